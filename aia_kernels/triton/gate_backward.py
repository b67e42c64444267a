"""The transposes of the gate on packed maps (gate.py): of its sigmoid, normalization and convolution.

Three launches. What follows a sum over the batch joins the parts of all programs itself, each program anew. The
gradients of the weights, which nothing follows, are joined by the program that ends last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import packed_maps, tiles
from .checks import check_contiguous, check_packed, check_same, check_weights
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
    tap_offset,
    three,
)


@triton.jit
def store_taps(weight_ptr, taps, m, CHANNEL: tl.constexpr, STRIDES: tl.constexpr, i: tl.constexpr):
    """Store taps [32] of a channel as those of map i, if m is this one."""
    tap = tl.arange(0, 32)
    to = weight_ptr + tap_offset(tap, CHANNEL, STRIDES, i)
    tl.store(to, taps.to(weight_ptr.dtype.element_ty), mask=tap < tl.where(m == i, 27, 0))


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
    launch(grad_z_kernel, z, dims, packed_maps.FLAT, *arguments, parts=parts.shape[1])
    partial = partial_sums(z, dims, packed_maps.TAPPED, 54)
    arguments = grad_z, pooled, *three(weight), grad_pooled, partial, *three(grad_weight), ended
    constants = {"STRIDES": strides_of(weight), "GRAD_STRIDES": strides_of(grad_weight)}
    rows = triton.next_power_of_2(min(partial.shape[1], 256 // z.element_size()))
    launch(conv_backward_kernel, z, dims, packed_maps.TAPPED, *arguments, **constants, ROWS=rows)
    return grad_pooled, grad_weight, affine


def _check_gradient(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> int:
    """How many maps there are."""
    n = check_packed("z", z, dims)
    check_same("grad_gate", grad_gate, z, "z")
    check_contiguous("norm", norm, (n, 4), z.dtype, z)
    return n


def _reduced(grad_gate: Tensor, z: Tensor, norm: Tensor, dims: Sequence[int]) -> Tensor:
    """The sums of du and of du * xhat of each program's part, [n, P, 2]."""
    partial = partial_sums(z, dims, packed_maps.FLAT, 2)
    launch(backward_reduce_kernel, z, dims, packed_maps.FLAT, grad_gate, z, norm, partial)
    return partial
