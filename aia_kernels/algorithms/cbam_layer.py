"""CBAM as one operator for each direction, schemas.CBAM_PROPAGATE_PASSES.

Of a small call Python is what it costs: a tensor for each part that is kept, and a call for each pass. Here are two
operators and one node of autograd. The mathematics is that of cbam.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, save, saved
from .cbam import LEARNED, MOST_ROWS, Plan, followed, stored_gradients, typed
from .double_backward import backward_is_followed
from .unit import statistics_of


class Buffers(NamedTuple):
    """Of the spatial gate's BN: fixed, its mean and variance, or nothing where it uses those of the batch; and running,
    the tensors that move by momentum, as cbam_propagate_ takes them."""

    fixed: Sequence[Tensor | None] = ()
    running: Sequence[Tensor] = ()
    momentum: float = 0.0


def serves(plan: Plan, x: Tensor, has_mlp: bool) -> bool:
    """Whether the passes have all of a call as one: no statistics are shared with other processes, and an MLP has the
    published pools, of a batch small enough for products of their own."""
    if plan.group or not hasattr(plan.passes, "cbam_propagate_"):
        return False
    return not has_mlp or (sorted(plan.pool_types) == ["avg", "max"] and 2 * x.shape[0] <= MOST_ROWS)


def forward(plan: Plan, x: Tensor, parameters: Sequence[Tensor | None], buffers: Buffers, keep: bool) -> list[Tensor]:
    """What cbam_propagate_ returns."""
    fixed, running, momentum = buffers
    settings = plan.eps, plan.batch, momentum, plan.confounder, keep
    return plan.passes.cbam_propagate_(x, contiguous(*parameters), fixed, running, *settings)


class CbamLayerFunction(torch.autograd.Function):
    """y, confounder or None, kept = apply(x, plan, buffers, *parameters), with exact first and second derivatives.

    parameters: The LEARNED fields of Parameters. kept stands in a list of its own, as it is no part of the graph.
    """

    @staticmethod
    def forward(ctx, x, plan, buffers, *parameters):
        *results, kept = forward(plan, x, parameters, buffers, True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, kept, parameters=parameters)
        return *results, *(() if plan.confounder else (None,)), [kept]

    @staticmethod
    def backward(ctx, grad_y, grad_confounder, _kept):
        plan = ctx.plan
        needs_x, _, _, *needs = ctx.needs_input_grad
        if grad_y is None and grad_confounder is None:
            return (None,) * (3 + LEARNED)
        x, kept, *parameters = saved(ctx)
        if backward_is_followed():
            statistics = statistics_of(kept, 1, accumulate_dtype(x.dtype)) if parameters[4] is not None else None
            of_all = needs_x, *needs
            grad_x, *grads = followed(plan, x, parameters, statistics, of_all, (grad_y, grad_confounder))
            return grad_x, None, None, *grads
        of_results = stored_gradients(grad_y, grad_confounder, x)
        found = iter(plan.passes.cbam_propagate_back(*of_results, x, contiguous(*parameters), kept, (*needs, needs_x)))
        needed = [need and p is not None for need, p in zip(needs, parameters, strict=True)]
        grads = [next(found) if need else None for need in needed]
        wanted = [p if need else None for p, need in zip(parameters, needed, strict=True)]
        return next(found, None), None, None, *typed(grads, wanted)
