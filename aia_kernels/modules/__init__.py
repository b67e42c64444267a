"""The layers as modules, with the published names and parameters. One file per family."""

from .attention_in_attention import ST, C, CinST, STinC, STinC2
from .causal_attention import CausalAttention, ComplementAttention
from .cbam import CBAM, CausalCBAM, ChannelGate, SpatialGate
from .external_attention import (
    ExternalAttention,
    ExternalAttention2d,
    MultiHeadExternalAttention,
    TokenExternalAttention,
    TransformerTokenExternalAttention,
)
from .halo_attention import HaloAttention, HaloAttn
from .linear_attention import (
    ChannelLinearAttention,
    EfficientAttention,
    KernelLinearAttention,
    PositionLinearAttention,
)
from .temporal_shift import TemporalShift

__all__ = [
    "CBAM",
    "ST",
    "C",
    "CausalAttention",
    "CausalCBAM",
    "ChannelGate",
    "ChannelLinearAttention",
    "CinST",
    "ComplementAttention",
    "EfficientAttention",
    "ExternalAttention",
    "ExternalAttention2d",
    "HaloAttention",
    "HaloAttn",
    "KernelLinearAttention",
    "MultiHeadExternalAttention",
    "PositionLinearAttention",
    "STinC",
    "STinC2",
    "SpatialGate",
    "TemporalShift",
    "TokenExternalAttention",
    "TransformerTokenExternalAttention",
]
