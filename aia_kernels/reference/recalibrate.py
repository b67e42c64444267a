"""Recalibration by the gates of a context, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common.maps import GATE_AXES

_AXIS = {"T": 1, "C": 2, "H": 3, "W": 4}


def field(gate: Tensor, pooled: str) -> Tensor:
    """A gate [B, *GATE_AXES[pooled]] with its pooled axis back at length one: broadcasts against [B, T, C, H, W]."""
    axes = GATE_AXES[pooled]
    return gate.permute(0, *(1 + axes.index(a) for a in "TCHW".replace(pooled, ""))).unsqueeze(_AXIS[pooled])


def recalibrate(x: Tensor, fields: Sequence[Tensor]) -> Tensor:
    """x * G with G the mean of the fields: g_C for the channel context, (g_T + g_H + g_W) / 3 for spacetime.

    The published code writes the third as ``x * 1 / 3 * (...)`` in ST and STinC and ``1 / 3 * x * (...)`` in CinST.
    The three placements differ by rounding only; dividing the sum of the gates is the one that reads like the paper.
    """
    return x * (sum(fields) / len(fields))
