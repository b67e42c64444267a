"""PyTorch's scaled_dot_product_attention, with the derivatives that its fused kernel on a CPU does not have, second
ones and those of forward mode; and attention of operands that are made again for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.double_backward import backward_is_followed, gradients
from ..common.autocast import autocast_dtype, no_autocast
from ..common.layouts import save, saved
from ..common.tracing import is_symbolic, is_traced, needs_reference

#: What torch._fused_sdp_choice calls the fused kernel.
_FUSED = 1

#: Numbers of a map of attention, of all samples and heads, up to which two of them are made and kept rather than left
#: to two fused kernels. Both maps are of one product q k^T, so that a step takes 9 products, and two kernels 14; a
#: larger map costs more to write and read than the products that it saves.
_MAPS_IN_CACHE = 3 * 2**19

#: Numbers of operands up to which what is made of them is kept for the backward: to make it again takes a tenth of a
#: step.
_OPERANDS_IN_CACHE = 2**20


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """o = softmax(scale q k^T) v of each head.

    Args:
        query: [B, heads, N, d], floating-point.
        key: [B, heads, L, d].
        value: [B, heads, L, v].
        shown: Boolean, spread over [B, heads, N, L]: True where a key takes part; None: all do. Where none does, o is
            0.
        dropout: Its probability, on the map of attention.
        scale: None: 1 over the root of d.

    Returns:
        o, [B, heads, N, v].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if needs_reference() and not dropout:
        return formula(query, key, value, shown, scale)
    if query.device.type == "cpu" and not dropout and not is_traced() and torch.is_grad_enabled():
        if (dtype := autocast_dtype(query)) is not None:
            query, key, value = (t.to(dtype) for t in (query, key, value))
        with no_autocast(query):
            chosen = torch._fused_sdp_choice(query, key, value, shown, 0.0, False, scale=scale)
            if chosen == _FUSED and any(t.requires_grad for t in (query, key, value)):
                return _Fused.apply(query, key, value, shown, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=shown, dropout_p=dropout, scale=scale)


def formula(query: Tensor, key: Tensor, value: Tensor, shown: Tensor | None, scale: float) -> Tensor:
    """o in operators that are differentiable as often as wanted."""
    logits = (query * scale) @ key.mT
    if shown is None:
        return logits.softmax(-1) @ value
    attention = logits.masked_fill(~shown, -torch.inf).softmax(-1)
    return attention.masked_fill(~shown.any(-1, keepdim=True), 0.0) @ value


class _Fused(torch.autograd.Function):
    """The kernel of a CPU, and the formula where its backward is differentiated."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, shown: Tensor | None, scale: float) -> Tensor:
        mask = None
        if shown is not None:
            mask = query.new_zeros(shown.shape).masked_fill_(~shown, -torch.inf)
        given = query, key, value, 0.0, False
        o, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, attn_mask=mask, scale=scale)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        save(ctx, query, key, value, shown, mask, o, total)
        return o

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 5
        query, key, value, shown, mask, o, total = saved(ctx)
        if backward_is_followed():
            function = lambda q, k, v: formula(q, k, v, shown, ctx.scale)  # noqa: E731
            return *gradients(function, (query, key, value), ctx.needs_input_grad[:3], grad), None, None
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        given = grad, query, key, value, o, total, 0.0, False
        return *backward(*given, attn_mask=mask, scale=ctx.scale), None, None


def opposed_attentions(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and softmax(-scale q k^T) v of each head.

    Args:
        query: [B, heads, N, d], floating-point.
        key: [B, heads, L, d].
        value: [B, heads, L, v].
        scale: Of the logits.

    Returns:
        Both, [B, heads, N, v] each.
    """
    if _is_eager_on_cpu(query, key, value) and query.shape[:3].numel() * key.shape[2] <= _MAPS_IN_CACHE:
        logits = (query * scale) @ key.mT
        return logits.softmax(-1) @ value, (-logits).softmax(-1) @ value
    causal = dot_product_attention(query, key, value, scale=scale)
    if query.device.type == "cpu":  # kernels of a GPU take the maximum before they scale
        return causal, dot_product_attention(query, key, value, scale=-scale)
    return causal, dot_product_attention(-query, key, value, scale=scale)


def attention_of_made(make: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Tensor:
    """softmax(q k^T) v of query, key and value that make(*tensors) gives, larger than the tensors. In training on a CPU
    they are made again for the backward, if they do not stay in a cache anyhow, and only the map of attention is kept
    beside the tensors.

    Args:
        make: Differentiable operations that change nothing.
        *tensors: What it takes.

    Returns:
        o, [B, heads, N, v].
    """
    if not _is_eager_on_cpu(*tensors):
        query, key, value = make(*tensors)
        return dot_product_attention(query, key, value, scale=1.0)
    many = sum(t.numel() for t in tensors) > _OPERANDS_IN_CACHE
    if many and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _OfMade.apply(make, *tensors)
    q, k, v = make(*tensors)  # PyTorch's own form for such sizes copies q and k to scale them
    return (q @ k.mT).softmax(-1) @ v


def _is_eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether a call is an ordinary one on a CPU, which _OfMade may take: it writes into nothing, so that selective
    checkpointing may replay it."""
    if is_symbolic() or needs_reference() or autocast_dtype(tensors[0]) is not None:
        return False
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and t.numel() for t in tensors)


class _OfMade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Tensor:
        q, k, v = make(*tensors)
        attention = (q @ k.mT).softmax(-1)
        ctx.make = make
        ctx.set_materialize_grads(False)
        save(ctx, *tensors, attention)
        return attention @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, attention = saved(ctx)
        make, needs = ctx.make, ctx.needs_input_grad[1:]
        if backward_is_followed():
            function = lambda *tensors: formula(*make(*tensors), None, 1.0)  # noqa: E731
            return None, *gradients(function, tensors, needs, grad)
        with no_autocast(grad):  # a backward may be called inside of one
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in tensors]
                made = make(*leaves)
            q, k, v = (t.detach() for t in made)
            softmax_backward = torch.ops.aten._softmax_backward_data.default
            grad_logits = softmax_backward(grad @ v.mT, attention, -1, attention.dtype)
            of_made = grad_logits @ k, grad_logits.mT @ q, attention.mT @ grad
            return None, *torch.autograd.grad(made, leaves, of_made)
