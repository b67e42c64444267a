"""The units of Attention in Attention at the stages of ResNet-50.

The bytes are the budget of the algorithm in units of |X|, the bytes of x; pooled-size maps are not counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

import aia_kernels

from ..published import attention_in_attention as published
from .case import DTYPES, Case

#: ResNet-50 at 224 x 224, where the units stand (after the 3x3 convolution): name -> (C, H, W).
STAGES = {"64x56x56": (64, 56, 56), "128x28x28": (128, 28, 28), "256x14x14": (256, 14, 14), "512x7x7": (512, 7, 7)}
NUM_SEGMENTS = 8
CLIPS = (8, 1, 32)
LAYOUTS = ("contiguous", "channels_last", "5d")

NAMES = ("CinST", "STinC", "ST", "C", "STinC2")
HAS_INNER = {"C": False, "ST": False, "CinST": True, "STinC": True, "STinC2": True}


@dataclass(frozen=True)
class UnitCase(Case):
    """One unit on clips of ``segments`` frames. ``sizes`` is (C, H, W)."""

    segments: int = NUM_SEGMENTS
    kind: str = field(default="unit", kw_only=True)

    family: ClassVar = "attention_in_attention"
    displaced: ClassVar = {"grad x, all": 0.1, "grad parameters": 1e-4}

    def __str__(self) -> str:
        return f"{self.name}-{self.stage}-{self.clips}clips-{self.dtype}-{self.layout}"

    @property
    def x_bytes(self) -> int:
        c, h, w = self.sizes
        return self.clips * self.segments * c * h * w * DTYPES[self.dtype].itemsize

    def traffic(self, mode: str) -> int:
        forward, backward = (4, 5) if HAS_INNER[self.name] else (3, 4)
        return forward if mode == "eval" else forward + backward

    @property
    def shape(self) -> tuple[int, ...]:
        return self.clips, self.segments, *self.sizes

    def arrange(self, values: Tensor) -> Tensor:
        """[B * T, C, H, W], or [B, C, T, H, W] for layout 5d."""
        if self.layout == "5d":
            return values.transpose(1, 2).contiguous()
        form = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return values.flatten(0, 1).contiguous(memory_format=form)

    def published(self) -> nn.Module:
        return published.UNITS[self.name](num_segments=self.segments)

    def fused(self) -> nn.Module:
        return getattr(aia_kernels, self.name)(num_segments=self.segments)

    @property
    def compiled_on_cpu(self) -> bool:
        """The two main units on their main input."""
        main = UnitCase(self.name, self.stage, CLIPS[0], "fp32", LAYOUTS[0], self.sizes)
        return self.name in ("CinST", "STinC") and self == main

    def near_ties(self, elements: int) -> int:
        return near_ties(elements)


def near_ties(elements: int) -> int:
    """One in 500 of a large x, none of a small one.

    Where two candidates for a maximum differ by less than rounding, float32 and float64 choose differently; so does
    every float32 implementation, the published one too. Among 13 million normal numbers this happens about once. It
    moves the gradient of two elements by up to some percent of the largest and, through the 3x3x3 convolution and the
    mean of the inner gate, that of 2 * 27 * C others by about a thousandth of that.
    """
    return elements // 500 if elements >= 1_000_000 else 0


def cases() -> list[UnitCase]:
    """Every case, the main ones first: float32, contiguous, eight clips; then with one thing changed at a time."""
    grid = itertools.product(CLIPS, LAYOUTS, DTYPES, NAMES, STAGES)
    found = [UnitCase(unit, stage, clips, dtype, layout, STAGES[stage]) for clips, layout, dtype, unit, stage in grid]

    def departures(case: UnitCase) -> int:
        return (case.clips != CLIPS[0]) + (case.layout != LAYOUTS[0]) + (case.dtype != "fp32")

    return sorted(found, key=departures)


def quick_cases() -> list[UnitCase]:
    """One small case for each unit: a smoke run."""
    return [UnitCase(unit, "16x14x14", 1, "fp32", "contiguous", (16, 14, 14)) for unit in NAMES]


def pass_cases(chosen: list[UnitCase]) -> list[UnitCase]:
    """The cases on which the raw passes are measured: they do not depend on the unit, which only checks them."""
    return [case for case in chosen if case.name == NAMES[0]]
