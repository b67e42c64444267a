"""External attention's layers as registered operators.

Arguments and results are those of the functions of the same name in algorithms/external_attention.py; tokens and maps
are [B, N, d] as there. What is kept of the attention is the backend's pair, and what is kept of a batch is empty under
fixed statistics. shards and members name process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .. import backends, schemas
from ..algorithms import double_normalization
from ..algorithms import external_attention as algorithm
from ..algorithms.double_backward import backward_is_followed, gradients
from ..algorithms.external_attention import BatchNorm, Plan
from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, dense_tokens, save, saved, stored_as, with_rows
from ..common.tracing import is_exporting
from .registration import differentiate, register

_SCHEMAS = {
    "double_normalize_forward": "(Tensor logits, Tensor? padding, int group, float eps, str shards, str backend) -> "
    "(Tensor attention, Tensor mass)",
    "double_normalize_backward": "(Tensor grad, Tensor attention, Tensor mass, Tensor? padding, int group, float eps, "
    "str shards, str backend) -> Tensor",
    "external_attention_forward": "(Tensor x, Tensor key, Tensor value, Tensor? bias, Tensor? padding, Tensor? keep, "
    "int group, float eps, str shards, float scale, str backend) -> (Tensor o, Tensor attention, Tensor second)",
    "external_attention_backward": "(Tensor grad, Tensor x, Tensor key, Tensor value, Tensor attention, Tensor second, "
    "Tensor? padding, Tensor? keep, int group, float eps, str shards, float scale, str backend) -> "
    "(Tensor grad_x, Tensor grad_key, Tensor grad_value, Tensor grad_bias)",
    "external_attention_evaluate": "(Tensor x, Tensor key, Tensor value, Tensor? bias, float eps, str backend) -> "
    "Tensor",
    "external_attention_block_forward": "(Tensor x, Tensor key, Tensor value, Tensor? weight, Tensor? bias, "
    "Tensor? fixed, float eps, bool batch, float norm_eps, str members, str backend) -> (Tensor y, Tensor attention, "
    "Tensor second, Tensor signs, Tensor origin, Tensor off, Tensor total, Tensor moment, Tensor statistics)",
    "external_attention_block_backward": "(Tensor grad_y, Tensor x, Tensor key, Tensor value, Tensor? weight, "
    "Tensor attention, Tensor second, Tensor signs, Tensor origin, Tensor off, Tensor total, Tensor moment, "
    "Tensor statistics, "
    "float eps, bool batch, float norm_eps, str members, str backend) -> "
    "(Tensor grad_x, Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_bias)",
}


def _passes(backend: str):
    return backends.passes(backend, "external_attention")


def _typed(grads: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients of parameters, None for those that are absent, in their types."""
    return [None if p is None else g.to(p.dtype) for g, p in zip(grads, inputs, strict=True)]


def _accumulated(grads: Iterable[Tensor], x: Tensor) -> list[Tensor]:
    """Gradients of parameters in the one type that an operator promises; the passes choose between two."""
    return [g.to(accumulate_dtype(x.dtype)) for g in grads]


def _normalize_plan(group, eps, shards, backend) -> Plan:
    return Plan(_passes(backend), group, eps, shards)


def _normalize(logits, padding, *settings):
    return algorithm.double_normalize_forward(_normalize_plan(*settings), logits, *contiguous(padding))


def _normalize_backward(grad, attention, mass, padding, *settings):
    kept = contiguous(attention, mass, padding)
    return algorithm.double_normalize_backward(_normalize_plan(*settings), grad, *kept)


