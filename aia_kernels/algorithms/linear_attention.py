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
from ..reference.linear_attention import FEATURES
from .double_backward import backward_is_followed, gradients

#: Tokens that one product sums over.
CHUNK = 2**15


class Plan(NamedTuple):
    """What is constant about a call.

    passes: has those of schemas.MEMORY_PASSES as attributes, and may have schemas.MEMORY_PROPAGATE_PASSES. form: the
    feature map, the heads and eps. shards: the name of the process group whose members hold the tokens, or "".
    keeps_logits, keeps_sums: whether Z and (T, s) are kept for the backward.
    """

    passes: Any
    form: Form
    shards: str = ""
    keeps_logits: bool = True
    keeps_sums: bool = True


class Sums(NamedTuple):
    """T [B, H R, C] and s [B, H R], sums over the tokens of all members of a process group, in accumulate_dtype; T in
    that of dtype_of_memory."""

    t: Tensor
    s: Tensor


class Gradients(NamedTuple):
    """Those of x, stored as x and None if it is not wanted, of each of Weights in dtype_of_memory, and of gamma in
    accumulate_dtype. Those of absent ones are None, but for gamma."""

    x: Tensor | None
    projection: Tensor
    bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    output: Tensor | None
    output_bias: Tensor | None
    gamma: Tensor


def keeps(channels: int, keys: int, rows: int, tokens: int | None) -> tuple[bool, bool]:
    """Whether Z [2 keys, N] and (T, s) [rows, C + 1] are kept, such that all that is kept is at most 1.3 |X|.

    tokens: N, or None where it is unknown.
    """
    logits = 2 * keys / channels
    keeps_logits = logits <= 0.25
    sums = 0.0 if tokens is None else rows / tokens
    return keeps_logits, (logits if keeps_logits else 0.0) + sums <= 0.29


def dtype_of_memory(x: Tensor, shards: str = "") -> torch.dtype:
    """The type of T, M and their gradients, that of the products over tokens rounded once.

    Small products of bfloat16 stay in it where a cast is a launch: they round what the published flow rounds too.
    Members of a process group add up in the wider type.
    """
    narrow = x.dtype == torch.bfloat16 and _is_launched(x) and not shards
    return x.dtype if narrow else accumulate_dtype(x.dtype)


def _is_launched(t: Tensor) -> bool:
    """Whether an operator on t costs a launch, whatever it does."""
    return t.device.type != "cpu"


@without_autocast
def forward(plan: Plan, x: Tensor, weights: Weights, padding: Tensor | None) -> tuple[Tensor, Tensor, Sums]:
    """y, stored as x, Z [B, 2 H d, N] and (T, s), for a dense x [B, N, C]; see reference.Weights."""
    if can_propagate(plan, x, padding):
        y, logits, *sums = plan.passes.memory_propagate(x, [*weights], *_of_call(plan))
        return y, logits, Sums(*sums)
    tokens = _shown(x, padding).mT
    logits = _logits(tokens, weights)
    phi, s = _keys(plan, logits, padding, False)
    sums = _sums(plan, phi, tokens, s)
    memory = _memory(plan, sums, weights, x.shape[1])[1]
    query = plan.passes.memory_queries(logits, *_of_phi(plan, padding), sums.s, weights.gamma, plan.form.eps)
    y = _product(x, _as(memory.mT, x.dtype), _as(query, x.dtype), plan.form.residual)
    return y, logits, sums


