"""A unit of Attention in Attention as one operator for each direction (algorithms/unit.py), where the CPU has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..algorithms.unit import Buffers, Plan, UnitFunction, forward
from ..common.functions import apply_of
from ..reference import Norm, Unit
from ..reference.norm import is_number_of_batches, updates

FAMILY = "attention_in_attention"
_apply = apply_of(UnitFunction)


class GatesRead(NamedTuple):
    """What an ordinary call reads of the submodules of a unit (modules.submodules.read_gates_at_once).

    parameters: For each gate weight [1, 2, 3, 3, 3], scale and shift. buffers: as of algorithms.unit. batch, eps: for
    each gate. momentum: by which the running statistics move.
    """

    parameters: Sequence[Tensor | None]
    buffers: Buffers
    batch: Sequence[bool]
    eps: Sequence[float]
    momentum: float


def has_units(passes: Any, groups: Sequence[str] = ()) -> bool:
    """Whether passes have a unit as one operator: no statistics are shared with other processes."""
    return hasattr(passes, "unit_propagate_") and not any(groups)


def moving(norms: Sequence[Norm | None]) -> tuple[Sequence[Tensor], float]:
    """The running statistics of Buffers and the momentum by which they move at once; none where they do not move, or
    not alike."""
    momentum, counted = norms[0] and norms[0].momentum, norms[0] and norms[0].num_batches_tracked is not None
    running: list[Any] = []
    for norm in norms:
        if norm is None or not updates(norm) or norm.momentum is None or norm.momentum != momentum:
            return (), 0.0
        tracked = norm.num_batches_tracked
        if (tracked is not None) != counted or (counted and not is_number_of_batches(tracked)):
            return (), 0.0
        running += norm[2:5] if counted else norm[2:4]
    return running, momentum


def at_once(x: Tensor, unit: Unit, frames: Any, read: GatesRead) -> Tensor | None:
    """y of an ordinary call, the running statistics moved; None where x, frames or the backend is not ordinary, which
    says nothing yet."""
    if x.ndim == 4:
        if type(frames) is not int or frames < 1 or x.shape[0] % frames:
            return None
        channels_last = torch.channels_last
    elif x.ndim == 5:
        channels_last, frames = torch.channels_last_3d, 1
    else:
        return None
    # At least one map may have a single value, or none.
    if x.numel() <= max(x.shape) or not (x.is_contiguous() or x.is_contiguous(memory_format=channels_last)):
        return None
    if backends.chosen_backend() not in ("auto", "cpu") or backends.select(x.device, x.dtype, FAMILY) != "cpu":
        return None
    passes = backends.passes("cpu", FAMILY)
    if not has_units(passes):
        return None
    plan = Plan(unit, passes, frames, read.batch, read.eps, read.momentum)
    return called(plan, x, read.parameters, read.buffers, _apply)[0]


def called(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    buffers: Buffers,
    apply: Callable[..., Any] = UnitFunction.apply,
) -> tuple[Tensor, Tensor]:
    """y and what is kept, by way of autograd where somebody wants gradients."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        y, (kept,) = apply(x, plan, buffers, *parameters)
        return y, kept
    return forward(plan, x, parameters, buffers, False)
