"""The parameters of a batch normalization, as every reference and function of this package takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """One batch normalization over C channels, field for field as torch.nn.BatchNorm holds it. C is 1 for a gate.

    Attributes:
        weight: [C], or None for 1.
        bias: [C], or None for 0.
        running_mean: [C], or None; the batch's statistics then serve in evaluation too.
        running_var: [C], or None together with running_mean.
        num_batches_tracked: An integer scalar, or None.
        training: Whether to normalize by the statistics of the batch and update the running ones.
        momentum: The share of the batch in a new running statistic; None: a cumulative average.
        eps: Added to the variance.
        track: Whether training updates the running statistics.
        process_group: The group over which training shares its statistics, as torch.nn.SyncBatchNorm does, or None.
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


# Functions, not properties of the tuple: torch.compile of torch 2.10 cannot follow those.
def uses_batch(norm: Norm) -> bool:
    """Whether a call normalizes by the statistics of its batch."""
    return norm.training or norm.running_mean is None


def updates(norm: Norm) -> bool:
    """Whether a call updates the running statistics."""
    return norm.training and norm.track and norm.running_mean is not None


def is_number_of_batches(tracked: Tensor | None) -> bool:
    """Whether the passes can add one to num_batches_tracked: int64, which Module.type casts as it does all buffers."""
    return tracked is not None and tracked.dtype == torch.int64