@without_autocast
def backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    logits: Tensor | None,
    sums: Sums | None,
    padding: Tensor | None,
    needs_x: bool = True,
) -> Gradients:
    """The gradients for that of y, stored as x. logits and sums as forward returns them, None to make them again."""
    if can_propagate(plan, x, padding):
        kept = [logits, *(sums or (None, None))]
        found = plan.passes.memory_propagate_back(grad, x, [*weights], kept, *_of_call(plan), needs_x)
        there = needs_x, *(w is not None for w in weights[:-1]), True
        return Gradients(*(g if is_there else None for g, is_there in zip(found, there, strict=True)))
    passes, of_phi = plan.passes, _of_phi(plan, padding)
    tokens, g = _shown(x, padding).mT, _shown(grad, padding).mT
    logits = _logits(tokens, weights) if logits is None else logits
    rows, s = _keys(plan, logits, padding, True)
    phi_rows = s.shape[1]
    sums = _sums(plan, rows[:, :phi_rows], tokens, s) if sums is None else sums
    u, memory = _memory(plan, sums, weights, x.shape[1])
    reached = torch.bmm(_as(memory, x.dtype), g)
    of_divisor = sums.s, weights.gamma, plan.form.eps
    query, grad_total, grad_gamma = passes.memory_queries_backward_(rows, logits, *of_phi, *of_divisor, reached)
    grad_memory = _gradient_of_memory(plan, query, g, memory)
    grad_sums, *of_parameters = _through_memory(plan, grad_memory, sums, u, weights)
    if plan.form.feature != "softmax":
        grad_sums = grad_sums._replace(s=grad_sums.s + grad_total)
    grad_sums = _sums_of_members(plan, grad_sums)
    grad_t = _as(grad_sums.t, x.dtype)
    reached = torch.bmm(grad_t, tokens)
    reduced = _reduced(plan, rows, reached, grad_sums.s)
    passes.memory_keys_backward_(rows, logits, *of_phi, reached, _as(grad_sums.s, s.dtype), reduced)
    narrow, grad_x = _as(rows, x.dtype), None
    if needs_x:
        factors = torch.cat((grad_t, weights.projection.expand(x.shape[0], -1, -1)), 1)
        grad_x = _product(grad, factors.mT, narrow, plan.form.residual)
    of_projection = _over_samples(_over_tokens(plan, narrow[:, phi_rows:], tokens))
    of_bias = None if weights.bias is None else _as(rows[:, phi_rows:].sum((0, 2)), of_projection.dtype)
    return Gradients(grad_x, of_projection, of_bias, *of_parameters, grad_gamma)


def can_propagate(plan: Plan, x: Tensor, padding: Tensor | None) -> bool:
    """Whether the passes have all of a direction as one: then nothing is between a call and its products."""
    if not hasattr(plan.passes, "memory_propagate") or plan.shards or padding is not None:
        return False
    return x.dtype in (torch.float32, torch.float64) and x.shape[1] <= CHUNK


