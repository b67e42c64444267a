"""Double normalization: the statistics over tokens, the attention from logits, and the way back. Tiles: columns.py.

Sums over tokens are made of the sums of tiles, joined in the order of the tokens: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..algorithms.external_attention_passes import DoubleNorm
from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import check_apart, check_contiguous, check_eps, check_logits, check_same
from .columns import (
    INTERPRETED,
    Columns,
    as_bytes,
    attention_tile,
    column_count,
    column_max,
    columns,
    columns_at,
    finite,
    group_count,
    group_max,
    group_sum,
    is_wide,
    load_tile,
    log_p_tile,
    norm_of,
    pieces,
    place,
    spans,
    store_column_sums,
    store_statistics,
    token_block,
    token_rows,
    tokens_at,
)

#: Elements of a tile of the passes of this file, 32 to a thread.
ELEMENTS = 1 << 14 if INTERPRETED else 4096


@triton.jit
def span_total(logits_ptr, lse_ptr, t, shown, head, span, C: tl.constexpr, ACC: tl.constexpr):
    """r and the sum of exp(log P - r) of each token's group: [BT, BM], or [BT, 1] if a span is one group."""
    M: tl.constexpr = column_count(C)
    PADDED: tl.constexpr = C.padded
    if pieces(C) == 1:
        m, exists, _ = columns_at(head, span, 0, C)
        log_p = log_p_tile(logits_ptr, lse_ptr, t, m, shown[:, None] & exists[None, :], M, ACC)
        r = finite(group_max(log_p, PADDED))
        total = group_sum(tl.exp(log_p - r), PADDED)
    else:
        BT: tl.constexpr = t.shape[0]
        maximum = tl.full([BT, 1], float("-inf"), ACC)
        total = tl.zeros([BT, 1], ACC)
        for piece in range(pieces(C)):
            m, exists, _ = columns_at(head, span, piece, C)
            log_p = log_p_tile(logits_ptr, lse_ptr, t, m, shown[:, None] & exists[None, :], M, ACC)
            larger = tl.maximum(maximum, group_max(log_p, PADDED))
            r = finite(larger)
            total = total * tl.exp(maximum - r) + group_sum(tl.exp(log_p - r), PADDED)
            maximum = larger
        r = finite(maximum)
    return r, total


