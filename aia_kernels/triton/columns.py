"""Tiles of tokens by columns: the geometry in which external attention's kernels see the logits, and A made of them.

A kernel sees B samples of N tokens by M columns as tiles [BT, BM]. The columns are laid out in a tile so that groups do
not straddle tiles: a tile holds whole groups, each padded to a power of two, and a group wider than the widest tile
takes several tiles, its *pieces*. What one program normalizes is a *span*: the groups of one tile, or all pieces of one
group. With r the maximum of log P over a token's group,

    log P = L - lse        A = exp(log P - r) / norm        norm = eps exp(-r) + sum over the group of exp(log P - r)

so that nothing overflows, and A is right where P itself underflows. A fused kernel makes A from the logits as it needs
it: r and norm come from its own tile, or, for groups in pieces, from a pass before it (double_norm.normalizer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

#: Columns of the widest tile: wider ones leave a tile of tl.dot too few tokens, or too many elements to a thread.
WIDEST = 128

#: Columns of a tile that holds several groups, where there are as many.
COLUMNS = 64

#: Programs that a launch should have: two for each SM of an H200. The interpreter's cost is per program.
PROGRAMS = 1 if INTERPRETED else 264

#: The least length of an axis of tl.dot.
LEAST = 16


class Columns(NamedTuple):
    """Compile-time geometry of the columns: `heads` times `width` of them, in groups of `group`.

    A tile has `block` columns, in parts of `padded`, one for each group: `padded` is the power of two that holds a
    group, or `block` if there is none.
    """

    heads: int
    width: int
    group: int
    block: int
    padded: int


def columns(heads: int, width: int, group: int, most: int = COLUMNS) -> Columns:
    """The geometry with tiles of up to ``most`` columns, or of one group if that is wider."""
    padded = min(triton.next_power_of_2(group), WIDEST)
    block = max(padded, LEAST, min(most, padded * triton.next_power_of_2(width // group)))
    return Columns(heads, width, group, block, padded)


@triton.constexpr_function
def column_count(c):
    """M."""
    return c.heads * c.width


@triton.constexpr_function
def group_count(c):
    """Groups of a token."""
    return c.heads * c.width // c.group


@triton.constexpr_function
def pieces(c):
    """Tiles of a span."""
    return -(-c.group // c.block)


@triton.constexpr_function
def spans(c):
    """Spans of a head."""
    return -(-(c.width // c.group) // (c.block // c.padded))


def row_count(n: int, m: int, group: int) -> int:
    """Numbers kept with the logits [N, M] of a sample: lse and, for groups in pieces, r and norm by token and group."""
    return m + (2 * n * (m // group) if pieces.fn(columns(1, m, group)) > 1 else 0)


@triton.constexpr_function
def packed(c):
    """Whether a tile has no gaps between its groups."""
    return c.group == c.padded


@triton.jit
def place(n, HEADS: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr):
    """Sample (int64), block of tokens, head and part of it (a span, say) of this program.

    Programs of the same tokens are neighbours, so that they share what they read of them.
    """
    pid = tl.program_id(0)
    part = pid % PARTS
    pid = pid // PARTS
    head = pid % HEADS
    pid = pid // HEADS
    blocks = tl.cdiv(n, BT)
    return (pid // blocks).to(tl.int64), pid % blocks, head, part


@triton.jit
def tokens_at(b, block, n, padding_ptr, BT: tl.constexpr, WIDE: tl.constexpr):
    """Tokens t [BT] of a block, which are inside the sample, and which of those are not padding."""
    t = block * BT + tl.arange(0, BT)
    inside = t < n
    if WIDE:
        t = t.to(tl.int64)
    shown = inside
    if padding_ptr is not None:
        shown = inside & (tl.load(padding_ptr + b * n + t, mask=inside, other=1) == 0)
    return t, inside, shown


@triton.jit
def columns_at(head, span, piece, C: tl.constexpr):
    """Columns m [BM] of a tile, which of them exist, and their groups among all of a token."""
    BLOCK: tl.constexpr = C.block
    PADDED: tl.constexpr = C.padded
    GROUP: tl.constexpr = C.group
    WIDTH: tl.constexpr = C.width
    i = tl.arange(0, BLOCK)
    group = span * (BLOCK // PADDED) + i // PADDED
    if packed(C):
        m = span * BLOCK + i
        exists = m < WIDTH
    else:
        within = piece * BLOCK + i % PADDED
        m = group * GROUP + within
        exists = (within < GROUP) & (m < WIDTH)
    return head * WIDTH + m, exists, head * (WIDTH // GROUP) + group


@triton.jit
def along(t, AXIS: tl.constexpr, MAXIMUM: tl.constexpr):
    """The maximum or the sum along an axis, which stays."""
    return tl.max(t, AXIS, keep_dims=True) if MAXIMUM else tl.sum(t, AXIS, keep_dims=True)


@triton.jit
def over_group(t, PADDED: tl.constexpr, MAXIMUM: tl.constexpr):
    """The maximum (NaN may be passed over) or sum of each token's group, [BT, BM], or [BT, 1] if the tile is one."""
    BT: tl.constexpr = t.shape[0]
    BM: tl.constexpr = t.shape[1]
    if BM == PADDED:
        result = along(t, 1, MAXIMUM)
    else:
        result = along(tl.reshape(t, [BT, BM // PADDED, PADDED]), 2, MAXIMUM)
        result = tl.reshape(tl.broadcast_to(result, [BT, BM // PADDED, PADDED]), [BT, BM])
    return result


@triton.jit
def group_sum(t, PADDED: tl.constexpr):
    return over_group(t, PADDED, False)


@triton.jit
def group_max(t, PADDED: tl.constexpr):
    return over_group(t, PADDED, True)


@triton.jit
def finite(maximum):
    """What to subtract before exp: the maximum, or 0 where there is nothing above -inf."""
    return tl.where(maximum == float("-inf"), 0, maximum)


@triton.jit
def column_max(t):
    """The maximum of each column, NaN if it holds one: tl.max passes over NaN."""
    return tl.where(tl.max((t != t).to(tl.int32), 0) > 0, float("nan"), tl.max(t, 0))


@triton.jit
def load_tile(ptr, t, m, mask, M: tl.constexpr):
    """A tile of a contiguous [N, M], zero where the mask is not set."""
    return tl.load(ptr + (t[:, None] * M + m[None, :]), mask=mask, other=0)


@triton.jit
def log_p_tile(logits_ptr, lse_ptr, t, m, mask, M: tl.constexpr, ACC: tl.constexpr):
    """L - lse, and -inf where the mask is not set."""
    lse = tl.load(lse_ptr + m, mask=m < M, other=0)
    log_p = load_tile(logits_ptr, t, m, mask, M).to(ACC) - lse[None, :]
    return tl.where(mask, log_p, float("-inf"))


@triton.jit
def norm_of(total, r, EPS: tl.constexpr):
    """norm, from the sum of exp(log P - r) over the group."""
    if EPS > 0:
        total += tl.exp(-r) * tl.full([1, 1], EPS, r.dtype)
    return total


@triton.jit
def token_rows(n, C: tl.constexpr):
    """N * M / group, int64 though n may be a constant."""
    return (tl.zeros([], tl.int64) + n) * group_count(C)


@triton.jit
def attention_tile(
    attention_ptr,  # A or the logits, [N, M]
    rows_ptr,  # [row_count] or None
    n,
    t,
    shown,
    head,
    span,
    piece,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A of a sample at a tile [BT, BM], 0 at padding and outside: stored, or, with rows, made from the logits."""
    M: tl.constexpr = column_count(C)
    GROUPS: tl.constexpr = group_count(C)
    m, exists, _ = columns_at(head, span, piece, C)
    mask = shown[:, None] & exists[None, :]
    if rows_ptr is None:
        a = load_tile(attention_ptr, t, m, mask, M).to(ACC)
    else:
        log_p = log_p_tile(attention_ptr, rows_ptr, t, m, mask, M, ACC)
        if pieces(C) == 1:
            r = finite(group_max(log_p, C.padded))
            e = tl.exp(log_p - r)
            norm = norm_of(group_sum(e, C.padded), r, EPS)
        else:
            at = rows_ptr + M + t * GROUPS + head * (GROUPS // C.heads) + span
            r = tl.load(at, mask=shown, other=0)[:, None]
            norm = tl.load(at + token_rows(n, C), mask=shown, other=1)[:, None]
            e = tl.exp(log_p - r)
        a = tl.where(mask, e / norm, 0)
    return a


@triton.jit
def store_column_sums(partial_ptr, b, block, n, t, m, exists, q, C: tl.constexpr):
    """The sums of a tile over its tokens into partial [B, blocks, M]."""
    M: tl.constexpr = column_count(C)
    BT: tl.constexpr = t.shape[0]
    tl.store(partial_ptr + (b * tl.cdiv(n, BT) + block) * M + m, tl.sum(q, 0), mask=exists)


@triton.jit
def store_statistics(partial_ptr, b, block, n, logits, m, exists, shown, C: tl.constexpr):
    """Maximum and sum of exp(logit - maximum) of each column over the tokens of a tile: partial [B, blocks, 2, M]."""
    M: tl.constexpr = column_count(C)
    BT: tl.constexpr = logits.shape[0]
    logits = tl.where(shown[:, None], logits, float("-inf"))
    maximum = column_max(logits)
    total = tl.sum(tl.exp(logits - finite(maximum)[None, :]), 0)
    partial_ptr += (b * tl.cdiv(n, BT) + block) * (2 * M) + m
    tl.store(partial_ptr, maximum, mask=exists)
    tl.store(partial_ptr + M, total, mask=exists)


def is_wide(elements: int) -> bool:
    """Whether offsets among so many elements take 64 bits."""
    return elements >= 2**31


def as_bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def token_block(b: int, n: int, others: int, most: int) -> int:
    """Tokens of a tile: a power of two up to ``most``, the fewer the fewer programs there are for each block."""
    block = max(min(most, triton.next_power_of_2(n)), LEAST)
    while block > LEAST and b * triton.cdiv(n, block) * others < PROGRAMS:
        block //= 2
    return block
