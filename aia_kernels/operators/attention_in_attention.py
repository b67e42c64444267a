"""The whole unit as registered operators: forward, backward, and the forward that keeps nothing.

Arguments and results are those of forward and backward in algorithms/attention_in_attention.py. What is kept of an
absent inner context is empty. fixed is None where every gate uses the batch's statistics. index is the type in which
indices are kept, by default the smallest that holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..algorithms import attention_in_attention as algorithm
from ..algorithms.double_backward import backward_is_followed, gradients
from ..common import maps
from ..common.dtypes import accumulate_dtype
from ..common.layouts import dense_clips, save, saved, stored_as
from ..common.tracing import is_exporting
from ..fakes import packed_like
from ..reference import UNITS
from .registration import differentiate, register

_FORWARD = (
    "(Tensor x, Tensor weight, Tensor affine, Tensor? fixed, str unit, str backend, bool[] batch, "
    "float[] eps, str[] groups, ScalarType? index=None) -> "
    "(Tensor y, Tensor inner_pooled, Tensor inner_argmax, Tensor inner_norm, "
    "Tensor outer_pooled, Tensor outer_argmax, Tensor outer_norm, Tensor statistics)"
)
_BACKWARD = (
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor inner_pooled, Tensor inner_argmax, "
    "Tensor inner_norm, Tensor outer_pooled, Tensor outer_argmax, Tensor outer_norm, Tensor statistics, str unit, "
    "str backend, bool[] batch, float[] eps, str[] groups) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_affine)"
)


_EVALUATE = (
    "(Tensor x, Tensor[] weight, Tensor?[] scale, Tensor?[] shift, Tensor?[] mean, Tensor?[] var, str unit, "
    "str backend, float[] eps) -> Tensor"
)


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


def index_dtype(clips: Tensor, unit: str) -> torch.dtype | None:
    """The type in which unit_forward is to keep indices. None, the smallest, where the lengths of the clips are known;
    where lengths are symbols, one that holds every index, as one recorded program serves them all.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    _, t, c, h, w = clips.shape
    contexts = UNITS[unit].inner, UNITS[unit].outer
    lengths = [*((c,) if maps.CHANNEL in contexts else ()), *((t, h, w) if maps.SPACETIME in contexts else ())]
    return None if all(statically_known_true(length <= 256) for length in lengths) else torch.int32


def _plan(unit, backend, batch, eps, groups) -> algorithm.Plan:
    return algorithm.Plan(
        UNITS[unit], backends.passes(backend, "attention_in_attention"), tuple(batch), tuple(eps), tuple(groups)
    )


def _gates(weight: Tensor, affine: Tensor, fixed: Tensor | None) -> list[algorithm.GateParameters]:
    """What packed() made one, apart."""
    pairs = [(None, None)] * weight.shape[0] if fixed is None else [row.split(1) for row in fixed.unbind()]
    rows = zip(weight.split(1), affine.unbind(), pairs, strict=True)
    return [algorithm.GateParameters(w, *row.split(1), *pair) for w, row, pair in rows]


def evaluates(unit: str, backend: str, batch: Sequence[bool]) -> bool:
    """Whether unit_evaluate stands for a call that torch.compile records. Where gradients are recorded something may be
    kept; an exported program may be trained later; and a backend may lack the pass, as it does for averages."""
    if torch.is_grad_enabled() or any(batch) or not torch.compiler.is_compiling() or is_exporting():
        return False
    return backend in ("cpu", "cuda") and not UNITS[unit].averaged


def _evaluate(x, weight, scale, shift, mean, var, unit, backend, eps):
    plan = _plan(unit, backend, (False,) * len(eps), eps, ("",) * len(eps))
    gates = [algorithm.GateParameters(*of) for of in zip(weight, scale, shift, mean, var, strict=True)]
    return algorithm.evaluate(plan, dense_clips(x), gates)


def _fake_evaluate(x, weight, scale, shift, mean, var, unit, backend, eps):
    return torch.empty_like(dense_clips(x))


