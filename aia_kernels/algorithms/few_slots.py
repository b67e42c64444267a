"""External attention of fewer slots than a vector has lanes, in operators of PyTorch, forward and backward.

The map lies slot by slot, A^T [S, B, N], the tokens of all samples side by side. So a softmax over tokens runs along
memory, where one over a handful of slots would be a call for each token. And each product over tokens has its short
side first, S x d times d x tokens: a library's product of few columns takes up to ten times as long as one of few rows.
In the terms of external_attention.py, dA being the gradient of A:

    L^T = K x^T       A = P / mass            o = A V^T + bias
    dV^T = A^T do     dA^T = V^T do^T         Q = A * (dA - sum over slots of dA * A)
    dL = Q - A * mass * (sum over tokens of Q)              dx = dL K           dK = dL^T x
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.layouts import save, saved
from ..common.tracing import is_statically
from ..reference import external_attention as reference
from . import safe_normalization
from .double_backward import backward_is_followed, gradients

#: Elements that a core's own cache holds, about: two megabytes of float32.
_IN_CACHE = 2**19


def forward(x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """o [B, N, v] of x [B, N, d], key [S, d], value [v, S] and bias [v]."""
    logits = _logits(x, key)
    if torch.compiler.is_compiling():
        attention = safe_normalization.for_a_compiler(logits, 2, 0, eps)
    elif eps or logits.numel() > safe_normalization.SMALL_MAP:
        attention, _mass = safe_normalization.by_sums(logits, 2, 0, eps, kept=False)
    else:
        attention = safe_normalization.by_two_softmaxes(logits, 2, 0)
    return _values(x, attention, value, bias)


def _logits(x: Tensor, key: Tensor) -> Tensor:
    """L^T [S, B, N]."""
    return _by_slot(key, x.reshape(-1, x.shape[2])).view(-1, *x.shape[:2])


def _by_slot(matrix: Tensor, tokens: Tensor) -> Tensor:
    """matrix [S, d] @ tokens^T [d, T]. Where the tokens come from memory, or their number is not known, a product
    along their rows is the faster one, and its narrow result is turned; that takes each row of the matrix in
    one piece."""
    if not is_statically(tokens.numel() <= _IN_CACHE):
        return torch.nn.functional.linear(tokens, matrix.contiguous()).mT.contiguous()
    return matrix @ tokens.mT


def _values(x: Tensor, attention: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    rows = attention.view(attention.shape[0], -1).mT
    o = rows @ value.mT if bias is None else torch.addmm(bias, rows, value.mT)
    return o.view(*x.shape[:2], -1)


def backward(
    grad: Tensor, x: Tensor, key: Tensor, value: Tensor, attention: Tensor, mass: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, key and value, contiguous but for that of value, for that of o."""
    slots = attention.shape[0]
    tokens, grad = x.reshape(-1, x.shape[2]), grad.reshape(-1, value.shape[0])
    grad_value = (attention.view(slots, -1) @ grad).mT
    grad_attention = _by_slot(value.mT, grad).view(attention.shape)
    q = torch._softmax_backward_data(grad_attention, attention, 0, attention.dtype)
    grad_logits = q.addcmul(attention * mass, q.sum(2, keepdim=True), value=-1).view(slots, -1)
    return (grad_logits.mT @ key).view(x.shape) if needs_x else None, grad_logits @ tokens, grad_value


class FewSlotsFunction(torch.autograd.Function):
    """o = apply(x, key, value, bias, eps), as forward of this module on non-empty tensors of one type, float32 or
    float64, with exact first and second derivatives."""

    @staticmethod
    def forward(ctx, x, key, value, bias, eps):
        attention, mass = safe_normalization.by_sums(_logits(x, key), 2, 0, eps, kept=True)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        save(ctx, x, key, value, bias, attention, mass)
        return _values(x, attention, value, bias)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 5
        x, key, value, bias, attention, mass = saved(ctx)
        needs, eps = ctx.needs_input_grad[:4], ctx.eps
        if backward_is_followed():

            def formula(x, key, value, bias):
                return reference(x, key.unsqueeze(0), value.unsqueeze(0), bias, key.shape[0], eps)

            return *gradients(formula, (x, key, value, bias), needs, grad), None
        grad_bias = grad.sum((0, 1)) if needs[3] else None
        return *backward(grad, x, key, value, attention, mass, needs[0]), grad_bias, None
