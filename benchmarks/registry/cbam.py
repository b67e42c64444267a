"""CBAM at the ends of the blocks of ResNet-50. The bytes are the budget of the algorithm in |X|."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..published import cbam as published
from .attention_in_attention import near_ties
from .case import Place, SizedCase, at_places, main_form

#: ResNet-50 at 224 x 224, where CBAM stands: name -> (C, H, W).
STAGES = {
    "256x56x56": (256, 56, 56),
    "512x28x28": (512, 28, 28),
    "1024x14x14": (1024, 14, 14),
    "2048x7x7": (2048, 7, 7),
}
BATCHES = (8, 1, 32)


@dataclass(frozen=True)
class GatesCase(SizedCase):
    """CBAM on maps [B, C, H, W]."""

    family: ClassVar = "cbam"
    layers: ClassVar = {"CBAM": published.CBAM}
    displaced: ClassVar = {"grad x, all": 0.1, "grad parameters": 1e-4}

    def traffic(self, mode: str) -> int:
        return 4 if mode == "eval" else 9

    def near_ties(self, elements: int) -> int:
        return near_ties(elements)


def place(b: int, c: int, h: int, w: int) -> Place:
    return Place("CBAM", {"in_planes": c}, (b, c, h, w))


def cases() -> list[GatesCase]:
    """Every case, those of eight maps first."""
    of_batches = ([(stage, place(b, *sizes)) for stage, sizes in STAGES.items()] for b in BATCHES)
    return [case for places in of_batches for case in at_places(GatesCase, places)]


def quick_cases() -> list[GatesCase]:
    """One small case: a smoke run."""
    return [main_form(GatesCase, "32x9x7", place(2, 32, 9, 7))]


def pass_cases(chosen: list[GatesCase]) -> list[GatesCase]:
    """The cases on which the raw passes are measured: all."""
    return chosen
