"""The temporal shift (arXiv 1811.08383) in plain PyTorch: channels of the next frame and of the previous one."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift(x: Tensor, fold: int, reverse: bool = False) -> Tensor:
    """Shift the first ``fold`` channels from frame t + 1, the next ``fold`` from t - 1 (arXiv 1811.08383).

    Args:
        x: [B, T, C, H, W], of any type.
        fold: The channels that move each way; 2 * fold is at most C.
        reverse: The first two change places. This is the transpose: the shift of the gradient.

    Returns:
        y, shaped as x, 0 where there is no such frame.
    """
    ahead, behind, still = x.split((fold, fold, x.shape[2] - 2 * fold), 2)
    if reverse:
        ahead, behind = behind, ahead
    nothing = torch.zeros_like(x[:, :1, :fold])
    ahead = torch.cat((ahead[:, 1:], nothing), 1)
    behind = torch.cat((nothing, behind[:, :-1]), 1)
    return torch.cat((behind, ahead, still) if reverse else (ahead, behind, still), 2)
