"""CBAM's passes (schemas.py).

In the order of storage a sample of x is a matrix [R, N], of channels by positions or, in channels_last, of positions by
channels. What CBAM does to channels and to positions is then done to rows and to columns, or the other way round, so
that kernels know two axes and one order. A program has a block [BR, BN] of it, and walks along an axis that it sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import (
    check_contiguous,
    check_map_features,
    check_map_gates,
    check_maps,
    check_same,
    come_together,
)
from .pool import first_maximum, key_type, key_value, least_key, order_key

#: Elements of a block, 16 to a thread, and the most columns of one: whole lines of a cache. The interpreter's cost is
#: per program: there, few large ones.
ELEMENTS = 1 << 20 if triton.knobs.runtime.interpret else 4096
COLUMNS = 1 << 20 if triton.knobs.runtime.interpret else 256


class Matrix(NamedTuple):
    """Compile-time geometry of a sample: rows R, columns N, and blocks of them, powers of two."""

    R: int
    N: int
    BR: int
    BN: int
    rows_are_channels: bool
    wide: bool  # a sample passes 2^31 elements


def matrix_of(x: Tensor) -> Matrix:
    """Of x [B, C, H, W], contiguous or channels_last; contiguous where it is both."""
    _, c, h, w = x.shape
    rows, columns = (c, h * w) if x.is_contiguous() else (h * w, c)
    block_columns = min(triton.next_power_of_2(columns), COLUMNS)
    block_rows = min(triton.next_power_of_2(rows), max(1, ELEMENTS // block_columns))
    return Matrix(rows, columns, block_rows, block_columns, x.is_contiguous(), rows * columns >= 2**31)


@triton.jit
def place(count: tl.constexpr):
    """Sample (int64) and part of it of this program, of so many parts."""
    pid = tl.program_id(0)
    return (pid // count).to(tl.int64), pid % count


@triton.jit
def block_at(r, n, M: tl.constexpr):
    """Rows [BR, 1] and columns [1, BN] from these on, where both are inside, and their offsets in a sample."""
    rows = (r + tl.arange(0, M.BR))[:, None]
    columns = (n + tl.arange(0, M.BN))[None, :]
    offsets = (rows.to(tl.int64) if M.wide else rows) * M.N + columns
    return rows, columns, (rows < M.R) & (columns < M.N), offsets


@triton.jit
def factor(ptr, b, i, LENGTH: tl.constexpr):
    """A gate of rows or of columns i of sample b; 1 where there is none."""
    return 1.0 if ptr is None else tl.load(ptr + b * LENGTH + i, mask=i < LENGTH, other=0)


@triton.jit
def unpooled(grad_ptr, argmax_ptr, b, i, other, LENGTH: tl.constexpr, POOLED: tl.constexpr):
    """What the pooled features of rows or columns i send to the elements at `other` along the axis, POOLED long, that
    was pooled: that of the mean to each, that of the maximum to where it was. 0 where there are none."""
    if grad_ptr is None:
        return 0.0
    at = grad_ptr + b * (2 * LENGTH) + i
    peak = tl.load(at, mask=i < LENGTH, other=0)
    mean = tl.load(at + LENGTH, mask=i < LENGTH, other=0)
    where = tl.load(argmax_ptr + b * LENGTH + i, mask=i < LENGTH, other=-1)
    return mean * (1 / POOLED) + tl.where(where == other, peak, 0)


@tiles.launched
def pool_kernel(x_ptr, gate_ptr, pooled_ptr, argmax_ptr, M: tl.constexpr, OVER_ROWS: tl.constexpr):
    """Maximum, mean and index of x times a gate along the axis that is pooled: over the columns of each row, or over
    the rows of each column. The gate is that of the pooled axis. Reads 1 |X|."""
    BR: tl.constexpr = M.BR
    BN: tl.constexpr = M.BN
    ACC: tl.constexpr = pooled_ptr.dtype.element_ty
    KEPT: tl.constexpr = M.N if OVER_ROWS else M.R
    POOLED: tl.constexpr = M.R if OVER_ROWS else M.N
    STEP: tl.constexpr = M.BR if OVER_ROWS else M.BN
    BLOCK: tl.constexpr = M.BN if OVER_ROWS else M.BR
    AXIS: tl.constexpr = 0 if OVER_ROWS else 1
    b, part = place((KEPT + BLOCK - 1) // BLOCK)
    best = tl.full([BR, BN], least_key(ACC), key_type(ACC))
    index = tl.zeros([BR, BN], tl.int32)
    total = tl.zeros([BR, BN], ACC)
    x_ptr += b * (M.R * M.N)
    for start in range(0, POOLED, STEP):
        r, n, inside, offsets = block_at(start if OVER_ROWS else part * BLOCK, part * BLOCK if OVER_ROWS else start, M)
        along = r if OVER_ROWS else n
        a = tl.load(x_ptr + offsets, mask=inside, other=0).to(ACC) * factor(gate_ptr, b, along, POOLED)
        total += tl.where(inside, a, 0)
        key = tl.where(inside, order_key(a), least_key(ACC))
        take = key > best
        best = tl.where(take, key, best)
        index = tl.where(take, along, index)
    best, index = first_maximum(best, index, AXIS)
    mean = tl.sum(total, AXIS, keep_dims=True) * (1 / POOLED)
    r, n, _, _ = block_at(part * BLOCK, part * BLOCK, M)
    kept = n if OVER_ROWS else r
    at = pooled_ptr + b * (2 * KEPT) + kept
    tl.store(at, key_value(best, ACC), mask=kept < KEPT)
    tl.store(at + KEPT, mean, mask=kept < KEPT)
    tl.store(argmax_ptr + b * KEPT + kept, index, mask=kept < KEPT)


@tiles.launched
def recalibrate_kernel(x_ptr, row_ptr, column_ptr, y_ptr, confounder_ptr, M: tl.constexpr, ACC: tl.constexpr):
    """y = x times both gates, and x - y where it is wanted. Reads 1 |X|, writes 1 or 2 |X|."""
    blocks: tl.constexpr = (M.N + M.BN - 1) // M.BN
    b, part = place((M.R + M.BR - 1) // M.BR * blocks)
    r, n, inside, offsets = block_at(part // blocks * M.BR, part % blocks * M.BN, M)
    sample = b * (M.R * M.N)
    x = tl.load(x_ptr + sample + offsets, mask=inside, other=0).to(ACC)
    y = x * (factor(row_ptr, b, r, M.R) * factor(column_ptr, b, n, M.N))
    tl.store(y_ptr + sample + offsets, y, mask=inside)
    if confounder_ptr is not None:
        tl.store(confounder_ptr + sample + offsets, x - y, mask=inside)


@triton.jit
def gradient(grad_ptr, confounder_ptr, offsets, inside, ACC: tl.constexpr):
    """The gradient of y as x - confounder."""
    g = tl.load(grad_ptr + offsets, mask=inside, other=0).to(ACC)
    return g if confounder_ptr is None else g - tl.load(confounder_ptr + offsets, mask=inside, other=0).to(ACC)


@tiles.launched
def reduce_kernel(
    grad_ptr, confounder_ptr, x_ptr, row_ptr, column_ptr, over_columns_ptr, over_rows_ptr, M: tl.constexpr
):
    """Of q = grad_y * x the sums over columns of q times their gate [B, R], and over this block's rows those of q times
    theirs, [B, blocks of rows, N]. Reads 2 |X|, or 3 |X| with a confounder."""
    BR: tl.constexpr = M.BR
    BN: tl.constexpr = M.BN
    ACC: tl.constexpr = over_rows_ptr.dtype.element_ty
    blocks: tl.constexpr = (M.R + M.BR - 1) // M.BR
    b, part = place(blocks)
    sample = b * (M.R * M.N)
    total = tl.zeros([BR, BN], ACC)
    for start in range(0, M.N, M.BN):
        r, n, inside, offsets = block_at(part * M.BR, start, M)
        q = gradient(grad_ptr, confounder_ptr, sample + offsets, inside, ACC)
        q *= tl.load(x_ptr + sample + offsets, mask=inside, other=0).to(ACC)
        total += q * factor(column_ptr, b, n, M.N)
        over_rows = tl.sum(q * factor(row_ptr, b, r, M.R), 0, keep_dims=True)
        tl.store(over_rows_ptr + (b * blocks + part) * M.N + n, over_rows, mask=n < M.N)
    r, _, _, _ = block_at(part * M.BR, 0, M)
    tl.store(over_columns_ptr + b * M.R + r, tl.sum(total, 1, keep_dims=True), mask=r < M.R)


@tiles.launched
def unpool_reduce_kernel(x_ptr, grad_ptr, argmax_ptr, out_ptr, M: tl.constexpr):
    """The sums over positions of x * U, U of the spatial features, for each channel. Reads 1 |X|."""
    BR: tl.constexpr = M.BR
    BN: tl.constexpr = M.BN
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    CHANNELS: tl.constexpr = M.R if M.rows_are_channels else M.N
    POSITIONS: tl.constexpr = M.N if M.rows_are_channels else M.R
    STEP: tl.constexpr = M.BN if M.rows_are_channels else M.BR
    BLOCK: tl.constexpr = M.BR if M.rows_are_channels else M.BN
    b, part = place((CHANNELS + BLOCK - 1) // BLOCK)
    total = tl.zeros([BR, BN], ACC)
    x_ptr += b * (M.R * M.N)
    for start in range(0, POSITIONS, STEP):
        first = part * BLOCK
        r, n, inside, offsets = block_at(
            first if M.rows_are_channels else start, start if M.rows_are_channels else first, M
        )
        c, p = (r, n) if M.rows_are_channels else (n, r)
        u = unpooled(grad_ptr, argmax_ptr, b, p, c, POSITIONS, CHANNELS)
        total += tl.where(inside, tl.load(x_ptr + offsets, mask=inside, other=0).to(ACC) * u, 0)
    r, n, _, _ = block_at(part * BLOCK, part * BLOCK, M)
    c = r if M.rows_are_channels else n
    tl.store(
        out_ptr + b * CHANNELS + c, tl.sum(total, 1 if M.rows_are_channels else 0, keep_dims=True), mask=c < CHANNELS
    )


@tiles.launched
def unpool_kernel(
    grad_ptr,
    confounder_ptr,
    channel_ptr,
    grad_channel_ptr,
    channel_argmax_ptr,
    spatial_ptr,
    grad_spatial_ptr,
    spatial_argmax_ptr,
    out_ptr,
    M: tl.constexpr,
    ACC: tl.constexpr,
):
    """grad_x = (grad_y * spatial + U(spatial features)) * channel + U(channel features) + that of the confounder.
    Reads 1 |X|, or 2 |X| with a confounder, writes 1 |X|."""
    CHANNELS: tl.constexpr = M.R if M.rows_are_channels else M.N
    POSITIONS: tl.constexpr = M.N if M.rows_are_channels else M.R
    blocks: tl.constexpr = (M.N + M.BN - 1) // M.BN
    b, part = place((M.R + M.BR - 1) // M.BR * blocks)
    r, n, inside, offsets = block_at(part // blocks * M.BR, part % blocks * M.BN, M)
    c, p = (r, n) if M.rows_are_channels else (n, r)
    offsets += b * (M.R * M.N)
    g = gradient(grad_ptr, confounder_ptr, offsets, inside, ACC) * factor(spatial_ptr, b, p, POSITIONS)
    g += unpooled(grad_spatial_ptr, spatial_argmax_ptr, b, p, c, POSITIONS, CHANNELS)
    g *= factor(channel_ptr, b, c, CHANNELS)
    g += unpooled(grad_channel_ptr, channel_argmax_ptr, b, c, p, CHANNELS, POSITIONS)
    if confounder_ptr is not None:
        g += tl.load(confounder_ptr + offsets, mask=inside, other=0).to(ACC)
    tl.store(out_ptr + offsets, g, mask=inside)


def _launch(kernel, x: Tensor, programs: int, *arguments, m: Matrix, **constants) -> None:
    warps = min(max(m.BR * m.BN // 512, 1), 8)
    tiles.launch(kernel, x, (x.shape[0] * programs,), *arguments, M=m, **constants, num_warps=warps)


def _numbers(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=accumulate_dtype(x.dtype))


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _pool(x: Tensor, gate: Tensor | None, pooled: Tensor, argmax: Tensor, channels: bool) -> tuple[Tensor, Tensor]:
    m = matrix_of(x)
    over_rows = m.rows_are_channels == channels
    programs = triton.cdiv(m.N, m.BN) if over_rows else triton.cdiv(m.R, m.BR)
    _launch(pool_kernel, x, programs, x, gate, pooled, argmax, m=m, OVER_ROWS=over_rows)
    return pooled, argmax


def cbam_pool_positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and mean over H and W [B, 2, C], and the index of the maximum [B, C]."""
    check_maps("x", x)
    b, c, _, _ = x.shape
    return _pool(x, None, _numbers(x, b, 2, c), x.new_empty((b, c), dtype=torch.int32), channels=False)


