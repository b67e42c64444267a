"""External attention (arXiv 2105.02358) in plain PyTorch: the specification of the second family.

    L = x K^T                                           [B, N, M]
    A = L normalized over tokens, then over slots       double_norm.py
    o = A V^T + bias

and EANet's block around it, y = relu(BN(A V^T) + x), whose convolutions are folded into K and V by the caller (no
nonlinearity stands between a projection and its memory). Runs on any device in any floating-point type, and is
differentiable as often as wanted.

What the published code (MenghaoGuo/EANet and its ports) does that one would not guess:

* EANet's block and EAMLP add eps = 1e-9 to the sum over slots, and the popular port with two linear layers adds none.
* EAMLP's memories have biases. That of the keys is a constant per slot, which the softmax over tokens does not see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .all_reduce import all_reduce
from .double_norm import double_normalize
from .norm import Norm, uses_batch


def external_attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    group: int,
    eps: float,
    padding: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float = 1.0,
    process_group: Any = None,
) -> Tensor:
    """o = A V^T + bias, A = double_normalize(x K^T) for each head (arXiv 2105.02358).

    Args:
        x: [B, N, H * k], the features of the H heads one after the other.
        key: K, [H, M, k], or [1, M, k] for all heads.
        value: V, [H, v, M], or [1, v, M] for all heads.
        bias: [H * v], or None.
        group: As of double_normalize.
        eps: As of double_normalize.
        padding: [B, N], True at tokens that take no part, or None. Their o is 0.
        keep: [B, N, H * M], 0 or 1: dropout's mask, or None. A * keep * scale then takes the place of A in the value
            product.
        scale: Dropout's factor.
        process_group: As of double_normalize.

    Returns:
        o, [B, N, H * v], in the type of x.
    """
    heads = x.shape[2] // key.shape[2]
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
    attention = double_normalize(_by_heads(x, key, heads), group, eps, padding, process_group)
    if keep is not None:
        attention = attention * keep * scale
    o = _by_heads(attention, value, heads)
    if bias is not None:
        o = o + bias.to(o.dtype)
    return o if padding is None else o.masked_fill(padding.unsqueeze(-1), 0.0)


def _by_heads(x: Tensor, matrices: Tensor, heads: int) -> Tensor:
    """Each head's features of x [B, N, H * p] times the transpose of its matrix of [H or 1, q, p]: [B, N, H * q]."""
    if heads == 1:
        return x @ matrices[0].mT
    by_head = x.unflatten(-1, (heads, -1))
    return torch.einsum("bnhp,hqp->bnhq", by_head, matrices.expand(heads, -1, -1)).flatten(2)


def second_moments(attention: Tensor, process_group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [M] and covariance [M, M] of A over batch and tokens, and the number of tokens, over a group's members.

    The covariance is that of A less its mean: where the mean of a column dwarfs its spread, a difference of second
    moments would have lost the digits.
    """
    a = attention.flatten(0, 1).to(accumulate_dtype(attention.dtype))
    count = a.new_full((), a.shape[0])
    if process_group is None:
        mean = a.mean(0)
        a = a - mean
        return mean, a.mT @ a / count, count
    flat = all_reduce(torch.cat((a.sum(0), count.view(1))), process_group)
    total, count = flat[:-1], flat[-1]
    mean = total / count
    a = a - mean
    return mean, all_reduce(a.mT @ a, process_group) / count, count


def external_attention_block(x: Tensor, key: Tensor, value: Tensor, norm: Norm, eps: float) -> tuple[Tensor, Tensor]:
    """y = relu(BN(z) + x), z = A V^T, A = double_normalize(x K^T) in one group.

    As z is linear in A, its moments follow from those of A, which has M columns instead of C: mean(z) = V mean(A) and
    var(z) = diag(V Cov(A) V^T). Running statistics are read, never written.

    Args:
        x: [B, N, C], floating-point.
        key: K, [M, C].
        value: V, [C, M].
        norm: BN over C channels.
        eps: Added to the sum over slots.

    Returns:
        y, shaped and stored as x; and BN's statistics [C, 3]: the mean and biased variance that BN used, and the share
        of one token in them, 1 / count, or 0 where they are not the batch's.
    """
    dtype = accumulate_dtype(x.dtype)
    attention = double_normalize(x @ key.mT, key.shape[0], eps)
    factor, mean, statistics, _ = norm_of_values(attention, value, norm)
    shift = -mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    z = attention @ (factor.unsqueeze(1) * value.to(dtype)).to(x.dtype).mT
    y = (x.to(dtype) + z.to(dtype) + shift).relu().to(x.dtype)  # x first: y takes its storage
    return y, statistics


def norm_of_values(attention: Tensor, value: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What BN does to z = A V^T: BN(z) = (z - mean) * factor + bias.

    Args:
        attention: A, [B, N, M], floating-point.
        value: V, [C, M].
        norm: BN over C channels. Running statistics are read, never written.

    Returns:
        factor and mean [C] in the accumulate_dtype of A; BN's statistics [C, 3], as of external_attention_block; and
        the mean of A [M] where the statistics are those of the batch, else None.
    """
    dtype = accumulate_dtype(attention.dtype)
    v, mean_of_a = value.to(dtype), None
    if uses_batch(norm):
        members = norm.process_group if norm.training else None
        mean_of_a, covariance, count = second_moments(attention, members)
        mean, var = v @ mean_of_a, ((v @ covariance) * v).sum(1).clamp_min(0)
        share = count.reciprocal()
    else:
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
        share = mean.new_zeros(())
    factor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.to(dtype)
    return factor, mean, torch.stack((mean, var, share.expand_as(mean)), 1).detach(), mean_of_a
