"""The gate on packed maps: 3x3x3 convolution 2 -> 1, normalization, sigmoid, and their transposes.

All maps of a context share a launch: program (i, m) takes tasks i, i + P, i + 2P, ... of map m, a task being a block
of one map of one clip. Sums over the batch and a map are kept lane by lane in a program, reduced once at its end and
then joined over the P programs in their order, so two runs give the same bits.

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
def load_taps(weight_ptr, m, CHANNEL: tl.constexpr):
    """The 27 taps of a channel (0 maximum, 1 mean) of map m, [32, 1]."""
    tap = tl.arange(0, 32)[:, None]
    return tl.load(weight_ptr + m * 54 + CHANNEL * 27 + tap, mask=tap < 27, other=0)


@triton.jit
def normalize(z, norm_ptr, m):
    """xhat = (z - mean) * rstd."""
    return (z - tl.load(norm_ptr + 4 * m)) * tl.load(norm_ptr + 4 * m + 1)


@triton.jit
def activate(xhat, norm_ptr, m):
    """sigmoid(weight * xhat + bias)."""
    return 1 / (1 + tl.exp(-(tl.load(norm_ptr + 4 * m + 2) * xhat + tl.load(norm_ptr + 4 * m + 3))))


@triton.jit
def join_moments(count, mean, squares):
    """Count, mean and sum of squared deviations of the union of samples (of none, mean and squares are 0)."""
    total = tl.sum(count, 0)
    joined = tiles.quotient(tl.sum(count * mean, 0), tl.maximum(total, 1))
    return total, joined, tl.sum(squares + count * (mean - joined) * (mean - joined), 0)


@tiles.launched
def conv_kernel(
    pooled_ptr, weight_ptr, z_ptr, partial_ptr, batch, DIMS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """z = conv(pooled), and count, mean and squared deviations of the z of this program: partial [n, P, 3]."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    weight_max, weight_mean = load_taps(weight_ptr, m, 0), load_taps(weight_ptr, m, 1)
    count, mean, squares = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        b, position = split(task, size, BLOCK)
        at, exists = b * M + start + position, position < size
        distance, valid = neighbours(position, m, 1, DIMS)
        near = pooled_ptr + (at + b * M)[None, :] + distance
        valid &= exists[None, :]
        z = tl.sum(weight_max * tl.load(near, mask=valid, other=0), 0)
        z += tl.sum(weight_mean * tl.load(near + M, mask=valid, other=0), 0)
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


@triton.constexpr_function
def chosen(values, i):
    return values[i]


