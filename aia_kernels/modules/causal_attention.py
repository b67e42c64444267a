"""Attention with a causal intervention: CATT (arXiv 2103.03493), and the transformer's form of CaaM (arXiv 2108.08782).

In PyTorch's scaled_dot_product_attention on every backend (functional/dot_product.py); nothing of this package's passes
serves them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..functional.checks import check_at_least_one, check_beside, check_tensor
from ..functional.dot_product import dot_product_attention, opposed_attentions
from ..functional.external_attention_checks import check_dropout
from .recorded import one_call
from .submodules import can_be_read


class CausalAttention(nn.Module):
    """CATT: attention inside the sample beside attention to a learned dictionary of other samples, joined.

        o = fc([softmax(q(h) k(c)^T / sqrt d) v(c),  softmax(q(h) k(M)^T / sqrt d) v(M)])

    It takes h [B, N, dim], of which the queries are made, and returns o of that shape. The context c, [B, L, dim] or,
    between two streams, [B, L, context_dim], is h where none is given, and mask says what of it counts: [B, L] boolean,
    True where a token of the context takes no part; where none does, that half of what fc joins is 0. Keys and values
    of the dictionary M depend on parameters alone: they are made once in a call for the whole batch, whose queries are
    one sequence to them. State dict: att.query, att.key, att.value, fc, M.

    Args:
        dim: The features of a token, a multiple of heads.
        heads: Their number.
        slots: The entries of the dictionary, 500 or 1000 as published.
        dropout: The probability of dropout on both maps of attention.
        context_dim: The features of a token of the context and of an entry of the dictionary; None: dim.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or dim no multiple of heads; in forward, a tensor has
            another shape or type.
    """

    def __init__(
        self, dim: int, heads: int = 12, slots: int = 500, dropout: float = 0.0, context_dim: int | None = None
    ):
        super().__init__()
        _check_heads(dim, heads)
        context_dim = dim if context_dim is None else context_dim
        check_at_least_one(slots=slots, context_dim=context_dim)
        check_dropout(dropout)
        self.heads, self.dropout = heads, dropout
        widths = {"query": dim, "key": context_dim, "value": context_dim}
        self.att = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in widths.items()})
        self.M = nn.Parameter(torch.rand(1, slots, context_dim) / 100)
        self.fc = nn.Linear(2 * dim, dim)

    def forward(self, h: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if isinstance(h, Proxy):
            return one_call(self, CausalAttention.forward, h, context, mask)
        context = h if context is None else context
        dim = self.fc.out_features
        for name, t, width in (("h", h, dim), ("context", context, self.M.shape[2])):
            check_tensor(name, t)
            if t.ndim != 3 or t.shape[2] != width or t.shape[0] != h.shape[0]:
                raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected [{h.shape[0]}, N, {width}]")
            check_beside(name, t, self.M)
        shown = None if mask is None else _shown(mask, context)
        dropout: Any = getattr(self.att, "dropout", self.dropout if self.training else 0.0)
        att: Any = self.att  # a ModuleDict, or the module of a converted layer
        query, of_heads = att.query(h), (self.heads, (dim // self.heads) ** -0.5, dropout)
        inside = _attend(query, *self._keys_and_values(context), *of_heads, shown)
        across = _attend(query.reshape(1, -1, dim), *self._keys_and_values(self.M), *of_heads)
        return self.fc(torch.cat((inside, across.view_as(h)), -1))

    def _keys_and_values(self, of: Tensor) -> tuple[Tensor, Tensor]:
        att: Any = self.att
        return att.key(of), att.value(of)


class ComplementAttention(nn.Module):
    """CaaM's pair of attentions in a vision transformer: softmax(q k^T) v, causal, and softmax(-q k^T) v, its
    complement, by the same projections.

    It takes x [B, N, dim] and returns both, [B, N, dim] each. State dict, as published: qkv, proj.

    Args:
        dim: The features of a token, a multiple of num_heads.
        num_heads: The heads.
        qkv_bias: Whether queries, keys and values have biases.
        qk_scale: The factor of the logits; None: 1 over the root of the features of a head.
        attn_drop: The probability of dropout on both maps of attention.
        proj_drop: The probability of dropout on both results.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or dim no multiple of num_heads; in forward, x has
            another shape or type.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return one_call(self, ComplementAttention.forward, x)
        check_tensor("x", x)
        proj, heads = self.proj, self.num_heads
        if x.ndim != 3 or x.shape[2] != proj.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, N, {proj.in_features}]")
        check_beside("x", x, getattr(proj, "weight", None))
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if (dropout := _probability(self.attn_drop)) == 0:
            both = opposed_attentions(q, k, v, self.scale)
        else:
            both = _attention(q, k, v, self.scale, dropout), _attention(-q, k, v, self.scale, dropout)
        proj_drop = self.proj_drop
        results = (proj(o.transpose(1, 2).reshape(b, n, dim)) for o in both)
        causal, complement = results if _probability(proj_drop) == 0 else map(proj_drop, results)
        return causal, complement


def _apart(t: Tensor, heads: int) -> Tensor:
    """[B, heads, N, d] of t [B, N, heads * d]."""
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(o: Tensor) -> Tensor:
    """The inverse of _apart."""
    return o.transpose(1, 2).flatten(2)


def _probability(dropout: Any) -> Any:
    """That of a dropout that can be read; another module as it is."""
    if isinstance(dropout, nn.Module) and can_be_read(dropout, nn.Dropout):
        return dropout.p if dropout.training else 0.0
    return dropout


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    dropout: Any,
    shown: Tensor | None = None,
) -> Tensor:
    """[B, N, dim] of query, key and value [B, N or L, dim]; shown [B, 1, 1, L], True where a key takes part. A dropout
    that is a module of another kind, or has hooks, is called on the map of attention, which is made for it."""
    q, k, v = (_apart(t, heads) for t in (query, key, value))
    return _joined(_attention(q, k, v, scale, _probability(dropout), shown))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Any, shown: Tensor | None = None) -> Tensor:
    """The same of q, k and v [B, heads, N or L, d], and o so; dropout as of _probability."""
    if not isinstance(dropout, nn.Module):
        return dot_product_attention(q, k, v, scale, shown, dropout)
    logits = q @ k.mT * scale
    attention = (logits if shown is None else logits.masked_fill(~shown, -torch.inf)).softmax(-1)
    if shown is not None:  # where nothing is shown, o is 0
        attention = attention.masked_fill(~shown.any(-1, keepdim=True), 0.0)
    return dropout(attention) @ v


def _shown(mask: Tensor, context: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {found}, expected torch.bool, True where a token takes no part")
    if mask.shape != context.shape[:2]:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(context.shape[:2])}")
    return ~mask[:, None, None]


def _check_heads(dim: int, heads: int) -> None:
    check_at_least_one(dim=dim, heads=heads)
    if dim % heads:
        raise ValueError(f"dim: got {dim}, expected a multiple of the {heads} heads")
