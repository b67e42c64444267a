"""Attention by a memory per sample, forward and backward, written once; the mathematics: reference/linear_attention.py.

Sizes: x is [B, N, C], and X its transpose [C, N]. H heads have R rows each: the d features of a key, and for the
feature l2 a constant 1 before them. phi(k) and phi(q) are [H R, N], tokens contiguous, so that every operation on them
runs along tokens. Sums over tokens are T = phi(k) X^T [H R, C] and s = phi(k) 1 [H R].

No nonlinearity stands between T and y but the division by a number per token. So V and the output projection meet T and
not the tokens: with U = T W_v^T + s b_v^T of each head and M = U W_o^T,

    y = x + M^T phi(q)'       phi(q)' = phi(q) gamma / (phi(q) (s + eps)), or gamma phi(q) where phi is a softmax

b_o joins M, as a softmax over a head sums to 1. Per token that is 4 H d C products for any number of values.

Backward, with G the gradient of Y, r = 1 / (phi(q) (s + eps)) and P = M G [H R, N]:

    t = r (sum over rows of phi(q) * P)            dgamma = sum of t            dM = phi(q)' G^T
    dphi(q) = gamma r (P - (s + eps) t)            ds = -gamma phi(q) (r t)^T + dU b_v
    dU = dM W_o    dT = dU W_v    dW_o = dM^T U    dW_v = dU^T T    db_v = dU^T s
    dphi(k) = dT X + ds            dX = G + dT^T phi(k) + W^T dZ          dW = dZ X^T

Z is what the projections give, and dZ comes of dphi through the feature map. x-sized traffic: x is read three times and
y written; backward reads g three times and x twice, and writes dx. Kept are x, and, where they are small beside it, Z
and (T, s); they are made again where they are not. T over the tokens of a process group is a sum over its members, and
so are dT and ds. Numerator and divisor are both scaled by 1 / N, so that M fits into float16. Without
the residual x is not added to y, nor G to dX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.autocast import without_autocast
from ..common.dtypes import accumulate_dtype
from ..common.layouts import save, saved, stored_as, unviewed
from ..common.process_groups import gather, resolve
from ..reference import Form, Weights
from ..reference import linear_attention as reference
from .double_backward import backward_is_followed, gradients

#: Tokens that one product sums over.
CHUNK = 2**15


class Plan(NamedTuple):
    """What is constant about a call.

    form: the feature map, the heads and eps. shards: the name of the process group whose members hold the tokens, or
    "". keeps_logits, keeps_sums: whether Z and (T, s) are kept for the backward.
    """

    form: Form
    shards: str = ""
    keeps_logits: bool = True
    keeps_sums: bool = True


class Features(NamedTuple):
    """phi(k) and phi(q) [B, H, R, N] in accumulate_dtype, and what their gradient needs beside them: the logits, and
    the inverse lengths for l2."""

    key: Tensor
    query: Tensor
    logits: Tensor
    inverse: Tensor | None = None


class Gradients(NamedTuple):
    """Those of x, stored as x and None if it is not wanted, and of each of Weights in accumulate_dtype."""

    x: Tensor | None
    projection: Tensor
    bias: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor | None
    output_bias: Tensor
    gamma: Tensor


def keeps(channels: int, keys: int, rows: int, tokens: int | None) -> tuple[bool, bool]:
    """Whether Z [2 keys, N] and (T, s) [rows, C + 1] are kept, such that all that is kept is at most 1.3 |X|.

    tokens: N, or None where it is unknown.
    """
    logits = 2 * keys / channels
    keeps_logits = logits <= 0.25
    sums = 0.0 if tokens is None else rows / tokens
    return keeps_logits, (logits if keeps_logits else 0.0) + sums <= 0.29


@without_autocast
def forward(plan: Plan, x: Tensor, weights: Weights, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, stored as x, Z [B, 2 H d, N] and (T, s) [B, H R, C + 1], for a dense x [B, N, C]; see reference.Weights."""
    tokens = _shown(x, padding).mT
    logits = _logits(tokens, weights)
    features = _features(plan, logits, padding)
    sums = _sum_of_members(_with_total(features.key, tokens), plan.shards)
    memory = _memory(plan, sums, weights, x.shape[1])[1]
    query, factor = features.query, None if weights.gamma is None else weights.gamma.to(features.query.dtype)
    if plan.form.feature != "softmax":
        inverse = _inverse_mass(plan, query, sums, padding)[0]
        factor = inverse if factor is None else inverse * factor
    elif padding is not None:
        query = query.masked_fill(_per_token(padding), 0.0)
    if factor is not None:
        query = query.mul_(factor)  # features are made anew in the backward
    y = _product(x, memory.mT.to(x.dtype), query.flatten(1, 2).to(x.dtype), plan.form.residual)
    return y, logits, sums


