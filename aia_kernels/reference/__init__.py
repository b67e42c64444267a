"""The specification: Attention in Attention in plain PyTorch. Imports nothing but torch and the maps' bookkeeping."""

from .attention_in_attention import UNITS, Unit, attention_in_attention, compose
from .gate import Gate, Norm

__all__ = ["UNITS", "Gate", "Norm", "Unit", "attention_in_attention", "compose"]
