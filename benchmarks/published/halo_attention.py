"""HaloNet's attention (arXiv 2103.12731) in both published layouts of parameters: the baselines.

Written after halonet-pytorch and timm, each with its sequence of eager operations: windows by unfold, the logits of
relative positions from a product with the whole table, shifted by padding and reshaping, added to the map of attention.
halonet-pytorch fills the logits of the positions inside of the map, where its paper and its own comment have those
outside in mind: here those outside are filled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shifted(logits: Tensor) -> Tensor:
    """[b, n, w] by distance from [b, n, 2 w - 1] by entry of the table: each row starts one entry earlier."""
    b, n, m = logits.shape
    w = (m + 1) // 2
    flat = F.pad(F.pad(logits, (0, 1)).flatten(1), (0, m - n))
    return flat.reshape(b, n + 1, m)[:, :n, w - 1 :]


def along_columns(q: Tensor, table: Tensor) -> Tensor:
    """[b, rows, columns, w] of queries [b, rows, columns, d]: the term of each column of the window."""
    b, rows, columns, _ = q.shape
    return shifted((q @ table.t()).reshape(b * rows, columns, -1)).reshape(b, rows, columns, -1)


class Positions(nn.Module):
    """The terms of relative positions [b, block^2, window^2] of queries [b, block^2, d]."""

    def __init__(self, names: tuple[str, str], block: int, window: int, features: int):
        super().__init__()
        self.names, self.block = names, block
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(2 * window - 1, features) * features**-0.5))

    def forward(self, q: Tensor) -> Tensor:
        by_row, by_column = (getattr(self, name) for name in self.names)
        q = q.reshape(-1, self.block, self.block, q.shape[-1])
        of_columns = along_columns(q, by_column).unsqueeze(3)
        of_rows = along_columns(q.transpose(1, 2), by_row).transpose(1, 2).unsqueeze(4)
        return (of_columns + of_rows).flatten(3).flatten(1, 2)


class HaloAttention(nn.Module):
    """After halonet-pytorch, its mask turned."""

    def __init__(self, *, dim: int, block_size: int, halo_size: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        self.dim, self.heads, self.scale = dim, heads, dim_head**-0.5
        self.block_size, self.halo_size = block_size, halo_size
        self.rel_pos_emb = Positions(("rel_height", "rel_width"), block_size, block_size + 2 * halo_size, dim_head)
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * heads * 2, bias=False)
        self.to_out = nn.Linear(dim_head * heads, dim)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), n = x.shape, self.block_size
        rows, columns = h // n, w // n
        window = {"kernel_size": n + 2 * self.halo_size, "stride": n, "padding": self.halo_size}
        blocks = x.view(b, c, rows, n, columns, n).permute(0, 2, 4, 3, 5, 1).reshape(-1, n * n, c)
        around = F.unfold(x, **window).view(b, c, -1, rows * columns).permute(0, 3, 2, 1).flatten(0, 1)
        q, (k, v) = self.to_q(blocks), self.to_kv(around).chunk(2, dim=-1)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        q = q * self.scale
        logits = torch.einsum("bid,bjd->bij", q, k) + self.rel_pos_emb(q)
        inside = F.unfold(torch.ones(1, 1, h, w, device=x.device), **window)[0].t()
        outside = (inside == 0).repeat(b, 1).repeat_interleave(self.heads, 0).unsqueeze(1)
        attention = logits.masked_fill(outside, -torch.finfo(logits.dtype).max).softmax(dim=-1)
        o = torch.einsum("bij,bjd->bid", attention, v)
        o = self.to_out(o.view(-1, self.heads, n * n, o.shape[-1]).transpose(1, 2).flatten(2))
        return o.view(b, rows, columns, n, n, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


class HaloAttn(nn.Module):
    """After timm, without a stride."""

    def __init__(self, dim: int, num_heads: int = 8, block_size: int = 8, halo_size: int = 3, qkv_bias: bool = False):
        super().__init__()
        self.num_heads, self.head = num_heads, dim // num_heads
        self.scale, self.scale_pos_embed = self.head**-0.5, False
        self.block_size, self.halo_size = block_size, halo_size
        self.q, self.kv = nn.Conv2d(dim, dim, 1, bias=qkv_bias), nn.Conv2d(dim, 2 * dim, 1, bias=qkv_bias)
        self.pos_embed = Positions(("height_rel", "width_rel"), block_size, block_size + 2 * halo_size, self.head)
        self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), n, halo = x.shape, self.block_size, self.halo_size
        rows, columns, window = h // n, w // n, n + 2 * halo
        q = self.q(x).reshape(-1, self.head, rows, n, columns, n).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(b * self.num_heads, self.head, -1, rows * columns).transpose(1, 3)
        kv = F.pad(self.kv(x), (halo, halo, halo, halo)).unfold(2, window, n).unfold(3, window, n)
        kv = kv.reshape(b * self.num_heads, 2 * self.head, rows * columns, -1).permute(0, 2, 3, 1)
        k, v = kv.chunk(2, dim=-1)
        terms = self.pos_embed(q.flatten(0, 1)).view(*q.shape[:3], -1)
        o = ((q @ k.transpose(-1, -2)) * self.scale + terms).softmax(dim=-1) @ v
        o = o.transpose(1, 3).reshape(-1, n, n, rows, columns).permute(0, 3, 1, 4, 2).reshape(b, c, h, w)
        return self.pool(o)


LAYERS = {layer.__name__: layer for layer in (HaloAttention, HaloAttn)}
