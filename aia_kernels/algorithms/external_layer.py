"""A small layer of external attention as one operator for each direction, schemas.EXTERNAL_PROPAGATE_PASSES.

Of a small call its operators are what it costs: a dozen forward, twice as many backward, and a node of autograd for
each of them. Here are two operators and one node. The mathematics is that of external_attention.py, with a projection
before and behind A, but for the block's BN: where x is small, z and its moments are cheaper than those of A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.layouts import as_maps, as_tokens, save, saved, stored_as
from ..reference import Norm
from ..reference import external_attention as reference
from ..reference import external_attention_block as reference_block
from .double_backward import backward_is_followed, gradients


class Layer(NamedTuple):
    """The tensors of a layer.

    first: W_1 [heads * k, C], or None. key: K [S, k]. value: V [v, S]. value_bias: [v], or None. last: W_2
    [O, heads * v], or None. last_bias: [O], or None. scale, shift: of the block's BN [C], or None. first_bias,
    key_bias: those of W_1 and K, which have no effect and a gradient of zero; but with a residual that of W_1 has one.
    Weights may have axes of one behind.
    """

    first: Tensor | None
    key: Tensor
    value: Tensor
    value_bias: Tensor | None = None
    last: Tensor | None = None
    last_bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    first_bias: Tensor | None = None
    key_bias: Tensor | None = None


#: Of Layer, in front: what the operators take as weights, and those and the numbers of BN, whose gradients they give.
_WEIGHTS, _GIVEN = 6, 8


class Plan(NamedTuple):
    """What is constant about a call.

    passes: those of schemas.EXTERNAL_PROPAGATE_PASSES are its attributes. heads, eps: as of the schemas. fold: whether
    the weights of one head are folded. block: whether BN, the residual and ReLU follow. residual: whether first(x) is
    added at the end, of tokens. batch: whether BN uses the statistics of the batch. norm_eps: what it adds to the
    variance. momentum: by which the running statistics move.
    """

    passes: Any
    heads: int
    eps: float
    fold: bool = False
    block: bool = False
    batch: bool = False
    norm_eps: float = 0.0
    momentum: float = 0.0
    residual: bool = False


class Buffers(NamedTuple):
    """Of a block's BN: fixed, the mean and variance [C] that it takes where it does not use those of the batch, and
    running, those that move, with the number of batches if there is one."""

    fixed: tuple[Tensor | None, Tensor | None] = (None, None)
    running: tuple[Tensor, ...] = ()


def weights_of(plan: Plan, layer: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What the operators take as weights."""
    return (*layer[:_WEIGHTS], layer[_GIVEN]) if plan.residual else layer[:_WEIGHTS]


def forward(plan: Plan, x: Tensor, layer: Sequence[Tensor | None], buffers: Buffers) -> tuple[Tensor, Tensor]:
    """y and what is kept, as external_propagate_ returns them."""
    norm = [*layer[_WEIGHTS:_GIVEN], *buffers.fixed] if plan.block else []
    settings = plan.heads, plan.eps, plan.fold, plan.batch, plan.norm_eps, plan.momentum
    return plan.passes.external_propagate_(x, weights_of(plan, layer), norm, buffers.running, *settings)


def formula(plan: Plan, statistics: Tensor | None) -> Callable[..., Tensor]:
    """y of the reference as a function of x and of the tensors of Layer."""

    def y_of(x, *tensors):
        layer = Layer(*tensors)
        first, key, value, last = (
            w if w is None else w.flatten(1) for w in (layer.first, layer.key, layer.value, layer.last)
        )
        for bias in (None if plan.residual else layer.first_bias, layer.key_bias):
            key = key if bias is None else key + bias[:0].sum()
        if plan.block:
            key, value = key if first is None else key @ first, value if last is None else last @ value
            mean, var, _ = statistics.unbind(1)
            norm = Norm(layer.scale, layer.shift, mean, var, training=plan.batch, eps=plan.norm_eps)
            return as_maps(reference_block(as_tokens(x), key, value, norm, plan.eps)[0], x)
        tokens = as_tokens(x) if x.ndim == 4 else x
        rows = tokens if first is None else tokens @ first.mT
        if plan.residual and layer.first_bias is not None:
            rows = rows + layer.first_bias
        bias = None if layer.value_bias is None else layer.value_bias.repeat(plan.heads)
        o = reference(rows, key.unsqueeze(0), value.unsqueeze(0), bias, key.shape[0], plan.eps)
        o = o if last is None else o @ last.mT
        o = o if layer.last_bias is None else o + layer.last_bias
        o = o + rows if plan.residual else o
        return as_maps(o, x) if x.ndim == 4 else o

    return y_of


def statistics_of(kept: Tensor, channels: int) -> Tensor:
    """The statistics [C, 3] of a block, with which what is kept ends, up to a multiple of 16 numbers."""
    count = 3 * channels
    return kept.narrow(0, kept.numel() - (count + 15) // 16 * 16, count).view(channels, 3)


class ExternalLayerFunction(torch.autograd.Function):
    """y = apply(x, plan, buffers, *layer), as forward, with exact first and second derivatives, for a y shaped as x,
    or, with a residual, of tokens."""

    @staticmethod
    def forward(ctx, x, plan, buffers, *tensors):
        y, kept = forward(plan, x, tensors, buffers)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, y if plan.block else None, kept, parameters=tensors)
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * (3 + len(Layer._fields))
        x, y, kept, *tensors = saved(ctx)
        plan = ctx.plan
        needs_x, _, _, *needs = ctx.needs_input_grad
        if backward_is_followed():
            y_of = formula(plan, statistics_of(kept, x.shape[1]) if plan.block else None)
            grad_x, *grads = gradients(y_of, (x, *tensors), (needs_x, *needs), grad)
            return grad_x, None, None, *grads
        tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]  # see layouts.saved
        norm = [*tensors[_WEIGHTS:_GIVEN], None, None] if plan.block else []
        grad = stored_as(grad, x if grad.shape == x.shape else x.new_empty(grad.shape))
        of_first_bias = needs[_GIVEN : _GIVEN + 1] if plan.residual else []
        wanted = *needs[:_WEIGHTS], *of_first_bias, *needs[_WEIGHTS:_GIVEN], needs_x
        found = iter(
            plan.passes.external_propagate_back(
                *(grad, x, y, weights_of(plan, tensors), norm, kept), plan.heads, plan.fold, plan.norm_eps, wanted
            )
        )
        of_weights, of_bias, of_norm = (
            [next(found) if needed else None for needed in part]
            for part in (needs[:_WEIGHTS], of_first_bias, needs[_WEIGHTS:_GIVEN])
        )
        first = _GIVEN + len(of_bias)
        without_effect = [
            torch.zeros_like(t) if needed else None for t, needed in zip(tensors[first:], needs[first:], strict=True)
        ]
        return next(found) if needs_x else None, None, None, *of_weights, *of_norm, *of_bias, *without_effect
