"""Attention by a memory per sample (arXiv 2007.14902 and 1812.01243) in plain PyTorch: the specification of the family.

    k, q, v = x W_k^T + b_k,  x W_q^T + b_q,  x W_v^T + b_v          of each head
    S = sum over tokens of phi(k) v^T        s = sum over tokens of phi(k)
    o = phi(q) S / (phi(q) (s + eps))        or, where phi is a softmax, o = phi(q) S
    y = x + gamma * (o W_o^T + b_o)

phi of a key and of a query:

========= ========================= ======================== ====================================================
feature   keys                      queries                  published as
========= ========================= ======================== ====================================================
l2        (1, k / |k|)              (1, q / |q|)             linear attention, arXiv 2007.14902; eps leaves out the 1
softplus  softplus(k)               softplus(q)              MANet's kernel attention, arXiv 2009.02130
softmax   softmax over tokens of k  softmax over a head of q efficient attention, arXiv 1812.01243; eps is 0
========= ========================= ======================== ====================================================

Runs on any device in any floating-point type, and is differentiable as often as wanted. What goes into a product and
what comes out of it is rounded to the type of x; sums over tokens and the feature maps are in accumulate_dtype. S and
s are divided by N, so that S fits into float16. Where a key or a query is zero, or where all softplus of a query are,
the published code divides 0 by 0; here k / |k| and o are 0 there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .all_reduce import all_reduce
from .double_norm import log_sum_exp

FEATURES = ("l2", "softplus", "softmax")


class Form(NamedTuple):
    """What is constant about a layer.

    Attributes:
        feature: The feature map, one of FEATURES.
        heads: H.
        eps: Added to s.
        residual: Whether x is added.
    """

    feature: str
    heads: int = 1
    eps: float = 0.0
    residual: bool = True


class Weights(NamedTuple):
    """The parameters of a layer of H heads on C channels, with d features of a key and v of a value in each head.

    Attributes:
        projection: [2 H d, C], the keys of all heads and then the queries.
        bias: [2 H d], or None.
        value: [H, v, C].
        value_bias: [H, v], or None.
        output: [H, C, v], the columns of W_o of each head; or None for the identity, with one head.
        output_bias: [C], or None; for the feature softmax alone.
        gamma: [1], or None for 1.
    """

    projection: Tensor
    bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None = None
    output: Tensor | None = None
    output_bias: Tensor | None = None
    gamma: Tensor | None = None


def linear_attention(
    x: Tensor, weights: Weights, form: Form, padding: Tensor | None = None, process_group: Any = None
) -> Tensor:
    """y = x + gamma * (o W_o^T + b_o), as the head of this module says.

    Args:
        x: [B, N, C].
        weights: The parameters, in the type of x.
        form: The feature map, the heads and eps.
        padding: [B, N], True at tokens that take no part, or None. Their y is x.
        process_group: Its members hold the tokens in shards; None: this process holds all.

    Returns:
        y, [B, N, C], in the type of x.
    """
    dtype, heads = accumulate_dtype(x.dtype), form.heads
    tokens = x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)
    logits = torch.nn.functional.linear(tokens, weights.projection, weights.bias).to(dtype)
    key, query = _features(form, logits.unflatten(2, (2, heads, -1)), padding, process_group)
    bias = None if weights.value_bias is None else weights.value_bias.flatten()
    v = torch.nn.functional.linear(tokens, weights.value.flatten(0, 1), bias).to(dtype).unflatten(2, (heads, -1))
    key, query = (t.to(x.dtype).to(dtype) for t in (key, query))
    memory = torch.einsum("bnhd,bnhv->bhdv", key, v)
    if process_group is not None:
        memory = all_reduce(memory, process_group)
    count = 1 if form.feature == "softmax" else x.shape[1]
    o = torch.einsum("bnhd,bhdv->bnhv", query, (memory / count).to(x.dtype).to(dtype)).to(x.dtype).to(dtype)
    if form.feature != "softmax":
        total = key.sum(1)
        if process_group is not None:
            total = all_reduce(total, process_group)
        mass = torch.einsum("bnhd,bhd->bnh", query, (total + added(form, total)) / count)
        o = o / (mass + (mass == 0)).unsqueeze(-1)
    if weights.output is not None:
        o = torch.einsum("bnhv,hcv->bnc", o, weights.output.to(dtype))
        o = o if weights.output_bias is None else o + weights.output_bias.to(dtype)
    o = o.reshape(x.shape)
    if weights.gamma is not None:
        o = o * weights.gamma.to(dtype)
    o = (o if padding is None else o.masked_fill(padding.unsqueeze(-1), 0.0)).to(x.dtype)
    return x + o if form.residual else o


def added(form: Form, total: Tensor) -> Tensor:
    """What is added to s, of the length of its last axis: eps, but 0 to the constant 1 of the feature l2."""
    eps = total.new_full(total.shape[-1:], form.eps)
    return torch.cat((eps.new_zeros(1), eps[1:])) if form.feature == "l2" else eps


def _features(form: Form, logits: Tensor, padding: Tensor | None, process_group: Any) -> tuple[Tensor, Tensor]:
    """phi of the keys and of the queries, [B, N, H, d'], of the logits [B, N, 2, H, d]; 0 for keys at padding."""
    if form.feature == "softmax":
        key = logits[:, :, 0].flatten(2)
        key = (key - log_sum_exp(key, padding, process_group)).exp().view_as(logits[:, :, 0])
        query = logits[:, :, 1].softmax(-1)
    elif form.feature == "softplus":
        key, query = torch.nn.functional.softplus(logits).unbind(2)
    else:
        square = logits.square().sum(-1, keepdim=True)
        unit = logits * (square + (square == 0)).rsqrt()
        key, query = torch.cat((torch.ones_like(square), unit), -1).unbind(2)
    return key if padding is None else key.masked_fill(padding.unsqueeze(-1).unsqueeze(-1), 0.0), query


def channel_linear_attention(x: Tensor, gamma: Tensor | None, eps: float = 1e-6) -> Tensor:
    """y of linear attention over channels (arXiv 2007.14902, as in A2-FPN), of maps seen as x [B, C, N]:

        xh = x / |x| over channels      M = x xh^T [C, C]
        y[c, n] = x[c, n] + gamma * (sum_c' x[c', n] + (M xh)[c, n]) / (N + sum_n xh[c, n] (sum_c' xh[c', n] + eps))

    M is symmetric, and gamma and the divisor of a channel join its rows. So y takes two products, reads x three times,
    and no more than x and xh are as large as x.

    Args:
        x: [B, C, N], floating-point, its positions or its channels contiguous.
        gamma: [1], or None for 1.
        eps: As in the formula.

    Returns:
        y, [B, C, N], stored and of the type as x. Where x is zero at a position, so is xh.
    """
    dtype = accumulate_dtype(x.dtype)
    wide = x.to(dtype)
    square = wide.square().sum(1, keepdim=True)
    unit = wide * (square + (square == 0)).rsqrt()
    per_channel = unit @ (unit.sum(1, keepdim=True) + eps).mT + x.shape[2]
    factor = per_channel.reciprocal() if gamma is None else gamma.to(dtype) / per_channel
    memory = (wide @ unit.mT) * factor
    base = torch.addcmul(wide, factor, wide.sum(1, keepdim=True))
    by_position = x.shape[1] > 1 and x.stride(1) == 1
    y = torch.baddbmm(base.mT, unit.mT, memory.mT).mT if by_position else torch.baddbmm(base, memory, unit)
    return y.to(x.dtype)
