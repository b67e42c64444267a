"""Products of features that give columns: the logits with their column statistics, and the gradient of A."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algorithms.external_attention_passes import Attention, BatchTerm, DoubleNorm, Dropout
from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import (
    check_attended,
    check_contiguous,
    check_dropout,
    check_eps,
    check_logits,
    check_memory,
    check_sizes,
    check_tokens,
    heads_of,
)
from .columns import (
    LEAST,
    Columns,
    as_bytes,
    attention_tile,
    column_count,
    columns,
    columns_at,
    group_sum,
    load_tile,
    pieces,
    place,
    row_count,
    spans,
    store_column_sums,
    store_statistics,
    token_block,
    tokens_at,
)
from .double_norm import backward_reduce, join_statistics, normalizer
from .products import accumulated, launch, load_features, tile_count

#: Features of one step of a product over features: 128 bytes, a line of memory.
STEP = {2: 64, 4: 32, 8: 16}


@triton.jit
def column_product(
    x_ptr,  # [N, H * F] by strides
    weight_ptr,  # H matrices of F features and M' columns by strides
    t,
    shown,
    head,
    m,
    exists,
    stride_n,
    stride_f,
    C: tl.constexpr,
    F: tl.constexpr,
    STRIDE_M: tl.constexpr,
    STRIDE_F: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """[BT, BM]: the features of a head at tokens t times its matrix in weight, H matrices with strides of columns and
    features."""
    WIDTH: tl.constexpr = C.width
    weight_ptr += head.to(tl.int64) * (F * WIDTH)
    column = m - head * WIDTH
    result = tl.zeros([t.shape[0], m.shape[0]], ACC)
    for first in range(0, F, STEP):
        f = first + tl.arange(0, STEP)
        x = load_features(x_ptr, t, shown, head, f, stride_n, stride_f, F)
        at = f[:, None] * STRIDE_F + column[None, :] * STRIDE_M
        w = tl.load(weight_ptr + at, mask=(f < F)[:, None] & exists[None, :], other=0)
        result = tl.dot(x, w, result, input_precision=PRECISION, out_dtype=ACC)
    return result


@tiles.launched
def logits_kernel(
    x_ptr,  # [B, N, H * F] by strides
    key_ptr,  # [H, M', F]
    padding_ptr,  # [B, N] or None
    logits_ptr,  # [B, N, M]
    partial_ptr,  # [B, blocks, 2, M]
    n,
    stride_b,
    stride_n,
    stride_f,
    C: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """L = x key^T of one tile, and its column statistics: partial [B, blocks, 2, M]."""
    M: tl.constexpr = column_count(C)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    b, block, head, span = place(n, C.heads, spans(C), BT)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    m, exists, _ = columns_at(head, span, 0, C)
    x_ptr += b * stride_b
    arguments = (x_ptr, key_ptr, t, shown, head, m, exists, stride_n, stride_f)
    logits = column_product(*arguments, C, F, F, 1, STEP, PRECISION, ACC).to(logits_ptr.dtype.element_ty)
    at = b * n * M + t[:, None] * M + m[None, :]
    tl.store(logits_ptr + at, logits, mask=inside[:, None] & exists[None, :])
    store_statistics(partial_ptr, b, block, n, logits.to(ACC), m, exists, shown, C)


@tiles.launched
def attention_gradient_kernel(
    grad_ptr,  # [B, N, H * F] by strides
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    value_ptr,  # [H, F, M']
    keep_ptr,  # [B, N, M] or None
    origin_ptr,  # [M] or None
    inner_ptr,  # [M, M] or None
    constant_ptr,  # [M] or None
    padding_ptr,  # [B, N] or None
    grad_attention_ptr,  # [B, N, M]
    partial_ptr,  # [B, blocks, M], None for groups in pieces
    n,
    stride_b,
    stride_n,
    stride_f,
    C: tl.constexpr,
    F: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dA = keep * SCALE * (grad value) + (A - origin) inner + constant of one tile. Stores Q and its column sums,
    partial [B, blocks, M]; for groups in pieces, dA."""
    M: tl.constexpr = column_count(C)
    WIDTH: tl.constexpr = C.width
    TILES: tl.constexpr = spans(C) * pieces(C)
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    TYPE: tl.constexpr = grad_attention_ptr.dtype.element_ty
    b, block, head, tile = place(n, C.heads, TILES, BT)
    span, piece = tile // pieces(C), tile % pieces(C)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    m, exists, _ = columns_at(head, span, piece, C)
    grad_ptr += b * stride_b
    logits_ptr += b * n * M
    rows_ptr += b * rows_stride
    arguments = (grad_ptr, value_ptr, t, shown, head, m, exists, stride_n, stride_f)
    grad = column_product(*arguments, C, F, 1, WIDTH, STEP, PRECISION, ACC)
    mask = shown[:, None] & exists[None, :]
    if keep_ptr is not None:
        keep = load_tile(keep_ptr + b * n * M, t, m, mask, M)
        grad = grad * (keep.to(ACC) * tl.full([1, 1], SCALE, ACC))
    if inner_ptr is not None:
        for other in range(TILES):
            there = (head, other // pieces(C), other % pieces(C))
            a = attention_tile(logits_ptr, rows_ptr, n, t, shown, *there, C, EPS, ACC)
            k, exist, _ = columns_at(*there, C)
            a -= tl.load(origin_ptr + k, mask=exist, other=0)[None, :]
            w = tl.load(inner_ptr + k[:, None] * M + m[None, :], mask=exist[:, None] & exists[None, :], other=0)
            grad = tl.dot(a.to(TYPE), w, grad, input_precision=PRECISION, out_dtype=ACC)
        grad += tl.load(constant_ptr + m, mask=exists, other=0)[None, :]
    if pieces(C) == 1:
        a = attention_tile(logits_ptr, rows_ptr, n, t, shown, head, span, 0, C, EPS, ACC)
        # Where A is 0 for want of a token or a column, the gradient may be anything.
        grad = tl.where(mask, a * (grad - group_sum(tl.where(mask, grad * a, 0), C.padded)), 0)
        store_column_sums(partial_ptr, b, block, n, t, m, exists, grad, C)
    at = b * n * M + t[:, None] * M + m[None, :]
    tl.store(grad_attention_ptr + at, grad.to(TYPE), mask=inside[:, None] & exists[None, :])


def logits(x: Tensor, key: Tensor, *, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """L = x key^T [B, N, M], its column statistics [B, 2, M] and lse [B, M]. Reads 1 |X|, writes M / d |X|."""
    check_tokens("x", x)
    check_memory("key", key, x)
    memories, width, k = key.shape
    b, n, features = x.shape
    heads = heads_of(memories, features, k)
    check_sizes("x", x, (b, n, heads * k), x.dtype, x)
    if padding is not None:
        check_contiguous("padding", padding, (b, n), torch.bool, x)
    c = columns(heads, width, 1)
    bt = _tokens(x, c, heads * spans.fn(c))
    blocks = triton.cdiv(n, bt)
    out = x.new_empty((b, n, heads * width))
    partial = x.new_empty((b, blocks, 2, heads * width), dtype=accumulate_dtype(x.dtype))
    arguments = x, key.expand(heads, -1, -1).contiguous(), as_bytes(padding), out, partial, n, *x.stride()
    constants = {"C": c, "F": k, "BT": bt, "STEP": _step(x, k)}
    launch(logits_kernel, (out, x), b * blocks * heads * spans.fn(c), *arguments, **constants)
    return out, *join_statistics(partial)


def normalize(logits: Tensor, lse: Tensor, *, norm: DoubleNorm) -> Attention:
    """The attention: the logits and lse. For groups in pieces, r and norm are made here. Reads M / d |X| then, else
    nothing."""
    check_logits("logits", logits, norm.group, norm.padding)
    m = logits.shape[2]
    check_contiguous("lse", lse, (logits.shape[0], m), accumulate_dtype(logits.dtype), logits)
    check_eps(norm.eps)
    c = columns(1, m, norm.group)
    if pieces.fn(c) == 1:
        return logits, lse
    _, rows = empty_attention(logits, columns=m, group=norm.group)
    rows[:, :m] = lse
    normalizer(logits, rows, c, norm)
    return logits, rows


def empty_attention(x: Tensor, *, columns: int, group: int) -> Attention:
    """Uninitialized tensors like the attention of x [B, N, d]."""
    b, n, _ = x.shape
    rows = x.new_empty((b, row_count(n, columns, group)), dtype=accumulate_dtype(x.dtype))
    return x.new_empty((b, n, columns)), rows


def attention_gradient(
    grad: Tensor,
    attention: Attention,
    *,
    value: Tensor,
    norm: DoubleNorm,
    dropout: Dropout | None = None,
    batch_term: BatchTerm | None = None,
) -> tuple[Tensor, Tensor]:
    """Q [B, N, M] = A * (dA - the sum of dA * A over the group), and its column sums D [B, M].

    dA = keep * scale * (grad V) + (A - origin) inner + constant. Reads (1 + M / d) |X|, writes M / d |X|.
    """
    heads = check_attended(attention, "value", value, 2, norm)
    logits, rows = attention
    _, v, width = value.shape
    check_dropout(dropout, logits)
    b, n, m = logits.shape
    check_sizes("grad", grad, (b, n, heads * v), logits.dtype, logits)
    if batch_term is not None:
        _check_batch_term(batch_term, m, rows.dtype, logits)
        batch_term = batch_term._replace(inner=batch_term.inner.to(logits.dtype))
    c = columns(heads, width, norm.group)
    bt = _tokens(grad, c, heads * tile_count(c))
    blocks = triton.cdiv(n, bt)
    grad_attention = torch.empty_like(logits)
    in_pieces = pieces.fn(c) > 1
    partial = None if in_pieces else rows.new_empty((b, blocks, heads * width))
    keep, scale = dropout or (None, 1.0)
    arguments = grad, logits, rows, rows.stride(0), value.expand(heads, -1, -1).contiguous(), keep
    arguments += *(batch_term or (None,) * 3), as_bytes(norm.padding), grad_attention, partial, n, *grad.stride()
    constants = {"C": c, "F": v, "EPS": norm.eps, "SCALE": scale, "BT": bt, "STEP": _step(grad, v)}
    programs = b * blocks * heads * tile_count(c)
    launch(attention_gradient_kernel, (logits, grad), programs, *arguments, **constants)
    if in_pieces:
        return grad_attention, backward_reduce(grad_attention, logits, rows, c, norm)
    return grad_attention, partial.sum(1)


def _check_batch_term(term: BatchTerm, m: int, dtype: torch.dtype, first: Tensor) -> None:
    if any(t is None for t in term):
        raise ValueError("origin, inner and constant must come together or not at all")
    for name, t, sizes in zip(BatchTerm._fields, term, ((m,), (m, m), (m,)), strict=True):
        check_contiguous(name, t, sizes, dtype, first)


def _tokens(x: Tensor, c: Columns, others: int) -> int:
    """Tokens of a tile with all columns of a tile, where a block of tokens has so many programs."""
    return token_block(x.shape[0], x.shape[1], others, min(128, accumulated(x) // c.block))


def _step(x: Tensor, features: int) -> int:
    return max(min(STEP[x.element_size()], triton.next_power_of_2(features)), LEAST)
