"""Attention by a memory per sample as a registered operator: arguments and results are those of the functions of
algorithms/linear_attention.py. What is not kept, absent or not wanted is empty. shards names a process group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..algorithms import linear_attention as algorithm
from ..algorithms.double_backward import backward_is_followed, gradients
from ..algorithms.linear_attention import Plan, Sums
from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, dense_tokens, save, saved, stored_as
from ..reference import Form, Weights
from .registration import differentiate, register

_WEIGHTS = (
    "Tensor projection, Tensor? bias, Tensor value, Tensor? value_bias, Tensor? output, Tensor? output_bias, "
    "Tensor? gamma, Tensor? padding, "
)
_SETTINGS = (
    "str feature, int heads, float eps, bool residual, str shards, bool keeps_logits, bool keeps_sums, str backend"
)
_FORWARD = f"(Tensor x, {_WEIGHTS}{_SETTINGS}) -> (Tensor y, Tensor logits, Tensor t, Tensor s)"
_BACKWARD = (
    f"(Tensor grad, Tensor x, Tensor logits, Tensor t, Tensor s, {_WEIGHTS}{_SETTINGS}) -> (Tensor x, "
    "Tensor projection, Tensor bias, Tensor value, Tensor value_bias, Tensor output, Tensor output_bias, Tensor gamma)"
)
#: The numbers of tensors and of settings behind x.
_TENSORS, _REST = len(Weights._fields) + 1, 8


def _plan(feature, heads, eps, residual, shards, keeps_logits, keeps_sums, backend) -> Plan:
    form = Form(feature, heads, eps, residual)
    return Plan(backends.passes(backend, "linear_attention"), form, shards, keeps_logits, keeps_sums)


def _split(arguments) -> tuple[Weights, Tensor | None, Plan]:
    """Weights, padding and plan of what follows x in the schemas."""
    *tensors, padding = contiguous(*arguments[:_TENSORS])
    return Weights(*tensors), padding, _plan(*arguments[_TENSORS:])


def _forward(x, *arguments):
    weights, padding, plan = _split(arguments)
    y, logits, sums = algorithm.forward(plan, dense_tokens(x), weights, padding)
    kept = sums if plan.keeps_sums else (sums.t.new_empty((0,)), sums.s.new_empty((0,)))
    return y, logits if plan.keeps_logits else x.new_empty((0,)), *kept


def fake_forward(x, *arguments):
    """What linear_attention_forward returns, without values."""
    weights, _, plan = _split(arguments)
    b, n, c = x.shape
    columns = weights.projection.shape[0]
    rows = columns // 2 + (plan.form.heads if plan.form.feature == "l2" else 0)
    logits = x.new_empty((b, columns, n) if plan.keeps_logits else (0,))
    shapes = ((b, rows, c), (b, rows)) if plan.keeps_sums else ((0,), (0,))
    dtypes = algorithm.dtype_of_memory(x, plan.shards), accumulate_dtype(x.dtype)
    sums = (x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return torch.empty_like(dense_tokens(x)), logits, *sums


def _shapes(x, weights: Weights) -> list[tuple[int, ...]]:
    """Those of the gradients of Weights."""
    of_all = [(0,) if w is None else tuple(w.shape) for w in weights]
    return [*of_all[:-1], (1,)]


def _backward(grad, x, logits, t, s, *arguments):
    weights, padding, plan = _split(arguments)
    x = dense_tokens(x)
    sums = Sums(t.contiguous(), s.contiguous()) if plan.keeps_sums else None
    logits = logits.contiguous() if plan.keeps_logits else None
    grads = algorithm.backward(plan, stored_as(grad, x), x, weights, logits, sums, padding)
    return [grads.projection.new_empty((0,)) if g is None else g for g in grads]


def _fake_backward(grad, x, logits, t, s, *arguments):
    weights, _, plan = _split(arguments)
    *shapes, of_gamma = _shapes(x, weights)
    of_weights = (x.new_empty(shape, dtype=algorithm.dtype_of_memory(x, plan.shards)) for shape in shapes)
    return torch.empty_like(dense_tokens(x)), *of_weights, x.new_empty(of_gamma, dtype=accumulate_dtype(x.dtype))


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
    x, *tensors, padding, logits, t, s = saved(ctx)
    inputs = x, *tensors
    if backward_is_followed():
        needs = ctx.needs_input_grad[: len(inputs)]
        grads = gradients(algorithm.formula(_plan(*ctx.settings), padding), inputs, needs, grad)
    else:
        arguments = *tensors, padding, *ctx.settings
        found = linear_attention_backward(stored_as(grad, x), x, logits, t, s, *arguments)
        grads = algorithm.typed(found, inputs)
    return *grads, *(None,) * (1 + _REST)


linear_attention_forward = register("linear_attention_forward", _FORWARD, _forward, fake_forward)
linear_attention_backward = register("linear_attention_backward", _BACKWARD, _backward, _fake_backward)
differentiate("linear_attention_forward", _setup, _autograd, "linear_attention_backward")
