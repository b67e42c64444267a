"""The keys of attention by a memory per sample: phi(k) and the way back. Tiles: memory_tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from . import tiles
from .checks import check_apart, check_contiguous, check_memory_logits, check_memory_reached, check_memory_rows
from .columns import as_bytes, finite, place, tokens_at
from .memory_tiles import (
    L2,
    SOFTMAX,
    Memory,
    dtype_of_rows,
    inverse_lengths,
    join,
    launch,
    load_parts,
    load_rows,
    memory,
    no_zero,
    one_over,
    row_blocks,
    rows_from,
    sigmoid,
    softplus,
    store_rows,
    strip_at,
    strips_of,
    warps,
)


@tiles.launched
def keys_kernel(
    logits_ptr,  # the keys of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    rows_ptr,  # [B, PITCH, N]
    partial_ptr,  # [B, H, blocks, R]
    n,
    PITCH: tl.constexpr,
    G: tl.constexpr,
):
    """phi(k) of each token alone, and its sums over the tokens of a block."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    UNIT: tl.constexpr = G.rows - G.d
    b, block, head, _ = place(n, G.heads, 1, G.tokens)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, G.tokens, G.wide)
    z_ptr = logits_ptr + (b * (2 * G.heads) + head) * G.d * n
    rows_ptr += (b * PITCH + head * G.rows) * n
    partial_ptr += ((b * G.heads + head) * tl.cdiv(n, G.tokens) + block) * G.rows
    if G.feature == L2:
        inverse = inverse_lengths(z_ptr, t, shown, n, G, ACC)
        ones = shown.to(ACC)
        tl.store(rows_ptr + t, ones.to(rows_ptr.dtype.element_ty), mask=inside)
        tl.store(partial_ptr, tl.sum(ones, 0))
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        mask = exists[:, None] & shown[None, :]
        z = load_rows(z_ptr, r, t, mask, n).to(ACC)
        v = tl.where(mask, z * inverse[None, :] if G.feature == L2 else softplus(z), 0)
        store_rows(rows_ptr + UNIT * n, r, t, v, exists[:, None] & inside[None, :], n)
        tl.store(partial_ptr + UNIT + r, tl.sum(v, 1), mask=exists)


@tiles.launched
def statistics_kernel(
    logits_ptr,  # the keys of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    partial_ptr,  # [B, 2, H d, strips]
    n,
    blocks,  # tiles of a strip
    G: tl.constexpr,
):
    """Of each row of keys the maximum and the sum of exp(logit - maximum) over the tokens of a strip."""
    BLOCK: tl.constexpr = G.block
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    M: tl.constexpr = G.heads * G.d
    strips = tl.cdiv(n, G.tokens * blocks)
    pid = tl.program_id(0)
    strip, part, b = pid % strips, pid // strips % row_blocks(G), (pid // (strips * row_blocks(G))).to(tl.int64)
    r, exists = rows_from(part * G.block, M, G)
    logits_ptr += b * (2 * M) * n
    maximum, total = tl.full([BLOCK], float("-inf"), ACC), tl.zeros([BLOCK], ACC)
    for i in range(blocks):
        t, shown = strip_at(i, strip, blocks, n, b, padding_ptr, G)
        mask = exists[:, None] & shown[None, :]
        z = tl.where(mask, load_rows(logits_ptr, r, t, mask, n).to(ACC), float("-inf"))
        larger = tl.maximum(maximum, tl.max(z, 1))
        origin = finite(larger)
        total = total * tl.exp(maximum - origin) + tl.sum(tl.exp(z - origin[:, None]), 1)
        maximum = larger
    partial_ptr += b * (2 * M) * strips + r * strips + strip
    tl.store(partial_ptr, maximum, mask=exists)
    tl.store(partial_ptr + M * strips, total, mask=exists)


