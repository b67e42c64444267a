"""The running statistics of batch normalisations, moved as torch's batch norm moves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import Norm


def update_running_statistics(norms: Sequence[Norm | None], statistics: Tensor) -> None:
    """Move the running statistics of each norm that says so toward those of its batch, as torch's batch norm does.

    statistics [norms * C, 3], C channels each: mean, biased variance and share, one over the size N of the batch. The
    running variance is unbiased: var * N / (N - 1) = var / (1 - share).
    """
    rows = [i for i, norm in enumerate(norms) if norm is not None and norm.updates]
    if not rows:
        return
    statistics, channels = statistics.detach(), statistics.shape[0] // len(norms)
    new = torch.stack((statistics[:, 0], statistics[:, 1] / (1 - statistics[:, 2])))
    with torch.no_grad():
        tracked = [norms[i].num_batches_tracked for i in rows if norms[i].num_batches_tracked is not None]
        # vmap has no rule for lists of tensors.
        batched = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
        if batched:
            for number in tracked:
                number.add_(1)
        elif tracked:
            torch._foreach_add_(tracked, 1)
        buffers = [buffer for i in rows for buffer in (norms[i].running_mean, norms[i].running_var)]
        latest = [
            new[k, i * channels : (i + 1) * channels].to(norms[i].running_mean.dtype) for i in rows for k in (0, 1)
        ]
        momenta = [norms[i].momentum for i in rows]
        if None not in momenta and len(set(momenta)) == 1 and not batched:
            torch._foreach_lerp_(buffers, latest, momenta[0])
            return
        for k, (buffer, value) in enumerate(zip(buffers, latest, strict=True)):
            norm = norms[rows[k // 2]]
            factor = norm.momentum
            if factor is None:
                if norm.num_batches_tracked is None:
                    continue  # as torch: an average of unknown length stays
                factor = norm.num_batches_tracked.reciprocal().to(buffer.dtype)
            buffer.lerp_(value, factor)
