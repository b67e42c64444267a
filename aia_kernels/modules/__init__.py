"""The layers as modules, with the published names and parameters. One file per family."""

from .attention_in_attention import ST, C, CinST, STinC, STinC2

__all__ = ["ST", "C", "CinST", "STinC", "STinC2"]