@without_autocast
def backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    logits: Tensor | None,
    sums: Tensor | None,
    padding: Tensor | None,
    needs_x: bool = True,
) -> Gradients:
    """The gradients for that of y, stored as x. logits and sums as forward returns them, None to make them again."""
    tokens, g, heads = _shown(x, padding).mT, _shown(grad, padding).mT, plan.form.heads
    features = _features(plan, _logits(tokens, weights) if logits is None else logits, padding)
    if sums is None:
        sums = _sum_of_members(_with_total(features.key, tokens), plan.shards)
    u, memory = _memory(plan, sums, weights, x.shape[1])
    reached = torch.bmm(memory.to(x.dtype), g).to(memory.dtype).unflatten(1, (heads, -1))
    query, grad_query, grad_total, grad_gamma = _through_query(plan, features, reached, sums, weights, padding)
    grad_memory = _over_tokens(query.flatten(1, 2), g)
    of_memory = _through_memory(plan, grad_memory, sums, u, weights, x.shape[1])
    grad_sums = of_memory[0]
    if grad_total is not None:
        grad_sums[..., -1] += grad_total
    grad_sums = _sum_of_members(grad_sums, plan.shards)
    grad_t, grad_s = grad_sums[..., :-1].to(x.dtype), grad_sums[..., -1:]
    grad_key = torch.bmm(grad_t, tokens).to(grad_s.dtype).add_(grad_s).unflatten(1, (heads, -1))
    grad_logits = _through_features(plan, features, grad_key, grad_query, padding)
    narrow = grad_logits.to(x.dtype)
    grad_x = None
    if needs_x:
        factors = torch.cat((grad_t.mT, weights.projection.mT.expand(x.shape[0], -1, -1)), 2)
        rows = torch.cat((features.key.flatten(1, 2).to(x.dtype), narrow), 1)
        grad_x = _product(grad, factors, rows, plan.form.residual)
    of_projection = _over_tokens(narrow, tokens).sum(0), grad_logits.sum((0, 2))
    return Gradients(grad_x, *of_projection, *of_memory[1:], grad_gamma)


def _shown(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)


def _per_token(padding: Tensor) -> Tensor:
    """padding [B, N] over heads and rows."""
    return padding.unsqueeze(1).unsqueeze(1)


def _logits(tokens: Tensor, weights: Weights) -> Tensor:
    """Z [B, 2 H d, N] of X [B, C, N]."""
    projection = weights.projection.expand(tokens.shape[0], -1, -1)
    if weights.bias is None:
        return torch.bmm(projection, tokens)
    return torch.baddbmm(weights.bias.view(1, -1, 1), projection, tokens)


def _features(plan: Plan, logits: Tensor, padding: Tensor | None) -> Features:
    split = logits.to(accumulate_dtype(logits.dtype)).unflatten(1, (2, plan.form.heads, -1))  # [B, 2, H, d, N]
    if plan.form.feature == "softmax":
        return Features(_softmax_over_tokens(plan, split[:, 0], padding), split[:, 1].softmax(2), split)
    inverse = None
    if plan.form.feature == "softplus":
        both = torch.nn.functional.softplus(split)
    else:
        square = split.square().sum(3, keepdim=True)
        inverse = square.add_(square == 0).rsqrt_()
        both = split.new_empty((*split.shape[:3], split.shape[3] + 1, split.shape[4]))
        both[:, :, :, :1] = 1.0
        torch.mul(split, inverse, out=both[:, :, :, 1:])
    if padding is not None:
        both[:, 0].masked_fill_(_per_token(padding), 0.0)
    return Features(*both.unbind(1), split, inverse)


