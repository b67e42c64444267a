"""The specification: all families in plain PyTorch. Imports nothing but torch and the maps' bookkeeping."""

from .attention_in_attention import UNITS, Unit, attention_in_attention, compose
from .cbam import MLP, cbam
from .double_norm import double_normalize
from .external_attention import external_attention, external_attention_block, norm_of_values
from .gate import Gate
from .linear_attention import Form, Weights, channel_linear_attention, linear_attention
from .norm import Norm
from .shift import temporal_shift

__all__ = [
    "MLP",
    "UNITS",
    "Form",
    "Gate",
    "Norm",
    "Unit",
    "Weights",
    "attention_in_attention",
    "cbam",
    "channel_linear_attention",
    "compose",
    "double_normalize",
    "external_attention",
    "external_attention_block",
    "linear_attention",
    "norm_of_values",
    "temporal_shift",
]
