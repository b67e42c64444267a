"""Moves running statistics of up to four BNs in one launch, where the framework's operators take five for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import running_statistics
from . import tiles

#: BNs of a launch, and channels of a program.
NORMS, CHANNELS = 4, 256


@triton.jit
def moved(buffer_ptr, at, latest, momentum, mask):
    """Moves the running numbers at some places toward the latest."""
    number = tl.load(buffer_ptr + at, mask=mask, other=0).to(latest.dtype)
    tl.store(buffer_ptr + at, (number + momentum * (latest - number)).to(buffer_ptr.dtype.element_ty), mask=mask)


@triton.jit
def move(own, mean_ptr, var_ptr, tracked_ptr, statistics_ptr, channels, momentum, BLOCK: tl.constexpr):
    """Moves the statistics of a BN, and counts a batch, if this program is its own; nothing where there is no BN."""
    if mean_ptr is not None:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = at < tl.where(own, channels, 0)
        mean = tl.load(statistics_ptr + 3 * at, mask=valid, other=0)
        var = tl.load(statistics_ptr + 3 * at + 1, mask=valid, other=0)
        share = tl.load(statistics_ptr + 3 * at + 2, mask=valid, other=0)
        moved(mean_ptr, at, mean, momentum, valid)
        moved(var_ptr, at, tiles.quotient(var, 1 - share), momentum, valid)
    if tracked_ptr is not None:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = at < tl.where(own, 1, 0)
        tl.store(tracked_ptr + at, tl.load(tracked_ptr + at, mask=valid, other=0) + 1, mask=valid)


@tiles.launched
def move_kernel(
    mean0_ptr,
    mean1_ptr,
    mean2_ptr,
    mean3_ptr,
    var0_ptr,
    var1_ptr,
    var2_ptr,
    var3_ptr,
    tracked0_ptr,
    tracked1_ptr,
    tracked2_ptr,
    tracked3_ptr,
    statistics0_ptr,
    statistics1_ptr,
    statistics2_ptr,
    statistics3_ptr,
    channels0,
    channels1,
    channels2,
    channels3,
    momentum,
    BLOCK: tl.constexpr,
):
    """Program (., i) moves the statistics of BN i, and counts a batch in number i; None where there is no such one."""
    i = tl.program_id(1)
    move(i == 0, mean0_ptr, var0_ptr, tracked0_ptr, statistics0_ptr, channels0, momentum, BLOCK)
    move(i == 1, mean1_ptr, var1_ptr, tracked1_ptr, statistics1_ptr, channels1, momentum, BLOCK)
    move(i == 2, mean2_ptr, var2_ptr, tracked2_ptr, statistics2_ptr, channels2, momentum, BLOCK)
    move(i == 3, mean3_ptr, var3_ptr, tracked3_ptr, statistics3_ptr, channels3, momentum, BLOCK)


def move_statistics_(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    tracked: Sequence[Tensor],
    statistics: Sequence[Tensor],
    momentum: float,
) -> None:
    """The pass of this name in schemas.py."""
    buffers = [*means, *variances, *tracked]
    # A kernel is given numbers in 32 bits.
    wide = any(s.dtype == torch.float64 for s in statistics)
    if wide or not all(t.is_contiguous() for t in (*buffers, *statistics)):
        running_statistics.move_statistics_(means, variances, tracked, statistics, momentum)
        return
    for first in range(0, len(means), NORMS):
        of = slice(first, first + NORMS)
        channels = [m.numel() for m in means[of]]
        columns = means[of], variances[of], tracked[of], statistics[of], channels
        arguments = [entry for column in columns for entry in (*column, *[None] * (NORMS - len(column)))]
        grid = triton.cdiv(max(channels), CHANNELS), len(channels)
        tiles.launch(move_kernel, means[first], grid, *arguments, momentum, BLOCK=CHANNELS)
    # Autograd and checkpoints see what was written.
    for buffer in buffers:
        torch.autograd.graph.increment_version(buffer)
