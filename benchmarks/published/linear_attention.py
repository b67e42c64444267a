"""The published eager flows of linear attention (arXiv 2007.14902), of MANet's kernel attention and of efficient
attention (arXiv 1812.01243): the baselines of attention by a memory per sample.

Written after the code of MAResU-Net, MANet, A2-FPN and efficient-attention, each with its sequence of eager operations:
the convolution of the values, the memory made of them, one contraction for each term, the heads one after the other.
Parameters carry the published names and initialization. The maps of linear attention are square, as that code confuses
height and width at its end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(rows: Tensor) -> Tensor:
    """[B, d, N] over its length in d."""
    return torch.einsum("bdn,bn->bdn", rows, 1 / torch.norm(rows, p=2, dim=1))


class PositionLinearAttention(nn.Module):
    """Linear attention over the positions of maps [B, C, H, H]."""

    def __init__(self, in_places: int, scale: int = 8, eps: float = 1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.in_places, self.eps = in_places, eps
        self.query_conv = nn.Conv2d(in_places, in_places // scale, 1)
        self.key_conv = nn.Conv2d(in_places, in_places // scale, 1)
        self.value_conv = nn.Conv2d(in_places, in_places, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        query, key, value = (conv(x).view(b, -1, h * w) for conv in (self.query_conv, self.key_conv, self.value_conv))
        o = self.attend(query, key, value).view(b, c, w, h)
        return (x + self.gamma * o).contiguous()

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n = query.shape[2]
        query, key = unit(query).permute(0, 2, 1), unit(key)
        share = 1 / (n + torch.einsum("bnd,bd->bn", query, key.sum(-1) + self.eps))
        sums = torch.einsum("bcn->bc", value).unsqueeze(-1).expand(-1, value.shape[1], n)
        memory = torch.einsum("bdn,bcn->bdc", key, value)
        o = sums + torch.einsum("bnd,bdc->bcn", query, memory)
        return torch.einsum("bcn,bn->bcn", o, share)


class KernelAttention(PositionLinearAttention):
    """MANet's: softplus in the place of the unit vectors and of the constant 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = F.softplus(query).permute(0, 2, 1), F.softplus(key)
        memory = torch.einsum("bdn,bcn->bdc", key, value)
        share = 1 / torch.einsum("bnd,bd->bn", query, key.sum(-1) + self.eps)
        return torch.einsum("bdc,bnd,bn->bcn", memory, query, share)


class ChannelLinearAttention(nn.Module):
    """Linear attention over the channels of maps [B, C, H, H]."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        value = x.view(b, c, -1)
        query, key = unit(value), unit(value).permute(0, 2, 1)
        share = 1 / (h * w + torch.einsum("bnc,bn->bc", key, query.sum(1) + self.eps))
        sums = torch.einsum("bcn->bn", value).unsqueeze(1).expand(-1, c, h * w)
        memory = torch.einsum("bcn,bnm->bcm", value, key)
        o = sums + torch.einsum("bcm,bmn->bcn", memory, query)
        o = torch.einsum("bcn,bc->bcn", o, share).view(b, c, w, h)
        return (x + self.gamma * o).contiguous()


class EfficientAttention(nn.Module):
    """Efficient attention on maps [B, C, H, W]."""

    def __init__(self, in_channels: int, key_channels: int, head_count: int, value_channels: int):
        super().__init__()
        self.in_channels, self.key_channels, self.value_channels = in_channels, key_channels, value_channels
        self.head_count = head_count
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        keys, queries, values = (conv(x).reshape(b, -1, h * w) for conv in (self.keys, self.queries, self.values))
        k, v = self.key_channels // self.head_count, self.value_channels // self.head_count
        heads = []
        for i in range(self.head_count):
            key = F.softmax(keys[:, i * k : (i + 1) * k], dim=2)
            query = F.softmax(queries[:, i * k : (i + 1) * k], dim=1)
            context = key @ values[:, i * v : (i + 1) * v].transpose(1, 2)
            heads.append((context.transpose(1, 2) @ query).reshape(b, v, h, w))
        return self.reprojection(torch.cat(heads, dim=1)) + x


LAYERS = {layer.__name__: layer for layer in (PositionLinearAttention, ChannelLinearAttention, EfficientAttention)}
