"""The temporal shift (arXiv 1811.08383) in plain PyTorch: channels of the next frame and of the previous one."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift(x: Tensor, fold: int, reverse: bool = False) -> Tensor:
    """y [B, T, C, H, W]: the first ``fold`` channels of frame t + 1, the next ``fold`` of t - 1, the others of t.

    Where there is no such frame y is 0. With reverse the first two change places, which is the transpose: the shift of
    the gradient. 2 * fold is at most C.
    """
    ahead, behind, still = x.split((fold, fold, x.shape[2] - 2 * fold), 2)
    if reverse:
        ahead, behind = behind, ahead
    nothing = torch.zeros_like(x[:, :1, :fold])
    ahead = torch.cat((ahead[:, 1:], nothing), 1)
    behind = torch.cat((nothing, behind[:, :-1]), 1)
    return torch.cat((behind, ahead, still) if reverse else (ahead, behind, still), 2)
