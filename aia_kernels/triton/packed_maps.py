"""Packed maps in Triton: where their elements, neighbours and parameters lie, and the launch of a pass over them.

All maps of a context share a launch: program (i, m) takes tasks i, i + P, i + 2P, ... of map m, a task being a block
of one map of one clip. Sums over the batch and a map are kept lane by lane in a program, reduced once at its end and
then joined over the P programs in their order, so two runs give the same bits.

A convolution holds its 27 taps as an axis of a block, [32, BLOCK], next to BLOCK neighbouring elements of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tiles

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
def load_norm(norm_ptr, m):
    """mean, rstd, scale and shift of map m, from [n, 4]."""
    norm_ptr += 4 * m
    return tl.load(norm_ptr), tl.load(norm_ptr + 1), tl.load(norm_ptr + 2), tl.load(norm_ptr + 3)


@triton.jit
def normalize(z, norm):
    """xhat = (z - mean) * rstd."""
    return (z - norm[0]) * norm[1]


@triton.jit
def activate(xhat, norm):
    """sigmoid(weight * xhat + bias)."""
    return 1 / (1 + tl.exp(-(norm[2] * xhat + norm[3])))


def three(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What belongs to each map, as kernels take it: None for maps that are not there."""
    return *tensors, *[None] * (3 - len(tensors))


def strides_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each weight [1, 2, 3, 3, 3] the strides of its last four axes."""
    return tuple(stride for weight in weights for stride in weight.stride()[1:])


def _programs(z: Tensor, dims: Sequence[int], block: int) -> int:
    largest = max(map_size.fn(dims, i) for i in range(len(dims) // 3))
    return min(z.shape[0] * triton.cdiv(largest, block), PROGRAMS)


def partial_sums(z: Tensor, dims: Sequence[int], block: int, width: int) -> Tensor:
    """A workspace for the sums of each program of a launch: [n, P, width]."""
    return z.new_empty((len(dims) // 3, _programs(z, dims, block), width))


def launch(kernel, z: Tensor, dims: Sequence[int], block: int, *args, parts: int = 0, **constants) -> None:
    """Launch P programs for each map. parts: of each map, the sums of an earlier launch that a program joins."""
    grid = (_programs(z, dims, block), len(dims) // 3)
    constants |= {"DIMS": tuple(dims), "M": z.shape[1], "BLOCK": block}
    counts = [z.shape[0]]
    if parts:
        counts, constants = [*counts, parts], constants | {"PROGRAMS": triton.next_power_of_2(parts)}
    warps = 8 if z.element_size() == 8 else 4
    tiles.launch(kernel, z, grid, *args, *counts, **constants, num_warps=warps)
