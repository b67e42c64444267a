"""PyTorch's scaled_dot_product_attention, with the derivatives that its fused kernel on a CPU does not have, second
ones and those of forward mode; and attention of operands that are made again for the backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.double_backward import backward_is_followed, gradients
from ..common.autocast import autocast_dtype, no_autocast
from ..common.dtypes import DTYPES
from ..common.layouts import save, saved, unviewed
from ..common.tracing import is_symbolic, is_traced, needs_reference

#: What torch._fused_sdp_choice calls the fused kernel.
_FUSED = 1

#: Numbers of a map of attention, of all samples and heads, up to which two of them are made and kept as by PyTorch's
#: own operators. Both maps are of one product q k^T, so that a step takes 9 products, and two fused kernels 14.
_MAPS_IN_CACHE = 2**20
#: Features of a head up to which two fused kernels are the faster ones all the same, and numbers of a map beyond which
#: it is not kept for the backward, but 14 products are taken.
_FEW_FEATURES, _MOST_KEPT = 32, 2**25

#: Numbers of maps of attention that are met together, in half a megabyte.
_PIECE = 2**17

#: Numbers of operands up to which what is made of them is kept for the backward: to make it again takes a tenth of a
#: step.
_OPERANDS_IN_CACHE = 2**20


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    shown: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """o = softmax(scale q k^T) v of each head.

    Args:
        query: [B, heads, N, d], floating-point.
        key: [B, heads, L, d].
        value: [B, heads, L, v].
        scale: Of the logits. Made of a shape it would be a number of float32 to torch.jit.trace.
        shown: Boolean, spread over [B, heads, N, L]: True where a key takes part; None: all do. Where none does, o is
            0.
        dropout: Its probability, on the map of attention.

    Returns:
        o, [B, heads, N, v].
    """
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
    numbers = query.shape[:3].numel() * key.shape[2]
    if numbers <= _MAPS_IN_CACHE and _is_eager_on_cpu(query, key, value, types=DTYPES):
        logits = (query * scale) @ key.mT
        return logits.softmax(-1) @ value, logits.neg().softmax(-1) @ value
    if numbers <= _MOST_KEPT and _is_eager_on_cpu(query, key, value):
        differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if differentiates and query.shape[3] > _FEW_FEATURES:
            causal, complement = _Opposed.apply(query, key, value, scale)
            return causal, complement
    causal = dot_product_attention(query, key, value, scale)
    if query.device.type == "cpu":  # kernels of a GPU take the maximum before they scale
        return causal, dot_product_attention(query, key, value, -scale)
    return causal, dot_product_attention(-query, key, value, scale)


def attention_of_made(make: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Tensor:
    """softmax(q k^T) v of query, key and value that make(*tensors) gives, larger than the tensors. In training on a CPU
    they are made again for the backward, and only the map of attention is kept beside the tensors.

    Args:
        make: Differentiable operations that change nothing.
        *tensors: What it takes.

    Returns:
        o, [B, heads, N, v].
    """
    if not _is_eager_on_cpu(*tensors):
        query, key, value = make(*tensors)
        return dot_product_attention(query, key, value, 1.0)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _OfMade.apply(make, *tensors)
    return _attended(*make(*tensors))[0]  # PyTorch's own form for such sizes copies q and k to scale them


def stay_in_cache(*tensors: Tensor) -> bool:
    """Whether what is made of tensors, several times as large, stays in a cache of a CPU, so that an ordinary call is
    of as few operators as can be."""
    return _is_eager_on_cpu(*tensors, types=DTYPES) and sum(t.numel() for t in tensors) <= _OPERANDS_IN_CACHE


def _is_eager_on_cpu(*tensors: Tensor, types: Collection[torch.dtype] = (torch.float32, torch.float64)) -> bool:
    """Whether a call is an ordinary one on a CPU. Selective checkpointing may replay it: where it does, nothing may be
    written into."""
    if is_symbolic() or needs_reference() or autocast_dtype(tensors[0]) is not None:
        return False
    return all(t.device.type == "cpu" and t.dtype in types and t.numel() for t in tensors)


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Samples whose maps of attention stay in the cache of a core while one operation follows the other."""
    each = max(1, _PIECE // (query.shape[:-1].numel() // len(query) * key.shape[-2]))
    return (slice(first, first + each) for first in range(0, len(query), each))


def _attended(query: Tensor, key: Tensor, value: Tensor, keeps: bool = False) -> tuple[Tensor, Tensor | None]:
    """o, and the map of attention if it is to be kept."""
    if is_traced():
        maps = [torch.matmul(query[at], key[at].mT).softmax(-1) for at in _pieces(query, key)]
        found = torch.cat([torch.matmul(a, value[at]) for a, at in zip(maps, _pieces(query, key), strict=True)])
        return found, torch.cat(maps) if keeps else None
    o = query.new_empty((*query.shape[:3], value.shape[3]))
    kept = query.new_empty((*query.shape[:3], key.shape[2])) if keeps else None
    for at in _pieces(query, key):
        attention = torch.matmul(query[at], key[at].mT)
        attention = torch.softmax(attention, -1, out=None if kept is None else kept[at])
        torch.matmul(attention, value[at], out=o[at])
    return o, kept


class _OfMade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Tensor:
        o, attention = _attended(*make(*tensors), keeps=True)
        ctx.make = make
        ctx.set_materialize_grads(False)
        save(ctx, *tensors, attention)
        return o

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
            return None, *torch.autograd.grad(made, leaves, _backward(grad, attention, *(t.detach() for t in made)))


def _backward(grad: Tensor, attention: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value of softmax(q k^T) v."""
    softmax_backward = torch.ops.aten._softmax_backward_data.default
    found = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for at in _pieces(query, key):
        of_map = softmax_backward(torch.matmul(grad[at], value[at].mT), attention[at], -1, attention.dtype)
        pairs = (of_map, key[at]), (of_map.mT, query[at]), (attention[at].mT, grad[at])
        for result, pair in zip(found, pairs, strict=True):
            torch.matmul(*pair, out=result[at])
    return found


class _Opposed(torch.autograd.Function):
    """Both of opposed_attentions, side by side. Kept are the logits, of which both maps are made again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (query, key, value))
        logits = torch.bmm(q * scale, k.mT)
        if is_traced():
            signed, pieces = (logits, logits.neg()), [*_pieces(q, k)]
            both = torch.stack([torch.cat([torch.bmm(of[at].softmax(-1), v[at]) for at in pieces]) for of in signed])
        else:
            both = q.new_empty((2, *q.shape[:2], v.shape[2]))
            for at in _pieces(q, k):
                torch.bmm(logits[at].softmax(-1), v[at], out=both[0, at])
                torch.bmm(logits[at].neg().softmax(-1), v[at], out=both[1, at])
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        save(ctx, query, key, value, logits)
        return unviewed(both.view(2, *query.shape[:3], v.shape[2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 4
        *operands, logits = saved(ctx)
        if backward_is_followed():
            function = lambda q, k, v: torch.stack([formula(q, k, v, None, s) for s in (ctx.scale, -ctx.scale)])  # noqa: E731
            return *gradients(function, operands, ctx.needs_input_grad[:3], grad), None
        with no_autocast(grad):
            found = _through_opposed(grad.flatten(1, 2), logits, *(t.flatten(0, 1) for t in operands), ctx.scale)
        return *(g.view(t.shape) for g, t in zip(found, operands, strict=True)), None


def _through_opposed(
    grad: Tensor, logits: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value [B heads, N or L, features] of _Opposed, for that of both results."""
    softmax_backward = torch.ops.aten._softmax_backward_data.default
    found = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for at in _pieces(query, key):
        attention = logits[at].softmax(-1)
        of_logits = softmax_backward(torch.bmm(grad[0, at], value[at].mT), attention, -1, attention.dtype)
        of_value = torch.bmm(attention.mT, grad[0, at], out=found[2][at])
        attention = logits[at].neg().softmax(-1)
        of_logits -= softmax_backward(torch.bmm(grad[1, at], value[at].mT), attention, -1, attention.dtype)
        of_value.baddbmm_(attention.mT, grad[1, at])
        of_logits *= scale
        torch.bmm(of_logits, key[at], out=found[0][at])
        torch.bmm(of_logits.mT, query[at], out=found[1][at])
    return found
