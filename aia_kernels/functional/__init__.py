"""The layers as functions: check, choose a path, call. One file per family.

x may be a DTensor whose samples are sharded or replicated, beside replicated parameters: y is placed as x, and batch
norms that use their batch take the statistics of all samples. Other placements are a ValueError, plain tensors among
DTensors a TypeError (sharded.py).
"""

from .attention_in_attention import ST, C, CinST, Gate, Norm, STinC, STinC2, attention_in_attention
from .cbam import MLP, causal_cbam, cbam
from .external_attention import double_normalize, external_attention, external_attention_block
from .linear_attention import channel_linear_attention, efficient_attention, linear_attention
from .temporal_shift import temporal_shift

__all__ = [
    "MLP",
    "ST",
    "C",
    "CinST",
    "Gate",
    "Norm",
    "STinC",
    "STinC2",
    "attention_in_attention",
    "causal_cbam",
    "cbam",
    "channel_linear_attention",
    "double_normalize",
    "efficient_attention",
    "external_attention",
    "external_attention_block",
    "linear_attention",
    "temporal_shift",
]
