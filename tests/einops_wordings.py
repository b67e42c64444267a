"""External attention with einops. Import it only where that is installed."""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from fuse_cases import ATTEND, MAPS, TOKENS
from fuse_variants import Matrices, Memories, normalize
from torch import nn


class Heads(nn.Module):
    def __init__(self, c=6, heads=2, slots=5):
        super().__init__()
        self.heads, self.q, self.o = heads, nn.Linear(c, c), nn.Linear(c, c)
        self.mk, self.mv = (nn.Linear(*sizes, bias=False) for sizes in ((c // heads, slots), (slots, c // heads)))

    def forward(self, x):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.o(rearrange(self.mv(normalize(self.mk(q), 2, 3)), "b h n d -> b n (h d)"))


class OfMaps(Memories):
    def forward(self, x):
        _, _, h, w = x.shape
        attn = normalize(self.mk(rearrange(x, "b c h w -> b (h w) c")))
        return rearrange(self.mv(attn), "b (h w) c -> b c h w", h=h, w=w) + x


class Repeated(Matrices):
    def forward(self, x):
        k, v = (repeat(m, "s c -> b s c", b=x.shape[0]) for m in (self.k, self.v))
        return torch.bmm(normalize(x @ k.transpose(1, 2)), v)


class Einsum(Matrices):
    def forward(self, x):
        attn = einsum(x, self.k, "b n c, s c -> b n s").softmax(1)
        attn = attn / (reduce(attn, "b n s -> b n 1", "sum") + 1e-9)
        return einsum(attn, self.v, "b n s, s c -> b n c")


class Layers(nn.Module):
    def __init__(self, c=6, slots=5):
        super().__init__()
        self.keys = nn.Sequential(Rearrange("b c h w -> b (h w) c"), nn.Linear(c, slots, bias=False))
        self.values, self.back = nn.Linear(slots, c, bias=False), Rearrange("b n c -> b c n")

    def forward(self, x):
        return self.back(self.values(normalize(self.keys(x)))).reshape(x.shape)


#: As fuse_cases.KINDS.
EINOPS = dict.fromkeys((Heads, Repeated, Einsum), (ATTEND, TOKENS)) | dict.fromkeys((OfMaps, Layers), (ATTEND, MAPS))