@triton.jit
def span_product(
    grad_ptr,  # [N, M]
    attention_ptr,  # A or the logits, [N, M]
    rows_ptr,  # [row_count] or None
    n,
    t,
    shown,
    head,
    span,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum of grad * A over each token's group: [BT, BM], or [BT, 1] if a span is one group."""
    M: tl.constexpr = column_count(C)
    PADDED: tl.constexpr = C.padded
    if pieces(C) == 1:
        m, exists, _ = columns_at(head, span, 0, C)
        a = attention_tile(attention_ptr, rows_ptr, n, t, shown, head, span, 0, C, EPS, ACC)
        total = group_sum(load_tile(grad_ptr, t, m, shown[:, None] & exists[None, :], M).to(ACC) * a, PADDED)
    else:
        BT: tl.constexpr = t.shape[0]
        total = tl.zeros([BT, 1], ACC)
        for piece in range(pieces(C)):
            m, exists, _ = columns_at(head, span, piece, C)
            a = attention_tile(attention_ptr, rows_ptr, n, t, shown, head, span, piece, C, EPS, ACC)
            total += group_sum(load_tile(grad_ptr, t, m, shown[:, None] & exists[None, :], M).to(ACC) * a, PADDED)
    return total


@tiles.launched
def column_statistics_kernel(
    logits_ptr,  # [B, N, M]
    padding_ptr,  # [B, N] or None
    partial_ptr,  # [B, blocks, 2, M]
    n,
    C: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The statistics of one tile."""
    M: tl.constexpr = column_count(C)
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, _, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    m, exists, _ = columns_at(head, span, 0, C)
    logits = load_tile(logits_ptr + b * n * M, t, m, shown[:, None] & exists[None, :], M)
    store_statistics(partial_ptr, b, block, n, logits.to(partial_ptr.dtype.element_ty), m, exists, shown, C)


@tiles.launched
def join_statistics_kernel(
    partial_ptr,  # [B, blocks, 2, M]
    statistics_ptr,  # [B, 2, M]
    lse_ptr,  # [B, M]
    blocks,
    M: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """Statistics [B, 2, M], and lse, from those of blocks of tokens, partial [B, blocks, 2, M]."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    SPANS: tl.constexpr = (M + BM - 1) // BM
    b = (tl.program_id(0) // SPANS).to(tl.int64)
    m = tl.program_id(0) % SPANS * BM + tl.arange(0, BM)
    maximum, total = tl.full([BM], float("-inf"), ACC), tl.zeros([BM], ACC)
    for first in range(0, blocks, BP):
        i = (first + tl.arange(0, BP))[:, None]
        at = partial_ptr + (b * blocks + i) * (2 * M) + m[None, :]
        mask = (i < blocks) & (m < M)[None, :]
        maxima = tl.load(at, mask=mask, other=float("-inf"))
        larger = tl.maximum(maximum, column_max(maxima), propagate_nan=tl.PropagateNan.ALL)
        shift = finite(larger)
        total = total * tl.exp(maximum - shift)
        total += tl.sum(tl.load(at + M, mask=mask, other=0) * tl.exp(maxima - shift[None, :]), 0)
        maximum = larger
    statistics_ptr += b * (2 * M) + m
    tl.store(statistics_ptr, maximum, mask=m < M)
    tl.store(statistics_ptr + M, total, mask=m < M)
    tl.store(lse_ptr + b * M + m, maximum + tl.log(total), mask=m < M)


@tiles.launched
def double_norm_kernel(
    logits_ptr,  # [B, N, M]
    lse_ptr,  # [B, M]
    mass_ptr,  # [B, N, M / group]
    padding_ptr,  # [B, N] or None
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A over the logits, and mass = eps + the sum of P over the group."""
    BM: tl.constexpr = C.block
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = mass_ptr.dtype.element_ty
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    logits_ptr += b * n * M
    lse_ptr += b * M
    r, total = span_total(logits_ptr, lse_ptr, t, shown, head, span, C, ACC)
    norm = norm_of(total, r, EPS)
    mass = tl.broadcast_to(total * tl.exp(r) + tl.full([1, 1], EPS, ACC), [BT, BM])
    for piece in range(pieces(C)):
        m, exists, group = columns_at(head, span, piece, C)
        mask = shown[:, None] & exists[None, :]
        a = tl.where(mask, tl.exp(log_p_tile(logits_ptr, lse_ptr, t, m, mask, M, ACC) - r) / norm, 0)
        at, mask = t[:, None] * M + m[None, :], inside[:, None] & exists[None, :]
        tl.store(logits_ptr + at, a.to(logits_ptr.dtype.element_ty), mask=mask)
        first = mask & (m % C.group == 0)[None, :]
        at = b * n * group_count(C) + t[:, None] * group_count(C) + group[None, :]
        tl.store(mass_ptr + at, mass, mask=first)


@tiles.launched
def normalizer_kernel(
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    padding_ptr,  # [B, N] or None
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """r and norm of groups in pieces, into rows."""
    M: tl.constexpr = column_count(C)
    GROUPS: tl.constexpr = group_count(C)
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    rows_ptr += b * rows_stride
    r, total = span_total(logits_ptr + b * n * M, rows_ptr, t, shown, head, span, C, rows_ptr.dtype.element_ty)
    at = rows_ptr + M + t[:, None] * GROUPS + head * (GROUPS // C.heads) + span
    tl.store(at, r, mask=inside[:, None])
    tl.store(at + token_rows(n, C), norm_of(total, r, EPS), mask=inside[:, None])


@tiles.launched
def backward_reduce_kernel(
    grad_ptr,  # [B, N, M]
    attention_ptr,  # A or the logits, [B, N, M]
    rows_ptr,  # [B, rows_stride] or None
    rows_stride,
    padding_ptr,  # [B, N] or None
    partial_ptr,  # [B, blocks, M]
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Column sums of Q = A * (grad - the sum of grad * A over the group), partial [B, blocks, M]. With rows, A is made
    from the logits, and Q overwrites grad."""
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    grad_ptr += b * n * M
    attention_ptr += b * n * M
    if rows_ptr is not None:
        rows_ptr += b * rows_stride
    total = span_product(grad_ptr, attention_ptr, rows_ptr, n, t, shown, head, span, C, EPS, ACC)
    for piece in range(pieces(C)):
        m, exists, _ = columns_at(head, span, piece, C)
        mask = shown[:, None] & exists[None, :]
        a = attention_tile(attention_ptr, rows_ptr, n, t, shown, head, span, piece, C, EPS, ACC)
        q = tl.where(mask, a * (load_tile(grad_ptr, t, m, mask, M).to(ACC) - total), 0)
        store_column_sums(partial_ptr, b, block, n, t, m, exists, q, C)
        if rows_ptr is not None:
            at = t[:, None] * M + m[None, :]
            tl.store(grad_ptr + at, q.to(grad_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])


@tiles.launched
def backward_kernel(
    grad_ptr,  # [B, N, M]
    attention_ptr,  # [B, N, M]
    mass_ptr,  # [B, N, M / group]
    reduced_ptr,  # [B, M]
    n,
    C: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Q - A * mass * D over grad."""
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = reduced_ptr.dtype.element_ty
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, inside, _ = tokens_at(b, block, n, None, BT, WIDE)
    grad_ptr += b * n * M
    attention_ptr += b * n * M
    total = span_product(grad_ptr, attention_ptr, None, n, t, inside, head, span, C, 0.0, ACC)
    for piece in range(pieces(C)):
        m, exists, group = columns_at(head, span, piece, C)
        mask = inside[:, None] & exists[None, :]
        a = load_tile(attention_ptr, t, m, mask, M).to(ACC)
        mass = load_tile(mass_ptr + b * n * group_count(C), t, group, mask, group_count(C))
        reduced = tl.load(reduced_ptr + b * M + m, mask=exists, other=0)
        grad = a * (load_tile(grad_ptr, t, m, mask, M).to(ACC) - total - mass * reduced[None, :])
        tl.store(grad_ptr + (t[:, None] * M + m[None, :]), grad.to(grad_ptr.dtype.element_ty), mask=mask)


def column_statistics(logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, 2, M]: of each column of logits [B, N, M] the maximum over tokens and the sum of exp(logit - maximum); and
    lse [B, M], the maximum plus the logarithm of the sum."""
    check_logits("logits", logits, 1, padding)
    _, n, m = logits.shape
    c = columns(1, m, 1)
    bt, blocks = token_blocks(logits, n, c)
    partial = logits.new_empty((logits.shape[0], blocks, 2, m), dtype=accumulate_dtype(logits.dtype))
    launch(column_statistics_kernel, logits, n, c, blocks, logits, as_bytes(padding), partial, BT=bt)
    return join_statistics(partial)


def double_norm_(logits: Tensor, lse: Tensor, group: int, eps: float, padding: Tensor | None) -> Tensor:
    """Overwrites logits [B, N, M] by A and returns mass [B, N, M / group], given lse [B, M]."""
    check_logits("logits", logits, group, padding)
    b, n, m = logits.shape
    check_contiguous("lse", lse, (b, m), accumulate_dtype(logits.dtype), logits)
    check_eps(eps)
    check_apart("logits", logits, lse=lse, padding=padding)
    c = columns(1, m, group)
    mass = lse.new_empty((b, n, m // group))
    bt, blocks = token_blocks(logits, n, c)
    launch(double_norm_kernel, logits, n, c, blocks, logits, lse, mass, as_bytes(padding), EPS=eps, BT=bt)
    return mass


def double_norm_backward_reduce(grad: Tensor, attention: Tensor, group: int) -> Tensor:
    """D [B, M]: the sums over tokens of Q = A * (grad - the sum of grad * A over a token's group)."""
    check_logits("grad", grad, group)
    check_same("attention", attention, grad, "grad")
    return backward_reduce(grad, attention, None, columns(1, grad.shape[2], group), DoubleNorm(group, 0.0, None))


def double_norm_backward_(grad: Tensor, attention: Tensor, mass: Tensor, reduced: Tensor, group: int) -> None:
    """Overwrites grad [B, N, M] by the gradient of the logits, Q - A * mass * D."""
    check_logits("grad", grad, group)
    check_same("attention", attention, grad, "grad")
    b, n, m = grad.shape
    check_contiguous("mass", mass, (b, n, m // group), accumulate_dtype(grad.dtype), grad)
    check_contiguous("reduced", reduced, (b, m), accumulate_dtype(grad.dtype), grad)
    check_apart("grad", grad, attention=attention, mass=mass, reduced=reduced)
    c = columns(1, m, group)
    bt, blocks = token_blocks(grad, n, c)
    launch(backward_kernel, grad, n, c, blocks, grad, attention, mass, reduced, BT=bt)


def backward_reduce(grad: Tensor, attention: Tensor, rows: Tensor | None, c: Columns, norm: DoubleNorm) -> Tensor:
    """D [B, M] of a stored A, or with rows of the A of logits; then Q overwrites grad."""
    b, n, m = grad.shape
    bt, blocks = token_blocks(grad, n, c)
    partial = grad.new_empty((b, blocks, m), dtype=accumulate_dtype(grad.dtype))
    arguments = grad, attention, rows, 0 if rows is None else rows.stride(0), as_bytes(norm.padding), partial
    launch(backward_reduce_kernel, grad, n, c, blocks, *arguments, EPS=norm.eps, BT=bt)
    return partial.sum(1)


def normalizer(logits: Tensor, rows: Tensor, c: Columns, norm: DoubleNorm) -> None:
    """Completes rows [B, M + 2 * N * M / group], which begin with lse, by r and norm of groups in pieces."""
    bt, blocks = token_blocks(logits, logits.shape[1], c)
    arguments = logits, rows, rows.stride(0), as_bytes(norm.padding)
    launch(normalizer_kernel, logits, logits.shape[1], c, blocks, *arguments, EPS=norm.eps, BT=bt)


def join_statistics(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [B, 2, M], and lse [B, M], from those of blocks of tokens [B, blocks, 2, M]."""
    b, blocks, _, m = partial.shape
    statistics, lse = partial.new_empty((b, 2, m)), partial.new_empty((b, m))
    # Few columns to a program: where blocks are many, samples are few.
    block = min(triton.next_power_of_2(m), 1024 if INTERPRETED else 16)
    rows = min(triton.next_power_of_2(max(blocks, 1)), ELEMENTS // 2 // block)
    arguments = partial, statistics, lse, blocks
    constants = {"M": m, "BP": rows, "BM": block, "num_warps": 4}
    tiles.launch(join_statistics_kernel, partial, (b * triton.cdiv(m, block),), *arguments, **constants)
    return statistics, lse


def token_blocks(x: Tensor, n: int, c: Columns) -> tuple[int, int]:
    """Tokens of a tile of a pass of this file, and blocks of a sample."""
    block = token_block(x.shape[0], n, c.heads * spans.fn(c), ELEMENTS * 4 // max(x.element_size(), 4) // c.block)
    return block, triton.cdiv(n, block)


def launch(kernel, x: Tensor, n: int, c: Columns, blocks: int, *args, **constants) -> None:
    """Run one program for each block of tokens and span of x [B, N, M]."""
    grid = (x.shape[0] * blocks * c.heads * spans.fn(c),)
    tiles.launch(kernel, x, grid, *args, n, C=c, **constants, WIDE=is_wide(n * column_count.fn(c)), num_warps=4)