def cbam_pool_channels(x: Tensor, channel: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maximum and mean over C of x * channel [B, 2, H, W], and the index of the maximum [B, H, W]."""
    check_maps("x", x)
    b, c, h, w = x.shape
    if channel is not None:
        check_contiguous("channel", channel, (b, c), accumulate_dtype(x.dtype), x)
    pooled, argmax = _numbers(x, b, 2, h, w), x.new_empty((b, h, w), dtype=torch.int32)
    return _pool(x, channel, pooled, argmax, channels=True)


def cbam_recalibrate(x: Tensor, channel: Tensor | None, spatial: Tensor | None, confounder: bool) -> list[Tensor]:
    """y = x * channel * spatial and, with the confounder, x - y, stored as x."""
    check_maps("x", x)
    check_map_gates(channel, spatial, x)
    m, found = matrix_of(x), [torch.empty_like(x) for _ in range(1 + confounder)]
    gates = (channel, spatial) if m.rows_are_channels else (spatial, channel)
    programs = triton.cdiv(m.R, m.BR) * triton.cdiv(m.N, m.BN)
    results = found[0], found[1] if confounder else None
    _launch(recalibrate_kernel, x, programs, x, *gates, *results, m=m, ACC=_acc(x))
    return found


def cbam_recalibrate_reduce(
    grad_y: Tensor, grad_confounder: Tensor | None, x: Tensor, channel: Tensor | None, spatial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of q = (grad_y - grad_confounder) * x the sums over positions of q * spatial [B, C], and over channels of
    q * channel [B, 1, H, W]. The parts that blocks of rows leave are added in the framework's order."""
    check_maps("x", x)
    check_same("grad_y", grad_y, x, "x")
    if grad_confounder is not None:
        check_same("grad_confounder", grad_confounder, grad_y, "grad_y")
    check_map_gates(channel, spatial, x)
    b, c, h, w = x.shape
    m = matrix_of(x)
    blocks = triton.cdiv(m.R, m.BR)
    over_columns, parts = _numbers(x, b, m.R), _numbers(x, b, blocks, m.N)
    gates = (channel, spatial) if m.rows_are_channels else (spatial, channel)
    _launch(reduce_kernel, x, blocks, grad_y, grad_confounder, x, *gates, over_columns, parts, m=m)
    over_rows = parts.sum(1) if blocks > 1 else parts
    of_channels, of_positions = (over_columns, over_rows) if m.rows_are_channels else (over_rows, over_columns)
    return of_channels.view(b, c), of_positions.view(b, 1, h, w)


def cbam_unpool_reduce(x: Tensor, grad_spatial: Tensor, spatial_argmax: Tensor) -> Tensor:
    """The sums over positions of x * U(grad_spatial) [B, C]."""
    check_maps("x", x)
    check_map_features(grad_spatial, spatial_argmax, x, of_channels=False)
    m, out = matrix_of(x), _numbers(x, *x.shape[:2])
    programs = triton.cdiv(m.R, m.BR) if m.rows_are_channels else triton.cdiv(m.N, m.BN)
    _launch(unpool_reduce_kernel, x, programs, x, grad_spatial, spatial_argmax, out, m=m)
    return out


def cbam_unpool(
    grad_y: Tensor,
    grad_confounder: Tensor | None,
    channel: Tensor | None,
    grad_channel: Tensor | None,
    channel_argmax: Tensor | None,
    spatial: Tensor | None,
    grad_spatial: Tensor | None,
    spatial_argmax: Tensor | None,
) -> Tensor:
    """The gradient of x, stored as grad_y (schemas.py)."""
    check_maps("grad_y", grad_y)
    if grad_confounder is not None:
        check_same("grad_confounder", grad_confounder, grad_y, "grad_y")
    check_map_gates(channel, spatial, grad_y)
    of_channels, of_positions = (channel, grad_channel, channel_argmax), (spatial, grad_spatial, spatial_argmax)
    if come_together(("channel", "grad_channel", "channel_argmax"), of_channels):
        check_map_features(grad_channel, channel_argmax, grad_y, of_channels=True)
    if come_together(("spatial", "grad_spatial", "spatial_argmax"), of_positions):
        check_map_features(grad_spatial, spatial_argmax, grad_y, of_channels=False)
    m, out = matrix_of(grad_y), torch.empty_like(grad_y)
    programs = triton.cdiv(m.R, m.BR) * triton.cdiv(m.N, m.BN)
    given = grad_y, grad_confounder, *of_channels, *of_positions
    _launch(unpool_kernel, grad_y, programs, *given, out, m=m, ACC=_acc(grad_y))
    return out
