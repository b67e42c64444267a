"""Pooled features of one axis, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.maps import GATE_AXES

_AXIS = {"T": 1, "C": 2, "H": 3, "W": 4}


def pool(x: Tensor, pooled: str) -> Tensor:
    """P_d(x) = cat[max_d x, mean_d x] (arXiv 2204.09303, section 3.1): the maximum is channel 0, the mean channel 1.

    x is [B, T, C, H, W] and ``pooled`` one of the letters T, C, H, W; returns [B, 2, *GATE_AXES[pooled]]. The maximum
    is that of torch.max(x, dim): the first index wins ties and takes the whole gradient, NaN wins over numbers.
    """
    axis = _AXIS[pooled]
    features = torch.stack((torch.max(x, axis).values, x.mean(axis)), 1)
    axes = "TCHW".replace(pooled, "")
    return features.permute(0, 1, *(2 + axes.index(a) for a in GATE_AXES[pooled]))
