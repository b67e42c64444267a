"""Fused kernels for Attention in Attention (arXiv 2204.09303), with a plain PyTorch specification beside them.

    from aia_kernels import CinST          # a drop-in for the published module
    y = CinST(num_segments=8)(x)           # x [B * 8, C, H, W]

Units: C, ST, CinST, STinC, STinC2; as functions: aia_kernels.functional. ``python -m aia_kernels`` tells what can run.
"""

from . import functional
from .attention_in_attention import AttentionInAttentionFunction
from .backends import available_backends, set_backend, use_backend
from .modules import ST, C, CinST, STinC, STinC2
from .reference import Gate, Norm

__version__ = "0.1.0"

__all__ = [
    "ST",
    "AttentionInAttentionFunction",
    "C",
    "CinST",
    "Gate",
    "Norm",
    "STinC",
    "STinC2",
    "available_backends",
    "functional",
    "set_backend",
    "use_backend",
]
