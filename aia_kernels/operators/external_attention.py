"""External attention's layers as registered operators, the road of torch.compile and torch.export. Schemas and fakes:
ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, ops
from .. import external_attention as algorithm
from ..external_attention import BatchNorm, Plan
from ..layouts import stored_as, with_rows

_registered = getattr(torch.ops, ops.NAMESPACE)
double_normalize_forward = _registered.double_normalize_forward.default
double_normalize_backward = _registered.double_normalize_backward.default
external_attention_forward = _registered.external_attention_forward.default
external_attention_backward = _registered.external_attention_backward.default
external_attention_block_forward = _registered.external_attention_block_forward.default
external_attention_block_backward = _registered.external_attention_block_backward.default


def _passes(backend: str):
    return backends.passes(backend, "external_attention")


def _normalize(logits, padding, group, eps, shards, backend):
    return algorithm.double_normalize_forward(Plan(_passes(backend), group, eps, shards), logits, padding)


def _normalize_backward(grad, attention, mass, padding, group, eps, shards, backend):
    plan = Plan(_passes(backend), group, eps, shards)
    return algorithm.double_normalize_backward(plan, grad, attention, mass, padding)


def _normalize_setup(ctx, inputs, output):
    _logits, padding, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, padding)


def _normalize_autograd(ctx, grad: Tensor | None, _grad_mass):
    if grad is None:
        return (None,) * 6
    return double_normalize_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


def _attend(x, key, value, bias, padding, keep, group, eps, shards, scale, backend):
    plan = Plan(_passes(backend), group, eps, shards, scale)
    o, attention = algorithm.forward(plan, x, key, value, bias, padding, keep)
    return o, *attention


def _attend_backward(grad, x, key, value, attention, second, padding, keep, group, eps, shards, scale, backend):
    plan = Plan(_passes(backend), group, eps, shards, scale)
    return algorithm.backward(plan, grad, x, key, value, (attention, second), padding, keep)


def _attend_setup(ctx, inputs, output):
    x, key, value, bias, padding, keep, *ctx.settings = inputs
    _o, *attention = output
    ctx.mark_non_differentiable(*attention)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, key, value, *attention, padding, keep)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _attend_autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 11
    x, key, value, *kept = ctx.saved_tensors
    grads = external_attention_backward(with_rows(grad), x, key, value, *kept, *ctx.settings)
    grad_x, grad_key, grad_value, grad_bias = grads
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, *(None,) * 7


def _block_plan(key, eps, batch, norm_eps, members, backend) -> Plan:
    return Plan(_passes(backend), key.shape[0], eps, batch=batch, norm_eps=norm_eps, members=members)


def _block(x, key, value, weight, bias, fixed, *settings):
    result = algorithm.block_forward(_block_plan(key, *settings), x, key, value, weight, bias, fixed)
    return result.y, *result.attention, result.signs, *result.batch, result.statistics


def _block_backward(
    grad_y, x, key, value, weight, attention, second, signs, mean, total, centred, statistics, *settings
):
    plan, batch = _block_plan(key, *settings), BatchNorm(mean, total, centred)
    return algorithm.block_backward(plan, grad_y, x, key, value, weight, (attention, second), signs, batch, statistics)


def _block_setup(ctx, inputs, output):
    x, key, value, weight, bias, _fixed, *ctx.settings = inputs
    _y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, key, value, weight, *kept)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _block_autograd(ctx, grad_y: Tensor | None, *_):
    if grad_y is None:
        return (None,) * 11
    x, key, value, weight, *kept = ctx.saved_tensors
    grads = external_attention_block_backward(stored_as(grad_y, x), x, key, value, weight, *kept, *ctx.settings)
    grad_x, grad_key, grad_value, grad_weight, grad_bias = grads
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_weight, grad_bias, *(None,) * 6


def _no_second_derivative(ctx, *_):
    raise RuntimeError("a compiled or exported layer has first derivatives only; take second ones in eager mode")


for _name, _forward, _backward, _setup, _autograd in (
    ("double_normalize", _normalize, _normalize_backward, _normalize_setup, _normalize_autograd),
    ("external_attention", _attend, _attend_backward, _attend_setup, _attend_autograd),
    ("external_attention_block", _block, _block_backward, _block_setup, _block_autograd),
):
    ops.implement(f"{_name}_forward", _forward)
    ops.implement(f"{_name}_backward", _backward)
    torch.library.register_autograd(f"{ops.NAMESPACE}::{_name}_forward", _autograd, setup_context=_setup)
    torch.library.register_autograd(f"{ops.NAMESPACE}::{_name}_backward", _no_second_derivative)
