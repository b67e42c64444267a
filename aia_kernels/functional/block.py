"""EANet's block in the forms that no pass writes at once: with other norms, activations and residuals.

The double normalization in the middle is the fused one. A batch norm joins V where its statistics are fixed, or
cheaper to have of A than of z. Any other norm is called on z. Nothing of the size of x is kept but x, and what the norm
and the activation keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autocast import no_autocast
from ..common.dtypes import accumulate_dtype
from ..common.layouts import as_maps, as_tokens
from ..common.tracing import needs_reference
from ..reference import Norm, norm_of_values
from ..reference.norm import uses_batch

#: What an activation may be called.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def block(
    normalize: Callable[..., Tensor],
    x: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    norm: Norm | Callable[[Tensor], Tensor] | None,
    eps: float,
    activation: str | Callable[[Tensor], Tensor] | None,
    residual: bool | Tensor,
) -> tuple[Tensor, Tensor | None]:
    """functional.external_attention_block by the double normalization and operators of PyTorch.

    Returns:
        y, and the statistics of BN, as of the reference, or None.
    """
    statistics = None
    with no_autocast(x):
        attention = normalize(as_tokens(x) @ key.mT, eps=eps)
        joins = isinstance(norm, Norm) and _joins(norm, slots=key.shape[0], channels=value.shape[0])
        if joins:
            attention, value, bias, statistics = _joined(attention, value, norm)
        y = _values(attention, value, bias, x)
        if isinstance(norm, Norm) and not joins:
            y, statistics = _batch_norm(y, norm)
    if callable(norm) and not isinstance(norm, Norm):
        y = norm(y)
    if residual is not False:
        y = (x if residual is True else residual) + y  # in this order: y is stored as what comes first
    function: Any = ACTIVATIONS.get(activation, activation) if isinstance(activation, str) else activation
    return (y if function is None else function(y)), statistics


def _values(attention: Tensor, value: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A V^T + bias as maps [B, v, ...] stored as x. The product writes them as they are wanted: no copy turns them."""
    bias = None if bias is None else bias.to(attention.dtype)
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return as_maps(F.linear(attention, value, bias), x)
    by_sample = value.expand(x.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(by_sample, attention.mT).unflatten(2, x.shape[2:])
    return torch.baddbmm(bias.unsqueeze(1), by_sample, attention.mT).unflatten(2, x.shape[2:])


def _joins(norm: Norm, slots: int, channels: int) -> bool:
    """Whether BN joins V. Where there are more slots than channels, BN of z takes and keeps less than the moments of A;
    but statistics are shared with other processes, and taken under vmap, as moments."""
    return not uses_batch(norm) or norm.process_group is not None or slots < channels or needs_reference()


def _joined(attention: Tensor, value: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """BN of z = A V^T as one product, A' V'^T + bias: A', V', the bias in the accumulate_dtype, and the statistics.

    With the statistics of a batch A' is A less its mean: where that dwarfs the spread of A, gradients through a bias in
    its place would lose the digits.
    """
    factor, mean, statistics, mean_of_a = norm_of_values(attention, value, norm)
    bias = None if norm.bias is None else norm.bias.to(factor.dtype)
    folded = (factor.unsqueeze(1) * value).to(attention.dtype)
    if mean_of_a is not None:
        return (attention - mean_of_a).to(attention.dtype), folded, bias, statistics
    return attention, folded, -mean * factor if bias is None else bias - mean * factor, statistics


def _batch_norm(z: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """torch's BN of z by the statistics of the batch, and these."""
    dtype, share = accumulate_dtype(z.dtype), z.shape[1] / z.numel()
    weight, bias = (None if p is None else p.to(dtype) for p in (norm.weight, norm.bias))
    mean, var = z.new_zeros(z.shape[1], dtype=dtype), z.new_ones(z.shape[1], dtype=dtype)
    maps = z.flatten(2).unsqueeze(3)  # of four axes, which torch leaves stored as they are
    # mean and var become those of the batch, var unbiased.
    y = F.batch_norm(maps, mean, var, weight, bias, True, 1.0, norm.eps).reshape(z.shape)
    return y, torch.stack((mean, var * (1 - share), torch.full_like(mean, share)), 1)


def with_bias(norm: Norm, bias: Tensor) -> Norm:
    """BN by fixed statistics of z + bias, as one of z."""
    dtype = accumulate_dtype(bias.dtype)
    scaled = bias.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scaled = scaled * norm.weight.to(dtype)
    return norm._replace(bias=scaled if norm.bias is None else norm.bias + scaled)
