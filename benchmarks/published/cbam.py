"""CBAM as its authors compute it (Jongchan/attention-module), operation by operation, and CaaM's pair of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelGate(nn.Module):
    """Each pool goes through the MLP by itself; the gate is expanded to the size of x."""

    def __init__(self, gate_channels: int, reduction_ratio: int = 16, pool_types=("avg", "max")):
        super().__init__()
        hidden = gate_channels // reduction_ratio
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(gate_channels, hidden), nn.ReLU(), nn.Linear(hidden, gate_channels)
        )
        self.pool_types = pool_types

    def forward(self, x: Tensor) -> Tensor:
        plane, total = x.shape[2:], None
        for name in self.pool_types:
            if name == "avg":
                pooled = F.avg_pool2d(x, plane, stride=plane)
            elif name == "max":
                pooled = F.max_pool2d(x, plane, stride=plane)
            elif name == "lp":
                pooled = F.lp_pool2d(x, 2, plane, stride=plane)
            else:
                flat = x.flatten(2)
                largest = flat.max(2, keepdim=True).values
                pooled = largest + (flat - largest).exp().sum(2, keepdim=True).log()
            raw = self.mlp(pooled)
            total = raw if total is None else total + raw
        return x * total.sigmoid().unsqueeze(2).unsqueeze(3).expand_as(x)


class BasicConv(nn.Module):
    def __init__(self, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SpatialGate(nn.Module):
    def __init__(self, kernel_size: int = 7):
        super().__init__()
        self.spatial = BasicConv(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        compressed = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)), 1)
        return x * self.spatial(compressed).sigmoid()


class CBAM(nn.Module):
    def __init__(self, in_planes: int, reduction_ratio: int = 16, kernel_size: int = 7, pool_types=("avg", "max")):
        super().__init__()
        self.ChannelGate = ChannelGate(in_planes, reduction_ratio, pool_types)
        self.no_spatial = False
        self.SpatialGate = SpatialGate(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class CausalCBAM(CBAM):
    """Both gates are computed, and their product multiplies x; the rest of x is the confounder."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        causal = self.SpatialGate(self.ChannelGate(x))
        return causal, x - causal
