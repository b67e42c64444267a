"""The whole unit as two registered operators, the road of torch.compile and torch.export. Schemas and fakes: ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import attention_in_attention as algorithm
from .. import backends, maps, ops
from ..layouts import stored_as
from ..reference import UNITS

unit_forward = getattr(torch.ops, ops.NAMESPACE).unit_forward.default
unit_backward = getattr(torch.ops, ops.NAMESPACE).unit_backward.default


def _plan(unit, backend, batch, eps, groups) -> algorithm.Plan:
    return algorithm.Plan(UNITS[unit], backends.passes(backend), tuple(batch), tuple(eps), tuple(groups))


def _forward(x, weight, affine, fixed, *settings):
    result = algorithm.forward(_plan(*settings), x, weight.split(1), affine, fixed)
    if (inner := result.inner) is None:
        sizes = x.shape[0], 2, 0
        pooled = x.new_empty(sizes, dtype=result.statistics.dtype)
        inner = pooled, x.new_empty(sizes[::2], dtype=torch.uint8), pooled.new_empty((0, 4))
    return result.y, *inner, *result.outer, result.statistics


def _backward(grad_y, x, weight, *rest):
    kept, statistics, settings = rest[:6], rest[6], rest[7:]
    inner = algorithm.Kept(*kept[:3]) if UNITS[settings[0]].inner != maps.NONE else None
    return algorithm.backward(
        _plan(*settings), grad_y, x, weight.split(1), inner, algorithm.Kept(*kept[3:]), statistics
    )


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
