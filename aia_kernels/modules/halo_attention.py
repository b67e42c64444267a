"""Attention of blocks to their surroundings (HaloNet, arXiv 2103.12731), with both published layouts of parameters.

A block of b x b queries looks at the window of (b + 2 halo)^2 positions around it. Relative positions are learned by
row and by column:

    o_i = softmax over the window of (scale q_i k_j^T + q_i R_h[row j - row i] + q_i R_w[column j - column i]) v_j

In PyTorch's own attention on every backend; nothing of this package's passes serves it. Where FlexAttention runs
(flex_attention_runs) it adds the terms of the positions to each score. Elsewhere, in scaled_dot_product_attention, they
join the product: q_i gets its terms for each row and each column of the window as further features, and k_j which row
and which column it is in. So no map of attention is added to another, and padding is a row or a column whose term is
the lowest number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tracing import needs_reference
from ..functional.checks import check_at_least_one, check_beside, check_tensor
from ..functional.dot_product import attention_of_made


class HaloAttention(nn.Module):
    """HaloNet's attention on maps, with the parameters of halonet-pytorch; positions beyond the map are left out.

    It takes x [B, dim, H, W], H and W multiples of block_size, and returns o of that shape.

    Args:
        dim: The channels of x.
        block_size: b.
        halo_size: How many positions a window is larger than its block on each side.
        dim_head: The features of a head.
        heads: Their number.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1; in forward, x is none of these maps.
    """

    def __init__(self, *, dim: int, block_size: int, halo_size: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        check_at_least_one(dim=dim, block_size=block_size, halo_size=halo_size, dim_head=dim_head, heads=heads)
        self.dim, self.heads, self.scale = dim, heads, dim_head**-0.5
        self.block_size, self.halo_size = block_size, halo_size
        self.rel_pos_emb = _Positions(("rel_height", "rel_width"), block_size + 2 * halo_size, dim_head, self.scale)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim)

    def forward(self, x: Tensor) -> Tensor:
        _check_maps(x, self.dim, self.block_size, self.rel_pos_emb.rel_height)
        by_position = x.movedim(1, -1)
        q = self.to_q(by_position) * self.scale
        k, v = self.to_kv(by_position).chunk(2, -1)
        q, k, v = (_heads_first(t, self.heads) for t in (q, k, v))
        tables: Any = (self.rel_pos_emb.rel_height, self.rel_pos_emb.rel_width)
        o = _attend(q, k, v, tables, self.block_size, self.halo_size, masked=True)
        return self.to_out(o).movedim(-1, 1)


class HaloAttn(nn.Module):
    """HaloNet's attention on maps, with the parameters of timm's layer; positions beyond the map are zeros, as there.

    It takes x [B, dim, H, W], H and W multiples of block_size, and returns o [B, dim_out, H, W].

    Args:
        dim: The channels of x.
        dim_out: Those of o; None: dim.
        num_heads: The heads, a divisor of dim_out.
        dim_head: The features of keys and queries of a head; None: dim_out / num_heads.
        block_size: b.
        halo_size: How many positions a window is larger than its block on each side.
        qkv_bias: Whether queries, keys and values have biases.
        scale_pos_embed: Whether the terms of the positions are scaled as the products with the keys are.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or dim_out no multiple of num_heads; in forward, x is
            none of these maps.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qkv_bias: bool = False,
        scale_pos_embed: bool = False,
    ):
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        check_at_least_one(dim=dim, dim_out=dim_out, num_heads=num_heads, block_size=block_size, halo_size=halo_size)
        if dim_out % num_heads:
            raise ValueError(f"dim_out: got {dim_out}, expected a multiple of num_heads = {num_heads}")
        dim_head = dim_out // num_heads if dim_head is None else dim_head
        check_at_least_one(dim_head=dim_head)
        self.dim, self.num_heads, self.scale = dim, num_heads, dim_head**-0.5
        self.block_size, self.halo_size, self.scale_pos_embed = block_size, halo_size, scale_pos_embed
        self.keys = num_heads * dim_head
        self.q = nn.Conv2d(dim, self.keys, 1, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, self.keys + dim_out, 1, bias=qkv_bias)
        self.pos_embed = _Positions(("height_rel", "width_rel"), block_size + 2 * halo_size, dim_head, self.scale)
        for weight in (self.q.weight, self.kv.weight):
            nn.init.trunc_normal_(weight, std=dim**-0.5)
        for table in self.pos_embed.parameters():
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        _check_maps(x, self.dim, self.block_size, self.pos_embed.height_rel)
        q = self.q(x).movedim(1, -1)
        # As published, each head has its keys and its values side by side.
        kv = self.kv(x).movedim(1, -1).unflatten(-1, (self.num_heads, -1)).movedim(-2, 1)
        k, v = kv.split((self.keys // self.num_heads, kv.shape[-1] - self.keys // self.num_heads), -1)
        tables: Any = (self.pos_embed.height_rel, self.pos_embed.width_rel)
        if not self.scale_pos_embed:
            tables = tuple(t / self.scale for t in tables)
        q = _heads_first(q * self.scale, self.num_heads)
        return _attend(q, k, v, tables, self.block_size, self.halo_size, masked=False).movedim(-1, 1)


class _Positions(nn.Module):
    """The two tables of relative positions [2 window - 1, d], by rows and by columns, under their published names."""

    def __init__(self, names: tuple[str, str], window: int, features: int, scale: float):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(2 * window - 1, features) * scale))


