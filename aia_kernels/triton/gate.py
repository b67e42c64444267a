"""The gate on packed maps: 3x3x3 convolution 2 -> 1, normalization, sigmoid, and their transposes.

All maps of a context share a launch: program (i, m) takes tasks i, i + P, i + 2P, ... of map m, a task being a block
of one map of one clip. Sums over the batch and a map are kept lane by lane in a program, reduced once at its end and
then joined over the P programs in their order, so two runs give the same bits.

Launches: gate two, or one where no map uses the statistics of the batch; gate_again one; gate_backward three. What
follows a sum over the batch joins the parts of all programs itself, each program anew, and parameters are read where
they lie: a network of small maps is bound by its launches. The gradients of the weights, which nothing follows, are
joined by the program that ends last.

A convolution holds its 27 taps as an axis of a block, [32, BLOCK], next to BLOCK neighbouring elements of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .checks import check_contiguous, check_norms, check_packed, check_same, check_weights

INTERPRETED = triton.knobs.runtime.interpret

#: Elements of a map in a block of taps: with 27 taps and two accumulators, one element to each of 128 threads.
TAPPED = 4096 if INTERPRETED else 128

#: Elements of a map in a block of an elementwise pass.
FLAT = 1 << 16 if INTERPRETED else 1024

#: Most programs for a map, the length of the sums joined at the end: 4 on each SM of an H200.
PROGRAMS = 512


@triton.constexpr_function
def map_count(dims):
    return len(dims) // 3


@triton.constexpr_function
def map_size(dims, i):
    return math.prod(dims[3 * i : 3 * i + 3])


@triton.jit
def place(m, DIMS: tl.constexpr):
    """Start of map m in the packed tensor, and its size."""
    start = tl.zeros([], tl.int32)
    size = start + map_size(DIMS, 0)
    for i in tl.static_range(1, map_count(DIMS)):
        start = tl.where(m >= i, start + map_size(DIMS, i - 1), start)
        size = tl.where(m >= i, map_size(DIMS, i), size)
    return start, size


@triton.jit
def length(m, AXIS: tl.constexpr, DIMS: tl.constexpr):
    """Length of an axis (0 to 2, in stored order) of map m."""
    found = tl.zeros([], tl.int32) + DIMS[AXIS]
    for i in tl.static_range(1, map_count(DIMS)):
        found = tl.where(m >= i, DIMS[3 * i + AXIS], found)
    return found


@triton.jit
def split(task, size, BLOCK: tl.constexpr):
    """Clip (int64) of a task, and its positions [BLOCK] in the map."""
    blocks = tl.cdiv(size, BLOCK)
    return (task // blocks).to(tl.int64), task % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def elements(task, start, size, M: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK] of the elements of a task in a packed [B, M], and which exist."""
    b, position = split(task, size, BLOCK)
    return b * M + start + position, position < size


