"""Recalibration y = x * G(gate), and its reductions: the gradients of the gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import maps
from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import check_activation, check_context, check_gate, check_same
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


@tiles.launched
def recalibrate_kernel(x_ptr, gate_ptr, y_ptr, TILE: tl.constexpr, CONTEXT: tl.constexpr):
    """y = x * G(gate). Reads 1 |X|, writes 1 |X|."""
    b, origin = locate(TILE)
    at = coordinates(origin, TILE)
    gate = load_gate(gate_ptr, b, at, TILE, CONTEXT)
    x = load(x_ptr, b, origin, at, TILE).to(gate_ptr.dtype.element_ty)
    store(y_ptr, b, origin, at, x * gate, TILE)


@triton.jit
def product(x_ptr, factor_ptr, argmax_ptr, b, origin, at, TILE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr):
    """x * F at a tile, zero outside: F is a tensor like x (FACTOR 0) or the unpooled field U of a context (1 or 3)."""
    x = load(x_ptr, b, origin, at, TILE).to(ACC)
    if FACTOR == 0:
        factor = load(factor_ptr, b, origin, at, TILE).to(ACC)
    else:
        factor = load_unpooled(factor_ptr, argmax_ptr, b, at, TILE, FACTOR)
    return tl.where(inside(at, TILE, X), x * factor, 0)


@triton.jit
def store_sum(out_ptr, b, at, p, TILE: tl.constexpr, CONTEXT: tl.constexpr, AXIS: tl.constexpr):
    """Sum a tile along an axis; store it divided by the number of maps (which is the value of the context)."""
    out_ptr += b * packed_size(TILE, CONTEXT) + segment(TILE, CONTEXT, AXIS)
    total = tl.sum(p, AXIS, keep_dims=True) * (1 / CONTEXT)
    tl.store(out_ptr + offsets(at, TILE, AXIS), total, mask=inside(at, TILE, AXIS))


@tiles.launched
def product_sum_kernel(
    x_ptr, factor_ptr, argmax_ptr, out_ptr, TILE: tl.constexpr, FACTOR: tl.constexpr, CONTEXT: tl.constexpr
):
    """Sums of x * F over T, over H and over W in one reading: the tile holds all of T and W and walks over H."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    b, origin = locate(TILE)
    total = tl.zeros(block_of(TILE, X), ACC)
    for h in tl.range(0, TILE.sizes[2], TILE.block[2], num_stages=2 if FACTOR == 0 else 1):
        here = tiles.moved(origin, h, 2)
        at = coordinates(here, TILE)
        p = product(x_ptr, factor_ptr, argmax_ptr, b, here, at, TILE, FACTOR, ACC)
        store_sum(out_ptr, b, at, p, TILE, CONTEXT, 0)
        store_sum(out_ptr, b, at, p, TILE, CONTEXT, 3)
        total += p
    store_sum(out_ptr, b, coordinates(origin, TILE), total, TILE, CONTEXT, 2)


@tiles.launched
def product_sum_over_kernel(
    x_ptr,
    factor_ptr,
    argmax_ptr,
    out_ptr,
    TILE: tl.constexpr,
    FACTOR: tl.constexpr,
    CONTEXT: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Sums of x * F over one axis, walking along it."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    b, origin = locate(TILE)
    total = tl.zeros(block_of(TILE, X), ACC)
    for i in tl.range(0, TILE.sizes[AXIS], TILE.block[AXIS], num_stages=2 if FACTOR == 0 else 1):
        here = tiles.moved(origin, i, AXIS)
        total += product(x_ptr, factor_ptr, argmax_ptr, b, here, coordinates(here, TILE), TILE, FACTOR, ACC)
    store_sum(out_ptr, b, coordinates(origin, TILE), total, TILE, CONTEXT, AXIS)


def recalibrate(x: Tensor, gate: Tensor, context: int) -> Tensor:
    """y = x * G(gate), stored as x."""
    check_activation("x", x)
    check_gate("gate", gate, "context", context, x)
    y = torch.empty_like(x)
    tiles.launch_tiles(recalibrate_kernel, x, tiles.elementwise(x), x, gate, y, CONTEXT=context)
    return y


def recalibrate_reduce(grad_y: Tensor, x: Tensor, context: int) -> Tensor:
    """Gradients [B, M] of the gates of recalibrate: sums of grad_y * x over what a map lacks, by the number of maps."""
    check_activation("x", x)
    check_same("grad_y", grad_y, x, "x")
    check_context("context", context)
    return product_sum(x, grad_y, None, maps.NONE, context)


def product_sum(x: Tensor, factor: Tensor, argmax: Tensor | None, factor_context: int, context: int) -> Tensor:
    """[B, M]: sums of x * F over what each map of a context lacks, divided by the number of maps.

    F is a tensor like x (factor_context NONE) or U(factor, argmax) of a context. Reads each x-sized tensor once, or
    once for each axis where T x W outgrows a tile.
    """
    out = x.new_empty((x.shape[0], maps.packed_size(x.shape, context)), dtype=accumulate_dtype(x.dtype))
    arguments = (x, factor, argmax, out)
    # U takes more registers than a second tensor: 16 warps, or the compiler spills.
    constants = {"FACTOR": factor_context, "CONTEXT": context, "most_warps": 16 if factor_context else 8}
    tile = tiles.tile(x, whole="TW", looped="H") if context == maps.SPACETIME else None
    if tile:
        tiles.launch_tiles(product_sum_kernel, x, tile, *arguments, **constants, registers=255)
    else:
        for axis in maps.POOLED_AXES[context]:
            tile = tiles.tile(x, looped=axis)
            tiles.launch_tiles(product_sum_over_kernel, x, tile, *arguments, **constants, AXIS="TCHW".index(axis))
    return out
