"""The published eager flow of external attention in its three forms: the baseline of the second family.

Written after the code of arXiv 2105.02358 (EANet's block in model_torch.py, EAMLP's Attention in transformer_block.py)
and the popular port with two linear layers, each with its sequence of eager operations kept whole: the C x C products
around the memories, the softmax over tokens and the division by the sum over slots as passes of their own, and EAMLP's
heads brought to the front and back. Parameters carry the published names and initialization, so state dicts pass freely
between these layers and those of ``aia_kernels``.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class ExternalAttention2d(nn.Module):
    """EANet's block on maps [B, C, H, W]: conv1, memories of k slots, conv2 with batch norm, residual, ReLU.

    The published code initializes two memories that share storage: linear_0 ends with the values drawn for linear_1.
    Here the two are equal and apart, as they are in the published code once it has moved to a GPU.
    """

    def __init__(self, c: int, k: int = 64):
        super().__init__()
        self.k = k
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0 = nn.Conv1d(c, k, 1, bias=False)
        self.linear_1 = nn.Conv1d(k, c, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.linear_1.weight.data = self.linear_0.weight.data.permute(1, 0, 2)
        for conv in (self.conv1, self.linear_0, self.linear_1, self.conv2[0]):
            conv.weight.data.normal_(0, math.sqrt(2 / conv.out_channels))
        self.linear_1.weight.data = self.linear_1.weight.data.contiguous().clone()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.before_relu(x))

    def before_relu(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        z = self.conv1(x).reshape(b, c, h * w)
        attention = F.softmax(self.linear_0(z), dim=-1)  # [B, k, N]
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        return self.conv2(self.linear_1(attention).view(b, c, h, w)) + x


class MultiHeadExternalAttention(nn.Module):
    """EAMLP's Attention on tokens [B, N, dim]: four times the width and the heads, one pair of memories for all."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.coef = 4
        self.trans_dims = nn.Linear(dim, dim * self.coef)
        self.num_heads = num_heads * self.coef
        self.k = 256 // self.coef
        self.linear_0 = nn.Linear(dim * self.coef // self.num_heads, self.k)
        self.linear_1 = nn.Linear(self.k, dim * self.coef // self.num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim * self.coef, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        z = self.trans_dims(x).view(b, n, self.num_heads, -1).permute(0, 2, 1, 3)  # [B, heads, N, dim / heads]
        attention = self.linear_0(z).softmax(dim=-2)
        attention = attention / (1e-9 + attention.sum(dim=-1, keepdim=True))
        z = self.linear_1(self.attn_drop(attention)).permute(0, 2, 1, 3).reshape(b, n, -1)
        return self.proj_drop(self.proj(z))


class ExternalAttention(nn.Module):
    """The popular port on tokens [B, N, d_model]: two linear layers without bias, no eps, weights near zero."""

    def __init__(self, d_model: int, S: int = 64):
        super().__init__()
        self.mk = nn.Linear(d_model, S, bias=False)
        self.mv = nn.Linear(S, d_model, bias=False)
        for linear in (self.mk, self.mv):
            nn.init.normal_(linear.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        attention = F.softmax(self.mk(x), dim=1)
        attention = attention / attention.sum(dim=2, keepdim=True)
        return self.mv(attention)


LAYERS = {layer.__name__: layer for layer in (ExternalAttention2d, MultiHeadExternalAttention, ExternalAttention)}