@triton.jit
def neighbours(position, m, SIGN: tl.constexpr, DIMS: tl.constexpr):
    """For each tap [32, 1] and position [1, BLOCK] of map m: the distance in memory to the neighbour at +tap or -tap,
    and whether tap and neighbour exist."""
    d0, d1, d2 = length(m, 0, DIMS), length(m, 1, DIMS), length(m, 2, DIMS)
    tap = tl.arange(0, 32)[:, None]
    k0, k1, k2 = (tap // 9 - 1) * SIGN, (tap // 3 % 3 - 1) * SIGN, (tap % 3 - 1) * SIGN
    position = position[None, :]
    i0, i1, i2 = position // (d1 * d2) + k0, position // d2 % d1 + k1, position % d2 + k2
    valid = (tap < 27) & (i0 >= 0) & (i0 < d0) & (i1 >= 0) & (i1 < d1) & (i2 >= 0) & (i2 < d2)
    return (k0 * d1 + k1) * d2 + k2, valid


@triton.jit
def tap_offset(tap, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, i: tl.constexpr):
    """Where taps of a channel (0 maximum, 1 mean) lie in the weight of map i."""
    at = CHANNEL * STRIDES[4 * i] + tap // 9 * STRIDES[4 * i + 1]
    return at + tap // 3 % 3 * STRIDES[4 * i + 2] + tap % 3 * STRIDES[4 * i + 3]


@triton.jit
def taps_of(weight_ptr, m, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, i: tl.constexpr, ACC: tl.constexpr):
    """The 27 taps of a channel of map i, [32, 1]; zeros where m is another one."""
    tap = tl.arange(0, 32)[:, None]
    mask = tap < tl.where(m == i, 27, 0)
    return tl.load(weight_ptr + tap_offset(tap, CHANNEL, STRIDES, i), mask=mask, other=0).to(ACC)


@triton.jit
def load_taps(
    weight0_ptr, weight1_ptr, weight2_ptr, m, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, ACC: tl.constexpr
):
    """The 27 taps of a channel of map m, [32, 1], in the type of the maps; the weights may be of several."""
    taps = taps_of(weight0_ptr, m, CHANNEL, STRIDES, 0, ACC)
    if weight1_ptr is not None:
        taps += taps_of(weight1_ptr, m, CHANNEL, STRIDES, 1, ACC)
        taps += taps_of(weight2_ptr, m, CHANNEL, STRIDES, 2, ACC)
    return taps


@triton.jit
def store_taps(weight_ptr, taps, m, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, i: tl.constexpr):
    """Store taps [32] of a channel as those of map i, if m is this one."""
    tap = tl.arange(0, 32)
    to = weight_ptr + tap_offset(tap, CHANNEL, STRIDES, i)
    tl.store(to, taps.to(weight_ptr.dtype.element_ty), mask=tap < tl.where(m == i, 27, 0))


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
def load_norm(norm_ptr, m):
    """mean, rstd, scale and shift of map m, from [n, 4]."""
    norm_ptr += 4 * m
    return tl.load(norm_ptr), tl.load(norm_ptr + 1), tl.load(norm_ptr + 2), tl.load(norm_ptr + 3)


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
def normalize(z, norm):
    """xhat = (z - mean) * rstd."""
    return (z - norm[0]) * norm[1]


@triton.jit
def activate(xhat, norm):
    """sigmoid(weight * xhat + bias)."""
    return 1 / (1 + tl.exp(-(norm[2] * xhat + norm[3])))


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


@tiles.launched
def backward_reduce_kernel(
    grad_gate_ptr, z_ptr, norm_ptr, partial_ptr, batch, DIMS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of du and of du * xhat of this program, partial [n, P, 2]; du = grad_gate * gate * (1 - gate)."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    norm = load_norm(norm_ptr, m)
    sum_du, sum_du_xhat = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm)
        gate = activate(xhat, norm)
        du = tl.load(grad_gate_ptr + at, mask=exists, other=0) * gate * (1 - gate)
        sum_du += du
        sum_du_xhat += du * xhat
    partial_ptr += (m * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(partial_ptr, tl.sum(sum_du, 0))
    tl.store(partial_ptr + 1, tl.sum(sum_du_xhat, 0))


@tiles.launched
def grad_z_kernel(
    grad_gate_ptr,
    z_ptr,
    norm_ptr,
    partial_ptr,
    statistics_ptr,
    grad_z_ptr,
    grad_affine_ptr,
    ended_ptr,
    batch,
    programs,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dz = scale * rstd * (du - mean du - xhat * mean (du * xhat)), the means being sums times the share. The sums are
    those of partial [n, P, 2] over P, and are stored, [n, 2]. Clears ended [n] for conv_backward_kernel."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    norm = load_norm(norm_ptr, m)
    i = tl.arange(0, PROGRAMS)
    part, valid = partial_ptr + (m * programs + i) * 2, i < programs
    sum_du = tl.sum(tl.load(part, mask=valid, other=0), 0)
    sum_du_xhat = tl.sum(tl.load(part + 1, mask=valid, other=0), 0)
    first = tl.program_id(0) == 0
    tl.store(grad_affine_ptr + 2 * m, sum_du.to(grad_affine_ptr.dtype.element_ty), mask=first)
    tl.store(grad_affine_ptr + 2 * m + 1, sum_du_xhat.to(grad_affine_ptr.dtype.element_ty), mask=first)
    tl.store(ended_ptr + m, 0, mask=first)
    # Not sums * 0 where statistics are fixed: a NaN in one clip must not reach the others.
    share = tl.load(statistics_ptr + 3 * m + 2)
    mean_du = tl.where(share > 0, sum_du * share, 0.0)
    mean_du_xhat = tl.where(share > 0, sum_du_xhat * share, 0.0)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm)
        gate = activate(xhat, norm)
        du = tl.load(grad_gate_ptr + at, mask=exists, other=0) * gate * (1 - gate)
        # A product with zero is left out: an infinite z would make a NaN of it.
        corrected = tl.where(mean_du_xhat == 0, 0.0, xhat * mean_du_xhat)
        tl.store(grad_z_ptr + at, norm[1] * norm[2] * (du - mean_du - corrected), mask=exists)


@triton.jit
def joined_taps(partial_ptr, programs, ROWS: tl.constexpr):
    """The sum over programs of the taps [32] of a channel, which lie 54 apart."""
    tap, row = tl.arange(0, 32)[None, :], tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, 32], partial_ptr.dtype.element_ty)
    for first in range(0, programs, ROWS):
        valid = (first + row < programs) & (tap < 27)
        total += tl.load(partial_ptr + (first + row) * 54 + tap, mask=valid, other=0)
    return tl.sum(total, 0)


