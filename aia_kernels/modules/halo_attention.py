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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..common.layouts import CHANNELS_LAST, in_order, suggests_channels_last
from ..common.tracing import needs_reference
from ..functional.checks import check_at_least_one, check_beside, check_tensor
from ..functional.dot_product import attention_of_made, stay_in_cache
from .recorded import one_call
from .submodules import is_pointwise, must_be_called


class HaloAttention(nn.Module):
    """HaloNet's attention on maps, with the parameters of halonet-pytorch; positions beyond the map are left out.

    It takes x [B, dim, H, W], H and W multiples of block_size, and returns o of that shape, stored as storage has it.

    Args:
        dim: The channels of x.
        block_size: b.
        halo_size: How many positions a window is larger than its block on each side.
        dim_head: The features of a head.
        heads: Their number.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1; in forward, x is none of these maps.
    """

    #: "as x", or "contiguous" whatever x is, as the published layer has it: convert sets that.
    storage = "as x"

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
        if isinstance(x, Proxy):
            return one_call(self, HaloAttention.forward, x)
        embedding: Any = self.rel_pos_emb
        _check_maps(x, self.dim, self.block_size, embedding.rel_height)
        by_position = x.movedim(1, -1)
        q, kv = self.to_q(by_position), self.to_kv(by_position)
        # As published, all keys stand before all values.
        kv = kv.unflatten(3, (2, self.heads, -1)).permute(0, 4, 1, 2, 3, 5).flatten(4)
        plan = Plan(self.block_size, self.halo_size, kv.shape[-1] // 2, self.scale, self.scale, masked=True)
        o = _attend(_heads_first(q, self.heads), kv, embedding.rel_height, embedding.rel_width, plan)
        return in_order(self.to_out(_by_position(o)).movedim(-1, 1), _order(x, self.storage))


class HaloAttn(nn.Module):
    """HaloNet's attention on maps, with the parameters of timm's layer; positions beyond the map are zeros, as there.

    It takes x [B, dim, H, W], H and W multiples of block_size, and returns o [B, dim_out, H, W], stored as storage has
    it.

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

    #: "as x", or "contiguous" whatever x is, as the published layer has it: convert sets that.
    storage = "as x"

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
        if isinstance(x, Proxy):
            return one_call(self, HaloAttn.forward, x)
        embedding: Any = self.pos_embed
        _check_maps(x, self.dim, self.block_size, embedding.height_rel)
        q, kv = _projected(x, (self.q, self.kv))
        # As published, each head has its keys and its values side by side.
        q, kv = _heads_first(q, self.num_heads), _heads_first(kv, self.num_heads)
        of_terms = self.scale if self.scale_pos_embed else 1.0
        plan = Plan(self.block_size, self.halo_size, self.keys // self.num_heads, self.scale, of_terms, masked=False)
        o = _attend(q, kv, embedding.height_rel, embedding.width_rel, plan)
        return _by_position(o).movedim(-1, 1) if _order(x, self.storage) == CHANNELS_LAST else _by_channel(o)


def _projected(x: Tensor, convolutions: tuple[Any, ...]) -> list[Tensor]:
    """What 1x1 convolutions make of x, [B, H, W, features] each. As products that have positions for rows, nothing is
    turned, neither what they give nor its gradient."""
    if any(must_be_called(convolution) or not is_pointwise(convolution) for convolution in convolutions):
        return [convolution(x).movedim(1, -1) for convolution in convolutions]
    b, c, h, w = x.shape
    tokens, results = x.flatten(2).mT, []
    for convolution in convolutions:
        weight, bias = convolution.weight, convolution.bias
        matrix = weight.view(len(weight), c).mT.expand(b, -1, -1)
        result = torch.bmm(tokens, matrix) if bias is None else torch.baddbmm(bias, tokens, matrix)
        results.append(result.view(b, h, w, len(weight)))
    return results


class Plan(NamedTuple):
    """What is constant about a call: b and the halo, the features of a key, the factors of the products with the keys
    and of the terms of the positions, and whether positions beyond the map are left out."""

    block: int
    halo: int
    keys: int
    scale: float
    of_terms: float
    masked: bool


Blocks = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Positions(nn.Module):
    """The two tables of relative positions [2 window - 1, d], by rows and by columns, under their published names."""

    def __init__(self, names: tuple[str, str], window: int, features: int, scale: float):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(2 * window - 1, features) * scale))


def _attend(q: Tensor, kv: Tensor, row_table: Tensor, column_table: Tensor, plan: Plan) -> Tensor:
    """o of q [B, heads, H, W, d] and of keys and values side by side [B, heads, H, W, d + v], block by block:
    [B, heads, H / b, W / b, b, b, v]."""
    b, heads, h, w, _ = q.shape
    block, tensors = plan.block, (q, kv, row_table, column_table)
    if flex_attention_runs(q, kv[..., plan.keys :]):
        o = _by_flex_attention(*_in_blocks(plan, *tensors), plan.scale)
    elif stay_in_cache(*tensors):
        o = _with_terms(*_in_blocks(plan, *tensors), plan.scale)
    else:  # windows overlap, so they are several times as large as what they are made of
        o = attention_of_made(lambda *tensors: _with_places(*_in_blocks(plan, *tensors), plan.scale), *tensors)
    return o.view(b, heads, h // block, w // block, block, block, kv.shape[-1] - plan.keys)


def _by_position(o: Tensor) -> Tensor:
    """[B, H, W, heads * v] of _attend, contiguous."""
    b, heads, rows, columns, block, _, v = o.shape
    return o.permute(0, 2, 4, 3, 5, 1, 6).reshape(b, rows * block, columns * block, heads * v)


def _by_channel(o: Tensor) -> Tensor:
    """[B, heads * v, H, W] of _attend, contiguous."""
    b, heads, rows, columns, block, _, v = o.shape
    return o.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, heads * v, rows * block, columns * block)


def _order(x: Tensor, storage: str) -> tuple[int, ...]:
    """The order of axes in which a result is stored."""
    return CHANNELS_LAST if storage == "as x" and suggests_channels_last(x) else (0, 1, 2, 3)


def _in_blocks(plan: Plan, q: Tensor, kv: Tensor, row_table: Tensor, column_table: Tensor) -> Blocks:
    """Of each block of each head: its queries [blocks, b^2, d], the keys and the values of its window [blocks,
    window^2, features], and the terms of a query for each row and each column of the window [blocks, b^2, window]."""
    (b, heads, h, w, d), (block, halo, *_) = q.shape, plan
    rows, columns, places, window, entries = h // block, w // block, block**2, block + 2 * halo, len(row_table)
    blocks = b * heads * rows * columns
    q = q.view(b, heads, rows, block, columns, block, d).transpose(3, 4).reshape(blocks, places, d)
    # Every query meets all entries of both tables in one product. Those of its window begin one earlier for each row,
    # or each column, that it is further on: a stride from query to query that is one less.
    tables, step = torch.cat((row_table, column_table)), 2 * entries
    terms = q @ (tables if plan.of_terms == 1 else tables * plan.of_terms).mT
    by_row = terms.view(blocks, places * step)[:, window - 1 :].unfold(1, (block - 1) * step + window, block * step - 1)
    by_row = by_row.unfold(2, window, step).reshape(blocks, places, window)
    by_column = terms.view(blocks, block, block * step)[..., entries + window - 1 :].unfold(2, window, step - 1)
    by_column = by_column.reshape(blocks, places, window)
    if plan.masked:
        by_row = by_row.view(b * heads, rows, columns * places, window) + _beyond(by_row, h, block, halo)
        by_column = by_column.view(b * heads * rows, columns, places, window) + _beyond(by_column, w, block, halo)
        by_row, by_column = (t.view(blocks, places, window) for t in (by_row, by_column))
    padded = nn.functional.pad(kv, (0, 0, halo, halo, halo, halo))
    windows = padded.unfold(2, window, block).unfold(3, window, block).movedim(4, -1)
    windows = windows.reshape(blocks, window**2, kv.shape[-1])
    return q, windows[..., : plan.keys], windows[..., plan.keys :], by_row, by_column


def _with_terms(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """o [blocks, b^2, v] of _in_blocks, the terms added to the map of attention."""
    terms = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)
    return torch.baddbmm(terms, q, k.mT, alpha=scale).softmax(-1) @ v


def _with_places(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a dot product for those of _in_blocks, each block of each head a sample: the terms of
    a query are further features of it, and a key has a 1 where its row and its column are."""
    window = rows.shape[-1]
    one_hot = torch.eye(window, dtype=k.dtype, device=k.device).expand(window, -1, -1)
    places = torch.cat((one_hot.transpose(0, 1), one_hot), -1).flatten(0, 1)
    q, k = torch.cat((q * scale, rows, columns), -1), torch.cat((k, places.expand(k.shape[0], -1, -1)), -1)
    return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)


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


