"""Products of columns that give features: the values, and the gradient of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algorithms.external_attention_passes import Attention, DoubleNorm, Dropout
from . import tiles
from .checks import check_attended, check_contiguous, check_dropout, check_sizes
from .columns import (
    column_count,
    columns,
    columns_at,
    pieces,
    place,
    spans,
    token_block,
    tokens_at,
)
from .products import Factor, accumulated, factor_tile, launch, load_features, most_features
from .residual import by_feature, empty_signs, store_signs
from .token_sums import token_sums

#: Columns of one step of a product over columns whose factor can be cut anywhere.
CUT = {2: 64, 4: 32, 8: 32}


@tiles.launched
def features_kernel(
    logits_ptr,  # [B, N, M]
    rows_ptr,  # [B, rows_stride]
    rows_stride,
    grad_ptr,  # [B, N, M] or None
    reduced_ptr,  # [B, M] or None
    keep_ptr,  # [B, N, M] or None
    origin_ptr,  # [M] or None
    padding_ptr,  # [B, N] or None
    weight_ptr,  # [H, F, M'] by STRIDE_F and STRIDE_M
    bias_ptr,  # [H * F] or None
    residual_ptr,  # [B, N, H * F] by strides, or None
    o_ptr,  # [B, N, H * F] by strides
    signs_ptr,  # signs_shape(o) or None
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
    PARTS: tl.constexpr = (F + BF - 1) // BF
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
        sources = (logits_ptr, rows_ptr, grad_ptr, reduced_ptr, keep_ptr, origin_ptr)
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


def values(
    attention: Attention,
    value: Tensor,
    *,
    norm: DoubleNorm,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o = A V^T + bias [B, N, H * v], features contiguous, and None; with a residual, relu of the sum, stored as the
    residual, and its signs. Reads M / d |X| (+ 1 |X|), writes 1 |X|."""
    heads = check_attended(attention, "value", value, 2, norm)
    logits, rows = attention
    _, v, width = value.shape
    check_dropout(dropout, logits)
    b, n, _ = logits.shape
    if bias is not None:
        as_x = residual is None and bias.dtype == logits.dtype
        check_sizes("bias", bias, (heads * v,), bias.dtype if as_x else rows.dtype, logits)
        bias = bias.contiguous()
    if residual is not None:
        check_sizes("residual", residual, (b, n, heads * v), logits.dtype, logits)
    if residual is None:
        o, signs = value.new_empty((b, n, heads * v)), None
    else:
        o = torch.empty_like(residual)
        signs = empty_signs(o)
    factor = Factor(attention, norm, columns(heads, width, norm.group), dropout)
    _features(factor, value, {"STRIDE_M": 1, "STRIDE_F": width}, bias, residual, o, signs)
    return o, signs


def logits_gradient(
    grad_attention: Tensor,
    attention: Attention,
    *,
    reduced: Tensor,
    x: Tensor,
    key: Tensor,
    norm: DoubleNorm,
    residual_grad: Tensor | None = None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """dL key (+ residual_grad), stored as x, if needed, and dL^T x [H, M', k], with dL = Q - P * D.

    Reads (2 + 4 M / d) |X|, writes 1 |X|: dL is made twice. It asks nothing of groups, so tiles cut them anywhere.
    """
    heads = check_attended(attention, "key", key, 1, norm)
    logits, rows = attention
    _, width, k = key.shape
    check_contiguous("grad_attention", grad_attention, logits.shape, logits.dtype, logits)
    b, n, m = logits.shape
    check_contiguous("reduced", reduced, (b, m), rows.dtype, logits)
    check_sizes("x", x, (b, n, heads * k), logits.dtype, logits)
    if residual_grad is not None:
        check_sizes("residual_grad", residual_grad, x.shape, logits.dtype, logits)
    factor = Factor(attention, norm, columns(heads, width, 1), grad=grad_attention, reduced=reduced)
    grad_key, _ = token_sums(x, factor, needs_sums=False, by_column=True)
    grad_key = grad_key.sum_to_size(key.shape)
    if not needs_x:
        return None, grad_key
    grad_x = torch.empty_like(x)
    factor = factor._replace(columns=columns(heads, width, 1, CUT[x.element_size()]))
    _features(factor, key, {"STRIDE_M": k, "STRIDE_F": 1}, None, residual_grad, grad_x, None)
    return grad_x, grad_key


def _features(
    factor: Factor,
    weight: Tensor,
    strides: dict[str, int],
    bias: Tensor | None,
    residual: Tensor | None,
    o: Tensor,
    signs: Tensor | None,
) -> None:
    """Writes o and the signs: see features_kernel. strides: those of a head's columns and features in weight."""
    c, (logits, _) = factor.columns, factor.attention
    b, n, _ = logits.shape
    f = o.shape[2] // c.heads
    bf = most_features(o, f)
    parts = triton.cdiv(f, bf)
    bt = token_block(b, n, c.heads * parts, min(128, accumulated(o, 4) // max(bf, c.block)))
    residual_strides = (0, 0, 0) if residual is None else residual.stride()
    arguments = *factor.arguments(), weight.expand(c.heads, -1, -1).contiguous(), bias, residual, o, signs
    constants = {**factor.constants(), "F": f, **strides, "BT": bt, "BF": bf, "BY_FEATURE": by_feature(o)}
    launch(
        features_kernel,
        (logits, o) if residual is None else (logits, o, residual),
        b * triton.cdiv(n, bt) * c.heads * parts,
        *arguments,
        n,
        *residual_strides,
        *o.stride(),
        **constants,
    )