@triton.jit
def join_taps(
    partial_ptr,
    grad_weight0_ptr,
    grad_weight1_ptr,
    grad_weight2_ptr,
    ended_ptr,
    m,
    STRIDES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of the weight of map m from partial [n, P, 54], by the program of the map that ends last."""
    programs = tl.num_programs(0)
    # All threads of the program have stored; then its end is counted, and what it stored is seen by whoever counts on.
    tl.debug_barrier()
    if tl.atomic_add(ended_ptr + m, 1, sem="acq_rel", scope="gpu") == programs - 1:
        partial_ptr += m * programs * 54
        for channel in tl.static_range(2):
            taps = joined_taps(partial_ptr + 27 * channel, programs, ROWS)
            store_taps(grad_weight0_ptr, taps, m, channel, STRIDES, 0)
            if grad_weight1_ptr is not None:
                store_taps(grad_weight1_ptr, taps, m, channel, STRIDES, 1)
                store_taps(grad_weight2_ptr, taps, m, channel, STRIDES, 2)


@tiles.launched
def conv_backward_kernel(
    grad_z_ptr,
    pooled_ptr,
    weight0_ptr,
    weight1_ptr,
    weight2_ptr,
    grad_pooled_ptr,
    partial_ptr,
    grad_weight0_ptr,
    grad_weight1_ptr,
    grad_weight2_ptr,
    ended_ptr,
    batch,
    STRIDES: tl.constexpr,
    GRAD_STRIDES: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_pooled[p] = sum over taps k of weight[k] * dz[p - k], and grad_weight[k] = sum over p of pooled[p] *
    dz[p - k]: both read the same neighbours of dz. ended [n]: how many programs have ended, 0 before the launch."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = grad_z_ptr.dtype.element_ty
    weight_max = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 0, STRIDES, ACC)
    weight_mean = load_taps(weight0_ptr, weight1_ptr, weight2_ptr, m, 1, STRIDES, ACC)
    grad_max, grad_mean = tl.zeros([32, BLOCK], ACC), tl.zeros([32, BLOCK], ACC)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        b, position = split(task, size, BLOCK)
        at, exists = b * M + start + position, position < size
        distance, valid = neighbours(position, m, -1, DIMS)
        near = tl.load(grad_z_ptr + at[None, :] + distance, mask=valid & exists[None, :], other=0)
        at += b * M
        tl.store(grad_pooled_ptr + at, tl.sum(weight_max * near, 0), mask=exists)
        tl.store(grad_pooled_ptr + at + M, tl.sum(weight_mean * near, 0), mask=exists)
        grad_max += tl.load(pooled_ptr + at, mask=exists, other=0)[None, :] * near
        grad_mean += tl.load(pooled_ptr + at + M, mask=exists, other=0)[None, :] * near
    tap = tl.arange(0, 32)
    own = partial_ptr + (m * tl.num_programs(0) + tl.program_id(0)) * 54 + tap
    tl.store(own, tl.sum(grad_max, 1), mask=tap < 27)
    tl.store(own + 27, tl.sum(grad_mean, 1), mask=tap < 27)
    join_taps(partial_ptr, grad_weight0_ptr, grad_weight1_ptr, grad_weight2_ptr, ended_ptr, m, GRAD_STRIDES, ROWS)


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
    numbers = [number for of in (scale, shift, *fixed) for number in _three(of)]
    z = pooled.new_empty((pooled.shape[0], pooled.shape[2]))
    weights, eps = {"STRIDES": _strides(weight)}, tuple(eps)
    if not any(batch):
        arguments = pooled, *_three(weight), *numbers, z, norm, statistics
        _launch(fixed_kernel, z, dims, TAPPED, *arguments, EPS=eps, **weights)
        return z, norm, statistics
    partial = _partial(z, dims, TAPPED, 3)
    _launch(conv_kernel, z, dims, TAPPED, pooled, *_three(weight), z, partial, **weights)
    constants = {"EPS": eps, "USES_BATCH": tuple(map(int, batch)), "parts": partial.shape[1]}
    _launch(activate_kernel, z, dims, FLAT, z, partial, *numbers, norm, statistics, **constants)
    return z, norm, statistics


def gate_again(pooled: Tensor, weight: Sequence[Tensor], norm: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gates [B, M] from norm [n, 4], and their z."""
    n = check_packed("pooled", pooled, dims, features=2)
    check_weights(weight, n, pooled)
    check_contiguous("norm", norm, (n, 4), pooled.dtype, pooled)
    found, z = (pooled.new_empty((pooled.shape[0], pooled.shape[2])) for _ in range(2))
    arguments = pooled, *_three(weight), norm, found, z
    _launch(known_kernel, z, dims, TAPPED, *arguments, STRIDES=_strides(weight))
    return found, z


def gate_backward_reduce(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> Tensor:
    """[n, 2]: sums over batch and map of du and of du * xhat."""
    _check_gradient(grad_gate, z, norm, dims)
    return _reduced(grad_gate, z, norm, dims).sum(1)


def gate_backward(
    grad_gate: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    statistics: Tensor,
    pooled: Tensor,
    weight: Sequence[Tensor],
    dims: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of pooled [B, 2, M] and of each weight, through sigmoid, norm and convolution, and the sums."""
    n = _check_gradient(grad_gate, z, norm, dims)
    if sums is not None:
        check_contiguous("sums", sums, (n, 2), z.dtype, z)
    check_contiguous("statistics", statistics, (n, 3), z.dtype, z)
    check_contiguous("pooled", pooled, (z.shape[0], 2, z.shape[1]), z.dtype, z)
    check_weights(weight, n, z)
    parts = _reduced(grad_gate, z, norm, dims) if sums is None else sums.view(n, 1, 2)
    grad_z, grad_pooled = torch.empty_like(z), torch.empty_like(pooled)
    grad_weight = [torch.empty_like(w) for w in weight]
    affine, ended = weight[0].new_empty((n, 2)), z.new_empty((n,), dtype=torch.int32)
    arguments = grad_gate, z, norm, parts, statistics, grad_z, affine, ended
    _launch(grad_z_kernel, z, dims, FLAT, *arguments, parts=parts.shape[1])
    partial = _partial(z, dims, TAPPED, 54)
    arguments = grad_z, pooled, *_three(weight), grad_pooled, partial, *_three(grad_weight), ended
    constants = {"STRIDES": _strides(weight), "GRAD_STRIDES": _strides(grad_weight)}
    rows = triton.next_power_of_2(min(partial.shape[1], 256 // z.element_size()))
    _launch(conv_backward_kernel, z, dims, TAPPED, *arguments, **constants, ROWS=rows)
    return grad_pooled, grad_weight, affine


def _check_gradient(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> int:
    """How many maps there are."""
    n = check_packed("z", z, dims)
    check_same("grad_gate", grad_gate, z, "z")
    check_contiguous("norm", norm, (n, 4), z.dtype, z)
    return n


def _reduced(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> Tensor:
    """The sums of du and of du * xhat of each program's part, [n, P, 2]."""
    partial = _partial(z, dims, FLAT, 2)
    _launch(backward_reduce_kernel, z, dims, FLAT, grad_gate, z, norm, partial)
    return partial


def _three(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What belongs to each map, as kernels take it: None for maps that are not there."""
    return *tensors, *[None] * (3 - len(tensors))


def _strides(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each weight [1, 2, 3, 3, 3] the strides of its last four axes."""
    return tuple(stride for weight in weights for stride in weight.stride()[1:])


def _programs(z: Tensor, dims: Sequence[int], block: int) -> int:
    largest = max(map_size.fn(dims, i) for i in range(len(dims) // 3))
    return min(z.shape[0] * triton.cdiv(largest, block), PROGRAMS)


def _partial(z: Tensor, dims: Sequence[int], block: int, width: int) -> Tensor:
    """A workspace for the sums of each program of a launch: [n, P, width]."""
    return z.new_empty((len(dims) // 3, _programs(z, dims, block), width))


def _launch(kernel, z: Tensor, dims: Sequence[int], block: int, *args, parts: int = 0, **constants) -> None:
    """Launch P programs for each map. parts: of each map, the sums of an earlier launch that a program joins."""
    grid = (_programs(z, dims, block), len(dims) // 3)
    constants |= {"DIMS": tuple(dims), "M": z.shape[1], "BLOCK": block}
    counts = [z.shape[0]]
    if parts:
        counts, constants = [*counts, parts], constants | {"PROGRAMS": triton.next_power_of_2(parts)}
    warps = 8 if z.element_size() == 8 else 4
    tiles.launch(kernel, z, grid, *args, *counts, **constants, num_warps=warps)
