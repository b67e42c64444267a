"""Attention by a memory per sample as a registered operator: arguments and results are those of the functions of
algorithms/linear_attention.py. What is not kept is empty. shards names a process group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithms import linear_attention as algorithm
from ..algorithms.double_backward import backward_is_followed, gradients
from ..algorithms.linear_attention import Plan
from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, dense_tokens, save, saved, stored_as
from ..reference import Form, Weights
from .registration import differentiate, register

_WEIGHTS = (
    "Tensor projection, Tensor? bias, Tensor value, Tensor? value_bias, Tensor? output, Tensor? output_bias, "
    "Tensor? gamma, Tensor? padding, "
)
_SETTINGS = "str feature, int heads, float eps, bool residual, str shards, bool keeps_logits, bool keeps_sums"
_FORWARD = f"(Tensor x, {_WEIGHTS}{_SETTINGS}) -> (Tensor y, Tensor logits, Tensor sums)"
_BACKWARD = (
    f"(Tensor grad, Tensor x, Tensor logits, Tensor sums, {_WEIGHTS}{_SETTINGS}) -> (Tensor x, Tensor projection, "
    "Tensor bias, Tensor value, Tensor value_bias, Tensor output, Tensor output_bias, Tensor gamma)"
)
#: The numbers of tensors and of settings behind x.
_TENSORS, _REST = len(Weights._fields) + 1, 7


def _plan(feature, heads, eps, residual, shards, keeps_logits, keeps_sums) -> Plan:
    return Plan(Form(feature, heads, eps, residual), shards, keeps_logits, keeps_sums)


def _split(arguments) -> tuple[Weights, Tensor | None, Plan]:
    """Weights, padding and plan of what follows x in the schemas."""
    *tensors, padding = contiguous(*arguments[:_TENSORS])
    return Weights(*tensors), padding, _plan(*arguments[_TENSORS:])


def _forward(x, *arguments):
    weights, padding, plan = _split(arguments)
    y, logits, sums = algorithm.forward(plan, dense_tokens(x), weights, padding)
    nothing = sums.new_empty((0,))
    return y, logits if plan.keeps_logits else x.new_empty((0,)), sums if plan.keeps_sums else nothing


def fake_forward(x, *arguments):
    """What linear_attention_forward returns, without values."""
    weights, _, plan = _split(arguments)
    b, n, c = x.shape
    columns = weights.projection.shape[0]
    rows = columns // 2 + (plan.form.heads if plan.form.feature == "l2" else 0)
    logits = x.new_empty((b, columns, n) if plan.keeps_logits else (0,))
    sums = x.new_empty((b, rows, c + 1) if plan.keeps_sums else (0,), dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(dense_tokens(x)), logits, sums


def _shapes(x, weights: Weights) -> list[tuple[int, ...]]:
    """Those of the gradients of Weights; empty for an output projection that is absent."""
    (heads, v, _), c = weights.value.shape, x.shape[2]
    output = (0,) if weights.output is None else tuple(weights.output.shape)
    projection = tuple(weights.projection.shape)
    return [projection, projection[:1], tuple(weights.value.shape), (heads, v), output, (c,), (1,)]


def _backward(grad, x, logits, sums, *arguments):
    weights, padding, plan = _split(arguments)
    x = dense_tokens(x)
    kept = (t.contiguous() if keeps else None for t, keeps in ((logits, plan.keeps_logits), (sums, plan.keeps_sums)))
    grads = algorithm.backward(plan, stored_as(grad, x), x, weights, *kept, padding)
    return *grads[:5], sums.new_empty((0,)) if grads.output is None else grads.output, *grads[6:]


def _fake_backward(grad, x, logits, sums, *arguments):
    weights, _, _ = _split(arguments)
    wide = x.new_empty((), dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(dense_tokens(x)), *(wide.new_empty(shape) for shape in _shapes(x, weights))


def _setup(ctx, inputs, output):
    x, *tensors = inputs[: 1 + _TENSORS]
    ctx.settings = inputs[1 + _TENSORS :]
    _y, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    save(ctx, x, *tensors, *kept)


def _autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * (1 + _TENSORS + _REST)
    x, *tensors, padding, logits, sums = saved(ctx)
    inputs = x, *tensors
    if backward_is_followed():
        needs = ctx.needs_input_grad[: len(inputs)]
        grads = gradients(algorithm.formula(_plan(*ctx.settings), padding), inputs, needs, grad)
    else:
        arguments = *tensors, padding, *ctx.settings
        found = linear_attention_backward(stored_as(grad, x), x, logits, sums, *arguments)
        grads = algorithm.typed(found, inputs)
    return *grads, *(None,) * (1 + _REST)


linear_attention_forward = register("linear_attention_forward", _FORWARD, _forward, fake_forward)
linear_attention_backward = register("linear_attention_backward", _BACKWARD, _backward, _fake_backward)
differentiate("linear_attention_forward", _setup, _autograd, "linear_attention_backward")
