"""The layers as modules, with the published names and parameters. One file per family."""

from .attention_in_attention import ST, C, CinST, STinC, STinC2
from .external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
    TokenExternalAttention,
    TransformerTokenExternalAttention,
)
from .temporal_shift import TemporalShift

__all__ = [
    "ST",
    "C",
    "CinST",
    "ExternalAttention",
    "ExternalAttention2d",
    "MultiHeadExternalAttention",
    "STinC",
    "STinC2",
    "TemporalShift",
    "TokenExternalAttention",
    "TransformerTokenExternalAttention",
]
