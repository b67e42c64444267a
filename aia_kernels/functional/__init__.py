"""The layers as functions: validate, choose a road, call. One file per family."""

from .attention_in_attention import ST, C, CinST, Gate, Norm, STinC, STinC2, attention_in_attention

__all__ = ["ST", "C", "CinST", "Gate", "Norm", "STinC", "STinC2", "attention_in_attention"]
