"""A gate, g = sigmoid(BN(conv(P))), in plain PyTorch, and the parameters that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .all_reduce import all_reduce
from .norm import Norm, uses_batch


class Gate(NamedTuple):
    """The parameters of one gate.

    Attributes:
        weight: [1, 2, 3, 3, 3], that of its convolution, in the axis order of maps.GATE_AXES; in CBAM [1, 2, k, k].
        norm: Its batch norm over one channel, or None.
    """

    weight: Tensor
    norm: Norm | None = None


def batch_statistics(z: Tensor, process_group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of z, and the number of its elements, over the members of a process group if given."""
    count = z.new_full((), z.numel())
    if process_group is None:
        return z.mean(), z.var(correction=0), count
    total, count = all_reduce(torch.stack((z.sum(), count)), process_group).unbind()
    mean = total / count
    return mean, all_reduce((z - mean).square().sum(), process_group) / count, count


def gate(pooled: Tensor, parameters: Gate) -> tuple[Tensor, Tensor]:
    """g = sigmoid(BN(conv(P))) of pooled features P [B, 2, i, j, k]; returns g [B, i, j, k] and statistics [3].

    The convolution is 2 -> 1, 3x3x3, padding 1, no bias; of P [B, 2, H, W] it is k x k, padding k // 2, k odd. BN
    computes in accumulate_dtype, as torch's does. The statistics are the mean and biased variance that BN used and the
    share of one element in them, 1 / count, or 0 where they are not the batch's (0, 1 and 0 without BN). Updating the
    running ones is the caller's business.
    """
    weight, norm = parameters
    dtype = accumulate_dtype(pooled.dtype)
    conv = F.conv3d if pooled.ndim == 5 else F.conv2d
    z = conv(pooled, weight.to(pooled.dtype), padding=weight.shape[-1] // 2)[:, 0]
    if norm is None:
        return z.sigmoid(), torch.stack([z.new_full((), value, dtype=dtype) for value in (0, 1, 0)])
    u = z.to(dtype)
    if uses_batch(norm):
        mean, var, count = batch_statistics(u, norm.process_group if norm.training else None)
        share = count.reciprocal()
    else:
        mean, var = norm.running_mean[0].to(dtype), norm.running_var[0].to(dtype)
        share = torch.zeros_like(mean)
    u = (u - mean) * torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        u = u * norm.weight.to(dtype)
    if norm.bias is not None:
        u = u + norm.bias.to(dtype)
    return u.to(z.dtype).sigmoid(), torch.stack((mean, var, share)).detach()