def _softmax_over_tokens(plan: Plan, key: Tensor, padding: Tensor | None) -> Tensor:
    """Of key [B, H, d, N] over N, over the tokens of all members of a process group; 0 where there is no token."""
    if padding is None and not plan.shards:
        return key.softmax(3)
    shown = key if padding is None else key.masked_fill(_per_token(padding), -torch.inf)
    maximum = shown.amax(3, keepdim=True)
    if plan.shards:
        maximum = gather(maximum, plan.shards).amax(0)
    weight = (shown - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp_()
    total = _sum_of_members(weight.sum(3, keepdim=True), plan.shards)
    return weight.div_(total.add_(total == 0))


def _with_total(key: Tensor, tokens: Tensor) -> Tensor:
    """(T, s) [B, H R, C + 1] of phi(k) [B, H, R, N] and X [B, C, N]."""
    rows = key.flatten(1, 2)
    return torch.cat((_over_tokens(rows, tokens), rows.sum(2, keepdim=True)), 2)


def _over_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
    """rows [B, p, N] times the transpose of tokens [B, C, N]: [B, p, C] in accumulate_dtype.

    Summed in chunks, as a library may add up a narrow product term by term, which a million of them do not stand.
    bfloat16 has the range of the wider type, and its product rounds once. A sum over tokens may leave that of float16,
    and a softmax over many tokens too: there the factors are wide.
    """
    dtype = accumulate_dtype(tokens.dtype)
    factor = dtype if tokens.dtype == torch.float16 else tokens.dtype
    pairs = zip(rows.split(CHUNK, 2), tokens.split(CHUNK, 2), strict=True)
    products = [torch.bmm(a.to(factor), b.to(factor).mT).to(dtype) for a, b in pairs]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0)


def _of_heads(t: Tensor, heads: int) -> Tensor:
    """[B, H R, q] as [H, B R, q]: what one matrix of a head does to all samples is one product."""
    if heads == 1 and t.is_contiguous():
        return t.view(1, -1, t.shape[2])
    return t.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def _of_samples(t: Tensor, samples: int) -> Tensor:
    """The inverse of _of_heads."""
    if t.shape[0] == 1 and t.is_contiguous():
        return t.view(samples, -1, t.shape[2])
    return t.unflatten(1, (samples, -1)).transpose(0, 1).flatten(1, 2)


def _memory(plan: Plan, sums: Tensor, weights: Weights, tokens: int) -> tuple[Tensor, Tensor]:
    """U [H, B R, v] and M [B, H R, C], scaled by 1 / N where a division follows."""
    by_head = _of_heads(sums, plan.form.heads)
    t, s = by_head[..., :-1], by_head[..., -1:]
    value = weights.value.to(t.dtype).mT
    if weights.value_bias is None:
        u = torch.bmm(t, value)
    else:
        u = torch.baddbmm(s * weights.value_bias.to(t.dtype).unsqueeze(1), t, value)
    memory = u if weights.output is None else torch.bmm(u, weights.output.to(t.dtype).mT)
    if weights.output_bias is not None:
        memory = memory + weights.output_bias.to(t.dtype) / plan.form.heads
    memory = _of_samples(memory, sums.shape[0])
    return u, memory if plan.form.feature == "softmax" else memory / tokens


