"""Linear and efficient attention on maps, as the map of ratios measures them (benchmarks.ratios)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import aia_kernels

from ..published import linear_attention as published
from .case import DTYPES, Case


@dataclass(frozen=True)
class MemoryCase(Case):
    """One layer on maps [B, C, H, W], of which ``sizes`` are the sizes."""

    arguments: tuple[tuple[str, int], ...] = ()

    family: ClassVar = "linear_attention"

    @property
    def x_bytes(self) -> int:
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize

    def traffic(self, mode: str) -> int:
        """Forward: x for keys and queries, for the sums and as the residual, and y. Backward: the gradient of y three
        times, x twice, and the gradient of x."""
        return 4 if mode == "eval" else 4 + 6

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def arrange(self, values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else values

    def published(self) -> nn.Module:
        """With a gamma that lets attention through: at its start it is 0."""
        layer = published.LAYERS[self.name](**dict(self.arguments))
        if hasattr(layer, "gamma"):
            nn.init.constant_(layer.gamma, 0.5)
        return layer

    @property
    def compiled_on_cpu(self) -> bool:
        return False

    def fused(self) -> nn.Module:
        return getattr(aia_kernels, self.name)(**dict(self.arguments))
