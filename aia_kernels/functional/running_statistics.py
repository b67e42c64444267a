"""The update of running statistics after a call, as torch's batch norm does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.running_statistics import latest_statistics, move_statistics_
from ..common.tracing import is_traced
from ..reference import Norm
from ..reference.norm import is_number_of_batches, updates


def update_running_statistics(
    norms: Sequence[Norm | None], statistics: Sequence[Tensor | None], move: Callable | None = None
) -> None:
    """Move the running statistics of each norm that says so toward those of its batch, as torch's batch norm does.

    A norm that stands in the list more than once moves as often, in the order of the list.
    statistics: per norm [C, 3] for C channels: mean, biased variance and share, one over the size N of the batch. The
    running variance is unbiased: var * N / (N - 1) = var / (1 - share). move: a backend's move_statistics_.
    """
    updated = [
        (norm, s.detach() if s.requires_grad else s)
        for norm, s in zip(norms, statistics, strict=True)
        if norm and updates(norm)
    ]
    if not updated:
        return
    means, variances = [norm.running_mean for norm, _ in updated], [norm.running_var for norm, _ in updated]
    tracked = [norm.num_batches_tracked for norm, _ in updated if norm.num_batches_tracked is not None]
    momenta, latest = {norm.momentum for norm, _ in updated}, [s for _, s in updated]
    # A list is changed all at once: functionalization, and a GPU, lose all but one of the changes of a tensor that
    # stands in it twice. vmap has no rule for lists.
    one_by_one = is_traced() or torch._C._are_functorch_transforms_active() or _shared((*means, *variances, *tracked))
    with torch.no_grad():
        if one_by_one or None in momenta or len(momenta) > 1 or not all(map(is_number_of_batches, tracked)):
            _move_one_by_one(updated)
        else:
            (move or move_statistics_)(means, variances, tracked, latest, *momenta)


def _shared(buffers: Sequence[Tensor]) -> bool:
    if len({b.data_ptr() for b in buffers}) == len(buffers):
        return False
    # By their storages: all tensors without data, such as those of the meta device, have the same address.
    return len({(b.untyped_storage()._cdata, b.storage_offset()) for b in buffers}) < len(buffers)


def _move_one_by_one(updated: Sequence[tuple[Norm, Tensor]]) -> None:
    for norm, statistics in updated:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        factor = norm.momentum
        if factor is None:
            if norm.num_batches_tracked is None:
                continue  # as torch: an average of unknown length stays
            factor = norm.num_batches_tracked.reciprocal().to(norm.running_mean.dtype)
        for buffer, value in zip(
            (norm.running_mean, norm.running_var), latest_statistics(statistics, norm.running_mean), strict=True
        ):
            buffer.lerp_(value, factor)