@tiles.launched
def norm_kernel(
    partial_ptr,
    given_ptr,
    norm_ptr,
    statistics_ptr,
    programs,
    EPS: tl.constexpr,
    USES_BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each map is normalized by, norm [n, 4] and statistics [n, 3] as in schemas.py, from partial [n, P, 3] and
    given [n, 4], scale, shift, mean and variance. USES_BATCH: whether a map uses the statistics of the batch.
    """
    i = tl.arange(0, BLOCK)
    valid = i < programs
    for m in tl.static_range(len(EPS)):
        at = partial_ptr + (m * programs + i) * 3
        count = tl.load(at, mask=valid, other=0)
        mean = tl.load(at + 1, mask=valid, other=0)
        squares = tl.load(at + 2, mask=valid, other=0)
        count, mean, squares = join_moments(count, mean, squares)
        if chosen(USES_BATCH, m):
            var = tiles.quotient(squares, count)
            share = tiles.quotient(1.0, count)
        else:
            mean = tl.load(given_ptr + 4 * m + 2)
            var = tl.load(given_ptr + 4 * m + 3)
            share = count * 0
        tl.store(norm_ptr + 4 * m, mean)
        tl.store(norm_ptr + 4 * m + 1, tiles.quotient(1.0, tiles.root(var + chosen(EPS, m))))
        tl.store(norm_ptr + 4 * m + 2, tl.load(given_ptr + 4 * m))
        tl.store(norm_ptr + 4 * m + 3, tl.load(given_ptr + 4 * m + 1))
        tl.store(statistics_ptr + 3 * m, mean)
        tl.store(statistics_ptr + 3 * m + 1, var)
        tl.store(statistics_ptr + 3 * m + 2, share)


@tiles.launched
def activate_kernel(z_ptr, norm_ptr, gate_ptr, batch, DIMS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """gate = sigmoid(weight * xhat + bias)."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm_ptr, m)
        tl.store(gate_ptr + at, activate(xhat, norm_ptr, m), mask=exists)


@tiles.launched
def backward_reduce_kernel(
    grad_gate_ptr, z_ptr, norm_ptr, partial_ptr, batch, DIMS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of du and of du * xhat of this program, partial [n, P, 2]; du = grad_gate * gate * (1 - gate)."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    sum_du, sum_du_xhat = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm_ptr, m)
        gate = activate(xhat, norm_ptr, m)
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
    sums_ptr,
    statistics_ptr,
    grad_z_ptr,
    batch,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = scale * rstd * (du - mean du - xhat * mean (du * xhat)), the means being sums times the share."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    scale = tl.load(norm_ptr + 4 * m + 1) * tl.load(norm_ptr + 4 * m + 2)
    # Not sums * 0 where statistics are fixed: a NaN in one clip must not reach the others.
    share = tl.load(statistics_ptr + 3 * m + 2)
    mean_du = tl.where(share > 0, tl.load(sums_ptr + 2 * m) * share, 0.0)
    mean_du_xhat = tl.where(share > 0, tl.load(sums_ptr + 2 * m + 1) * share, 0.0)
    for task in range(tl.program_id(0), batch * tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at, exists = elements(task, start, size, M, BLOCK)
        xhat = normalize(tl.load(z_ptr + at, mask=exists, other=0), norm_ptr, m)
        gate = activate(xhat, norm_ptr, m)
        du = tl.load(grad_gate_ptr + at, mask=exists, other=0) * gate * (1 - gate)
        # A product with zero is left out: an infinite z would make a NaN of it.
        corrected = tl.where(mean_du_xhat == 0, 0.0, xhat * mean_du_xhat)
        tl.store(grad_z_ptr + at, scale * (du - mean_du - corrected), mask=exists)


@tiles.launched
def conv_backward_kernel(
    grad_z_ptr,
    pooled_ptr,
    weight_ptr,
    grad_pooled_ptr,
    partial_ptr,
    batch,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_pooled[p] = sum over taps k of weight[k] * dz[p - k], and the share of this program, partial [n, P, 54], of
    grad_weight[k] = sum over p of pooled[p] * dz[p - k]: both read the same neighbours of dz."""
    m = tl.program_id(1)
    start, size = place(m, DIMS)
    ACC: tl.constexpr = grad_z_ptr.dtype.element_ty
    weight_max, weight_mean = load_taps(weight_ptr, m, 0), load_taps(weight_ptr, m, 1)
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
    partial_ptr += (m * tl.num_programs(0) + tl.program_id(0)) * 54 + tap
    tl.store(partial_ptr, tl.sum(grad_max, 1), mask=tap < 27)
    tl.store(partial_ptr + 27, tl.sum(grad_mean, 1), mask=tap < 27)


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
    z, partial = _conv(pooled, weight, dims)
    norm, statistics = pooled.new_empty((n, 4)), pooled.new_empty((n, 3))
    given, programs = _given(pooled, scale, shift, mean, var, batch), partial.shape[1]
    constants = {"EPS": tuple(eps), "USES_BATCH": tuple(batch), "BLOCK": triton.next_power_of_2(programs)}
    tiles.launch(norm_kernel, z, (1,), partial, given, norm, statistics, programs, **constants)
    _launch(activate_kernel, z, dims, FLAT, z, norm, z)
    return z, norm, statistics


def gate_again(pooled: Tensor, weight: Sequence[Tensor], norm: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gates [B, M] from norm [n, 4], and their z."""
    n = check_packed("pooled", pooled, dims, features=2)
    check_weights(weight, n, pooled)
    check_contiguous("norm", norm, (n, 4), pooled.dtype, pooled)
    z, _ = _conv(pooled, weight, dims)
    found = torch.empty_like(z)
    _launch(activate_kernel, z, dims, FLAT, z, norm, found)
    return found, z


def gate_backward_reduce(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> Tensor:
    """[n, 2]: sums over batch and map of du and of du * xhat."""
    _check_gradient(grad_gate, z, norm, dims)
    partial = _partial(z, dims, FLAT, 2)
    _launch(backward_reduce_kernel, z, dims, FLAT, grad_gate, z, norm, partial)
    return partial.sum(1)


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
    if sums is None:
        sums = gate_backward_reduce(grad_gate, z, norm, dims)
    grad_z, grad_pooled = torch.empty_like(z), torch.empty_like(pooled)
    partial = _partial(z, dims, TAPPED, 54)
    _launch(grad_z_kernel, z, dims, FLAT, grad_gate, z, norm, sums, statistics, grad_z)
    _launch(conv_backward_kernel, z, dims, TAPPED, grad_z, pooled, _arranged(weight, z), grad_pooled, partial)
    total = partial.sum(1).view(-1, 1, 2, 3, 3, 3)
    grad_weight = [torch.empty_like(w).copy_(grad) for w, grad in zip(weight, total, strict=True)]
    return grad_pooled, grad_weight, sums.to(weight[0].dtype)


def _check_gradient(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> int:
    """How many maps there are."""
    n = check_packed("z", z, dims)
    check_same("grad_gate", grad_gate, z, "z")
    check_contiguous("norm", norm, (n, 4), z.dtype, z)
    return n


def _conv(pooled: Tensor, weight: Sequence[Tensor], dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """z [B, M], and the count, mean and squared deviations of each program's part [n, P, 3]."""
    z = pooled.new_empty((pooled.shape[0], pooled.shape[2]))
    partial = _partial(z, dims, TAPPED, 3)
    _launch(conv_kernel, z, dims, TAPPED, pooled, _arranged(weight, z), z, partial)
    return z, partial


def _arranged(weight: Sequence[Tensor], z: Tensor) -> Tensor:
    """[n, 2, 3, 3, 3] contiguous, in the type of the maps."""
    return torch.cat(weight).to(z.dtype).contiguous()


def _given(
    pooled: Tensor,
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    mean: Sequence[Tensor | None],
    var: Sequence[Tensor | None],
    batch: Sequence[bool],
) -> Tensor:
    """The four numbers of each of n maps, [4 n], 0 or 1 where one is absent and anything where it is not looked at."""
    unread, flat, default = pooled.view(-1)[:1], [], None
    for uses_batch, *numbers in zip(batch, scale, shift, mean, var, strict=True):
        fixed = not uses_batch
        for number, absent, read in zip(numbers, (1, 0, 0, 1), (True, True, fixed, fixed), strict=True):
            if number is None and read:
                default = torch.arange(2, dtype=pooled.dtype, device=pooled.device) if default is None else default
                number = default[absent : absent + 1]
            flat.append(number.reshape(1) if read else unread)
    return torch.cat(flat).to(pooled.dtype)


def _programs(z: Tensor, dims: Sequence[int], block: int) -> int:
    largest = max(map_size.fn(dims, i) for i in range(len(dims) // 3))
    return min(z.shape[0] * triton.cdiv(largest, block), PROGRAMS)


def _partial(z: Tensor, dims: Sequence[int], block: int, width: int) -> Tensor:
    """A workspace for the sums of each program of a launch: [n, P, width]."""
    return z.new_empty((len(dims) // 3, _programs(z, dims, block), width))


def _launch(kernel, z: Tensor, dims: Sequence[int], block: int, *args) -> None:
    """Launch P programs for each map."""
    grid = (_programs(z, dims, block), len(dims) // 3)
    warps = 8 if z.element_size() == 8 else 4
    tiles.launch(kernel, z, grid, *args, z.shape[0], DIMS=tuple(dims), M=z.shape[1], BLOCK=block, num_warps=warps)
