"""A unit of Attention in Attention as one operator for each direction, schemas.UNIT_PASSES.

Of a small call Python is what it costs: views, lists, and a tensor for each part that is kept. Here are two operators
and one node of autograd, which take x and the parameters as a network has them. The mathematics is that of
attention_in_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.layouts import as_clips, as_input, save, saved, stored_as
from ..reference import Unit
from .attention_in_attention import Plan as PlanOfPasses
from .attention_in_attention import formula
from .double_backward import backward_is_followed, gradients


class Plan(NamedTuple):
    """What is constant about a call.

    unit: the unit. passes: those of schemas.UNIT_PASSES are its attributes. frames: of a clip of x [B * frames, C, H,
    W]. batch: for each gate in unit.letters whether its BN uses the statistics of the batch. eps: what each adds to the
    variance. momentum: by which the running statistics move.
    """

    unit: Unit
    passes: Any
    frames: int
    batch: Sequence[bool]
    eps: Sequence[float]
    momentum: float = 0.0


class Buffers(NamedTuple):
    """Of the BNs of a unit: fixed, the mean and variance of each gate, or nothing where all use the batch; and running,
    the tensors that move, as unit_propagate_ takes them."""

    fixed: Sequence[Tensor | None] = ()
    running: Sequence[Tensor] = ()


def forward(
    plan: Plan, x: Tensor, parameters: Sequence[Tensor | None], buffers: Buffers, keep: bool
) -> tuple[Tensor, Tensor]:
    """y and what is kept, as unit_propagate_ returns them."""
    unit = plan.unit
    settings = plan.eps, plan.batch, plan.momentum, unit.inner, unit.outer, unit.averaged, keep
    return plan.passes.unit_propagate_(x, plan.frames, parameters, *buffers, *settings)


def statistics_of(kept: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The statistics [n, 3] of the gates of x of a type, in what is kept, which begins with norm [n, 4] and them."""
    return kept[: 7 * n * dtype.itemsize].view(dtype)[4 * n :].view(n, 3)


class UnitFunction(torch.autograd.Function):
    """y, kept = apply(x, plan, buffers, *parameters), as forward, with exact first and second derivatives.

    parameters: For each gate in plan.unit.letters the weight, scale and shift. kept stands in a list of its own, as it
    is no part of the graph.
    """

    @staticmethod
    def forward(ctx, x, plan, buffers, *parameters):
        y, kept = forward(plan, x, parameters, buffers, True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, kept, parameters=parameters)
        return y, [kept]

    @staticmethod
    def backward(ctx, grad_y, _kept):
        plan = ctx.plan
        needs_x, _, _, *needs = ctx.needs_input_grad
        if grad_y is None:
            return (None,) * (3 + len(needs))
        x, kept, *parameters = saved(ctx)
        if backward_is_followed():
            grad_x, *grads = _followed(plan, x, parameters, kept, (needs_x, *needs), grad_y)
            return grad_x, None, None, *grads
        unit = plan.unit
        wanted = *needs, needs_x
        of_unit = unit.inner, unit.outer, unit.averaged
        found = plan.passes.unit_propagate_back(
            stored_as(grad_y, x), x, plan.frames, parameters, kept, *of_unit, wanted
        )
        if all(wanted):
            return found[-1], None, None, *found[:-1]
        given = iter(found)
        grads = [next(given) if needed else None for needed in wanted]
        return grads[-1], None, None, *grads[:-1]


def _followed(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Tensor,
    needs: Sequence[bool],
    grad_y: Tensor,
) -> list[Tensor | None]:
    n = len(plan.batch)
    statistics = statistics_of(kept, n, accumulate_dtype(x.dtype)).split(1)
    of_passes = PlanOfPasses(plan.unit, plan.passes, tuple(plan.batch), tuple(plan.eps), ("",) * n)

    def y_of(x, *parameters):
        return as_input(formula(of_passes, as_clips(x, plan.frames), parameters, statistics), x.ndim)

    return gradients(y_of, (x, *parameters), needs, grad_y)
