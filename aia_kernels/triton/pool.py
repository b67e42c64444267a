"""Pooling to maximum and mean over the axes of a context, and its transposes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import maps
from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import (
    check_activation,
    check_context,
    check_gate,
    check_optional_gate,
    check_optional_unpooled,
    check_unpooled,
)
from .recalibrate import product_sum
from .tiles import (
    X,
    block_of,
    coordinates,
    inside,
    load,
    load_gate,
    load_unpooled,
    locate,
    offsets,
    packed_size,
    segment,
    store,
)


@triton.constexpr_function
def key_type(acc):
    """The integer type as wide as an accumulation type."""
    return tl.int64 if acc.primitive_bitwidth == 64 else tl.int32


@triton.constexpr_function
def least_key(acc):
    return -(2 ** (acc.primitive_bitwidth - 1))


@triton.jit
def gated(x_ptr, gate_ptr, b, origin, at, TILE: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr):
    """A = x * G at a tile (A = x for GATE 0), zero outside, and the ordering key of each element."""
    a = load(x_ptr, b, origin, at, TILE).to(ACC)
    if GATE > 0:
        a *= load_gate(gate_ptr, b, at, TILE, GATE)
    valid = inside(at, TILE, X)
    return tl.where(valid, a, 0), tl.where(valid, order_key(a), least_key(ACC))


@triton.jit
def order_key(a):
    """An integer that orders as torch.max does: NaN above all numbers, equal NaNs, -0 equal to 0."""
    KEY: tl.constexpr = key_type(a.dtype)
    LARGEST: tl.constexpr = 2 ** (KEY.primitive_bitwidth - 1) - 1
    bits = tl.where(a == 0, 0.0, a).to(KEY, bitcast=True)
    return tl.where(a == a, bits ^ ((bits >> (KEY.primitive_bitwidth - 1)) & LARGEST), LARGEST)


@triton.jit
def key_value(key, ACC: tl.constexpr):
    """The number of an ordering key; the flip of order_key is its own inverse, and the largest key is a NaN."""
    BITS: tl.constexpr = key.dtype.primitive_bitwidth
    return (key ^ ((key >> (BITS - 1)) & (2 ** (BITS - 1) - 1))).to(ACC, bitcast=True)


@triton.jit
def first_maximum(key, index, AXIS: tl.constexpr):
    """Largest key along an axis and the least index that has it, both with length one along the axis."""
    best = tl.max(key, AXIS, keep_dims=True)
    return best, tl.min(tl.where(key == best, index, 2**31 - 1), AXIS, keep_dims=True)


@triton.jit
def store_features(
    pooled_ptr, argmax_ptr, b, at, key, index, a, TILE: tl.constexpr, CONTEXT: tl.constexpr, AXIS: tl.constexpr
):
    """Reduce keys, indices and values of a tile along an axis; store maximum, mean and argmax."""
    M: tl.constexpr = packed_size(TILE, CONTEXT)
    at_map = segment(TILE, CONTEXT, AXIS) + offsets(at, TILE, AXIS)
    valid = inside(at, TILE, AXIS)
    best, index = first_maximum(key, index.to(tl.int32), AXIS)
    mean = tl.sum(a, AXIS, keep_dims=True) * (1 / TILE.sizes[AXIS])
    tl.store(pooled_ptr + b * (2 * M) + at_map, key_value(best, a.dtype), mask=valid)
    tl.store(pooled_ptr + b * (2 * M) + M + at_map, mean, mask=valid)
    tl.store(argmax_ptr + b * M + at_map, index.to(argmax_ptr.dtype.element_ty), mask=valid)


@triton.jit
def empty_features(TILE: tl.constexpr, ACC: tl.constexpr):
    """Key (below every number's), index and sum of nothing, element by element of a tile."""
    KEY: tl.constexpr = key_type(ACC)
    return (
        tl.full(block_of(TILE, X), least_key(ACC), KEY),
        tl.zeros(block_of(TILE, X), tl.int32),
        tl.zeros(block_of(TILE, X), ACC),
    )


@triton.jit
def accumulate(best, index, total, a, key, position):
    """Join the next tile along an axis, element by element; what came before wins ties."""
    index = tl.where(key > best, position.to(tl.int32), index)
    return tl.maximum(best, key), index, total + a


@tiles.launched
def pool_kernel(
    x_ptr,
    gate_ptr,
    pooled_ptr,
    argmax_ptr,
    TILE: tl.constexpr,
    CONTEXT: tl.constexpr,
    GATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Maximum, mean and argmax of A over T, over H and over W in one reading of x.

    The tile holds all of T and W, which it reduces at once, and walks over H, for which it carries accumulators.
    """
    ACC: tl.constexpr = pooled_ptr.dtype.element_ty
    b, origin = locate(TILE)
    best, index, total = empty_features(TILE, ACC)
    for h in tl.range(0, TILE.sizes[2], TILE.block[2], num_stages=STAGES):
        here = tiles.moved(origin, h, 2)
        at = coordinates(here, TILE)
        a, key = gated(x_ptr, gate_ptr, b, here, at, TILE, GATE, ACC)
        store_features(pooled_ptr, argmax_ptr, b, at, key, at[0], a, TILE, CONTEXT, 0)
        store_features(pooled_ptr, argmax_ptr, b, at, key, at[3], a, TILE, CONTEXT, 3)
        best, index, total = accumulate(best, index, total, a, key, at[2])
    store_features(pooled_ptr, argmax_ptr, b, coordinates(origin, TILE), best, index, total, TILE, CONTEXT, 2)


@tiles.launched
def pool_over_kernel(
    x_ptr,
    gate_ptr,
    pooled_ptr,
    argmax_ptr,
    TILE: tl.constexpr,
    CONTEXT: tl.constexpr,
    GATE: tl.constexpr,
    STAGES: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Maximum, mean and argmax of A over one axis, walking along it."""
    ACC: tl.constexpr = pooled_ptr.dtype.element_ty
    b, origin = locate(TILE)
    best, index, total = empty_features(TILE, ACC)
    for i in tl.range(0, TILE.sizes[AXIS], TILE.block[AXIS], num_stages=STAGES):
        here = tiles.moved(origin, i, AXIS)
        at = coordinates(here, TILE)
        a, key = gated(x_ptr, gate_ptr, b, here, at, TILE, GATE, ACC)
        best, index, total = accumulate(best, index, total, a, key, at[AXIS])
    store_features(pooled_ptr, argmax_ptr, b, coordinates(origin, TILE), best, index, total, TILE, CONTEXT, AXIS)


@tiles.launched
def unpool_kernel(
    grad_y_ptr,
    gate_ptr,
    grad_pooled_ptr,
    argmax_ptr,
    inner_gate_ptr,
    inner_grad_pooled_ptr,
    inner_argmax_ptr,
    grad_x_ptr,
    TILE: tl.constexpr,
    CONTEXT: tl.constexpr,
    INNER_GATE: tl.constexpr,
    INNER: tl.constexpr,
):
    """grad_x = grad_y * G + Gi * U + Ui (Gi = 1 for INNER_GATE 0, Ui = 0 for INNER 0). Reads 1 |X|, writes 1 |X|."""
    b, origin = locate(TILE)
    at = coordinates(origin, TILE)
    grad_x = load_unpooled(grad_pooled_ptr, argmax_ptr, b, at, TILE, CONTEXT)
    if INNER_GATE > 0:
        grad_x = grad_x * load_gate(inner_gate_ptr, b, at, TILE, INNER_GATE)
    if INNER > 0:
        grad_x = grad_x + load_unpooled(inner_grad_pooled_ptr, inner_argmax_ptr, b, at, TILE, INNER)
    grad_y = load(grad_y_ptr, b, origin, at, TILE).to(gate_ptr.dtype.element_ty)
    grad_x = grad_y * load_gate(gate_ptr, b, at, TILE, CONTEXT) + grad_x
    store(grad_x_ptr, b, origin, at, grad_x, TILE)


def pool(x: Tensor, context: int, gate: Tensor | None, gate_context: int) -> tuple[Tensor, Tensor]:
    """Maximum and mean [B, 2, M] of x * G(gate) over the axes of a context, and argmax [B, M].

    Reads x once, or once for each axis where T x W outgrows a tile.
    """
    check_activation("x", x)
    check_context("context", context)
    check_optional_gate("gate", gate, "gate_context", gate_context, x)
    size = maps.packed_size(x.shape, context)
    pooled = x.new_empty((x.shape[0], 2, size), dtype=accumulate_dtype(x.dtype))
    argmax = x.new_empty((x.shape[0], size), dtype=maps.index_dtype(x.shape, context))
    arguments = (x, gate, pooled, argmax)
    constants = {"CONTEXT": context, "GATE": gate_context, "STAGES": 2 if gate_context else 3}
    tile = tiles.tile(x, whole="TW", looped="H") if context == maps.SPACETIME else None
    if tile:
        tiles.launch_tiles(pool_kernel, x, tile, *arguments, **constants, registers=255)
    else:
        for axis in maps.POOLED_AXES[context]:
            tile = tiles.tile(x, looped=axis)
            tiles.launch_tiles(pool_over_kernel, x, tile, *arguments, **constants, AXIS="TCHW".index(axis))
    return pooled, argmax


def unpool(
    grad_y: Tensor,
    gate: Tensor,
    grad_pooled: Tensor,
    argmax: Tensor,
    context: int,
    inner_gate: Tensor | None,
    inner_gate_context: int,
    inner_grad_pooled: Tensor | None,
    inner_argmax: Tensor | None,
    inner_context: int,
) -> Tensor:
    """grad_x = grad_y * G(gate) + G(inner_gate) * U(grad_pooled, argmax) + U(inner_grad_pooled, inner_argmax)."""
    check_activation("grad_y", grad_y)
    check_gate("gate", gate, "context", context, grad_y)
    check_unpooled("", grad_pooled, argmax, context, grad_y)
    check_optional_gate("inner_gate", inner_gate, "inner_gate_context", inner_gate_context, grad_y)
    check_optional_unpooled("inner_", inner_grad_pooled, inner_argmax, inner_context, grad_y)
    grad_x = torch.empty_like(grad_y)
    tiles.launch_tiles(
        unpool_kernel,
        grad_y,
        tiles.elementwise(grad_y),
        grad_y,
        gate,
        grad_pooled,
        argmax,
        inner_gate,
        inner_grad_pooled,
        inner_argmax,
        grad_x,
        CONTEXT=context,
        INNER_GATE=inner_gate_context,
        INNER=inner_context,
        most_warps=16,
    )
    return grad_x


def unpool_reduce(x: Tensor, grad_pooled: Tensor, argmax: Tensor, context: int, gate_context: int) -> Tensor:
    """Gradients [B, M] of the gates that multiplied x in pool: sums of x * U(grad_pooled, argmax). Reads x once."""
    check_activation("x", x)
    check_unpooled("", grad_pooled, argmax, context, x)
    check_context("gate_context", gate_context)
    return product_sum(x, grad_pooled, argmax, context, gate_context)
