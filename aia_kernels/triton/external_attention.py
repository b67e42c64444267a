"""The products of external attention, fused with the normalisation: the passes of aia_kernels.external_attention.

The attention that is kept is (logits [B, N, M] in the type of the product, rows [B, M] = lse); for groups in pieces
(double_norm.py) rows go on with r and norm of every token and group. A is made again from them wherever it is needed,
in the accumulation type, and rounded to the type of the product where it enters a product. Logits are rounded to that
type first, as a linear layer rounds its output, and their statistics are those of the rounded ones. The gradient of A
is kept as Q, in the same way.

Three shapes of product, each with a prologue or an epilogue for its passes:

    tokens x features -> columns    logits_kernel, attention_gradient_kernel
    tokens x columns -> features    features_kernel: values and grad_x
    features x tokens -> columns    token_sum_kernel: grad_value and grad_key; columns x tokens: moments_kernel

Products of 16-bit numbers run on tensor cores and accumulate in float32; those of float32 are exact unless torch allows
TF32 (torch.backends.cuda.matmul). Features may be contiguous or tokens may: strides are arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import maps
from . import tiles
from .double_norm import (
    COLUMNS,
    INTERPRETED,
    LEAST,
    PROGRAMS,
    Columns,
    as_bytes,
    attention_tile,
    backward_reduce,
    column_count,
    columns,
    columns_at,
    group_sum,
    is_wide,
    join_statistics,
    load_tile,
    log_p_tile,
    normaliser,
    pieces,
    place,
    spans,
    store_column_sums,
    store_statistics,
    token_block,
    tokens_at,
)
from .residual import by_feature, empty_signs, extent, store_signs

Attention = tuple[Tensor, Tensor]

#: Elements of an accumulator to a thread, by bytes of an element: many on tensor cores, few where a thread multiplies
#: alone and holds the operands in registers too.
EACH = {2: 64, 4: 16, 8: 16}

#: Warps of a program: where threads multiply alone, more of them share the operands.
WARPS = {2: 4, 4: 8, 8: 4}

#: Features of one step of a product over features: 128 bytes, a line of memory.
STEP = {2: 64, 4: 32, 8: 16}

#: Tokens of one step of a product over tokens.
TOKENS = {2: 64, 4: 16, 8: 16}

#: Columns of one step of a product over columns whose factor can be cut anywhere.
CUT = {2: 64, 4: 32, 8: 32}

#: Most features of a tile.
FEATURES = {2: 128, 4: 64, 8: 64}

#: The least tokens of a program that sums over them: its sums cost about as much traffic as this many tokens.
SUMMED = 1 << 16 if INTERPRETED else 128


@triton.jit
def gradient_tile(grad_ptr, logits_ptr, rows_ptr, reduced_ptr, t, shown, m, exists, M: tl.constexpr, ACC: tl.constexpr):
    """The gradient of the logits at a tile, Q - P * D, 0 at padding and outside."""
    mask = shown[:, None] & exists[None, :]
    p = tl.exp(log_p_tile(logits_ptr, rows_ptr, t, m, mask, M, ACC))
    reduced = tl.load(reduced_ptr + m, mask=exists, other=0)
    q = load_tile(grad_ptr, t, m, mask, M).to(ACC)
    return tl.where(mask, q - p * reduced[None, :], 0)


@triton.jit
def factor_tile(
    attention_ptr,
    rows_ptr,
    grad_ptr,
    reduced_ptr,
    keep_ptr,
    n,
    t,
    shown,
    head,
    tile,
    C: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """What multiplies the features at a tile of columns: A, with dropout if keep is given, or, with grad, the gradient
    of the logits."""
    M: tl.constexpr = column_count(C)
    span, piece = tile // pieces(C), tile % pieces(C)
    m, exists, _ = columns_at(head, span, piece, C)
    if grad_ptr is not None:
        factor = gradient_tile(grad_ptr, attention_ptr, rows_ptr, reduced_ptr, t, shown, m, exists, M, ACC)
    else:
        factor = attention_tile(attention_ptr, rows_ptr, n, t, shown, head, span, piece, C, EPS, ACC)
        if keep_ptr is not None:
            keep = load_tile(keep_ptr, t, m, shown[:, None] & exists[None, :], M)
            factor = factor * (keep.to(ACC) * tl.full([1, 1], SCALE, ACC))
    return factor


@triton.jit
def load_features(x_ptr, t, shown, head, f, stride_n, stride_f, F: tl.constexpr):
    """A tile [BT, BF] of a head's features of x."""
    mask = shown[:, None] & (f < F)[None, :]
    feature = (head * F + f).to(t.dtype)
    return tl.load(x_ptr + t[:, None] * stride_n + feature[None, :] * stride_f, mask=mask, other=0)


