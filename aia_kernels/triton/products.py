"""What the products of external attention's fused passes share: the factor that they take, their tiles, their launch.

The attention that is kept is (logits [B, N, M] in the type of the product, rows [B, M] = lse); for groups in pieces
(columns.py) rows go on with r and norm of every token and group. A is made again from them wherever it is needed, in
the accumulation type, and rounded to the type of the product where it enters a product. Logits are rounded to that type
first, as a linear layer rounds its output, and their statistics are those of the rounded ones. The gradient of A is
kept as Q, in the same way.

Three shapes of product, each with a prologue or an epilogue for its passes:

    tokens x features -> columns    logits.py: logits and the gradient of A
    tokens x columns -> features    values.py: o and the gradient of x
    features x tokens -> columns    token_sums.py: gradients of the memories; columns x tokens: moments

Products of 16-bit numbers run on tensor cores and accumulate in float32; those of float32 are exact unless torch allows
TF32 (torch.backends.cuda.matmul). Features may be contiguous or tokens may: strides are arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algorithms.external_attention_passes import Attention, DoubleNorm, Dropout
from . import tiles
from .columns import (
    LEAST,
    Columns,
    as_bytes,
    attention_tile,
    column_count,
    columns_at,
    is_wide,
    load_tile,
    log_p_tile,
    pieces,
    spans,
)
from .residual import extent

#: Elements of an accumulator to a thread, by bytes of an element: many on tensor cores, few where a thread multiplies
#: alone and holds the operands in registers too.
EACH = {2: 64, 4: 16, 8: 16}

#: Warps of a program: where threads multiply alone, more of them share the operands.
WARPS = {2: 4, 4: 8, 8: 4}

#: Most features of a tile.
FEATURES = {2: 128, 4: 64, 8: 64}


class Factor(NamedTuple):
    """What multiplies features at each token and column: A, with dropout if that is given, less an origin [M] if that
    is; or, with grad, the gradient of the logits, which Q = grad [B, N, M] and D = reduced [B, M] give."""

    attention: Attention
    norm: DoubleNorm
    columns: Columns
    dropout: Dropout | None = None
    origin: Tensor | None = None
    grad: Tensor | None = None
    reduced: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        """logits, rows, rows_stride, grad, reduced, keep, origin and padding of a kernel."""
        logits, rows = self.attention
        keep = None if self.dropout is None else self.dropout.keep
        return logits, rows, rows.stride(0), self.grad, self.reduced, keep, self.origin, as_bytes(self.norm.padding)

    def constants(self) -> dict[str, Any]:
        """C, EPS and SCALE of a kernel."""
        return {"C": self.columns, "EPS": self.norm.eps, "SCALE": 1.0 if self.dropout is None else self.dropout.scale}


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
    attention_ptr,  # logits, [N, M]
    rows_ptr,  # [row_count]
    grad_ptr,  # [N, M] or None
    reduced_ptr,  # [M] or None
    keep_ptr,  # [N, M] or None
    origin_ptr,  # [M] or None
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
    """A Factor at a tile of columns."""
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
        if origin_ptr is not None:
            factor -= tl.load(origin_ptr + m, mask=exists, other=0)[None, :]
    return factor


@triton.jit
def load_features(x_ptr, t, shown, head, f, stride_n, stride_f, F: tl.constexpr):
    """A tile [BT, BF] of a head's features of x."""
    mask = shown[:, None] & (f < F)[None, :]
    feature = (head * F + f).to(t.dtype)
    return tl.load(x_ptr + t[:, None] * stride_n + feature[None, :] * stride_f, mask=mask, other=0)


def tile_count(c: Columns) -> int:
    """Tiles of a head's columns."""
    return spans.fn(c) * pieces.fn(c)


def accumulated(x: Tensor, warps: int | None = None) -> int:
    """Elements of an accumulator."""
    return EACH[x.element_size()] * 32 * (warps or WARPS[x.element_size()])


def most_features(x: Tensor, features: int) -> int:
    return max(min(FEATURES[x.element_size()], triton.next_power_of_2(features)), LEAST)


def launch(kernel, sized: tuple[Tensor, ...], programs: int, *args, **constants) -> None:
    """Launch, with 64-bit offsets inside a sample where one of the tensors [B, N, d] takes them."""
    x = sized[0]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants["PRECISION"] = "tf32" if tf32 else "ieee"
    wide = is_wide(max(extent(t) for t in sized))
    constants.setdefault("num_warps", WARPS[x.element_size()])
    tiles.launch(kernel, x, (programs,), *args, **constants, WIDE=wide)
