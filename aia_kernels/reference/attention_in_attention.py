"""Attention in Attention (arXiv 2204.09303) in plain PyTorch: the specification of this package.

    P_d(x) = cat[max_d x, mean_d x]
    g_d(x) = sigmoid(BN(conv3d(P_d(x))))
    y      = x * G_outer(x * G_inner(x))

with G = g_C for the channel context and G = (g_T + g_H + g_W) / 3 for the spacetime context. The last factor multiplies
x, never x * G_inner. Runs on any device in any floating-point type, and is differentiable as often as wanted.

What the published code (haoyanbin918/Attention-in-Attention, nets/block_zoo.py) does that one would not guess:

* g_W is convolved with its axes in the order T, H, C, not T, C, H: see maps.GATE_AXES.
* STinC2 averages each spacetime gate over C after its sigmoid, so its inner context is one map [B, T, H, W].
* CinST initializes H_conv twice and W_conv never: W_conv keeps the default of Conv3d. See modules/.
* The third of the spacetime context sits at different places in different units: see recalibrate.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.maps import CHANNEL, NONE, POOLED_AXES, SPACETIME
from .gate import Gate
from .gate import gate as compute_gate
from .pool import pool
from .recalibrate import field, recalibrate


@dataclass(frozen=True)
class Unit:
    """A unit: the context that guides (inner) and the context that recalibrates (outer).

    Attributes:
        name: "C", "ST", "CinST", "STinC" or "STinC2".
        letters: The pooled axes of the unit's gates, in the order in which modules and functions take their parameters.
        inner: NONE, CHANNEL or SPACETIME of common/maps.py.
        outer: CHANNEL or SPACETIME.
        averaged: The inner gates are averaged over C, so that they act as one channel-shaped gate.
    """

    name: str
    letters: str
    inner: int
    outer: int
    averaged: bool = False

    @property
    def inner_gate_context(self) -> int:
        """The shape of the inner gate, as maps knows it."""
        return CHANNEL if self.averaged else self.inner

    def rows(self, context: int) -> slice:
        """Find the gates of a context among the unit's gates.

        Args:
            context: CHANNEL or SPACETIME, one of the unit's.

        Returns:
            Their places in letters.
        """
        letters = POOLED_AXES[context]
        start = self.letters.index(letters[0])
        return slice(start, start + len(letters))


UNITS = {
    unit.name: unit
    for unit in (
        Unit("C", "C", NONE, CHANNEL),
        Unit("ST", "THW", NONE, SPACETIME),
        Unit("CinST", "CTHW", CHANNEL, SPACETIME),
        Unit("STinC", "CTHW", SPACETIME, CHANNEL),
        Unit("STinC2", "CTHW", SPACETIME, CHANNEL, averaged=True),
    )
}


def compose(x: Tensor, unit: Unit, gate: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Compute y = x * G_outer(x * G_inner(x)) with gates that a function computes.

    Args:
        x: [B, T, C, H, W], floating-point.
        unit: One of UNITS.
        gate: Takes a letter and its pooled features [B, 2, i, j, k], and returns the gate [B, i, j, k].

    Returns:
        y, shaped as x.
    """

    def fields(a: Tensor, context: int) -> list[Tensor]:
        return [field(gate(letter, pool(a, letter)), letter) for letter in POOLED_AXES[context]]

    a = x
    if unit.inner:
        inner = fields(x, unit.inner)
        if unit.averaged:
            inner = [g.mean(2, keepdim=True) for g in inner]
        a = recalibrate(x, inner)
    return recalibrate(x, fields(a, unit.outer))


def attention_in_attention(x: Tensor, unit: Unit, gates: Sequence[Gate]) -> tuple[Tensor, Tensor]:
    """Compute a unit (arXiv 2204.09303). Running statistics are read, never written.

    Args:
        x: [B, T, C, H, W], floating-point.
        unit: One of UNITS.
        gates: One for each letter of unit.letters. Where x and the parameters differ in type (autocast), everything is
            computed in the wider one.

    Returns:
        y, shaped and stored as x, in its type; and the statistics [n, 3] of its n gates (gate.py).
    """
    statistics: dict[str, Tensor] = {}

    def gate(letter: str, pooled: Tensor) -> Tensor:
        g, statistics[letter] = compute_gate(pooled, gates[unit.letters.index(letter)])
        return g

    dtype = x.dtype
    for parameters in gates:
        if parameters.weight.dtype != dtype:
            dtype = torch.promote_types(dtype, parameters.weight.dtype)
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        y = compose(x.to(dtype), unit, gate).to(x.dtype)
    return y, torch.stack([statistics[letter] for letter in unit.letters])
