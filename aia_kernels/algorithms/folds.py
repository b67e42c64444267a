"""The batch norm of external attention's block folded into V, in PyTorch's operators.

What a backend takes that lacks the passes (schemas.FOLD_PASSES): the same names, arguments and results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype


def fold(
    value: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: Sequence[Tensor],
    count: float,
    fixed: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = _wide(value)
    if of_batch:
        origin, total, second = of_batch
        off, share = total / count, 1 / count
        mean = v @ (origin + off)
        var = ((v @ (second / count - off.outer(off))) * v).sum(1).clamp_min(0)
    else:
        off, share = v.new_empty(0), 0.0
        mean, var = (t.to(v.dtype) for t in fixed)
    factor, _ = _factor(weight, var, eps)
    shift = -mean * factor if bias is None else bias.to(v.dtype) - mean * factor
    statistics = torch.stack((mean, var, torch.full_like(var, share)), 1)
    return (factor.unsqueeze(1) * v).to(value.dtype), shift, statistics, off


def fold_sums(
    value: Tensor, product: Tensor, sums: Tensor, statistics: Tensor, off: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    v = _wide(value)
    mean, var, _ = statistics.unbind(1)
    center = mean if off is None else v @ off
    _, rstd = _factor(None, var, eps)
    return torch.stack((sums, rstd * ((v * product).sum(1) - center * sums))), center


def fold_back(
    value: Tensor,
    weight: Tensor | None,
    product: Tensor,
    joint: Tensor,
    center: Tensor,
    statistics: Tensor,
    of_batch: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = _wide(value)
    _, var, share = statistics.unbind(1)
    factor, rstd = _factor(weight, var, eps)
    inner, constant = v.new_empty((0, 0)), v.new_empty(0)
    if of_batch:
        off, total, second = of_batch
        of_mean, of_variance = joint * share
        slope = rstd * of_variance
        centred = second - off.outer(total)
        product = product - torch.addmm(of_mean.outer(total), v * slope.unsqueeze(1), centred)
        inner = (v * (-factor * slope).unsqueeze(1)).mT @ v
        constant = -(factor * of_mean) @ v - off @ inner
    return factor.unsqueeze(1) * product, (factor.unsqueeze(1) * v).to(value.dtype), inner, constant


def _wide(value: Tensor) -> Tensor:
    return value.to(accumulate_dtype(value.dtype))


def _factor(weight: Tensor | None, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """gamma * rstd, and rstd."""
    rstd = (var + eps).rsqrt()
    return rstd if weight is None else rstd * weight.to(rstd.dtype), rstd