def _forward(x, weight, affine, fixed, unit, backend, batch, eps, groups, index=None):
    plan, x = _plan(unit, backend, batch, eps, groups), dense_clips(x)
    result = algorithm.forward(plan, x, _gates(weight, affine, fixed))
    statistics = torch.cat(algorithm.statistics_of(plan.unit, result.inner, result.outer))
    if (inner := result.inner) is None:
        sizes = x.shape[0], 2, 0
        pooled = x.new_empty(sizes, dtype=statistics.dtype)
        inner = pooled, x.new_empty(sizes[::2], dtype=torch.uint8), pooled.new_empty((0, 4))

    def kept(context: int, pooled: Tensor, argmax: Tensor, norm: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
        return pooled, argmax if index is None or not context else argmax.to(index), norm

    return result.y, *kept(plan.unit.inner, *inner), *kept(plan.unit.outer, *result.outer), statistics


def _backward(grad_y, x, weight, *rest):
    parts, statistics, plan = rest[:6], rest[6], _plan(*rest[7:])
    unit, x = plan.unit, dense_clips(x)

    def kept(context: int, pooled: Tensor, argmax: Tensor, norm: Tensor) -> algorithm.Kept:
        argmax = argmax.to(maps.index_dtype(x.shape, context))
        return algorithm.Kept(pooled, argmax, norm, statistics[unit.rows(context)])

    inner = kept(unit.inner, *parts[:3]) if unit.inner else None
    outer = kept(unit.outer, *parts[3:])
    grad_x, grad_weight, grad_affine = algorithm.backward(plan, stored_as(grad_y, x), x, weight.split(1), inner, outer)
    return grad_x, torch.cat(grad_weight), torch.cat([torch.cat(pair)[None] for pair in grad_affine])


def _fake_kept(x: Tensor, context: int, index: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.uint8 if context == maps.NONE else index or maps.index_dtype(x.shape, context)
    norm = x.new_empty((context, 4), dtype=accumulate_dtype(x.dtype))
    return packed_like(x, context, 2), packed_like(x, context, dtype=index), norm


def fake_forward(x, weight, affine, fixed, unit, backend, batch, eps, groups, index=None):
    """What unit_forward returns, without values."""
    described, n = UNITS[unit], len(batch)
    statistics = x.new_empty((n, 3), dtype=accumulate_dtype(x.dtype))
    kept = *_fake_kept(x, described.inner, index), *_fake_kept(x, described.outer, index)
    return torch.empty_like(dense_clips(x)), *kept, statistics


def _fake_backward(grad_y, x, weight, *kept_and_settings):
    n, dtype = weight.shape[0], accumulate_dtype(x.dtype)
    grad_weight, grad_affine = x.new_empty(weight.shape, dtype=dtype), x.new_empty((n, 2), dtype=dtype)
    return torch.empty_like(dense_clips(x)), grad_weight, grad_affine


def _setup(ctx, inputs, output):
    x, weight, affine, _fixed, *settings = inputs
    ctx.settings = settings[:5]
    _y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    save(ctx, x, weight, affine, *kept)


def _autograd(ctx, grad_y: Tensor | None, *_):
    if grad_y is None:
        return (None,) * len(ctx.needs_input_grad)
    x, weight, affine, *kept = saved(ctx)
    if backward_is_followed():
        plan, statistics = _plan(*ctx.settings), kept[-1].split(1)

        def y_of(x, weight, affine):
            rows = zip(weight.split(1), affine.unbind(), strict=True)
            return algorithm.formula(plan, x, [p for w, row in rows for p in (w, *row.split(1))], statistics)

        grads = gradients(y_of, (x, weight, affine), ctx.needs_input_grad[:3], grad_y)
    else:
        grads = unit_backward(stored_as(grad_y, x), x, weight, *kept, *ctx.settings)
    return *grads, *(None,) * (len(ctx.needs_input_grad) - 3)


unit_forward = register("unit_forward", _FORWARD, _forward, fake_forward)
unit_evaluate = register("unit_evaluate", _EVALUATE, _evaluate, _fake_evaluate)
unit_backward = register("unit_backward", _BACKWARD, _backward, _fake_backward)
differentiate("unit_forward", _setup, _autograd, "unit_backward")
