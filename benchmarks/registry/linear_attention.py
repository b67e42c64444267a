"""Linear and efficient attention on maps of segmentation heads, and a sweep over the number of tokens.

The bytes are the budget of the algorithm in |X|; keys, queries and their gradients are not counted, which are a quarter
of x with C / 8 features of keys, and as large as x with C / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..published import linear_attention as published
from .case import Place, SizedCase, at_places, main_form


def position(c: int, side: int) -> tuple[str, Place]:
    return f"{c}x{side}x{side}", Place("PositionLinearAttention", {"in_places": c}, (1, c, side, side))


def channel(c: int, side: int) -> tuple[str, Place]:
    return f"{c}x{side}x{side}", Place("ChannelLinearAttention", {}, (1, c, side, side))


def efficient(c: int, side: int, keys: int, heads: int = 1) -> tuple[str, Place]:
    arguments = {"in_channels": c, "key_channels": keys, "head_count": heads, "value_channels": c}
    stage = f"{c}x{side}x{side}" + (f", {keys} features of keys" if keys != c // 8 else "")
    return stage, Place("EfficientAttention", arguments, (1, c, side, side))


#: Square maps, as the published linear attention takes no other. Efficient attention also with as many features of keys
#: as of values, where nothing can be folded away.
PLACES = (
    *(position(c, side) for c in (64, 128, 256, 512) for side in (32, 64, 128)),
    *(efficient(c, side, c // 8) for c in (64, 128, 256, 512) for side in (32, 64, 128)),
    efficient(256, 32, 256, 8),
    channel(64, 128),
    channel(256, 64),
)
#: Sides of the maps of the sweep: 1024 to 1,000,000 tokens.
SWEEP = (32, 64, 128, 256, 512, 1000)


@dataclass(frozen=True)
class MemoryCase(SizedCase):
    """A layer of linear or efficient attention on maps."""

    family: ClassVar = "linear_attention"
    layers: ClassVar = published.LAYERS

    def traffic(self, mode: str) -> int:
        """Forward: x for keys and queries, for the sums and as the residual, and y. Backward: the gradient of y three
        times, x twice, and the gradient of x."""
        return 4 if mode == "eval" else 4 + 6

    def published(self) -> nn.Module:
        """With a gamma that lets attention through: at its start it is 0."""
        layer = super().published()
        if hasattr(layer, "gamma"):
            nn.init.constant_(layer.gamma, 0.5)
        return layer


def cases() -> list[MemoryCase]:
    """Every case, the main ones first, and the sweep over tokens."""
    return at_places(MemoryCase, PLACES) + sweep()


def sweep() -> list[MemoryCase]:
    """Linear attention of 64 channels on maps of 1024 to 1,000,000 positions."""
    return [main_form(MemoryCase, str(side**2), position(64, side)[1], kind="sweep") for side in SWEEP]


def quick_cases() -> list[MemoryCase]:
    """One small case for each layer and one of the sweep: a smoke run."""
    small = (position(16, 8), channel(16, 8), efficient(16, 8, 2))
    return [*(main_form(MemoryCase, *one) for one in small), *sweep()[:1]]


def pass_cases(chosen: list[MemoryCase]) -> list[MemoryCase]:
    """None: the algorithm is made of products of PyTorch."""
    return []