def _of_call(plan: Plan) -> tuple[int, float, bool]:
    return FEATURES.index(plan.form.feature), plan.form.eps, plan.form.residual


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a type; a call that does nothing takes a microsecond, too."""
    return t if t.dtype is dtype else t.to(dtype)


def _shown(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)


def _of_phi(plan: Plan, padding: Tensor | None) -> tuple[int, int, Tensor | None]:
    """What every pass is told."""
    return FEATURES.index(plan.form.feature), plan.form.heads, padding


def _logits(tokens: Tensor, weights: Weights) -> Tensor:
    """Z [B, 2 H d, N] of X [B, C, N]."""
    projection = weights.projection.expand(tokens.shape[0], -1, -1)
    if weights.bias is None:
        return torch.bmm(projection, tokens)
    return torch.baddbmm(weights.bias.unsqueeze(1), projection, tokens)


def _keys(plan: Plan, logits: Tensor, padding: Tensor | None, gradients: bool) -> tuple[Tensor, Tensor]:
    """phi(k) [B, H R, N], with room for dZ behind it if that is wanted, and s of the tokens here."""
    statistics = _statistics(plan, logits, padding) if plan.shards and plan.form.feature == "softmax" else None
    return plan.passes.memory_keys(logits, *_of_phi(plan, padding), statistics, gradients)


def _statistics(plan: Plan, logits: Tensor, padding: Tensor | None) -> Tensor:
    """The maximum of each column of keys and its sum of exp(logit - maximum), [B, 2, H d], over the tokens of all
    members of a process group."""
    key = logits[:, : logits.shape[1] // 2].to(accumulate_dtype(logits.dtype))
    shown = key if padding is None else key.masked_fill(padding.unsqueeze(1), -torch.inf)
    maximum = gather(shown.amax(2), plan.shards).amax(0)
    origin = maximum.masked_fill(maximum == -torch.inf, 0.0)
    total = _sum_of_members(plan, (shown - origin.unsqueeze(2)).exp_().sum(2))
    return torch.stack((maximum, total), 1)


def _reduced(plan: Plan, rows: Tensor, reached: Tensor, grad_s: Tensor) -> Tensor | None:
    """Of a softmax over the tokens of all members of a process group, the sum of phi(k) times its gradient [B, H d]."""
    if not (plan.shards and plan.form.feature == "softmax"):
        return None
    key = rows[:, : reached.shape[1]]
    return _sum_of_members(plan, (key * (reached.to(key.dtype) + grad_s.unsqueeze(2))).sum(2))


def _sums(plan: Plan, rows: Tensor, tokens: Tensor, s: Tensor) -> Sums:
    """(T, s) of phi(k) [B, H R, N], X [B, C, N] and the s of the tokens here."""
    return _sums_of_members(plan, Sums(_over_tokens(plan, rows, tokens), s))


def _over_tokens(plan: Plan, rows: Tensor, tokens: Tensor) -> Tensor:
    """rows [B, p, N] times the transpose of tokens [B, C, N]: [B, p, C] in dtype_of_memory.

    Summed in chunks, as a library may add up a narrow product term by term, which a million of them do not stand.
    bfloat16 has the range of the wider type, and its product rounds once. A sum over tokens may leave that of float16,
    and a softmax over many tokens too: there the factors are wide.
    """
    dtype = dtype_of_memory(tokens, plan.shards)
    factor = dtype if tokens.dtype == torch.float16 else tokens.dtype
    if tokens.shape[2] <= CHUNK:
        return _as(torch.bmm(_as(rows, factor), _as(tokens, factor).mT), dtype)
    pairs = zip(rows.split(CHUNK, 2), tokens.split(CHUNK, 2), strict=True)
    wide = accumulate_dtype(dtype)
    return _as(torch.stack([torch.bmm(_as(a, factor), _as(b, factor).mT).to(wide) for a, b in pairs]).sum(0), dtype)


def _gradient_of_memory(plan: Plan, query: Tensor, grad: Tensor, memory: Tensor) -> Tensor:
    """dM [B, H R, C] of phi(q)' and G [B, C, N], scaled by what M was scaled by."""
    share = _share(plan, grad.shape[2])
    if share != 1.0 and _is_launched(grad) and grad.shape[2] <= CHUNK and query.dtype == grad.dtype == memory.dtype:
        return torch.baddbmm(memory, query, grad.mT, beta=0, alpha=share)  # one launch
    product = _over_tokens(plan, query, grad)
    return product if share == 1.0 else product * share


def _over_samples(t: Tensor) -> Tensor:
    return t.squeeze(0) if t.shape[0] == 1 else t.sum(0)


def _of_heads(t: Tensor, heads: int) -> Tensor:
    """[B, H R, q] as [H, B R, q]: what one matrix of a head does to all samples is one product."""
    if heads == 1 and t.is_contiguous():
        return t.view(1, -1, t.shape[2])
    return t.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2).contiguous()  # a view, if a head has one row


