"""Fused kernels for two families of attention, with a plain PyTorch specification beside them.

    from aia_kernels import CinST          # a drop-in for the published module
    y = CinST(num_segments=8)(x)           # x [B * 8, C, H, W]

Attention in Attention (arXiv 2204.09303): C, ST, CinST, STinC, STinC2. External attention (arXiv 2105.02358):
ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention, TokenExternalAttention. As functions:
aia_kernels.functional. In the papers' networks: aia_kernels.models.
``convert(model)`` makes the published layers of a model the fused ones, ``to_reference(model)`` plain PyTorch.
``python -m aia_kernels`` tells what can run.
"""

from . import functional, models
from .algorithms.attention_in_attention import AttentionInAttentionFunction
from .backends import available_backends, set_backend, use_backend
from .convert import convert, fuse, fuse_backend, to_reference
from .modules import (
    CBAM,
    ST,
    C,
    CausalAttention,
    CausalCBAM,
    ChannelGate,
    ChannelLinearAttention,
    CinST,
    ComplementAttention,
    EfficientAttention,
    ExternalAttention,
    ExternalAttention2d,
    HaloAttention,
    HaloAttn,
    MultiHeadExternalAttention,
    PositionLinearAttention,
    SpatialGate,
    STinC,
    STinC2,
    TemporalShift,
    TokenExternalAttention,
)
from .operators.decompositions import decompositions
from .reference import Gate, Norm

__version__ = "0.2.0"

__all__ = [
    "CBAM",
    "ST",
    "AttentionInAttentionFunction",
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
    "Gate",
    "HaloAttention",
    "HaloAttn",
    "MultiHeadExternalAttention",
    "Norm",
    "PositionLinearAttention",
    "STinC",
    "STinC2",
    "SpatialGate",
    "TemporalShift",
    "TokenExternalAttention",
    "available_backends",
    "convert",
    "decompositions",
    "functional",
    "fuse",
    "fuse_backend",
    "models",
    "set_backend",
    "to_reference",
    "use_backend",
]
