"""CBAM at the ends of the blocks of ResNet-50, and at other sizes. The bytes are the budget of the algorithm in |X|."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import aia_kernels

from ..published import cbam as published
from .attention_in_attention import near_ties
from .case import DTYPES, Case

#: ResNet-50 at 224 x 224, where CBAM stands: name -> (C, H, W).
STAGES = {
    "256x56x56": (256, 56, 56),
    "512x28x28": (512, 28, 28),
    "1024x14x14": (1024, 14, 14),
    "2048x7x7": (2048, 7, 7),
}


@dataclass(frozen=True)
class GatesCase(Case):
    """CBAM, or CaaM's pair of it, on a batch of ``clips`` maps. ``sizes`` is (C, H, W)."""

    family: ClassVar = "cbam"
    displaced: ClassVar = {"grad x, all": 0.1, "grad parameters": 1e-4}

    def __str__(self) -> str:
        return f"{self.name}-{self.stage}-{self.clips}-{self.dtype}-{self.layout}"

    @property
    def x_bytes(self) -> int:
        c, h, w = self.sizes
        return self.clips * c * h * w * DTYPES[self.dtype].itemsize

    def traffic(self, mode: str) -> int:
        return 4 if mode == "eval" else 9

    @property
    def shape(self) -> tuple[int, ...]:
        return self.clips, *self.sizes

    def arrange(self, values: Tensor) -> Tensor:
        form = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return values.contiguous(memory_format=form)

    def published(self) -> nn.Module:
        return published.CBAM(self.sizes[0])

    def fused(self) -> nn.Module:
        return aia_kernels.CBAM(self.sizes[0])

    @property
    def compiled_on_cpu(self) -> bool:
        return False

    def near_ties(self, elements: int) -> int:
        return near_ties(elements)
