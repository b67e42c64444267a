"""Signs of the block's output, one bit for each element, and the gradient that they let through.

Bits are packed along the axis of [B, N, C] that is contiguous in memory, eight to a byte, lowest first, each row of
them filled up to whole bytes: [B, N, ceil(C / 8)], or [B, C, ceil(N / 8)] for maps. So a tile packs its bits without
those of its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import check_contiguous, check_tokens
from .columns import INTERPRETED, PROGRAMS, is_wide

#: A tile: elements along the contiguous axis, and of the other one.
RUN, ROWS = (256, 64) if INTERPRETED else (128, 32)


def by_feature(t: Tensor) -> bool:
    """Whether t [B, N, d] is stored feature by feature, its tokens contiguous, as maps are."""
    return t.shape[1] > 1 and t.shape[2] > 1 and t.stride(2) != 1


def signs_shape(o: Tensor) -> tuple[int, int, int]:
    """The shape of the signs of o [B, N, C]."""
    b, n, c = o.shape
    return (b, c, (n + 7) // 8) if by_feature(o) else (b, n, (c + 7) // 8)


def empty_signs(o: Tensor) -> Tensor:
    """Uninitialized signs of o [B, N, C]."""
    return o.new_empty(signs_shape(o), dtype=torch.uint8)


@triton.jit
def signs_at(signs_ptr, b, n, t, f, F: tl.constexpr, BY_FEATURE: tl.constexpr):
    """Addresses of the bytes of tokens t and features f; along the packed axis, every eighth is given."""
    if BY_FEATURE:
        row = (n + 7) // 8
        at = signs_ptr + b * row * F + f[None, :] * row + (t // 8)[:, None]
    else:
        row = (F + 7) // 8
        at = signs_ptr + b * n * row + t[:, None] * row + (f // 8)[None, :]
    return at


@triton.jit
def store_signs(
    signs_ptr, b, n, first_t, first_f, shown, F: tl.constexpr, BY_FEATURE: tl.constexpr, WIDE: tl.constexpr
):
    """Pack a boolean tile [BT, BF] that begins at a token and a feature, both multiples of 8."""
    BT: tl.constexpr = shown.shape[0]
    BF: tl.constexpr = shown.shape[1]
    bits = shown.to(tl.int32)
    if BY_FEATURE:
        weights = (1 << tl.arange(0, 8))[None, :, None]
        packed = tl.sum(tl.reshape(bits, [BT // 8, 8, BF]) * weights, 1)
        t, f = first_t + tl.arange(0, BT // 8) * 8, first_f + tl.arange(0, BF)
    else:
        weights = (1 << tl.arange(0, 8))[None, None, :]
        packed = tl.sum(tl.reshape(bits, [BT, BF // 8, 8]) * weights, 2)
        t, f = first_t + tl.arange(0, BT), first_f + tl.arange(0, BF // 8) * 8
    mask = (t < n)[:, None] & (f < F)[None, :]
    if WIDE:
        t, f = t.to(tl.int64), f.to(tl.int64)
    tl.store(signs_at(signs_ptr, b, n, t, f, F, BY_FEATURE), packed.to(tl.uint8), mask=mask)


@triton.jit
def load_signs(
    signs_ptr,  # signs_shape(o)
    b,
    n,
    first_t,
    first_f,
    BT: tl.constexpr,
    BF: tl.constexpr,
    F: tl.constexpr,
    BY_FEATURE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The inverse of store_signs."""
    if BY_FEATURE:
        t, f = first_t + tl.arange(0, BT // 8) * 8, first_f + tl.arange(0, BF)
    else:
        t, f = first_t + tl.arange(0, BT), first_f + tl.arange(0, BF // 8) * 8
    mask = (t < n)[:, None] & (f < F)[None, :]
    if WIDE:
        t, f = t.to(tl.int64), f.to(tl.int64)
    packed = tl.load(signs_at(signs_ptr, b, n, t, f, F, BY_FEATURE), mask=mask, other=0).to(tl.int32)
    if BY_FEATURE:
        bits = tl.reshape(packed[:, None, :] >> tl.arange(0, 8)[None, :, None], [BT, BF])
    else:
        bits = tl.reshape(packed[:, :, None] >> tl.arange(0, 8)[None, None, :], [BT, BF])
    return bits & 1 == 1


@tiles.launched
def signed_kernel(
    grad_y_ptr,  # [B, N, F] by strides
    signs_ptr,  # signs_shape(grad_y)
    grad_ptr,  # as grad_y
    partial_ptr,  # [P, F]
    batch,
    n,
    stride_b,
    stride_n,
    stride_f,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BY_FEATURE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """g = grad_y where the sign is set, and this program's share of its sums, partial [P, F]."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    first_f = tl.program_id(0) % BLOCKS * BF
    program = tl.program_id(0) // BLOCKS
    total = tl.zeros([BF], ACC)
    blocks = tl.cdiv(n, BT)
    f = (first_f + tl.arange(0, BF)).to(tl.int64 if WIDE else tl.int32)
    for task in range(program, batch * blocks, tl.num_programs(0) // BLOCKS):
        b, first_t = (task // blocks).to(tl.int64), task % blocks * BT
        shown = load_signs(signs_ptr, b, n, first_t, first_f, BT, BF, F, BY_FEATURE, WIDE)
        t = (first_t + tl.arange(0, BT)).to(tl.int64 if WIDE else tl.int32)
        mask = (t < n)[:, None] & (f < F)[None, :]
        at = b * stride_b + t[:, None] * stride_n + f[None, :] * stride_f
        g = tl.where(shown, tl.load(grad_y_ptr + at, mask=mask, other=0), 0)
        tl.store(grad_ptr + at, g, mask=mask)
        total += tl.sum(g.to(ACC), 0)
    tl.store(partial_ptr + program * F + f, total, mask=f < F)


def signed(grad_y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """g = grad_y where the sign is set, 0 elsewhere, and its sums [C]. Reads 1 |X|, writes 1 |X|."""
    check_tokens("grad_y", grad_y)
    b, n, c = grad_y.shape
    check_contiguous("signs", signs, signs_shape(grad_y), torch.uint8, grad_y)
    grad = torch.empty_like(grad_y)
    if grad.stride() != grad_y.stride():
        grad_y = grad.copy_(grad_y)
    across = by_feature(grad_y)
    bt, bf = (RUN, ROWS) if across else (ROWS, RUN)
    bf = min(bf, max(triton.next_power_of_2(c), 8))
    parts = triton.cdiv(c, bf)
    programs = min(b * triton.cdiv(n, bt), triton.cdiv(4 * PROGRAMS, parts))
    partial = grad_y.new_empty((programs, c), dtype=accumulate_dtype(grad_y.dtype))
    wide = is_wide(extent(grad_y))
    arguments = grad_y, signs, grad, partial, b, n, *grad_y.stride()
    constants = {"F": c, "BT": bt, "BF": bf, "BY_FEATURE": across, "WIDE": wide}
    tiles.launch(signed_kernel, grad_y, (programs * parts,), *arguments, **constants, num_warps=4)
    return grad, partial.sum(0)


def extent(t: Tensor) -> int:
    """One more than the largest offset inside a sample of t [B, N, d]."""
    return (t.shape[1] - 1) * t.stride(1) + (t.shape[2] - 1) * t.stride(2) + 1
