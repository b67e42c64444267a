"""The queries of attention by a memory per sample: phi(q)' and the way back. Tiles: memory_tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import (
    check_apart,
    check_contiguous,
    check_eps,
    check_memory_logits,
    check_memory_reached,
    check_memory_rows,
)
from .columns import as_bytes, place, tokens_at
from .memory_tiles import (
    L2,
    SOFTMAX,
    Memory,
    dtype_of_rows,
    inverse_lengths,
    join,
    launch,
    load_rows,
    memory,
    no_zero,
    one_over,
    rows_from,
    sigmoid,
    softplus,
    store_rows,
)


@triton.jit
def gamma_of(gamma_ptr, ACC: tl.constexpr):
    return tl.full([], 1, ACC) if gamma_ptr is None else tl.load(gamma_ptr).to(ACC)


@triton.jit
def weights_of(sums_ptr, r, exists, n, EPS: tl.constexpr):
    """(s + eps) / N of rows [BR]."""
    s = tl.load(sums_ptr + r, mask=exists, other=0)
    return tiles.quotient(s + tl.full(s.shape, EPS, s.dtype), tl.zeros(s.shape, s.dtype) + n)


@triton.jit
def maxima_of(z_ptr, t, shown, n, G: tl.constexpr, ACC: tl.constexpr):
    """The maximum over the rows of a head, [BT]; 0 where there is none."""
    BT: tl.constexpr = G.tokens
    maximum = tl.full([BT], float("-inf"), ACC)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        mask = exists[:, None] & shown[None, :]
        z = tl.where(mask, load_rows(z_ptr, r, t, mask, n).to(ACC), float("-inf"))
        maximum = tl.maximum(maximum, tl.max(z, 0))
    return tl.where(maximum == float("-inf"), 0, maximum)


@triton.jit
def phi_of(z_ptr, scale, r, t, mask, n, FEATURE: tl.constexpr, ACC: tl.constexpr):
    """phi of a tile of queries but for the sum of a softmax: scale [BT] are 1 / |z|, or maxima; 0 outside the mask."""
    z = load_rows(z_ptr, r, t, mask, n).to(ACC)
    if FEATURE == L2:
        phi = z * scale[None, :]
    elif FEATURE == SOFTMAX:
        phi = tl.exp(z - scale[None, :])
    else:
        phi = softplus(z)
    return tl.where(mask, phi, 0), z


@triton.jit
def scale_of(z_ptr, t, shown, n, G: tl.constexpr, ACC: tl.constexpr):
    """What phi_of is given."""
    BT: tl.constexpr = G.tokens
    scale = tl.full([BT], 1, ACC)
    if G.feature == L2:
        scale = inverse_lengths(z_ptr, t, shown, n, G, ACC)
    elif G.feature == SOFTMAX:
        scale = maxima_of(z_ptr, t, shown, n, G, ACC)
    return scale


@tiles.launched
def queries_kernel(
    logits_ptr,  # the queries of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    sums_ptr,  # [B, H R]
    gamma_ptr,  # [1] or None
    query_ptr,  # [B, H R, N]
    n,
    EPS: tl.constexpr,
    G: tl.constexpr,
):
    """phi(q)'."""
    BT: tl.constexpr = G.tokens
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    UNIT: tl.constexpr = G.rows - G.d
    b, block, head, _ = place(n, G.heads, 1, G.tokens)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, G.tokens, G.wide)
    z_ptr = logits_ptr + (b * (2 * G.heads) + head) * G.d * n
    query_ptr += (b * G.heads + head) * G.rows * n
    sums_ptr += (b * G.heads + head) * G.rows
    scale = scale_of(z_ptr, t, shown, n, G, ACC)
    mass = tl.zeros([BT], ACC)
    if UNIT:
        mass += tiles.quotient(tl.load(sums_ptr), tl.zeros([], ACC) + n)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        phi, _z = phi_of(z_ptr, scale, r, t, exists[:, None] & shown[None, :], n, G.feature, ACC)
        if G.feature == SOFTMAX:
            mass += tl.sum(phi, 0)
        else:
            mass += tl.sum(weights_of(sums_ptr + UNIT, r, exists, n, EPS)[:, None] * phi, 0)
    factor = tl.where(shown, tiles.quotient(gamma_of(gamma_ptr, ACC) + tl.zeros_like(mass), no_zero(mass)), 0)
    if UNIT:
        tl.store(query_ptr + t, factor.to(query_ptr.dtype.element_ty), mask=inside)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        phi, _z = phi_of(z_ptr, scale, r, t, exists[:, None] & shown[None, :], n, G.feature, ACC)
        store_rows(query_ptr + UNIT * n, r, t, phi * factor[None, :], exists[:, None] & inside[None, :], n)