@tiles.launched
def softmax_kernel(
    logits_ptr,  # the keys of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    statistics_ptr,  # [B, 2, H d, strips]
    rows_ptr,  # [B, PITCH, N]
    sums_ptr,  # [B, H d] or None
    partial_ptr,  # [B, H d, blocks] or None
    n,
    blocks,  # strips
    PITCH: tl.constexpr,
    STRIPS: tl.constexpr,
    G: tl.constexpr,
):
    """A softmax over tokens by the statistics of strips; its sum where all tokens are here, else those of blocks."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    M: tl.constexpr = G.heads * G.d
    b, block, _, part = place(n, 1, row_blocks(G), G.tokens)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, G.tokens, G.wide)
    r, exists = rows_from(part * G.block, M, G)
    statistics_ptr += b * (2 * M) * blocks
    maxima = load_parts(statistics_ptr, r, exists, blocks, float("-inf"), STRIPS)
    origin = finite(tl.max(maxima, 1))
    total = load_parts(statistics_ptr + M * blocks, r, exists, blocks, 0, STRIPS)
    total = tl.sum(total * tl.exp(maxima - origin[:, None]), 1)
    factor = one_over(no_zero(total))
    mask = exists[:, None] & shown[None, :]
    z = load_rows(logits_ptr + b * (2 * M) * n, r, t, mask, n).to(ACC)
    v = tl.where(mask, tl.exp(z - origin[:, None]) * factor[:, None], 0)
    store_rows(rows_ptr + b * PITCH * n, r, t, v, exists[:, None] & inside[None, :], n)
    if sums_ptr is not None:
        tl.store(sums_ptr + b * M + r, total * factor, mask=exists)  # every block of tokens the same
    if partial_ptr is not None:
        tl.store(partial_ptr + (b * M + r) * tl.cdiv(n, G.tokens) + block, tl.sum(v, 1), mask=exists)


@triton.jit
def gradients_of(reached_ptr, grad_sums_ptr, r, t, exists, mask, n, ACC: tl.constexpr):
    """Of a tile of phi(k): what reached it, and the gradient of its sums."""
    return load_rows(reached_ptr, r, t, mask, n).to(ACC) + tl.load(grad_sums_ptr + r, exists, 0)[:, None]


@tiles.launched
def keys_backward_kernel(
    logits_ptr,  # the keys of [B, 2 H d, N]
    padding_ptr,  # [B, N] or None
    reached_ptr,  # [B, H R, N]
    grad_sums_ptr,  # [B, H R]
    rows_ptr,  # its place in [B, H R + 2 H d, N]
    n,
    G: tl.constexpr,
):
    """The gradient of keys whose phi is of each token alone, which is made again."""
    BT: tl.constexpr = G.tokens
    ACC: tl.constexpr = grad_sums_ptr.dtype.element_ty
    UNIT: tl.constexpr = G.rows - G.d
    b, block, head, _ = place(n, G.heads, 1, G.tokens)
    t, inside, shown = tokens_at(b, block, n, padding_ptr, G.tokens, G.wide)
    z_ptr = logits_ptr + (b * (2 * G.heads) + head) * G.d * n
    reached_ptr += ((b * G.heads + head) * G.rows + UNIT) * n
    grad_sums_ptr += (b * G.heads + head) * G.rows + UNIT
    rows_ptr += (b * (G.heads * (G.rows + 2 * G.d)) + head * G.d) * n
    if G.feature == L2:
        inverse = inverse_lengths(z_ptr, t, shown, n, G, ACC)
        along = tl.zeros([BT], ACC)
        for first in range(0, G.d, G.block):
            r, exists = rows_from(first, G.d, G)
            mask = exists[:, None] & shown[None, :]
            grad = gradients_of(reached_ptr, grad_sums_ptr, r, t, exists, mask, n, ACC)
            along += tl.sum(load_rows(z_ptr, r, t, mask, n).to(ACC) * inverse[None, :] * grad, 0)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        mask = exists[:, None] & shown[None, :]
        z = load_rows(z_ptr, r, t, mask, n).to(ACC)
        grad = gradients_of(reached_ptr, grad_sums_ptr, r, t, exists, mask, n, ACC)
        if G.feature == L2:
            grad = (grad - z * inverse[None, :] * along[None, :]) * inverse[None, :]
        else:
            grad = grad * sigmoid(z)
        store_rows(rows_ptr, r, t, tl.where(mask, grad, 0), exists[:, None] & inside[None, :], n)


@tiles.launched
def reduced_kernel(
    phi_ptr,  # phi(k) of [B, 3 H d, N]
    reached_ptr,  # [B, H d, N]
    grad_sums_ptr,  # [B, H d]
    partial_ptr,  # [B, H d, strips]
    n,
    blocks,  # tiles of a strip
    G: tl.constexpr,
):
    """The sum of phi(k) times its gradient over the tokens of a strip, where phi is a softmax over tokens."""
    BLOCK: tl.constexpr = G.block
    ACC: tl.constexpr = grad_sums_ptr.dtype.element_ty
    M: tl.constexpr = G.heads * G.d
    strips = tl.cdiv(n, G.tokens * blocks)
    pid = tl.program_id(0)
    strip, part, b = pid % strips, pid // strips % row_blocks(G), (pid // (strips * row_blocks(G))).to(tl.int64)
    r, exists = rows_from(part * G.block, M, G)
    grad_sum = tl.load(grad_sums_ptr + b * M + r, mask=exists, other=0)
    total = tl.zeros([BLOCK], ACC)
    for i in range(blocks):
        t, inside = strip_at(i, strip, blocks, n, b, None, G)
        mask = exists[:, None] & inside[None, :]
        grad = load_rows(reached_ptr + b * M * n, r, t, mask, n).to(ACC) + grad_sum[:, None]
        total += tl.sum(load_rows(phi_ptr + b * (3 * M) * n, r, t, mask, n).to(ACC) * grad, 1)
    tl.store(partial_ptr + (b * M + r) * strips + strip, total, mask=exists)


@tiles.launched
def softmax_backward_kernel(
    phi_ptr,  # phi(k) of [B, 3 H d, N]
    reached_ptr,  # [B, H d, N]
    grad_sums_ptr,  # [B, H d]
    reduced_ptr,  # [B, H d, strips]
    rows_ptr,  # the place of the gradient in [B, 3 H d, N]
    n,
    blocks,  # strips
    STRIPS: tl.constexpr,
    G: tl.constexpr,
):
    """The gradient of keys through a softmax over tokens."""
    ACC: tl.constexpr = grad_sums_ptr.dtype.element_ty
    M: tl.constexpr = G.heads * G.d
    b, block, _, part = place(n, 1, row_blocks(G), G.tokens)
    t, inside, _ = tokens_at(b, block, n, None, G.tokens, G.wide)
    r, exists = rows_from(part * G.block, M, G)
    mask = exists[:, None] & inside[None, :]
    reduced = tl.sum(load_parts(reduced_ptr + b * M * blocks, r, exists, blocks, 0, STRIPS), 1)
    shift = tl.load(grad_sums_ptr + b * M + r, mask=exists, other=0) - reduced
    grad = load_rows(reached_ptr + b * M * n, r, t, mask, n).to(ACC) + shift[:, None]
    phi = load_rows(phi_ptr + b * (3 * M) * n, r, t, mask, n).to(ACC)
    store_rows(rows_ptr + b * (3 * M) * n, r, t, phi * grad, mask, n)


def memory_keys(
    logits: Tensor, feature: int, heads: int, padding: Tensor | None, statistics: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor]:
    """The pass of this name in schemas.py; rows are bfloat16 where logits are."""
    check_memory_logits(logits, feature, heads, padding)
    b, columns, n = logits.shape
    half, wide = columns // 2, accumulate_dtype(logits.dtype)
    if statistics is not None:
        if feature != SOFTMAX.value:
            raise ValueError("statistics must be None but for a softmax")
        check_contiguous("statistics", statistics, (b, 2, half), wide, logits)
    of = memory(logits, feature, heads, over_tokens=feature == SOFTMAX.value)
    pitch, blocks = heads * of.rows + (columns if gradients else 0), triton.cdiv(n, of.tokens)
    rows = logits.new_empty((b, pitch, n), dtype=dtype_of_rows(logits))
    sums = logits.new_empty((b, heads * of.rows), dtype=wide)
    keys, phi, hidden = logits[:, :half], rows[:, : heads * of.rows], as_bytes(padding)
    if feature != SOFTMAX.value:
        partial = sums.new_empty((b, heads, blocks, of.rows))
        launch(keys_kernel, logits, of, keys, hidden, phi, partial, n, PITCH=pitch)
        join(partial, sums)
        return rows, sums
    strips, partial, own = 1, None, sums
    if statistics is None:
        tiles_of_strip, strips = strips_of(n, of)
        statistics = sums.new_empty((b, 2, half, strips))
        _over_strips(statistics_kernel, logits, of, strips, keys, hidden, statistics, n, tiles_of_strip)
    else:
        partial, own = sums.new_empty((b, half, blocks, 1)), None
    arguments = keys, hidden, statistics, phi, own, partial, n, strips
    _over_tokens(softmax_kernel, logits, of, *arguments, PITCH=pitch, STRIPS=triton.next_power_of_2(strips))
    if partial is not None:
        join(partial, sums)
    return rows, sums


def memory_keys_backward_(
    rows: Tensor,
    logits: Tensor,
    feature: int,
    heads: int,
    padding: Tensor | None,
    reached: Tensor,
    grad_sums: Tensor,
    reduced: Tensor | None,
) -> None:
    """The pass of this name in schemas.py."""
    check_memory_logits(logits, feature, heads, padding)
    of = memory(logits, feature, heads, over_tokens=feature == SOFTMAX.value)
    b, columns, n = logits.shape
    half, wide = columns // 2, accumulate_dtype(logits.dtype)
    check_memory_rows(rows, logits, heads * of.rows)
    check_memory_reached(reached, logits, heads * of.rows)
    check_contiguous("grad_sums", grad_sums, (b, heads * of.rows), wide, logits)
    check_apart("rows", rows, reached=reached, grad_sums=grad_sums, padding=padding)
    keys, phi, grad = logits[:, :half], rows[:, : heads * of.rows], rows[:, heads * of.rows : -half]
    if reduced is not None:
        if feature != SOFTMAX.value:
            raise ValueError("reduced must be None but for a softmax")
        check_contiguous("reduced", reduced, (b, half), wide, logits)
        check_apart("rows", rows, reduced=reduced)
    if feature != SOFTMAX.value:
        launch(keys_backward_kernel, logits, of, keys, as_bytes(padding), reached, grad_sums, grad, n)
        return
    strips = 1
    if reduced is None:
        tiles_of_strip, strips = strips_of(n, of)
        reduced = grad_sums.new_empty((b, half, strips))
        _over_strips(reduced_kernel, logits, of, strips, phi, reached, grad_sums, reduced, n, tiles_of_strip)
    arguments = phi, reached, grad_sums, reduced, grad, n, strips
    _over_tokens(softmax_backward_kernel, logits, of, *arguments, STRIPS=triton.next_power_of_2(strips))


def _over_strips(kernel, logits: Tensor, of: Memory, strips: int, *args) -> None:
    """One program for each tile of rows and strip of tokens."""
    grid = (logits.shape[0] * row_blocks.fn(of) * strips,)
    tiles.launch(kernel, logits, grid, *args, G=of, num_warps=warps(logits, of))


def _over_tokens(kernel, logits: Tensor, of: Memory, *args, **constants) -> None:
    """One program for each tile of rows and of tokens."""
    grid = (logits.shape[0] * row_blocks.fn(of) * triton.cdiv(logits.shape[2], of.tokens),)
    tiles.launch(kernel, logits, grid, *args, **constants, G=of, num_warps=warps(logits, of))
