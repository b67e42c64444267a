"""The attention of EAMLP's T2T stages in plain PyTorch."""

from __future__ import annotations

from ..models.eamlp import TokenExternalAttention, TransformerTokenExternalAttention
from .plain import PlainExternal


class PlainTokenExternalAttention(PlainExternal, TokenExternalAttention):
    """TokenExternalAttention in plain PyTorch, its projections not folded."""


class PlainTransformerTokenExternalAttention(PlainExternal, TransformerTokenExternalAttention):
    """TransformerTokenExternalAttention in plain PyTorch, its projections not folded."""
