"""The double normalization as one operator for each direction, schemas.NORMALIZE_PASSES, between products of PyTorch.

In bfloat16 and float16 operators of PyTorch convert the whole map to float32 and back, in tensors of their own. Here it
is read and written in its own type, and normalized in float32 in registers. The mathematics stands in
external_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.layouts import save, saved
from ..reference import double_normalize as reference
from .double_backward import backward_is_followed, gradients


def keep(ctx: Any, logits: Tensor, eps: float, attention: Tensor, mass: Tensor) -> None:
    """Keep on the context of a node of autograd what gradient takes."""
    ctx.eps = eps
    ctx.set_materialize_grads(False)
    save(ctx, logits, attention, mass)


def gradient(ctx: Any, grad: Tensor | None, back: Callable[..., Tensor]) -> Tensor | None:
    """The gradient of the logits for that of A; back: double_normalize_back of a backend, for an ordinary backward."""
    if grad is None:
        return None
    logits, attention, mass = saved(ctx)
    if not backward_is_followed():
        return back(grad.contiguous().resolve_neg(), attention, mass)
    slots, eps = logits.shape[-1], ctx.eps

    def formula(logits: Tensor) -> Tensor:
        return reference(logits.flatten(2), slots, eps).view(logits.shape)

    return gradients(formula, (logits,), (True,), grad)[0]


class NormalizeFunction(torch.autograd.Function):
    """A = apply(logits, passes, eps) of logits [B, N, S] or [B, N, heads, S], contiguous and not empty, with exact
    first and second derivatives. passes: those of schemas.NORMALIZE_PASSES are its attributes."""

    @staticmethod
    def forward(ctx, logits, passes, eps):
        attention, mass = passes.double_normalize(logits, eps)
        ctx.passes = passes
        keep(ctx, logits, eps, attention, mass)
        return attention

    @staticmethod
    def backward(ctx, grad):
        return gradient(ctx, grad, ctx.passes.double_normalize_back), None, None
