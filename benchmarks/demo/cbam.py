"""CBAM in the demo, on every stage."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import aia_kernels

from ..published import cbam as published
from ..registry.attention_in_attention import near_ties
from .table import Row, gradient_for, same_parameters


def pair(channels: int, device: str) -> dict[str, nn.Module]:
    """The layer in both forms with the same parameters: the published initialization, seed 0."""
    torch.manual_seed(0)
    return same_parameters(published.CBAM(channels), aia_kernels.CBAM(channels), device)


def rows(stages: dict[str, Tensor]) -> list[Row]:
    """CBAM on the feature maps [B * T, C, H, W] of every stage."""
    return [Row("CBAM", stage, partial(pair, x.shape[1]), x, gradient_for(x), near_ties) for stage, x in stages.items()]
