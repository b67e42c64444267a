"""The gate on packed maps: 3x3x3 convolution 2 -> 1, normalization, sigmoid. Its transposes: gate_backward.py.

Launches: gate two, or one where no map uses the statistics of the batch; gate_again one. What follows a sum over the
batch joins the parts of all programs itself, each program anew, and parameters are read where they lie: a network of
small maps is bound by its launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import packed_maps, tiles
from .checks import check_contiguous, check_norms, check_packed, check_weights
from .packed_maps import (
    activate,
    elements,
    launch,
    load_norm,
    load_taps,
    neighbours,
    normalize,
    partial_sums,
    place,
    split,
    strides_of,
    three,
)


@triton.jit
def number_of(m, number0_ptr, number1_ptr, number2_ptr, absent, ACC: tl.constexpr):
    """The number of map m, of any type; where it is absent another."""
    found = tl.full([], 0, ACC) + absent
    if number0_ptr is not None:
        found = tl.where(m == 0, tl.load(number0_ptr).to(ACC), found)
    if number1_ptr is not None:
        found = tl.where(m == 1, tl.load(number1_ptr).to(ACC), found)
    if number2_ptr is not None:
        found = tl.where(m == 2, tl.load(number2_ptr).to(ACC), found)
    return found


@triton.constexpr_function
def chosen(values, i):
    return values[i]


@triton.jit
def entry(m, VALUES: tl.constexpr, ACC: tl.constexpr):
    """The entry of map m in a tuple."""
    found = tl.full([], chosen(VALUES, 0), ACC)
    for i in tl.static_range(1, len(VALUES)):
        found = tl.where(m == i, chosen(VALUES, i), found)
    return found


@triton.jit
def store_norm(norm_ptr, statistics_ptr, m, norm, var, share):
    """Rows of norm [n, 4] and of statistics [n, 3], as in schemas.py, by the first program of map m."""
    first = tl.program_id(0) == 0
    for i in tl.static_range(4):
        tl.store(norm_ptr + 4 * m + i, norm[i], mask=first)
    tl.store(statistics_ptr + 3 * m, norm[0], mask=first)
    tl.store(statistics_ptr + 3 * m + 1, var, mask=first)
    tl.store(statistics_ptr + 3 * m + 2, share, mask=first)


@triton.jit
def join_moments(count, mean, squares):
    """Count, mean and sum of squared deviations of the union of samples (of none, mean and squares are 0)."""
    total = tl.sum(count, 0)
    joined = tiles.quotient(tl.sum(count * mean, 0), tl.maximum(total, 1))
    return total, joined, tl.sum(squares + count * (mean - joined) * (mean - joined), 0)


@triton.jit
def convolved(pooled_ptr, weight_max, weight_mean, b, position, exists, m, at, DIMS: tl.constexpr, M: tl.constexpr):
    """z at positions of map m in clip b, which lie at offsets of a packed [B, M]."""
    distance, valid = neighbours(position, m, 1, DIMS)
    near = pooled_ptr + (at + b * M)[None, :] + distance
    valid &= exists[None, :]
    z = tl.sum(weight_max * tl.load(near, mask=valid, other=0), 0)
    return z + tl.sum(weight_mean * tl.load(near + M, mask=valid, other=0), 0)


@tiles.launched
def conv_kernel(
    pooled_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    z_ptr,
    partial_ptr,
    batch,
    STRIDES: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = conv(pooled), and count, mean and squared deviations of the z of this program: partial [n, P, 3]."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    weight_max = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 0, STRIDES, ACC)
    weight_mean = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 1, STRIDES, ACC)
    count, mean, squares = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        b, position = split(task, size, BLOCK)
        at, exists = b * M + start + position, position < size
        z = convolved(pooled_ptr, weight_max, weight_mean, b, position, exists, m, at, DIMS, M)
        tl.store(z_ptr + at, z, mask=exists)
        count += tl.where(exists, 1.0, 0.0)
        change = tl.where(exists, z - mean, 0)
        mean += change / tl.maximum(count, 1)
        squares += tl.where(exists, change * (z - mean), 0)
    count_all, mean_all, squares_all = join_moments(count, mean, squares)
    partial_ptr += (m * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(partial_ptr, count_all)
    tl.store(partial_ptr + 1, mean_all)
    tl.store(partial_ptr + 2, squares_all)


@tiles.launched
def activate_kernel(
    z_ptr,
    partial_ptr,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    shift0_ptr,
    shift1_ptr,
    shift2_ptr,
    mean0_ptr,
    mean1_ptr,
    mean2_ptr,
    var0_ptr,
    var1_ptr,
    var2_ptr,
    norm_ptr,
    statistics_ptr,
    batch,
    programs,
    EPS: tl.constexpr,
    USES_BATCH: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Overwrites z by the gate, with norm [n, 4] and statistics [n, 3] as in schemas.py, from partial [n, P, 3] and the
    numbers of each map. USES_BATCH: whether a map uses the statistics of the batch. PROGRAMS: a power of two from P on.
    """
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    i = tl.arange(0, PROGRAMS)
    part, valid = partial_ptr + (m * programs + i) * 3, i < programs
    count = tl.load(part, mask=valid, other=0)
    mean = tl.load(part + 1, mask=valid, other=0)
    squares = tl.load(part + 2, mask=valid, other=0)
    count, mean, squares = join_moments(count, mean, squares)
    uses_batch = entry(m, USES_BATCH, ACC) > 0
    mean = tl.where(uses_batch, mean, number_of(m, mean0_ptr, mean1_ptr, mean2_ptr, 0, ACC))
    var = tl.where(uses_batch, tiles.quotient(squares, count), number_of(m, var0_ptr, var1_ptr, var2_ptr, 1, ACC))
    share = tl.where(uses_batch, tiles.quotient(1.0, count), 0)
    rstd = tiles.quotient(1.0, tiles.root(var + entry(m, EPS, ACC)))
    scale = number_of(m, scale0_ptr, scale1_ptr, scale2_ptr, 1, ACC)
    norm = mean, rstd, scale, number_of(m, shift0_ptr, shift1_ptr, shift2_ptr, 0, ACC)
    store_norm(norm_ptr, statistics_ptr, m, norm, var, share)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm)
        tl.store(z_ptr + at, activate(xhat, norm), mask=exists)


