"""CATT, CaaM's pair of attentions and HaloNet's, over PyTorch's attention: at a size of their networks each.

The bytes are x and y, and in a step their gradients and x once more; keys, values and windows are several times these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..published import causal_attention, halo_attention
from .case import Place, SizedCase, at_places, main_form

#: Patches of 16 x 16 of an image of 224, and maps of the third stage of a network of halos.
PLACES = {
    "196x384": Place("CausalAttention", {"dim": 384, "heads": 6}, (8, 196, 384)),
    "196x384, both": Place("ComplementAttention", {"dim": 384, "num_heads": 6}, (8, 196, 384)),
    "256x16x16": Place(
        "HaloAttention", {"dim": 256, "block_size": 8, "halo_size": 3, "dim_head": 32, "heads": 8}, (2, 256, 16, 16)
    ),
    "256x32x32": Place("HaloAttn", {"dim": 256}, (2, 256, 32, 32)),
}


class BothResults(nn.Module):
    """A layer with two results, side by side."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.layer(x), -1)


@dataclass(frozen=True)
class AttentionCase(SizedCase):
    """A layer over PyTorch's attention, on tokens or maps."""

    family: ClassVar = "dot_product_attention"
    layers: ClassVar = {**causal_attention.LAYERS, **halo_attention.LAYERS}

    @property
    def has_two_results(self) -> bool:
        return self.name == "ComplementAttention"

    def traffic(self, mode: str) -> int:
        forward, backward = (3, 4) if self.has_two_results else (2, 3)
        return forward if mode == "eval" else forward + backward

    def published(self) -> nn.Module:
        return self._alone(super().published())

    def fused(self) -> nn.Module:
        return self._alone(super().fused())

    def empty_result(self, x: Tensor) -> Tensor:
        return torch.empty_like(torch.cat((x, x), -1) if self.has_two_results else x)

    def _alone(self, layer: nn.Module) -> nn.Module:
        return BothResults(layer) if self.has_two_results else layer


def cases() -> list[AttentionCase]:
    """Every case, the main ones first."""
    return at_places(AttentionCase, PLACES.items())


def quick_cases() -> list[AttentionCase]:
    """One small case for each layer: a smoke run."""
    halo = {"block_size": 4, "halo_size": 1}
    small = {
        "9x16": Place("CausalAttention", {"dim": 16, "heads": 2, "slots": 7}, (2, 9, 16)),
        "9x16, both": Place("ComplementAttention", {"dim": 16, "num_heads": 2}, (2, 9, 16)),
        "16x8x4": Place("HaloAttention", {"dim": 16, "dim_head": 4, "heads": 2, **halo}, (2, 16, 8, 4)),
        "16x4x8": Place("HaloAttn", {"dim": 16, "num_heads": 2, **halo}, (2, 16, 4, 8)),
    }
    return [main_form(AttentionCase, stage, place) for stage, place in small.items()]


def pass_cases(chosen: list[AttentionCase]) -> list[AttentionCase]:
    """None: nothing of this package's passes serves them."""
    return []
