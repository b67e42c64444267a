"""The whole unit as two registered operators, the road of torch.compile and torch.export. Schemas and fakes: ops.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import attention_in_attention as algorithm
from .. import backends, ops
from ..layouts import stored_as
from ..reference import UNITS

unit_forward = getattr(torch.ops, ops.NAMESPACE).unit_forward.default
unit_backward = getattr(torch.ops, ops.NAMESPACE).unit_backward.default


def packed(
    parameters: Sequence[Tensor | None], fixed: Sequence[Tensor | None], batch: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [n, 2, 3, 3, 3], affine [n, 2] and fixed [n, 2], None where every gate uses the batch's statistics, as
    unit_forward takes them; from what AttentionInAttentionFunction takes."""
    weight = torch.cat(parameters[::3]).to(dtype)
    one, zero = weight.new_ones(1), weight.new_zeros(1)

    def columns(first, second, default):
        filled = [
            d if p is None else p.to(dtype)
            for pair in zip(first, second, strict=True)
            for p, d in zip(pair, default, strict=True)
        ]
        return torch.cat(filled).view(-1, 2)

    affine = columns(parameters[1::3], parameters[2::3], (one, zero))
    return weight, affine, None if all(batch) else columns(fixed[::2], fixed[1::2], (zero, one))


def _plan(unit, backend, batch, eps, groups) -> algorithm.Plan:
    return algorithm.Plan(UNITS[unit], backends.passes(backend), tuple(batch), tuple(eps), tuple(groups))


def _forward(x, weight, affine, fixed, *settings):
    plan = _plan(*settings)
    pairs = [(None, None)] * len(plan.batch) if fixed is None else [row.split(1) for row in fixed.unbind()]
    rows = zip(weight.split(1), affine.unbind(), pairs, strict=True)
    gates = [algorithm.GateParameters(w, *row.split(1), *pair) for w, row, pair in rows]
    result = algorithm.forward(plan, x, gates)
    statistics = torch.cat(algorithm.statistics_of(plan.unit, result.inner, result.outer))
    if (inner := result.inner) is None:
        sizes = x.shape[0], 2, 0
        pooled = x.new_empty(sizes, dtype=statistics.dtype)
        inner = pooled, x.new_empty(sizes[::2], dtype=torch.uint8), pooled.new_empty((0, 4))
    return result.y, *inner[:3], *result.outer[:3], statistics


def _backward(grad_y, x, weight, *rest):
    kept, statistics, plan = rest[:6], rest[6], _plan(*rest[7:])
    unit = plan.unit
    inner = algorithm.Kept(*kept[:3], statistics[unit.rows(unit.inner)]) if unit.inner else None
    outer = algorithm.Kept(*kept[3:], statistics[unit.rows(unit.outer)])
    grad_x, grad_weight, grad_affine = algorithm.backward(plan, grad_y, x, weight.split(1), inner, outer)
    return grad_x, torch.cat(grad_weight), torch.cat([torch.cat(pair)[None] for pair in grad_affine])


def _setup(ctx, inputs, output):
    x, weight, _affine, _fixed, *ctx.settings = inputs
    _y, *kept, statistics = output
    ctx.mark_non_differentiable(*kept, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *kept, statistics)


def _autograd(ctx, grad_y: Tensor | None, *_):
    if grad_y is None:
        return (None,) * 9
    x, weight, *kept = ctx.saved_tensors
    grad_x, grad_weight, grad_affine = unit_backward(stored_as(grad_y, x), x, weight, *kept, *ctx.settings)
    return grad_x, grad_weight, grad_affine, *(None,) * 6


def _no_second_derivative(ctx, *_):
    raise RuntimeError("a compiled or exported unit has first derivatives only; take second ones in eager mode")


ops.implement("unit_forward", _forward)
ops.implement("unit_backward", _backward)
torch.library.register_autograd(f"{ops.NAMESPACE}::unit_forward", _autograd, setup_context=_setup)
torch.library.register_autograd(f"{ops.NAMESPACE}::unit_backward", _no_second_derivative)
