"""External attention's layers as registered operators. Schemas and fakes: ops.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import backends, ops
from .. import external_attention as algorithm
from ..external_attention import BatchNorm, Plan
from ..layouts import contiguous, dense_tokens, save, saved, stored_as, with_rows
from ..tracing import backward_is_followed, gradients

_registered = getattr(torch.ops, ops.NAMESPACE)
double_normalize_forward = _registered.double_normalize_forward.default
double_normalize_backward = _registered.double_normalize_backward.default
external_attention_forward = _registered.external_attention_forward.default
external_attention_backward = _registered.external_attention_backward.default
external_attention_block_forward = _registered.external_attention_block_forward.default
external_attention_block_backward = _registered.external_attention_block_backward.default


def _passes(backend: str):
    return backends.passes(backend, "external_attention")


def _typed(grads: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients of parameters, None for those that are absent, in their types."""
    return [None if p is None else g.to(p.dtype) for g, p in zip(grads, inputs, strict=True)]


def _normalize_plan(group, eps, shards, backend) -> Plan:
    return Plan(_passes(backend), group, eps, shards)


def _normalize(logits, padding, *settings):
    return algorithm.double_normalize_forward(_normalize_plan(*settings), logits, *contiguous(padding))


def _normalize_backward(grad, attention, mass, padding, *settings):
    kept = contiguous(attention, mass, padding)
    return algorithm.double_normalize_backward(_normalize_plan(*settings), grad, *kept)


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


def _attention_plan(group, eps, shards, scale, backend) -> Plan:
    return Plan(_passes(backend), group, eps, shards, scale)


def _attend(x, key, value, bias, padding, keep, *settings):
    tensors = with_rows(x), *contiguous(key, value, bias, padding, keep)
    o, attention = algorithm.forward(_attention_plan(*settings), *tensors)
    return o, *attention


def _attend_backward(grad, x, key, value, attention, second, padding, keep, *settings):
    key, value, attention, second, padding, keep = contiguous(key, value, attention, second, padding, keep)
    plan, kept = _attention_plan(*settings), (attention, second)
    return algorithm.backward(plan, with_rows(grad), with_rows(x), key, value, kept, padding, keep)


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


def _block_plan(key, eps, batch, norm_eps, members, backend) -> Plan:
    return Plan(_passes(backend), key.shape[0], eps, batch=batch, norm_eps=norm_eps, members=members)


def _block(x, key, value, weight, bias, fixed, *settings):
    tensors = dense_tokens(x), *contiguous(key, value, weight, bias, fixed)
    result = algorithm.block_forward(_block_plan(key, *settings), *tensors)
    return result.y, *result.attention, result.signs, *result.batch, result.statistics


def _block_backward(
    grad_y, x, key, value, weight, attention, second, signs, mean, total, centred, statistics, *settings
):
    x, kept = dense_tokens(x), contiguous(attention, second, signs, mean, total, centred, statistics)
    attention, second, signs, *batch, statistics = kept
    parameters = contiguous(key, value, weight)
    kept = (attention, second), signs, BatchNorm(*batch), statistics
    return algorithm.block_backward(_block_plan(key, *settings), stored_as(grad_y, x), x, *parameters, *kept)


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


def _no_second_derivative(ctx, *_):
    raise RuntimeError("a compiled layer has first derivatives only; take second ones in eager mode")


for _name, _forward, _backward, _setup, _autograd in (
    ("double_normalize", _normalize, _normalize_backward, _normalize_setup, _normalize_autograd),
    ("external_attention", _attend, _attend_backward, _attend_setup, _attend_autograd),
    ("external_attention_block", _block, _block_backward, _block_setup, _block_autograd),
):
    ops.implement(f"{_name}_forward", _forward)
    ops.implement(f"{_name}_backward", _backward)
    torch.library.register_autograd(f"{ops.NAMESPACE}::{_name}_forward", _autograd, setup_context=_setup)
    torch.library.register_autograd(f"{ops.NAMESPACE}::{_name}_backward", _no_second_derivative)