@triton.jit
def column_product(
    x_ptr,
    weight_ptr,
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


@triton.jit
def logits_kernel(
    x_ptr,
    key_ptr,
    padding_ptr,
    logits_ptr,
    partial_ptr,
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


@triton.jit
def attention_gradient_kernel(
    grad_ptr,
    logits_ptr,
    rows_ptr,
    rows_stride,
    value_ptr,
    keep_ptr,
    inner_ptr,
    constant_ptr,
    padding_ptr,
    grad_attention_ptr,
    partial_ptr,
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
    """dA = keep * SCALE * (grad value) + A' inner + constant, A' = A - 1 / group, of one tile. Stores Q and its column
    sums, partial [B, blocks, M]; for groups in pieces, dA."""
    M: tl.constexpr = column_count(C)
    WIDTH: tl.constexpr = C.width
    GROUP: tl.constexpr = C.group
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
            a = attention_tile(logits_ptr, rows_ptr, n, t, shown, *there, C, EPS, ACC) - 1 / GROUP
            k, exist, _ = columns_at(*there, C)
            w = tl.load(inner_ptr + k[:, None] * M + m[None, :], mask=exist[:, None] & exists[None, :], other=0)
            grad = tl.dot(a.to(TYPE), w, grad, input_precision=PRECISION, out_dtype=ACC)
        grad += tl.load(constant_ptr + m, mask=exists, other=0)[None, :]
    if pieces(C) == 1:
        a = attention_tile(logits_ptr, rows_ptr, n, t, shown, head, span, 0, C, EPS, ACC)
        # Where A is 0 for want of a token or a column, the gradient may be anything.
        grad = tl.where(mask, a * (grad - group_sum(tl.where(mask, grad * a, 0), C.room)), 0)
        store_column_sums(partial_ptr, b, block, n, t, m, exists, grad, C)
    at = b * n * M + t[:, None] * M + m[None, :]
    tl.store(grad_attention_ptr + at, grad.to(TYPE), mask=inside[:, None] & exists[None, :])


@triton.jit
def features_kernel(
    logits_ptr,
    rows_ptr,
    rows_stride,
    grad_ptr,
    reduced_ptr,
    keep_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    padding_ptr,
    o_ptr,
    signs_ptr,
    n,
    residual_b,
    residual_n,
    residual_f,
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
    BY_FEATURE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """o = factor weight (+ bias) (+ residual) at a tile [BT, BF], over all columns of a head; factor as factor_tile.

    With signs, o = relu of that, and the signs are stored.
    """
    M: tl.constexpr = column_count(C)
    WIDTH: tl.constexpr = C.width
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    TYPE: tl.constexpr = o_ptr.dtype.element_ty
    PARTS: tl.constexpr = tl.cdiv(F, BF)
    b, block, head, part = place(n, C.heads, PARTS, BT)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, BT, WIDE)
    f = part * BF + tl.arange(0, BF)
    logits_ptr += b * n * M
    rows_ptr += b * rows_stride
    if grad_ptr is not None:
        grad_ptr += b * n * M
        reduced_ptr += b * M
    if keep_ptr is not None:
        keep_ptr += b * n * M
    weight_ptr += head.to(tl.int64) * (F * WIDTH)
    o = tl.zeros([BT, BF], ACC)
    for tile in range(spans(C) * pieces(C)):
        sources = (logits_ptr, rows_ptr, grad_ptr, reduced_ptr, keep_ptr)
        factor = factor_tile(*sources, n, t, shown, head, tile, C, EPS, SCALE, ACC)
        m, exists, _ = columns_at(head, tile // pieces(C), tile % pieces(C), C)
        at = (m - head * WIDTH)[:, None] * STRIDE_M + f[None, :] * STRIDE_F
        w = tl.load(weight_ptr + at, mask=exists[:, None] & (f < F)[None, :], other=0)
        o = tl.dot(factor.to(TYPE), w, o, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        o += tl.load(bias_ptr + head * F + f, mask=f < F, other=0)[None, :]
    if residual_ptr is not None:
        residual_ptr += b * residual_b
        o += load_features(residual_ptr, t, inside, head, f, residual_n, residual_f, F).to(ACC)
    if signs_ptr is not None:
        # Not where o > 0: NaN passes, as through torch.relu.
        o = tl.where(o <= 0, 0, o)
        store_signs(signs_ptr, b, n, block * BT, part * BF, o != 0, F, BY_FEATURE, WIDE)
    mask = inside[:, None] & (f < F)[None, :]
    at = b * stride_b + t[:, None] * stride_n + (head * F + f).to(t.dtype)[None, :] * stride_f
    tl.store(o_ptr + at, o.to(TYPE), mask=mask)


@triton.jit
def token_sum_kernel(
    x_ptr,
    logits_ptr,
    rows_ptr,
    rows_stride,
    grad_ptr,
    reduced_ptr,
    keep_ptr,
    padding_ptr,
    partial_ptr,
    sums_ptr,
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
    """x^T factor over the tokens of this program: partial [P, H, F, M'] with strides of columns and features; factor as
    factor_tile. With sums, also those of x: [P, H * F]. Program p takes blocks p, p + P, ... of all samples."""
    M: tl.constexpr = column_count(C)
    WIDTH: tl.constexpr = C.width
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    PARTS: tl.constexpr = tl.cdiv(F, BF)
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
    total = tl.zeros([BF, C.block], ACC)
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
        sources = (logits_ptr + here, rows_ptr + b * rows_stride, grad, reduced, keep)
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


@triton.jit
def moments_kernel(
    logits_ptr,
    rows_ptr,
    rows_stride,
    padding_ptr,
    sums_ptr,
    second_ptr,
    batch,
    n,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of A' and of A'^T A' over the tokens of this program, [P, M] and [P, M, M], A' = A - 1 / group.

    Both are made of A' rounded to the type of the product, so that the covariance that follows is one.
    """
    M: tl.constexpr = column_count(C)
    GROUP: tl.constexpr = C.group
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    TYPE: tl.constexpr = logits_ptr.dtype.element_ty
    TILES: tl.constexpr = spans(C) * pieces(C)
    right = tl.program_id(0) % TILES
    left = tl.program_id(0) // TILES % TILES
    program = tl.program_id(0) // (TILES * TILES)
    blocks = tl.cdiv(n, BT)
    second = tl.zeros([C.block, C.block], ACC)
    sums = tl.zeros([C.block], ACC)
    for task in range(program, batch * blocks, tl.num_programs(0) // (TILES * TILES)):
        b = (task // blocks).to(tl.int64)
        t, inside, shown = tokens_at(b, task % blocks, n, padding_ptr, BT, WIDE)
        arguments = (logits_ptr + b * n * M, rows_ptr + b * rows_stride, n, t, shown, 0)
        a = attention_tile(*arguments, left // pieces(C), left % pieces(C), C, EPS, ACC) - 1 / GROUP
        a = tl.where(inside[:, None], a, 0).to(TYPE)
        if TILES == 1:
            other = a
        else:
            other = attention_tile(*arguments, right // pieces(C), right % pieces(C), C, EPS, ACC) - 1 / GROUP
            other = tl.where(inside[:, None], other, 0).to(TYPE)
        second = tl.dot(tl.trans(a), other, second, input_precision=PRECISION, out_dtype=ACC)
        sums += tl.sum(a.to(ACC), 0)
    i, i_exists, _ = columns_at(0, left // pieces(C), left % pieces(C), C)
    j, j_exists, _ = columns_at(0, right // pieces(C), right % pieces(C), C)
    at = program.to(tl.int64) * (M * M) + i[:, None] * M + j[None, :]
    tl.store(second_ptr + at, second, mask=i_exists[:, None] & j_exists[None, :])
    if right == 0:
        tl.store(sums_ptr + program.to(tl.int64) * M + i, sums, mask=i_exists)


def logits(x: Tensor, key: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """L = x key^T [B, N, M] and its column statistics [B, 2, M]. Reads 1 |X|, writes M / d |X|."""
    b, n, _ = x.shape
    heads, width, k = key.shape
    c = columns(heads, width, 1)
    bt = _tokens(x, c, heads * spans.fn(c))
    blocks = triton.cdiv(n, bt)
    out = x.new_empty((b, n, heads * width))
    partial = x.new_empty((b, blocks, 2, heads * width), dtype=maps.accumulate_dtype(x.dtype))
    arguments = x, key.contiguous(), as_bytes(padding), out, partial, n, *x.stride()
    constants = {"C": c, "F": k, "BT": bt, "STEP": _step(x, k)}
    _start(logits_kernel, (out, x), b * blocks * heads * spans.fn(c), *arguments, **constants)
    return out, join_statistics(partial)


def normalise(logits: Tensor, lse: Tensor, group: int, eps: float, padding: Tensor | None) -> Attention:
    """The attention: the logits and lse. For groups in pieces, r and norm are made here. Reads M / d |X| then, else
    nothing."""
    m = logits.shape[2]
    c = columns(1, m, group)
    if pieces.fn(c) == 1:
        return logits, lse.contiguous()
    _, rows = empty_attention(logits, m, group)
    rows[:, :m] = lse
    normaliser(logits, rows, c, eps, padding)
    return logits, rows


def empty_attention(x: Tensor, columns_: int, group: int) -> Attention:
    """Uninitialised tensors like the attention of x [B, N, d]."""
    b, n, _ = x.shape
    in_pieces = pieces.fn(columns(1, columns_, group)) > 1
    size = columns_ + (2 * n * (columns_ // group) if in_pieces else 0)
    return x.new_empty((b, n, columns_)), x.new_empty((b, size), dtype=maps.accumulate_dtype(x.dtype))


def moments(attention: Attention, group: int, eps: float, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over all tokens of A' [M] and of A'^T A' [M, M], A' = A - 1 / group. Reads M / d |X|."""
    logits, rows = attention
    b, n, m = logits.shape
    c = columns(1, m, group)
    square = _tiles(c) ** 2
    bt = _summed_tokens(logits, c)
    programs = _summing_programs(b, n, bt, square)
    sums, second = rows.new_empty((programs, m)), rows.new_empty((programs, m, m))
    arguments = logits, rows, rows.stride(0), as_bytes(padding), sums, second, b, n
    constants = {"C": c, "EPS": eps, "BT": bt, "num_warps": 4 if c.block <= COLUMNS else 8}
    if c.block <= COLUMNS:
        # Left alone, the assembler spills a few registers to fit one more program on an SM.
        constants["maxnreg"] = 255
    _start(moments_kernel, (logits,), programs * square, *arguments, **constants)
    return sums.sum(0), second.sum(0)


def values(
    attention: Attention,
    value: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    residual: Tensor | None,
    group: int,
    eps: float,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """o = A V^T + bias [B, N, H * v], features contiguous, and None; with a residual, relu of the sum, stored as the
    residual, and its signs. Reads M / d |X| (+ 1 |X|), writes 1 |X|."""
    heads, v, width = value.shape
    b, n, _ = attention[0].shape
    if residual is None:
        o, signs = value.new_empty((b, n, heads * v)), None
    else:
        o = torch.empty_like(residual)
        signs = empty_signs(o)
    c = columns(heads, width, group)
    strides = {"STRIDE_M": 1, "STRIDE_F": width}
    _features(attention, None, None, keep, value, bias, residual, padding, o, signs, c, strides, eps, scale)
    return o, signs


def value_gradient(
    grad: Tensor,
    attention: Attention,
    keep: Tensor | None,
    scale: float,
    heads: int,
    group: int,
    eps: float,
    padding: Tensor | None,
    needs_sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """grad^T A [H, v, M'], and if needed the sums [H * v] of grad over batch and tokens. Reads (1 + M / d) |X|."""
    c = columns(heads, attention[0].shape[2] // heads, group)
    return _token_sums(grad, attention, None, None, keep, padding, c, eps, scale, needs_sums, by_column=False)


def attention_gradient(
    grad: Tensor,
    attention: Attention,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    inner: Tensor | None,
    constant: Tensor | None,
    group: int,
    eps: float,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Q [B, N, M] = A * (dA - the sum of dA * A over the group), dA = keep * scale * (grad V) + A inner + constant, and
    its column sums D [B, M]. Reads (1 + M / d) |X|, writes M / d |X|."""
    logits, rows = attention
    b, n, _ = logits.shape
    heads, v, width = value.shape
    c = columns(heads, width, group)
    bt = _tokens(grad, c, heads * _tiles(c))
    blocks = triton.cdiv(n, bt)
    grad_attention = torch.empty_like(logits)
    if inner is not None:
        # A inner = A' inner + the sum of inner's rows / group: near-constant columns of A lose less to rounding.
        constant = inner.sum(0) / group if constant is None else constant + inner.sum(0) / group
        inner = inner.to(logits.dtype).contiguous()
    in_pieces = pieces.fn(c) > 1
    partial = None if in_pieces else rows.new_empty((b, blocks, heads * width))
    arguments = grad, logits, rows, rows.stride(0), value.contiguous(), keep, inner, constant, as_bytes(padding)
    constants = {"C": c, "F": v, "EPS": eps, "SCALE": scale, "BT": bt, "STEP": _step(grad, v)}
    _start(
        attention_gradient_kernel,
        (logits, grad),
        b * blocks * heads * _tiles(c),
        *arguments,
        grad_attention,
        partial,
        n,
        *grad.stride(),
        **constants,
    )
    if in_pieces:
        return grad_attention, backward_reduce(grad_attention, logits, rows, c, eps, padding)
    return grad_attention, partial.sum(1)


def logits_gradient(
    grad_attention: Tensor,
    attention: Attention,
    reduced: Tensor,
    x: Tensor,
    key: Tensor,
    residual_grad: Tensor | None,
    group: int,
    eps: float,
    padding: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """dL key (+ residual_grad), stored as x, if needed, and dL^T x [H, M', k], with dL = Q - P * D.

    Reads (2 + 4 M / d) |X|, writes 1 |X|: dL is made twice. It asks nothing of groups, so tiles cut them anywhere.
    """
    heads, width, k = key.shape
    c = columns(heads, width, 1)
    reduced = reduced.contiguous()
    grad_key, _ = _token_sums(
        x, attention, grad_attention, reduced, None, padding, c, eps, 1.0, needs_sums=False, by_column=True
    )
    if not needs_x:
        return None, grad_key
    grad_x = torch.empty_like(x)
    strides = {"STRIDE_M": k, "STRIDE_F": 1}
    sources = attention, grad_attention, reduced, None
    c = columns(heads, width, 1, CUT[x.element_size()])
    _features(*sources, key, None, residual_grad, padding, grad_x, None, c, strides, eps, 1.0)
    return grad_x, grad_key


def _features(
    attention: Attention,
    grad: Tensor | None,
    reduced: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Tensor | None,
    o: Tensor,
    signs: Tensor | None,
    c: Columns,
    strides: dict[str, int],
    eps: float,
    scale: float,
) -> None:
    logits, rows = attention
    b, n, _ = logits.shape
    f = o.shape[2] // c.heads
    bf = _most_features(o, f)
    parts = triton.cdiv(f, bf)
    bt = token_block(b, n, c.heads * parts, min(128, _accumulated(o, 4) // max(bf, c.block)))
    inputs = grad, reduced, keep, weight.contiguous(), bias, residual, as_bytes(padding)
    residual_strides = (0, 0, 0) if residual is None else residual.stride()
    constants = {"C": c, "F": f, **strides, "EPS": eps, "SCALE": scale, "BT": bt, "BF": bf, "BY_FEATURE": by_feature(o)}
    _start(
        features_kernel,
        (logits, o) if residual is None else (logits, o, residual),
        b * triton.cdiv(n, bt) * c.heads * parts,
        logits,
        rows,
        rows.stride(0),
        *inputs,
        o,
        signs,
        n,
        *residual_strides,
        *o.stride(),
        **constants,
    )


def _token_sums(
    x: Tensor,
    attention: Attention,
    grad: Tensor | None,
    reduced: Tensor | None,
    keep: Tensor | None,
    padding: Tensor | None,
    c: Columns,
    eps: float,
    scale: float,
    needs_sums: bool,
    by_column: bool,
) -> tuple[Tensor, Tensor | None]:
    """x^T factor over all tokens, [H, F, M'] or by column [H, M', F], and the sums of x if needed."""
    logits, rows = attention
    b, n, _ = x.shape
    f = x.shape[2] // c.heads
    bf = max(min(_most_features(x, f), _accumulated(x) // c.block), LEAST)
    parts, count = triton.cdiv(f, bf), _tiles(c)
    bt = _summed_tokens(x, c)
    programs = _summing_programs(b, n, bt, parts * count * c.heads)
    shape = (c.heads, c.width, f) if by_column else (c.heads, f, c.width)
    partial = rows.new_empty((programs, *shape))
    sums = rows.new_empty((programs, c.heads * f)) if needs_sums else None
    strides = {"STRIDE_M": f, "STRIDE_F": 1} if by_column else {"STRIDE_M": 1, "STRIDE_F": c.width}
    arguments = (
        x,
        logits,
        rows,
        rows.stride(0),
        grad,
        reduced,
        keep,
        as_bytes(padding),
        partial,
        sums,
        b,
        n,
        *x.stride(),
    )
    constants = {"C": c, "F": f, **strides, "EPS": eps, "SCALE": scale, "BT": bt, "BF": bf}
    _start(token_sum_kernel, (logits, x), programs * parts * count * c.heads, *arguments, **constants)
    return partial.sum(0), None if sums is None else sums.sum(0)


def _tiles(c: Columns) -> int:
    """Tiles of a head's columns."""
    return spans.fn(c) * pieces.fn(c)


def _accumulated(x: Tensor, warps: int | None = None) -> int:
    """Elements of an accumulator."""
    return EACH[x.element_size()] * 32 * (warps or WARPS[x.element_size()])


def _most_tokens(x: Tensor, c: Columns) -> int:
    return min(128, _accumulated(x) // c.block)


def _tokens(x: Tensor, c: Columns, others: int) -> int:
    """Tokens of a tile with all columns of a tile, where a block of tokens has so many programs."""
    return token_block(x.shape[0], x.shape[1], others, _most_tokens(x, c))


def _most_features(x: Tensor, features: int) -> int:
    return max(min(FEATURES[x.element_size()], triton.next_power_of_2(features)), LEAST)


def _summed_tokens(x: Tensor, c: Columns) -> int:
    """Tokens of one step of a sum over them."""
    most = min(TOKENS[x.element_size()], _accumulated(x) // c.block)
    return max(min(most, triton.next_power_of_2(x.shape[1])), LEAST)


def _step(x: Tensor, features: int) -> int:
    return max(min(STEP[x.element_size()], triton.next_power_of_2(features)), LEAST)


def _summing_programs(b: int, n: int, bt: int, others: int) -> int:
    """Programs among which the tokens of the batch are divided, each with blocks of bt of them."""
    return max(1, min(triton.cdiv(PROGRAMS, others), b * n // max(SUMMED, bt)))


def _start(kernel, sized: tuple[Tensor, ...], programs: int, *args, **constants) -> None:
    """Launch, with 64-bit offsets inside a sample where one of the tensors [B, N, d] takes them."""
    x = sized[0]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants["PRECISION"] = "tf32" if tf32 else "ieee"
    wide = is_wide(max(extent(t) for t in sized))
    constants.setdefault("num_warps", WARPS[x.element_size()])
    tiles.start(kernel, x, (programs,), *args, **constants, WIDE=wide)
