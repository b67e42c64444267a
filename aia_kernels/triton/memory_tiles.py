"""What the passes of attention by a memory per sample share in Triton: tiles of rows by tokens, and sums over tokens.

A kernel sees rows [p, N] of a sample, tokens contiguous, as tiles [BR, BT]. What normalizes over the features of a head
walks over its rows, tile after tile, for BT tokens; it meets them up to three times, all but the first in cache. A
softmax over tokens knows no heads: a first launch walks over strips of tokens, and what follows joins the strips of its
rows.

Sums over tokens are those of tiles, joined in the order of the tokens: two runs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..reference.linear_attention import FEATURES
from . import tiles
from .columns import INTERPRETED, PROGRAMS, is_wide

#: Elements of a tile, 16 to a thread, its most rows and its fewest tokens: 64 bytes of a row in 16 bits.
ELEMENTS = 1 << 14 if INTERPRETED else 2048
ROWS, TOKENS = 32, 32

#: Rows of a tile of a softmax over tokens, its fewest tokens, and the strips of which its statistics come.
STRIP_ROWS, STRIP_TOKENS, STRIPS = 4, 128, 32

#: Their places in FEATURES.
L2, SOFTMAX = (tl.constexpr(FEATURES.index(name)) for name in ("l2", "softmax"))


class Memory(NamedTuple):
    """Compile-time geometry of logits [B, 2 H d, N]: R rows of phi in each head, tiles of ``block`` rows by ``tokens``,
    and whether offsets within a sample take 64 bits."""

    feature: int
    heads: int
    d: int
    rows: int
    block: int
    tokens: int
    wide: bool


def memory(logits: Tensor, feature: int, heads: int, over_tokens: bool = False) -> Memory:
    """The geometry of a pass; over_tokens: of one that meets rows one by one."""
    b, columns, n = logits.shape
    d = columns // 2 // heads
    block = STRIP_ROWS if over_tokens else min(triton.next_power_of_2(d), ROWS)
    fewest = STRIP_TOKENS if over_tokens else TOKENS
    tokens = max(min(ELEMENTS * 4 // max(logits.element_size(), 4) // block, triton.next_power_of_2(n)), fewest)
    others = triton.cdiv(columns // 2, block) if over_tokens else heads
    while tokens > fewest and b * triton.cdiv(n, tokens) * others < PROGRAMS:
        tokens //= 2
    rows = d + (1 if feature == L2.value else 0)
    return Memory(feature, heads, d, rows, block, tokens, is_wide((rows + 2 * d) * heads * n))


def dtype_of_rows(logits: Tensor) -> torch.dtype:
    """That of rows: the products that follow take bfloat16 as it is, and all else in the wider type."""
    return torch.bfloat16 if logits.dtype == torch.bfloat16 else accumulate_dtype(logits.dtype)


def launch(kernel, logits: Tensor, of: Memory, *args, **constants) -> None:
    """One program for each head and block of tokens of logits."""
    blocks = triton.cdiv(logits.shape[2], of.tokens)
    grid = (logits.shape[0] * of.heads * blocks,)
    tiles.launch(kernel, logits, grid, *args, **constants, G=of, num_warps=warps(logits, of))


def warps(logits: Tensor, of: Memory) -> int:
    """So many that a thread has 16 elements of a tile, or eight in 64 bits: it reads 16 bytes at once."""
    return min(max(of.block * of.tokens * max(logits.element_size(), 4) // 2048, 1), 4)


@triton.constexpr_function
def row_blocks(g):
    """Tiles of rows of a softmax over tokens, which knows no heads."""
    return -(-(g.heads * g.d) // g.block)


@triton.jit
def rows_from(first, count, G: tl.constexpr):
    """Rows r [BR] from the first on, and which of them are below a count."""
    r = first + tl.arange(0, G.block)
    exists = r < count
    if G.wide:
        r = r.to(tl.int64)
    return r, exists


@triton.jit
def load_rows(ptr, r, t, mask, n):
    """A tile of contiguous rows [p, N], zero where the mask is not set."""
    return tl.load(ptr + (r[:, None] * n + t[None, :]), mask=mask, other=0)


@triton.jit
def store_rows(ptr, r, t, v, mask, n):
    tl.store(ptr + (r[:, None] * n + t[None, :]), v.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def one_over(v):
    return tiles.quotient(tl.full(v.shape, 1, v.dtype), v)


@triton.jit
def no_zero(v):
    """1 where it is zero."""
    return tl.where(v == 0, 1, v)


@triton.jit
def softplus(z):
    """log(1 + exp(z)), without loss where it is small or large."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    # log(u) has the rounding of u, of which u - 1 tells.
    small = tl.where(u == 1, e, tl.log(u) * tiles.quotient(e, tl.where(u == 1, 1, u - 1)))
    return tl.where(z > 0, z, 0) + small


