"""CATT (arXiv 2103.03493) and the transformer's form of CaaM (arXiv 2108.08782): the baselines.

Written after the published code, each with its sequence of eager operations: the map of attention is made, scaled and
normalized as a tensor; CATT looks into its dictionary once for each sample; CaaM takes a second softmax of the negated
logits. Parameters carry the published names and initialization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InSample(nn.Module):
    """Attention as in BERT, without its output layer."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def apart(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, -1).permute(0, 2, 1, 3)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.apart(self.query(h)), self.apart(self.key(context)), self.apart(self.value(context))
        scores = torch.matmul(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        attention = self.dropout(nn.functional.softmax(scores, dim=-1))
        o = torch.matmul(attention, value).permute(0, 2, 1, 3).contiguous()
        return o.view(*h.shape)


class CausalAttention(nn.Module):
    """CATT: attention in the sample, attention to the dictionary, and a linear map of both."""

    def __init__(self, dim: int, heads: int = 12, slots: int = 500, dropout: float = 0.0):
        super().__init__()
        self.att = InSample(dim, heads, dropout)
        self.M = nn.Parameter(torch.rand(1, slots, dim) / 100)
        self.fc = nn.Linear(2 * dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        dictionary = self.M.expand(h.shape[0], -1, -1)
        return self.fc(torch.cat((self.att(h, h), self.att(h, dictionary)), dim=-1))


class ComplementAttention(nn.Module):
    """CaaM's attention and its complement."""

    def __init__(self, dim: int, num_heads: int = 8, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        query, key, value = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (query @ key.transpose(-2, -1)) * self.scale
        maps = (self.attn_drop(logits.softmax(dim=-1)), self.attn_drop((-logits).softmax(dim=-1)))
        both = ((attention @ value).transpose(1, 2).reshape(b, n, c) for attention in maps)
        causal, complement = (self.proj_drop(self.proj(o)) for o in both)
        return causal, complement


LAYERS = {layer.__name__: layer for layer in (CausalAttention, ComplementAttention)}