def _of_samples(t: Tensor, samples: int) -> Tensor:
    """The inverse of _of_heads."""
    if t.shape[0] == 1 and t.is_contiguous():
        return t.view(samples, -1, t.shape[2])
    return t.unflatten(1, (samples, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _share(plan: Plan, tokens: int) -> float:
    """What M is scaled by."""
    return 1.0 if plan.form.feature == "softmax" else 1 / tokens


def _memory(plan: Plan, sums: Sums, weights: Weights, tokens: int) -> tuple[Tensor | None, Tensor]:
    """U [H, B R, v], None without an output projection, and M [B, H R, C], scaled by 1 / N where a division follows."""
    t, share = _of_heads(sums.t, plan.form.heads), _share(plan, tokens)
    added = {"beta": share, "alpha": share} if weights.output is None else {}
    value = _as(weights.value.mT, t.dtype)
    if weights.value_bias is not None:
        u = torch.baddbmm(_sums_times_bias(plan, sums, weights.value_bias), t, value, **added)
    else:
        u = torch.bmm(t, value)
        u = u.mul_(share) if weights.output is None and share != 1.0 else u
    if weights.output is None:
        return None, _of_samples(u, sums.t.shape[0])
    output = _as(weights.output.mT, t.dtype)
    if weights.output_bias is not None and _is_launched(t):
        bias = _as(weights.output_bias, t.dtype)
        memory = torch.baddbmm(bias, u, output, beta=share / plan.form.heads, alpha=share)
        return u, _of_samples(memory, sums.t.shape[0])
    memory = torch.bmm(u, output)
    if weights.output_bias is not None:
        memory = memory.add_(weights.output_bias.to(t.dtype), alpha=1 / plan.form.heads)
    return u, _of_samples(memory if share == 1.0 else memory.mul_(share), sums.t.shape[0])


def _sums_times_bias(plan: Plan, sums: Sums, value_bias: Tensor) -> Tensor:
    """s b_v^T of each head [H, B R, v], in the type of T."""
    s, bias = _of_heads(sums.s.unsqueeze(2), plan.form.heads), value_bias.unsqueeze(1)
    if sums.t.dtype == s.dtype:
        return s * _as(bias, s.dtype)
    return torch.mul(s, bias, out=sums.t.new_empty((*s.shape[:2], bias.shape[2])))  # rounded as it is written


def _through_memory(
    plan: Plan, grad: Tensor, sums: Sums, u: Tensor | None, weights: Weights
) -> tuple[Sums, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of (T, s), of the value, its bias, the output projection and its bias, for the scaled one of M."""
    heads, samples = plan.form.heads, sums.t.shape[0]
    grad_m, t = _of_heads(grad, heads), _of_heads(sums.t, heads)
    value, grad_output, grad_u = _as(weights.value, t.dtype), None, grad_m
    if weights.output is not None and u is not None:
        grad_output = torch.bmm(grad_m.mT, u)
        grad_u = torch.bmm(grad_m, _as(weights.output, t.dtype))
    grad_t, grad_bias = _of_samples(torch.bmm(grad_u, value), samples), None
    if weights.value_bias is None:
        grad_s = torch.zeros_like(sums.s)
    else:
        s = _as(_of_heads(sums.s.unsqueeze(2), heads), t.dtype)
        grad_s = _of_samples(torch.bmm(grad_u, _as(weights.value_bias, t.dtype).unsqueeze(2)), samples).squeeze(2)
        grad_bias = torch.bmm(grad_u.mT, s).squeeze(2)
    grad_output_bias = None
    if weights.output_bias is not None:
        grad_output_bias = grad_m.sum((0, 1))
        grad_output_bias = grad_output_bias if heads == 1 else grad_output_bias / heads
    return Sums(grad_t, grad_s), torch.bmm(grad_u.mT, t), grad_bias, grad_output, grad_output_bias


def _product(x: Tensor, factors: Tensor, rows: Tensor, added: bool) -> Tensor:
    """The transpose of factors [B, C, p] times rows [B, p, N], stored as x [B, N, C], which is added or not."""
    if x.is_contiguous():
        pair = rows.mT, factors.mT
        return stored_as(torch.baddbmm(x, *pair) if added else torch.bmm(*pair), x)
    return stored_as((torch.baddbmm(x.mT, factors, rows) if added else torch.bmm(factors, rows)).mT, x)


def _sum_of_members(plan: Plan, part: Tensor) -> Tensor:
    """The sum over the members of a process group, in the order of their ranks; the part itself without a group."""
    return gather(part, plan.shards).sum(0) if plan.shards else part


def _sums_of_members(plan: Plan, sums: Sums) -> Sums:
    """The same of both, in one exchange."""
    if not plan.shards:
        return sums
    both = _sum_of_members(plan, torch.cat((sums.t, sums.s.unsqueeze(2)), 2))
    return Sums(both[..., :-1].contiguous(), both[..., -1].contiguous())


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
        kept = sums if plan.keeps_sums else (None, None)
        save(ctx, x, *tensors, padding, logits if plan.keeps_logits else None, *kept)
        return unviewed(y)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 10
        x, *tensors, padding, logits, t, s = saved(ctx)
        plan, needs = ctx.plan, ctx.needs_input_grad[:8]
        if backward_is_followed():
            return *gradients(formula(plan, padding), (x, *tensors), needs, grad), None, None
        sums = None if t is None else Sums(t, s)
        grads = backward(plan, stored_as(grad, x), x, Weights(*tensors), logits, sums, padding, needs[0])
        return *typed(grads, (x, *tensors)), None, None


def typed(grads: Any, inputs: Any) -> list[Tensor | None]:
    """Gradients in the shapes and types of what they are of; None for what is absent or not wanted."""
    pairs = zip(grads, inputs, strict=True)
    return [None if g is None or p is None else _as(g, p.dtype).view(p.shape) for g, p in pairs]
