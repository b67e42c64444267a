"""Self-attention on the same tokens: what a user would otherwise run in the place of external attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention by scaled_dot_product_attention, on tokens [B, N, dim] or maps [B, dim, H, W]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT if x.ndim == 4 else x
        b, n, d = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        o = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return o.mT.unflatten(2, x.shape[2:]) if x.ndim == 4 else o