def _inverse_mass(plan: Plan, query: Tensor, sums: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """r N [B, H, 1, N], 0 at padding, and (s + eps) / N [B, H, R, 1]."""
    s = sums[..., -1].unflatten(1, (plan.form.heads, -1))
    s = (s / query.shape[3]).unsqueeze(3)
    s[:, :, plan.form.feature == "l2" :] += plan.form.eps / query.shape[3]  # not to the constant 1
    mass = torch.matmul(s.mT, query)
    inverse = mass.add_(mass == 0).reciprocal_()
    return inverse if padding is None else inverse.masked_fill(_per_token(padding), 0.0), s


def _through_query(
    plan: Plan, features: Features, reached: Tensor, sums: Tensor, weights: Weights, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """phi(q)', dphi(q) [B, H, R, N], the part of ds [B, H R] that comes through the divisor, and dgamma [1], of P."""
    query = features.query
    gamma = query.new_ones(1) if weights.gamma is None else weights.gamma.to(query.dtype)
    if plan.form.feature == "softmax":
        if padding is not None:
            query = query.masked_fill(_per_token(padding), 0.0)
        if weights.gamma is None:
            return query, reached, None, gamma
        return query * gamma, reached * gamma, None, (query * reached).sum().view(1)
    inverse, s = _inverse_mass(plan, query, sums, padding)
    ratio = (query * reached).sum(2, keepdim=True).mul_(inverse)
    factor = inverse * gamma
    grad_mass = (ratio * factor).neg_()
    grad_total = torch.matmul(query, grad_mass.mT).flatten(1) / query.shape[3]
    return query * factor, torch.addcmul(reached * factor, s, grad_mass), grad_total, ratio.sum().view(1)


def _through_memory(
    plan: Plan, grad: Tensor, sums: Tensor, u: Tensor, weights: Weights, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of (T, s), of the value, its bias, the output projection and its bias, for that of M."""
    heads, samples = plan.form.heads, sums.shape[0]
    if plan.form.feature != "softmax":
        grad = grad / tokens
    grad_m, by_head = _of_heads(grad, heads), _of_heads(sums, heads)
    t, s = by_head[..., :-1], by_head[..., -1:]
    grad_output, grad_u = None, grad_m
    if weights.output is not None:
        grad_output = torch.bmm(grad_m.mT, u)
        grad_u = torch.bmm(grad_m, weights.output.to(t.dtype))
    value = weights.value.to(t.dtype)
    bias = value.new_zeros(value.shape[:2]) if weights.value_bias is None else weights.value_bias.to(t.dtype)
    grad_sums = torch.cat((torch.bmm(grad_u, value), torch.bmm(grad_u, bias.unsqueeze(2))), 2)
    grad_value, grad_bias = torch.bmm(grad_u.mT, t), torch.bmm(grad_u.mT, s).squeeze(2)
    grad_output_bias = grad_m.sum((0, 1)) / heads
    return _of_samples(grad_sums, samples), grad_value, grad_bias, grad_output, grad_output_bias


def _through_features(
    plan: Plan, features: Features, grad_key: Tensor, grad_query: Tensor, padding: Tensor | None
) -> Tensor:
    """dZ [B, 2 H d, N] of dphi(k) and dphi(q)."""
    key, query, logits, inverse = features
    if plan.form.feature == "softmax":
        softmax_backward = torch.ops.aten._softmax_backward_data.default
        if plan.shards:
            reduced = _sum_of_members((key * grad_key).sum(3, keepdim=True), plan.shards)
            grad_key = (grad_key - reduced) * key
        else:
            grad_key = softmax_backward(grad_key, key, 3, key.dtype)
        grad = torch.stack((grad_key, softmax_backward(grad_query, query, 2, query.dtype)), 1)
    elif plan.form.feature == "softplus":
        grad = torch.stack((grad_key, grad_query), 1)
        grad = torch.ops.aten.softplus_backward.default(grad, logits, 1.0, 20.0)
    else:
        grad = torch.empty_like(logits)
        for i, pair in enumerate(((key, grad_key), (query, grad_query))):
            hat, of_hat = (t[:, :, 1:] for t in pair)
            along = (hat * of_hat).sum(2, keepdim=True)
            torch.addcmul(of_hat, hat, along, value=-1.0, out=grad[:, i])
        grad.mul_(inverse)
    if padding is not None:
        grad = grad.masked_fill(_per_token(padding).unsqueeze(1), 0.0)
    return grad.flatten(1, 3)


def _product(x: Tensor, factors: Tensor, rows: Tensor, added: bool) -> Tensor:
    """The transpose of factors [B, C, p] times rows [B, p, N], stored as x [B, N, C], which is added or not."""
    if x.is_contiguous():
        pair = rows.mT, factors.mT
        return stored_as(torch.baddbmm(x, *pair) if added else torch.bmm(*pair), x)
    return stored_as((torch.baddbmm(x.mT, factors, rows) if added else torch.bmm(factors, rows)).mT, x)


def _sum_of_members(part: Tensor, name: str) -> Tensor:
    """The sum over the members of a process group, in the order of their ranks; the part itself without a group."""
    return gather(part, name).sum(0) if name else part


def formula(plan: Plan, padding: Tensor | None) -> Callable[..., Tensor]:
    """y of the reference as a function of x and of the tensors of Weights."""
    group = resolve(plan.shards)
    return lambda x, *tensors: reference(x, Weights(*tensors), plan.form, padding, group)


class LinearAttentionFunction(torch.autograd.Function):
    """y = apply(x, *weights, plan, padding), as forward of this module on a dense x that is not empty, all of one type,
    with exact first and second derivatives."""

    @staticmethod
    def forward(ctx, x, *arguments):
        *tensors, plan, padding = arguments
        y, logits, sums = forward(plan, x, Weights(*tensors), padding)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, *tensors, padding, logits if plan.keeps_logits else None, sums if plan.keeps_sums else None)
        return unviewed(y)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 10
        x, *tensors, padding, logits, sums = saved(ctx)
        plan, needs = ctx.plan, ctx.needs_input_grad[:8]
        if backward_is_followed():
            return *gradients(formula(plan, padding), (x, *tensors), needs, grad), None, None
        grads = backward(plan, stored_as(grad, x), x, Weights(*tensors), logits, sums, padding, needs[0])
        return *typed(grads, (x, *tensors)), None, None


def typed(grads: Any, inputs: Any) -> list[Tensor | None]:
    """Gradients in the shapes and types of what they are of; None for what is absent or not wanted."""
    pairs = zip(grads, inputs, strict=True)
    return [None if g is None or p is None else g.view(p.shape).to(p.dtype) for g, p in pairs]