def _by_flex_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """o [blocks, 1, b^2, v] of _in_blocks, the terms added to each score where it is made."""
    window = rows.shape[-1]

    def with_terms(score: Tensor, block: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[block, query, key // window] + columns[block, query, key % window]

    q, k, v = (t.unsqueeze(1) for t in (q, k.contiguous(), v.contiguous()))  # of four axes, which its kernels ask for
    return _flex_attention()(q, k, v, score_mod=with_terms, scale=scale)


def _beyond(terms: Tensor, length: int, block: int, halo: int) -> Tensor:
    """What leaves out the places of a block's window along an axis that are beyond the map, [blocks, 1, window]: the
    lowest number there, and 0 elsewhere."""
    lowest = torch.finfo(terms.dtype).min / 2  # twice of it is still a number; of float16 logits may come near to it
    inside = terms.new_zeros(length)
    return nn.functional.pad(inside, (halo, halo), value=lowest).unfold(0, block + 2 * halo, block).unsqueeze(1)


def _heads_first(t: Tensor, heads: int) -> Tensor:
    """[B, heads, H, W, d] of t [B, H, W, heads * d]."""
    b, h, w, features = t.shape
    return t.view(b, h, w, heads, features // heads).permute(0, 3, 1, 2, 4)


def _check_maps(x: Tensor, channels: int, block: int, parameter: Any) -> None:
    check_tensor("x", x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
    if x.shape[2] % block or x.shape[3] % block or not x.shape[2] * x.shape[3]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected H and W multiples of block_size = {block}, not 0")
    check_beside("x", x, parameter)
