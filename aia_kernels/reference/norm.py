"""The parameters of a batch normalisation, as every reference and function of this package takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """One batch normalisation over C channels, field for field as torch.nn.BatchNorm holds it.

    weight and bias are [C] or None (1 and 0); running_mean and running_var are [C] or None (then the batch's statistics
    serve in evaluation too); num_batches_tracked is an integer scalar or None. momentum None means a cumulative
    average. track says whether training updates the running statistics. process_group is the group over which training
    shares its statistics, as torch.nn.SyncBatchNorm does, or None. C is 1 for a gate.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    track: bool = True
    process_group: Any = None

    @property
    def uses_batch(self) -> bool:
        """Whether this call normalises by the statistics of its batch."""
        return self.training or self.running_mean is None

    @property
    def updates(self) -> bool:
        """Whether this call updates the running statistics."""
        return self.training and self.track and self.running_mean is not None