@triton.jit
def sigmoid(z):
    return one_over(1 + tl.exp(-z))


@triton.jit
def inverse_lengths(z_ptr, t, shown, n, G: tl.constexpr, ACC: tl.constexpr):
    """1 / |z| of each token, [BT], over the rows from z on; 1 where that is zero."""
    BT: tl.constexpr = G.tokens
    square = tl.zeros([BT], ACC)
    for first in range(0, G.d, G.block):
        r, exists = rows_from(first, G.d, G)
        z = load_rows(z_ptr, r, t, exists[:, None] & shown[None, :], n).to(ACC)
        square += tl.sum(z * z, 0)
    return one_over(tiles.root(no_zero(square)))


@triton.jit
def strip_at(i, strip, blocks, n, b, padding_ptr, G: tl.constexpr):
    """Tokens of the i-th tile of a strip, and which of them take part."""
    t = (strip * blocks + i) * G.tokens + tl.arange(0, G.tokens)
    shown = t < n
    if G.wide:
        t = t.to(tl.int64)
    if padding_ptr is not None:
        shown = shown & (tl.load(padding_ptr + b * n + t, mask=shown, other=1) == 0)
    return t, shown


@triton.jit
def load_parts(partial_ptr, r, exists, strips, MISSING: tl.constexpr, STRIPS: tl.constexpr):
    """What strips of tokens have of each row, [BR, STRIPS], of [p, strips]."""
    i = tl.arange(0, STRIPS)
    mask = exists[:, None] & (i < strips)[None, :]
    return tl.load(partial_ptr + (r[:, None] * strips + i[None, :]), mask=mask, other=MISSING)


@tiles.launched
def join_kernel(
    partial_ptr,  # [B H, blocks, COLUMNS + 1, or without a total COLUMNS]
    sums_ptr,  # [B H, R]
    total_ptr,  # [1] or None
    programs,  # B H
    blocks,
    COLUMNS: tl.constexpr,  # R, or 0 where sums are 0
    R: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """Sums over the blocks of tokens, by heads, and of the last column over all heads."""
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    PARTS: tl.constexpr = (R + BR - 1) // BR
    WIDTH: tl.constexpr = COLUMNS + (0 if total_ptr is None else 1)
    pid = tl.program_id(0)
    i = tl.arange(0, BP).to(tl.int64)
    if pid < programs * PARTS:
        head = (pid // PARTS).to(tl.int64)
        r = pid % PARTS * BR + tl.arange(0, BR)
        sums = tl.zeros([BR], ACC)
        if COLUMNS > 0:
            for first in range(0, blocks, BP):
                at = partial_ptr + (head * blocks + first + i)[:, None] * WIDTH + r[None, :]
                sums += tl.sum(tl.load(at, mask=(first + i < blocks)[:, None] & (r < R)[None, :], other=0), 0)
        tl.store(sums_ptr + head * R + r, sums, mask=r < R)
    elif total_ptr is not None:
        parts = programs.to(tl.int64) * blocks
        total = tl.zeros([BP], ACC)
        for start in range(0, parts, BP):
            at = partial_ptr + (start + i) * WIDTH + COLUMNS
            total += tl.load(at, mask=start + i < parts, other=0)
        tl.store(total_ptr, tl.sum(total, 0))


def join(partial: Tensor, sums: Tensor, total: Tensor | None = None) -> None:
    """Writes sums [B, H R] and the total [1] of partial [B, H, blocks, columns], as join_kernel says."""
    b, heads, blocks, width = partial.shape
    rows = sums.shape[1] // heads
    block = min(triton.next_power_of_2(rows), ROWS)
    parts = min(triton.next_power_of_2(blocks), ELEMENTS // block)
    grid = (b * heads * triton.cdiv(rows, block) + (total is not None),)
    counts = b * heads, blocks
    constants = {"COLUMNS": width - (total is not None), "R": rows, "BR": block, "BP": parts, "num_warps": 4}
    tiles.launch(join_kernel, partial, grid, partial, sums, total, *counts, **constants)


def strips_of(n: int, of: Memory) -> tuple[int, int]:
    """Tiles of a strip, and the strips of a row of n tokens."""
    blocks = triton.cdiv(triton.cdiv(n, of.tokens), STRIPS)
    return blocks, triton.cdiv(n, of.tokens * blocks)