@tiles.launched
def queries_backward_kernel(
    logits_ptr,  # the queries of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    sums_ptr,  # [B, H R]
    gamma_ptr,  # [1] or None
    reached_ptr,  # [B, H R, N]
    rows_ptr,  # the place of their gradient in [B, H R + 2 H d, N]
    query_ptr,  # [B, H R, N]
    partial_ptr,  # [B, H, blocks, R + 1], or [B, H, blocks, 1] of a softmax
    n,
    EPS: tl.constexpr,
    G: tl.constexpr,
):
    """phi(q)', the gradient of queries, and the sums over a block of tokens of those of s and of gamma.

    With the mass of phi(q) and its product with P, both by the rows of a head, ratio = product / mass is the gradient
    of gamma, and that of the mass -ratio * factor.
    """
    BT: tl.constexpr = G.tokens
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    UNIT: tl.constexpr = G.rows - G.d
    COLUMNS: tl.constexpr = 0 if G.feature == SOFTMAX else G.rows
    b, block, head, _ = place(n, G.heads, 1, G.tokens)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, G.tokens, G.wide)
    z_ptr = logits_ptr + (b * (2 * G.heads) + head) * G.d * n
    reached_ptr += (b * G.heads + head) * G.rows * n
    query_ptr += (b * G.heads + head) * G.rows * n
    rows_ptr += (b * (G.heads * (G.rows + 2 * G.d)) + head * G.d) * n
    sums_ptr += (b * G.heads + head) * G.rows
    partial_ptr += ((b * G.heads + head) * tl.cdiv(n, G.tokens) + block) * (COLUMNS + 1)
    scale = scale_of(z_ptr, t, shown, n, G, ACC)
    # Of the features alone, without the constant.
    mass, product = tl.zeros([BT], ACC), tl.zeros([BT], ACC)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        mask = exists[:, None] & shown[None, :]
        phi, _z = phi_of(z_ptr, scale, r, t, mask, n, G.feature, ACC)
        product += tl.sum(phi * load_rows(reached_ptr + UNIT * n, r, t, mask, n).to(ACC), 0)
        if G.feature == SOFTMAX:
            mass += tl.sum(phi, 0)
        else:
            mass += tl.sum(weights_of(sums_ptr + UNIT, r, exists, n, EPS)[:, None] * phi, 0)
    whole_mass, whole_product = mass, product
    if UNIT:
        whole_mass += tiles.quotient(tl.load(sums_ptr), tl.zeros([], ACC) + n)
        whole_product += tl.load(reached_ptr + t, mask=shown, other=0).to(ACC)
    inverse = one_over(no_zero(whole_mass))
    ratio = tl.where(shown, whole_product * inverse, 0)
    factor = tl.where(shown, gamma_of(gamma_ptr, ACC) * inverse, 0)
    grad_mass = -(ratio * factor)
    tl.store(partial_ptr + COLUMNS, tl.sum(ratio, 0))
    if UNIT:
        tl.store(query_ptr + t, factor.to(query_ptr.dtype.element_ty), mask=inside)
        tl.store(partial_ptr, tiles.quotient(tl.sum(grad_mass, 0), tl.zeros([], ACC) + n))
    along = factor * product + grad_mass * mass
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        mask = exists[:, None] & shown[None, :]
        phi, z = phi_of(z_ptr, scale, r, t, mask, n, G.feature, ACC)
        grad = load_rows(reached_ptr + UNIT * n, r, t, mask, n).to(ACC)
        query = phi * factor[None, :]
        if G.feature == SOFTMAX:
            grad = query * (grad - ratio[None, :])
        else:
            weights = weights_of(sums_ptr + UNIT, r, exists, n, EPS)
            grad = grad * factor[None, :] + weights[:, None] * grad_mass[None, :]
            grad = (grad - phi * along[None, :]) * scale[None, :] if G.feature == L2 else grad * sigmoid(z)
            sums = tl.sum(phi * grad_mass[None, :], 1)
            tl.store(partial_ptr + UNIT + r, tiles.quotient(sums, tl.zeros_like(sums) + n), mask=exists)
        written = exists[:, None] & inside[None, :]
        store_rows(query_ptr + UNIT * n, r, t, query, written, n)
        store_rows(rows_ptr, r, t, tl.where(mask, grad, 0), written, n)


def memory_queries(
    logits: Tensor, feature: int, heads: int, padding: Tensor | None, sums: Tensor, gamma: Tensor | None, eps: float
) -> Tensor:
    """The pass of this name in schemas.py; phi(q)' is bfloat16 where logits are."""
    of = _checked(logits, feature, heads, padding, sums, gamma, eps)
    b, columns, n = logits.shape
    queries, query = logits[:, columns // 2 :], logits.new_empty((b, heads * of.rows, n), dtype=dtype_of_rows(logits))
    launch(queries_kernel, logits, of, queries, as_bytes(padding), sums, gamma, query, n, EPS=eps)
    return query


def memory_queries_backward_(
    rows: Tensor,
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    sums: Tensor,
    gamma: Tensor | None,
    eps: float,
    reached: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pass of this name in schemas.py; phi(q)' and rows are bfloat16 where logits are."""
    of = _checked(logits, feature, heads, padding, sums, gamma, eps)
    check_memory_rows(rows, logits, heads * of.rows)
    check_memory_reached(reached, logits, heads * of.rows)
    check_apart("rows", rows, sums=sums, reached=reached, padding=padding, gamma=gamma)
    b, columns, n = logits.shape
    queries, grad = logits[:, columns // 2 :], rows[:, -columns // 2 :]
    query = logits.new_empty((b, heads * of.rows, n), dtype=rows.dtype)
    grad_sums, grad_gamma = sums.new_empty(sums.shape), sums.new_empty(1)
    columns = 1 if feature == SOFTMAX.value else of.rows + 1
    partial = sums.new_empty((b, heads, triton.cdiv(n, of.tokens), columns))
    arguments = queries, as_bytes(padding), sums, gamma, reached, grad, query, partial, n
    launch(queries_backward_kernel, logits, of, *arguments, EPS=eps)
    join(partial, grad_sums, grad_gamma)
    return query, grad_sums, grad_gamma


def _checked(
    logits: Tensor, feature: int, heads: int, padding: Tensor | None, sums: Tensor, gamma: Tensor | None, eps: float
) -> Memory:
    """The geometry, once what queries are made of and divided by was checked."""
    check_memory_logits(logits, feature, heads, padding)
    of = memory(logits, feature, heads)
    check_contiguous("sums", sums, (logits.shape[0], heads * of.rows), accumulate_dtype(logits.dtype), logits)
    if gamma is not None:
        check_contiguous("gamma", gamma, (1,), logits.dtype, logits)
    check_eps(eps)
    return of
