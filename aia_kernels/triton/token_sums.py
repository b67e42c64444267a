"""Sums over the tokens of products with A or its gradient: gradients of the memories, and moments of A."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..algorithms.external_attention_passes import Attention, DoubleNorm, Dropout
from . import tiles
from .checks import check_attention, check_contiguous, check_dropout, check_heads, check_sizes, heads_of
from .columns import (
    COLUMNS,
    INTERPRETED,
    LEAST,
    PROGRAMS,
    Columns,
    as_bytes,
    attention_tile,
    column_count,
    columns,
    columns_at,
    pieces,
    spans,
    tokens_at,
)
from .products import Factor, accumulated, factor_tile, launch, most_features, tile_count

#: Tokens of one step of a product over tokens.
TOKENS = {2: 64, 4: 16, 8: 16}

#: The least tokens of a program that sums over them: its sums cost about as much traffic as this many tokens.
SUMMED = 1 << 16 if INTERPRETED else 128


@tiles.launched
def token_sum_kernel(
    x_ptr,  # [B, N, H * F] by strides
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    grad_ptr,  # [B, N, M] or None
    reduced_ptr,  # [B, M] or None
    keep_ptr,  # [B, N, M] or None
    origin_ptr,  # [M] or None
    padding_ptr,  # [B, N] or None
    partial_ptr,  # [P, H, F, M'] by STRIDE_F and STRIDE_M
    sums_ptr,  # [P, H * F] or None
    batch,
    n,
    stride_b,
    stride_n,
    stride_f,
    C: tl.constexpr,
    F: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_F: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x^T factor over the tokens of this program: partial, factor as factor_tile. With sums, also those of x. Program p
    takes blocks p, p + P, ... of all samples."""
    BM: tl.constexpr = C.block
    M: tl.constexpr = column_count(C)
    WIDTH: tl.constexpr = C.width
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    PARTS: tl.constexpr = (F + BF - 1) // BF
    TILES: tl.constexpr = spans(C) * pieces(C)
    pid = tl.program_id(0)
    part = pid % PARTS
    pid = pid // PARTS
    tile = pid % TILES
    pid = pid // TILES
    head = pid % C.heads
    program = (pid // C.heads).to(tl.int64)
    blocks = tl.cdiv(n, BT)
    f = part * BF + tl.arange(0, BF)
    total = tl.zeros([BF, BM], ACC)
    sums = tl.zeros([BF], ACC)
    for task in range(pid // C.heads, batch * blocks, tl.num_programs(0) // (PARTS * TILES * C.heads)):
        b = (task // blocks).to(tl.int64)
        t, _, shown = tokens_at(b, task % blocks, n, padding_ptr, BT, WIDE)
        feature = (head * F + f).to(t.dtype)
        at = b * stride_b + feature[:, None] * stride_f + t[None, :] * stride_n
        x = tl.load(x_ptr + at, mask=(f < F)[:, None] & shown[None, :], other=0)
        here = b * n * M
        grad, reduced, keep = grad_ptr, reduced_ptr, keep_ptr
        if grad_ptr is not None:
            grad, reduced = grad_ptr + here, reduced_ptr + b * M
        if keep_ptr is not None:
            keep = keep_ptr + here
        sources = (logits_ptr + here, rows_ptr + b * rows_stride, grad, reduced, keep, origin_ptr)
        factor = factor_tile(*sources, n, t, shown, head, tile, C, EPS, SCALE, ACC)
        total = tl.dot(x, factor.to(x.dtype), total, input_precision=PRECISION, out_dtype=ACC)
        if sums_ptr is not None:
            sums += tl.sum(x.to(ACC), 1)
    m, exists, _ = columns_at(head, tile // pieces(C), tile % pieces(C), C)
    partial_ptr += (program * C.heads + head) * (F * WIDTH)
    at = f[:, None] * STRIDE_F + (m - head * WIDTH)[None, :] * STRIDE_M
    tl.store(partial_ptr + at, total, mask=(f < F)[:, None] & exists[None, :])
    if sums_ptr is not None:
        # Every tile of columns has made them; the first tells.
        sums_ptr += (program * C.heads + head) * F + f
        tl.store(sums_ptr, sums, mask=f < tl.where(tile == 0, F, 0))


@tiles.launched
def attention_sums_kernel(
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    padding_ptr,  # [B, N] or None
    sums_ptr,  # [P, M]
    batch,
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of A over the tokens of this program, [P, M]."""
    BM: tl.constexpr = C.block
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    TILES: tl.constexpr = spans(C) * pieces(C)
    tile = tl.program_id(0) % TILES
    program = tl.program_id(0) // TILES
    blocks = tl.cdiv(n, BT)
    sums = tl.zeros([BM], ACC)
    for task in range(program, batch * blocks, tl.num_programs(0) // TILES):
        b = (task // blocks).to(tl.int64)
        t, inside, shown = tokens_at(b, task % blocks, n, padding_ptr, BT, WIDE)
        arguments = (logits_ptr + b * n * M, rows_ptr + b * rows_stride, n, t, shown, 0)
        a = attention_tile(*arguments, tile // pieces(C), tile % pieces(C), C, EPS, ACC)
        sums += tl.sum(tl.where(inside[:, None], a, 0), 0)
    m, exists, _ = columns_at(0, tile // pieces(C), tile % pieces(C), C)
    tl.store(sums_ptr + program.to(tl.int64) * M + m, sums, mask=exists)


@tiles.launched
def moments_kernel(
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    origin_ptr,  # [M]
    padding_ptr,  # [B, N] or None
    sums_ptr,  # [P, M]
    second_ptr,  # [P, M, M]
    batch,
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of A' and of A'^T A' over the tokens of this program, [P, M] and [P, M, M], A' = A - origin.

    Both are made of A' rounded to the type of the product, so that the covariance that follows is one.
    """
    BM: tl.constexpr = C.block
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    TYPE: tl.constexpr = logits_ptr.dtype.element_ty
    TILES: tl.constexpr = spans(C) * pieces(C)
    right = tl.program_id(0) % TILES
    left = tl.program_id(0) // TILES % TILES
    program = tl.program_id(0) // (TILES * TILES)
    blocks = tl.cdiv(n, BT)
    i, i_exists, _ = columns_at(0, left // pieces(C), left % pieces(C), C)
    j, j_exists, _ = columns_at(0, right // pieces(C), right % pieces(C), C)
    second = tl.zeros([BM, BM], ACC)
    sums = tl.zeros([BM], ACC)
    for task in range(program, batch * blocks, tl.num_programs(0) // (TILES * TILES)):
        b = (task // blocks).to(tl.int64)
        t, inside, shown = tokens_at(b, task % blocks, n, padding_ptr, BT, WIDE)
        arguments = (logits_ptr + b * n * M, rows_ptr + b * rows_stride, n, t, shown, 0)
        a = attention_tile(*arguments, left // pieces(C), left % pieces(C), C, EPS, ACC)
        a -= tl.load(origin_ptr + i, mask=i_exists, other=0)[None, :]
        a = tl.where(inside[:, None], a, 0).to(TYPE)
        if TILES == 1:
            other = a
        else:
            other = attention_tile(*arguments, right // pieces(C), right % pieces(C), C, EPS, ACC)
            other -= tl.load(origin_ptr + j, mask=j_exists, other=0)[None, :]
            other = tl.where(inside[:, None], other, 0).to(TYPE)
        second = tl.dot(tl.trans(a), other, second, input_precision=PRECISION, out_dtype=ACC)
        sums += tl.sum(a.to(ACC), 0)
    at = program.to(tl.int64) * (M * M) + i[:, None] * M + j[None, :]
    tl.store(second_ptr + at, second, mask=i_exists[:, None] & j_exists[None, :])
    if right == 0:
        tl.store(sums_ptr + program.to(tl.int64) * M + i, sums, mask=i_exists)


def value_gradient(
    grad: Tensor,
    attention: Attention,
    *,
    shape: Sequence[int],
    norm: DoubleNorm,
    dropout: Dropout | None = None,
    origin: Tensor | None = None,
    needs_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """grad^T A or grad^T (A - origin) for a value of a shape [H, v, M'], or [1, v, M'] for all heads, and if needed the
    sums [H * v] of grad over batch and tokens. Reads (1 + M / d) |X|."""
    check_attention(attention, norm)
    logits, rows = attention
    b, n, m = logits.shape
    memories, v, width = shape
    if min(shape) < 1:
        raise ValueError(f"shape must be that of a value, got {list(shape)}")
    heads = heads_of(memories, m, width)
    check_heads(logits, heads, width, norm.group)
    check_dropout(dropout, logits)
    if origin is not None:
        check_contiguous("origin", origin, (m,), rows.dtype, logits)
    check_sizes("grad", grad, (b, n, heads * v), logits.dtype, logits)
    factor = Factor(attention, norm, columns(heads, width, norm.group), dropout, origin)
    gradient, sums = token_sums(grad, factor, needs_sums, by_column=False)
    return gradient.sum_to_size(shape), sums


def moments(attention: Attention, *, norm: DoubleNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of A over all tokens, rounded, [M], and the sums of A' [M] and A'^T A' [M, M], A' = A - that mean. Reads
    2 M / d |X|."""
    check_attention(attention, norm)
    logits, rows = attention
    b, n, m = logits.shape
    c, padding = columns(1, m, norm.group), as_bytes(norm.padding)
    tiles, bt = tile_count(c), _summed_tokens(logits, c)
    source = logits, rows, rows.stride(0)
    constants = {"C": c, "EPS": norm.eps, "BT": bt, "num_warps": 4 if c.block <= COLUMNS else 8}
    programs = _summing_programs(b, n, bt, tiles)
    partial = rows.new_empty((programs, m))
    launch(attention_sums_kernel, (logits,), programs * tiles, *source, padding, partial, b, n, **constants)
    origin = partial.sum(0) / (b * n)
    square = tiles**2
    programs = _summing_programs(b, n, bt, square)
    sums, second = rows.new_empty((programs, m)), rows.new_empty((programs, m, m))
    if c.block <= COLUMNS:
        # Left alone, the assembler spills a few registers to fit one more program on an SM.
        constants["maxnreg"] = 255
    arguments = *source, origin, padding, sums, second, b, n
    launch(moments_kernel, (logits,), programs * square, *arguments, **constants)
    return origin, sums.sum(0), second.sum(0)


def token_sums(x: Tensor, factor: Factor, needs_sums: bool, by_column: bool) -> tuple[Tensor, Tensor | None]:
    """x^T factor over all tokens, [H, F, M'] or by column [H, M', F], and the sums of x if needed."""
    c, (logits, rows) = factor.columns, factor.attention
    b, n, _ = x.shape
    f = x.shape[2] // c.heads
    bf = max(min(most_features(x, f), accumulated(x) // c.block), LEAST)
    parts, count = triton.cdiv(f, bf), tile_count(c)
    bt = _summed_tokens(x, c)
    programs = _summing_programs(b, n, bt, parts * count * c.heads)
    shape = (c.heads, c.width, f) if by_column else (c.heads, f, c.width)
    partial = rows.new_empty((programs, *shape))
    sums = rows.new_empty((programs, c.heads * f)) if needs_sums else None
    strides = {"STRIDE_M": f, "STRIDE_F": 1} if by_column else {"STRIDE_M": 1, "STRIDE_F": c.width}
    arguments = x, *factor.arguments(), partial, sums, b, n, *x.stride()
    constants = {**factor.constants(), "F": f, **strides, "BT": bt, "BF": bf}
    launch(token_sum_kernel, (logits, x), programs * parts * count * c.heads, *arguments, **constants)
    return partial.sum(0), None if sums is None else sums.sum(0)


def _summed_tokens(x: Tensor, c: Columns) -> int:
    """Tokens of one step of a sum over them."""
    most = min(TOKENS[x.element_size()], accumulated(x) // c.block)
    return max(min(most, triton.next_power_of_2(x.shape[1])), LEAST)


def _summing_programs(b: int, n: int, bt: int, others: int) -> int:
    """Programs among which the tokens of the batch are divided, each with blocks of bt of them."""
    return max(1, min(triton.cdiv(PROGRAMS, others), b * n // max(SUMMED, bt)))
