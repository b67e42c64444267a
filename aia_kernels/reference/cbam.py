"""CBAM (arXiv 1807.06521) and CaaM's pair of it (arXiv 2108.08782) in plain PyTorch: the specification.

    g_c = sigmoid(sum over pool types of mlp(pool_HW x))            mlp: C -> C / r -> C, ReLU between
    g_s = sigmoid(BN(conv(cat[max_C, mean_C](x g_c))))
    causal = y = x g_c g_s        confounder = x - y

Either gate may be absent; it is 1 then. Runs on any device in any floating-point type, and is differentiable as often
as wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate import Gate
from .gate import gate as compute_gate


class MLP(NamedTuple):
    """The parameters of a channel gate: two linear maps with a ReLU between.

    Attributes:
        weight_1: [hidden, C].
        bias_1: [hidden], or None for 0.
        weight_2: [C, hidden].
        bias_2: [C], or None for 0.
    """

    weight_1: Tensor
    bias_1: Tensor | None
    weight_2: Tensor
    bias_2: Tensor | None


def _mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


def _maximum(x: Tensor) -> Tensor:
    return x.flatten(2).max(2).values


def _power_mean(x: Tensor) -> Tensor:
    return F.lp_pool2d(x, 2.0, (x.shape[2], x.shape[3])).flatten(1)


def _log_sum_exp(x: Tensor) -> Tensor:
    return x.flatten(2).logsumexp(2)


def _mixed(x: Tensor) -> Tensor:
    return (_mean(x) + _maximum(x)) / 2


#: What a channel gate may pool with, by the published names, [B, C, H, W] to [B, C]; "mix" is that of timm's LightCbam.
POOLS = {"avg": _mean, "max": _maximum, "lp": _power_mean, "lse": _log_sum_exp, "mix": _mixed}


def channel_gate(x: Tensor, mlp: MLP, pool_types: Sequence[str]) -> Tensor:
    """g_c [B, C] of x [B, C, H, W]. The maximum is that of torch.max(x, dim): the first index wins ties, NaN wins."""
    weight_1, bias_1, weight_2, bias_2 = (None if p is None else p.to(x.dtype) for p in mlp)
    raw = [F.linear(F.linear(POOLS[name](x), weight_1, bias_1).relu(), weight_2, bias_2) for name in pool_types]
    total = raw[0]
    for another in raw[1:]:
        total = total + another
    return total.sigmoid()


def spatial_gate(x: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """g_s [B, H, W] of x [B, C, H, W], and the statistics [3] of its BN (gate.py)."""
    return compute_gate(torch.stack((x.max(1).values, x.mean(1)), 1), gate)


def cbam(
    x: Tensor, mlp: MLP | None, gate: Gate | None, pool_types: Sequence[str] = ("avg", "max")
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute CBAM. Running statistics are read, never written.

    Args:
        x: [B, C, H, W], floating-point.
        mlp: The channel gate's parameters, or None without one.
        gate: The spatial gate's, its weight [1, 2, k, k] with k odd, or None without one. Where x and parameters differ
            in type (autocast), everything is computed in the wider one.
        pool_types: The channel gate's pools, of POOLS.

    Returns:
        y and x - y, shaped as x and in its type; and the statistics [1, 3] of the spatial gate's BN, or None.
    """
    dtype, statistics = x.dtype, None
    for p in (*(mlp or ())[::2], *(gate or ())[:1]):
        if p.dtype != dtype:
            dtype = torch.promote_types(dtype, p.dtype)
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        wide = y = x.to(dtype)
        if mlp is not None:
            y = y * channel_gate(y, mlp, pool_types)[:, :, None, None]
        if gate is not None:
            g, statistics = spatial_gate(y, gate)
            y, statistics = y * g.unsqueeze(1), statistics.unsqueeze(0)
        return y.to(x.dtype), (wide - y).to(x.dtype), statistics
