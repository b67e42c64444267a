"""The neighbours of external attention in the demo: linear and efficient attention, CATT, CaaM's pair of attentions and
HaloNet's. CBAM has a file of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aia_kernels

from ..published import causal_attention, halo_attention, linear_attention
from .external_attention import widened
from .table import Row, gradient_for, same_parameters

PUBLISHED = {**linear_attention.LAYERS, **causal_attention.LAYERS, **halo_attention.LAYERS}


class BothResults(nn.Module):
    """A layer with two results, side by side."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.layer(x), -1)


def pair(name: str, arguments: dict[str, Any], device: str) -> dict[str, nn.Module]:
    """The layer in both forms with the same parameters: the published initialization, seed 0, and a gamma that lets
    attention through."""
    torch.manual_seed(0)
    slow, fast = PUBLISHED[name](**arguments), getattr(aia_kernels, name)(**arguments)
    if hasattr(slow, "gamma"):
        nn.init.constant_(slow.gamma, 0.5)
    if name == "ComplementAttention":
        slow, fast = BothResults(slow), BothResults(fast)
    return same_parameters(slow, fast, device)


def rows(stages: dict[str, Tensor]) -> list[Row]:
    """Each at a size that its networks have: maps of a segmentation head, patches of a vision transformer, and the
    third stage of a network of halos."""
    maps = widened(stages["64x56x56"][:1], 256, 64).contiguous()
    patches = widened(stages["256x14x14"][:8], 384, 14).flatten(2).mT.contiguous()
    blocks = widened(stages["256x14x14"][:2], 256, 16).contiguous()
    efficient = {"in_channels": 256, "key_channels": 32, "head_count": 1, "value_channels": 256}
    halo = {"dim": 256, "block_size": 8, "halo_size": 3, "dim_head": 32, "heads": 8}
    found = {
        "linear": ("256x64x64", "PositionLinearAttention", {"in_places": 256}, maps),
        "efficient": ("256x64x64", "EfficientAttention", efficient, maps),
        "CATT": ("196x384", "CausalAttention", {"dim": 384, "heads": 6}, patches),
        "CaaM": ("196x384", "ComplementAttention", {"dim": 384, "num_heads": 6}, patches),
        "halo": ("256x16x16", "HaloAttention", halo, blocks),
    }
    result = []
    for name, (stage, layer, arguments, x) in found.items():
        y = torch.cat((x, x), -1) if layer == "ComplementAttention" else x
        result.append(Row(name, stage, partial(pair, layer, arguments), x, gradient_for(y)))
    return result
