"""The neighbours of external attention in the demo: linear and efficient attention, CATT, CaaM's pair of attentions and
HaloNet's. CBAM has a file of its own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..registry import dot_product_attention, linear_attention
from ..registry.case import SizedCase, main_form
from ..registry.dot_product_attention import AttentionCase
from ..registry.linear_attention import MemoryCase
from .external_attention import widened
from .table import Row, same_parameters


def pair(case: SizedCase, device: str) -> dict[str, nn.Module]:
    """The layer of a case in both forms with the same parameters: the published initialization, seed 0."""
    torch.manual_seed(0)
    return same_parameters(case.published(), case.fused(), device)


def rows(stages: dict[str, Tensor]) -> list[Row]:
    """Each at a size that its networks have: maps of a segmentation head, patches of a vision transformer, and the
    third stage of a network of halos."""
    maps = widened(stages["64x56x56"][:1], 256, 64).contiguous()
    patches = widened(stages["256x14x14"][:8], 384, 14).flatten(2).mT.contiguous()
    blocks = widened(stages["256x14x14"][:2], 256, 16).contiguous()
    catt, caam, halo, _ = (main_form(AttentionCase, *place) for place in dot_product_attention.PLACES.items())
    found = {
        "linear": (main_form(MemoryCase, *linear_attention.position(256, 64)), maps),
        "efficient": (main_form(MemoryCase, *linear_attention.efficient(256, 64, 32)), maps),
        "CATT": (catt, patches),
        "CaaM": (caam, patches),
        "halo": (halo, blocks),
    }
    return [
        Row(name, case.stage.split(",")[0], partial(pair, case), x, case.gradient(x))
        for name, (case, x) in found.items()
    ]