@tiles.launched
def known_kernel(
    pooled_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    norm_ptr,
    gate_ptr,
    z_ptr,
    batch,
    STRIDES: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gate, and z, by norm [n, 4]."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = gate_ptr.dtype.element_ty
    weight_max = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 0, STRIDES, ACC)
    weight_mean = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 1, STRIDES, ACC)
    norm = load_norm(norm_ptr, m)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        b, position = split(task, size, BLOCK)
        at, exists = b * M + start + position, position < size
        z = convolved(pooled_ptr, weight_max, weight_mean, b, position, exists, m, at, DIMS, M)
        tl.store(gate_ptr + at, activate(normalize(z, norm), norm), mask=exists)
        tl.store(z_ptr + at, z, mask=exists)


@tiles.launched
def fixed_kernel(
    pooled_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    scale0_ptr,
    scale1_ptr,
    scale2_ptr,
    shift0_ptr,
    shift1_ptr,
    shift2_ptr,
    mean0_ptr,
    mean1_ptr,
    mean2_ptr,
    var0_ptr,
    var1_ptr,
    var2_ptr,
    gate_ptr,
    norm_ptr,
    statistics_ptr,
    batch,
    EPS: tl.constexpr,
    STRIDES: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gate by fixed statistics, norm [n, 4] and statistics [n, 3], from the numbers of each map."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = gate_ptr.dtype.element_ty
    weight_max = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 0, STRIDES, ACC)
    weight_mean = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 1, STRIDES, ACC)
    mean = number_of(m, mean0_ptr, mean1_ptr, mean2_ptr, 0, ACC)
    var = number_of(m, var0_ptr, var1_ptr, var2_ptr, 1, ACC)
    rstd = tiles.quotient(1.0, tiles.root(var + entry(m, EPS, ACC)))
    scale = number_of(m, scale0_ptr, scale1_ptr, scale2_ptr, 1, ACC)
    norm = mean, rstd, scale, number_of(m, shift0_ptr, shift1_ptr, shift2_ptr, 0, ACC)
    store_norm(norm_ptr, statistics_ptr, m, norm, var, 0.0)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        b, position = split(task, size, BLOCK)
        at, exists = b * M + start + position, position < size
        z = convolved(pooled_ptr, weight_max, weight_mean, b, position, exists, m, at, DIMS, M)
        tl.store(gate_ptr + at, activate(normalize(z, norm), norm), mask=exists)


def gate(
    pooled: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    mean: Sequence[Tensor | None],
    var: Sequence[Tensor | None],
    eps: Sequence[float],
    batch: Sequence[bool],
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [B, M] with their norm [n, 4] and statistics [n, 3]: as in schemas.py."""
    n = check_packed("pooled", pooled, dims, features=2)
    check_weights(weight, n, pooled)
    check_norms(n, {"scale": scale, "shift": shift, "mean": mean, "var": var}, eps, batch, pooled)
    norm, statistics = pooled.new_empty((n, 4)), pooled.new_empty((n, 3))
    fixed = [[None if b else number for b, number in zip(batch, of, strict=True)] for of in (mean, var)]
    numbers = [number for of in (scale, shift, *fixed) for number in three(of)]
    z = pooled.new_empty((pooled.shape[0], pooled.shape[2]))
    weights, eps = {"STRIDES": strides_of(weight)}, tuple(eps)
    if not any(batch):
        arguments = pooled, *three(weight), *numbers, z, norm, statistics
        launch(fixed_kernel, z, dims, packed_maps.TAPPED, *arguments, EPS=eps, **weights)
        return z, norm, statistics
    partial = partial_sums(z, dims, packed_maps.TAPPED, 3)
    launch(conv_kernel, z, dims, packed_maps.TAPPED, pooled, *three(weight), z, partial, **weights)
    constants = {"EPS": eps, "USES_BATCH": tuple(map(int, batch)), "parts": partial.shape[1]}
    launch(activate_kernel, z, dims, packed_maps.FLAT, z, partial, *numbers, norm, statistics, **constants)
    return z, norm, statistics


def gate_again(pooled: Tensor, weight: Sequence[Tensor], norm: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gates [B, M] from norm [n, 4], and their z."""
    n = check_packed("pooled", pooled, dims, features=2)
    check_weights(weight, n, pooled)
    check_contiguous("norm", norm, (n, 4), pooled.dtype, pooled)
    found, z = (pooled.new_empty((pooled.shape[0], pooled.shape[2])) for _ in range(2))
    arguments = pooled, *three(weight), norm, found, z
    launch(known_kernel, z, dims, packed_maps.TAPPED, *arguments, STRIDES=strides_of(weight))
    return found, z