def _attend(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, ...], block: int, halo: int, masked: bool) -> Tensor:
    """o [B, H, W, heads * v] of q, k and v [B, heads, H, W, features], q scaled."""
    b, heads, h, w, _ = q.shape
    in_blocks = functools.partial(_in_blocks, block=block, halo=halo, masked=masked)
    if flex_attention_runs(q, v):
        o = _by_flex_attention(*_as_samples(*in_blocks(q, k, v, *tables)))
    else:  # windows overlap, so they are several times as large as what they are made of
        o = attention_of_made(lambda *tensors: _with_places(*in_blocks(*tensors)), q, k, v, *tables)
    o = o.view(b, heads, h // block, w // block, block, block, v.shape[-1])  # heads, rows, columns, b, b
    return o.permute(0, 2, 4, 3, 5, 1, 6).reshape(b, h, w, heads * v.shape[-1])


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, column_table: Tensor, block: int, halo: int, masked: bool
) -> tuple[Tensor, ...]:
    """The queries of each block [B, heads, rows, columns, b, b, d], views of the keys and values of its window
    [B, heads, rows, columns, window, window, features], and the terms of a query for each row and each column of the
    window [B, heads, rows, columns, b, b, window]."""
    h, w, window = q.shape[2], q.shape[3], block + 2 * halo
    q = q.unflatten(3, (-1, block)).unflatten(2, (-1, block)).transpose(3, 4)  # [B, heads, rows, columns, b, b, d]
    difference = torch.arange(window, device=q.device) - torch.arange(block, device=q.device).unsqueeze(1) + window - 1
    by_row, by_column = (table[difference] for table in (row_table, column_table))  # [b, window, d]
    rows, columns = q @ by_row.mT, (q.transpose(4, 5) @ by_column.mT).transpose(4, 5)
    if masked:
        lowest = torch.finfo(q.dtype).min / 4  # twice of it is still a number
        rows = rows.masked_fill(_outside(h, block, halo, q.device).view(1, 1, -1, 1, 1, 1, window), lowest)
        columns = columns.masked_fill(_outside(w, block, halo, q.device).view(1, 1, 1, -1, 1, 1, window), lowest)
    return q, _windows(k, block, halo), _windows(v, block, halo), rows, columns


def _as_samples(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[blocks, 1, places, features] of each of _in_blocks: each block of each head is a sample, of four axes, which
    PyTorch's kernels ask for."""
    return tuple(t.flatten(4, 5).flatten(0, 3).unsqueeze(1) for t in tensors)


def _with_places(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of a dot product for those of _in_blocks: the terms of a query are further features of
    it, and a key has a 1 where its row and its column are."""
    window = rows.shape[-1]
    one_hot = torch.eye(window, dtype=k.dtype, device=k.device).expand(window, -1, -1)
    places = torch.cat((one_hot.transpose(0, 1), one_hot), -1)
    return _as_samples(torch.cat((q, rows, columns), -1), torch.cat((k, places.expand(*k.shape[:-1], -1)), -1), v)


def flex_attention_runs(q: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention serves queries [..., d] and values: compiled, on a CUDA device of capability 8.0
    or more, in float32, bfloat16 or float16, with 16 features or more of a head, where no derivatives beyond the first
    of reverse mode are followed. Elsewhere it has no backward (a CPU), or makes the whole map (uncompiled)."""
    if not q.is_cuda or q.dtype == torch.float64 or min(q.shape[-1], v.shape[-1]) < 16 or not q.numel():
        return False
    return not needs_reference() and torch.cuda.get_device_capability(q.device) >= (8, 0)


@functools.cache
def _flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled; imported at its first use, as it brings torch's compiler with it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _by_flex_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """o [blocks, 1, b^2, v] of _as_samples, the terms added to each score where it is made."""
    window = rows.shape[-1]
    rows, columns = rows.squeeze(1), columns.squeeze(1)

    def with_terms(score: Tensor, block: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[block, query, key // window] + columns[block, query, key % window]

    return _flex_attention()(q, k, v, score_mod=with_terms, scale=1.0)


def _windows(t: Tensor, block: int, halo: int) -> Tensor:
    """A view [B, heads, rows, columns, window, window, d] of t [B, heads, H, W, d] with zeros around it."""
    padded, window = nn.functional.pad(t, (0, 0, halo, halo, halo, halo)), block + 2 * halo
    return padded.unfold(2, window, block).unfold(3, window, block).movedim(4, -1)


def _outside(length: int, block: int, halo: int, device: torch.device) -> Tensor:
    """Whether a place of the window of each block along an axis is beyond the map, [blocks, window]."""
    starts = torch.arange(0, length, block, device=device).unsqueeze(1) - halo
    places = starts + torch.arange(block + 2 * halo, device=device)
    return (places < 0) | (places >= length)


def _heads_first(t: Tensor, heads: int) -> Tensor:
    """[B, heads, H, W, d] of t [B, H, W, heads * d]."""
    return t.unflatten(-1, (heads, -1)).movedim(-2, 1)


def _check_maps(x: Tensor, channels: int, block: int, parameter: Any) -> None:
    check_tensor("x", x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
    if x.shape[2] % block or x.shape[3] % block or not x.shape[2] * x.shape[3]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected H and W multiples of block_size = {block}, not 0")
    check_beside("x", x, parameter)
