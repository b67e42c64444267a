"""What is measured: every case with its input, the bytes it should move, and the raw passes with theirs.

The bytes are the budget of the algorithm in units of |X|, the bytes of x; pooled-size maps are not counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

#: ResNet-50 at 224 x 224, where the units stand (after the 3x3 convolution): name -> (C, H, W).
STAGES = {"64x56x56": (64, 56, 56), "128x28x28": (128, 28, 28), "256x14x14": (256, 14, 14), "512x7x7": (512, 7, 7)}
NUM_SEGMENTS = 8
CLIPS = (8, 1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last", "5d")

UNITS = ("CinST", "STinC", "ST", "C", "STinC2")
HAS_INNER = {"C": False, "ST": False, "CinST": True, "STinC": True, "STinC2": True}
MODES = ("eval", "step")


@dataclass(frozen=True)
class Case:
    """One unit on one input. ``sizes`` is (C, H, W)."""

    unit: str
    stage: str
    clips: int
    dtype: str
    layout: str
    sizes: tuple[int, int, int]
    segments: int = NUM_SEGMENTS

    def __str__(self) -> str:
        return f"{self.unit}-{self.stage}-{self.clips}clips-{self.dtype}-{self.layout}"

    @property
    def x_bytes(self) -> int:
        c, h, w = self.sizes
        return self.clips * self.segments * c * h * w * DTYPES[self.dtype].itemsize

    def budget_bytes(self, mode: str) -> int:
        return traffic(self.unit, mode) * self.x_bytes

    def make_input(self, device: str = "cpu", seed: int = 0) -> Tensor:
        """Standard normal values, as after a BatchNorm: [B * T, C, H, W], or [B, C, T, H, W] for layout 5d.

        The values depend on the sizes and the seed alone, not on the layout.
        """
        c, h, w = self.sizes
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.clips, self.segments, c, h, w, generator=generator).to(device, DTYPES[self.dtype])
        if self.layout == "5d":
            return x.transpose(1, 2).contiguous()
        form = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return x.flatten(0, 1).contiguous(memory_format=form)


def traffic(unit: str, mode: str) -> int:
    """x-sized reads and writes of one call: forward in mode eval, forward and backward in mode step."""
    forward, backward = (4, 5) if HAS_INNER[unit] else (3, 4)
    return forward if mode == "eval" else forward + backward


def cases() -> list[Case]:
    """Every case, the main ones first: float32, contiguous, eight clips; then with one thing changed at a time."""
    grid = itertools.product(CLIPS, LAYOUTS, DTYPES, UNITS, STAGES)
    found = [Case(unit, stage, clips, dtype, layout, STAGES[stage]) for clips, layout, dtype, unit, stage in grid]

    def departures(case: Case) -> int:
        return (case.clips != CLIPS[0]) + (case.layout != LAYOUTS[0]) + (case.dtype != "fp32")

    return sorted(found, key=departures)


def quick_cases() -> list[Case]:
    """One small case for each unit: a smoke run."""
    return [Case(unit, "16x14x14", 1, "fp32", "contiguous", (16, 14, 14)) for unit in UNITS]


#: x-sized reads and writes of a pass, as beside its schema in aia_kernels/ops.py; the gate passes touch maps alone.
PASS_TRAFFIC = {
    "pool": (1, 0),
    "unpool": (1, 1),
    "unpool_reduce": (1, 0),
    "recalibrate": (1, 1),
    "recalibrate_reduce": (2, 0),
    "gate_conv": (0, 0),
    "gate_activate": (0, 0),
    "gate_backward_reduce": (0, 0),
    "gate_backward": (0, 0),
}