def fake_normalize(logits, padding, group, eps, shards, backend):
    """What double_normalize_forward returns, without values."""
    b, n, m = logits.shape
    mass = logits.new_empty((b, n, m // group), dtype=accumulate_dtype(logits.dtype))
    return logits.new_empty(logits.shape), mass


def _fake_normalize_backward(grad, attention, mass, padding, group, eps, shards, backend):
    return torch.empty_like(attention)


def _normalize_setup(ctx, inputs, output):
    logits, padding, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, logits, *output, padding)


def _normalize_autograd(ctx, grad: Tensor | None, _grad_mass):
    if grad is None:
        return (None,) * 6
    logits, *kept = saved(ctx)
    if backward_is_followed():
        formula = algorithm.normalize_formula(_normalize_plan(*ctx.settings), kept[-1])
        return *gradients(formula, (logits,), (True,), grad), *(None,) * 5
    return double_normalize_backward(grad, *kept, *ctx.settings), *(None,) * 5


def _normalize_as_one_setup(ctx, inputs, output):
    logits, eps = inputs
    ctx.mark_non_differentiable(output[1])
    double_normalization.keep(ctx, logits, eps, *output)


def _normalize_as_one_autograd(ctx, grad: Tensor | None, _grad_mass):
    return double_normalization.gradient(ctx, grad, double_normalize_back), None


def _attention_plan(group, eps, shards, scale, backend) -> Plan:
    return Plan(_passes(backend), group, eps, shards, scale)


def _attend(x, key, value, bias, padding, keep, *settings):
    tensors = with_rows(x), *contiguous(key, value, bias, padding, keep)
    o, attention = algorithm.forward(_attention_plan(*settings), *tensors)
    return o, *attention


def _attend_backward(grad, x, key, value, attention, second, padding, keep, *settings):
    key, value, attention, second, padding, keep = contiguous(key, value, attention, second, padding, keep)
    plan, kept = _attention_plan(*settings), (attention, second)
    grad_x, *grads = algorithm.backward(plan, with_rows(grad), with_rows(x), key, value, kept, padding, keep)
    return grad_x, *_accumulated(grads, x)


def fake_attend(x, key, value, bias, padding, keep, group, eps, shards, scale, backend):
    """What external_attention_forward returns, without values."""
    heads = x.shape[2] // key.shape[2]
    o = x.new_empty((*x.shape[:2], heads * value.shape[1]))
    return o, *_passes(backend).empty_attention(x, columns=heads * key.shape[1], group=group)


def _fake_attend_backward(grad, x, key, value, *kept_and_settings):
    dtype = accumulate_dtype(x.dtype)
    shapes = key.shape, value.shape, grad.shape[2:]
    grads = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return torch.empty_like(with_rows(x)), *grads


def _attend_setup(ctx, inputs, output):
    *tensors, padding, keep = inputs[:6]
    ctx.settings = inputs[6:]
    _o, *attention = output
    ctx.mark_non_differentiable(*attention)
    ctx.set_materialize_grads(False)
    save(ctx, *tensors, *attention, padding, keep)


def _attend_autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 11
    x, key, value, bias, *kept = saved(ctx)
    if backward_is_followed():
        formula = algorithm.attention_formula(_attention_plan(*ctx.settings), *kept[2:])
        return *gradients(formula, (x, key, value, bias), ctx.needs_input_grad[:4], grad), *(None,) * 7
    grad_x, *grads = external_attention_backward(with_rows(grad), x, key, value, *kept, *ctx.settings)
    return grad_x, *_typed(grads, (key, value, bias)), *(None,) * 7


def evaluates(backend: str) -> bool:
    """Whether external_attention_evaluate stands for an ordinary call that torch.compile records. Where gradients are
    recorded something is kept, and an exported program may be trained later."""
    evaluating = not torch.is_grad_enabled() and torch.compiler.is_compiling() and not is_exporting()
    return evaluating and backend == "cpu"


def _evaluate(x, key, value, bias, eps, backend):
    slots = key.shape[0]
    memories = contiguous(key.unsqueeze(0), value.unsqueeze(0), bias)
    return algorithm.forward(_attention_plan(slots, eps, "", 1.0, backend), with_rows(x), *memories, None, None)[0]


def _fake_evaluate(x, key, value, bias, eps, backend):
    return x.new_empty((*x.shape[:2], value.shape[0]))


def _block_plan(key, eps, batch, norm_eps, members, backend) -> Plan:
    return Plan(_passes(backend), key.shape[0], eps, batch=batch, norm_eps=norm_eps, members=members)


def _block(x, key, value, weight, bias, fixed, *settings):
    tensors = dense_tokens(x), *contiguous(key, value, weight, bias)
    of_norm = () if fixed is None else fixed.contiguous().unbind()
    result = algorithm.block_forward(_block_plan(key, *settings), *tensors, of_norm)
    return result.y, *result.attention, result.signs, *result.batch, result.statistics


def _block_backward(grad_y, x, key, value, weight, attention, second, signs, *rest):
    batch, statistics, settings = rest[:4], rest[4], rest[5:]
    x, kept = dense_tokens(x), contiguous(attention, second, signs, *batch, statistics)
    attention, second, signs, *batch, statistics = kept
    parameters = contiguous(key, value, weight)
    kept = (attention, second), signs, BatchNorm(*batch), statistics
    plan = _block_plan(key, *settings)
    grad_x, *grads = algorithm.block_backward(plan, stored_as(grad_y, x), x, *parameters, *kept)
    return grad_x, *_accumulated(grads, x)


def fake_block(x, key, value, weight, bias, fixed, eps, batch, norm_eps, members, backend):
    """What external_attention_block_forward returns, without values."""
    passes, (m, c) = _passes(backend), key.shape
    wide = x.new_empty((), dtype=accumulate_dtype(x.dtype))
    kept = (wide.new_empty(shape) for shape in (((m,), (m,), (m,), (m, m)) if batch else ((0,),) * 4))
    attention, y = passes.empty_attention(x, columns=m, group=m), torch.empty_like(dense_tokens(x))
    return y, *attention, passes.empty_signs(y), *kept, wide.new_empty((c, 3))


def _fake_block_backward(grad_y, x, key, value, weight, *kept_and_settings):
    wide, c = x.new_empty((), dtype=accumulate_dtype(x.dtype)), x.shape[2]
    return torch.empty_like(dense_tokens(x)), *(wide.new_empty(shape) for shape in (key.shape, value.shape, (c,), (c,)))


def _block_setup(ctx, inputs, output):
    *tensors, _fixed = inputs[:6]
    ctx.settings = inputs[6:]
    _y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    save(ctx, *tensors, *kept)


def _block_autograd(ctx, grad_y: Tensor | None, *_):
    if grad_y is None:
        return (None,) * 11
    x, key, value, weight, bias, *kept = saved(ctx)
    parameters = key, value, weight, bias
    if backward_is_followed():
        formula = algorithm.block_formula(_block_plan(key, *ctx.settings), kept[-1])
        return *gradients(formula, (x, *parameters), ctx.needs_input_grad[:5], grad_y), *(None,) * 6
    grad_x, *grads = external_attention_block_backward(
        stored_as(grad_y, x), x, key, value, weight, *kept, *ctx.settings
    )
    return grad_x, *_typed(grads, parameters), *(None,) * 6


def _register(name: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    return register(name, _SCHEMAS[name], implementation, fake)


double_normalize_forward = _register("double_normalize_forward", _normalize, fake_normalize)
double_normalize_backward = _register("double_normalize_backward", _normalize_backward, _fake_normalize_backward)
differentiate("double_normalize_forward", _normalize_setup, _normalize_autograd, "double_normalize_backward")

#: Passes of schemas.NORMALIZE_PASSES, which keep all that a backward takes: as they are they stand for themselves in a
#: record.
double_normalize, double_normalize_back = map(schemas.callable_pass, schemas.NORMALIZE_PASSES)
differentiate("double_normalize", _normalize_as_one_setup, _normalize_as_one_autograd, "double_normalize_back")

external_attention_forward = _register("external_attention_forward", _attend, fake_attend)
external_attention_backward = _register("external_attention_backward", _attend_backward, _fake_attend_backward)
differentiate("external_attention_forward", _attend_setup, _attend_autograd, "external_attention_backward")

#: One head and one group, key [S, d] and value [v, S], for a call that keeps nothing.
external_attention_evaluate = _register("external_attention_evaluate", _evaluate, _fake_evaluate)

external_attention_block_forward = _register("external_attention_block_forward", _block, fake_block)
external_attention_block_backward = _register(
    "external_attention_block_backward", _block_backward, _fake_block_backward
)
differentiate("external_attention_block_forward", _block_setup, _block_autograd, "external_attention_block_backward")
