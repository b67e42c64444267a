"""The pass that moves running statistics, in the framework's operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def move_statistics_(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    tracked: Sequence[Tensor],
    statistics: Sequence[Tensor],
    momentum: float,
) -> None:
    """The pass of this name in schemas.py, for buffers of any type, in the framework's operators."""
    if tracked:
        torch._foreach_add_(tracked, 1)
    latest = [latest_statistics(s, buffer) for s, buffer in zip(statistics, means, strict=True)]
    torch._foreach_lerp_([*means, *variances], [pair[k] for k in (0, 1) for pair in latest], momentum)


def latest_statistics(statistics: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance [C], in the type of a buffer."""
    mean, var, share = statistics.unbind(1)
    return mean.to(buffer.dtype), (var / (1 - share)).to(buffer.dtype)
