"""The algorithm, y = x * G_outer(x * G_inner(x)), forward and backward, written once in terms of the nine passes.

Forward, for a unit with an inner context i and an outer context o (without an inner one its lines fall away):

    P_i = pool(x)               G_i = activate(conv(P_i))
    P_o = pool(x * G_i)         G_o = activate(conv(P_o))         y = x * G_o

Backward, with U the transpose of pool (the passes: ops.py):

    dG_o = reduce(dy * x)       dP_o = gate_backward(dG_o)
    dG_i = reduce(U(dP_o) * x)  dP_i = gate_backward(dG_i)        dx = dy * G_o + G_i * U(dP_o) + U(dP_i)

U(dP_o), the gradient of x * G_i, is as large as x and is never stored. Kept for the backward: x, and of each context
the pooled features, the index of the maximum and four numbers per gate. The convolutions' results are computed again:
they would cost half as much memory as the pooled features, which the convolutions' own backward needs in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import maps
from .formulas import backward_is_followed, gradients
from .layouts import as_clips, as_input, stored_as, unviewed
from .process_groups import gather, resolve
from .reference import Gate, Norm, Unit, attention_in_attention


class Plan(NamedTuple):
    """What is constant about a call: the unit, the passes that compute it and, per gate in unit.letters, its BN.

    passes has the nine passes of ops.PASSES as attributes and map_order(storage order of x), the order in which it
    packs maps. batch: normalise by the statistics of the batch. eps: added to the variance. groups: the name of the
    process group that shares the statistics, or "".
    """

    unit: Unit
    passes: Any
    batch: tuple[bool, ...]
    eps: tuple[float, ...]
    groups: tuple[str, ...]


class Kept(NamedTuple):
    """What one context keeps for the backward: features [B, 2, M], indices [B, M], and norm [n, 4] as in ops.py."""

    pooled: Tensor
    argmax: Tensor
    norm: Tensor


class Forward(NamedTuple):
    """Result of forward: y, what is kept, and statistics [n, 3], per gate: the mean and biased variance that normalised
    it, and the share of one element in them, 1 / (elements in the batch), or 0 for fixed ones."""

    y: Tensor
    inner: Kept | None
    outer: Kept
    statistics: Tensor


def forward(plan: Plan, x: Tensor, weight: Sequence[Tensor], affine: Tensor, fixed: Tensor | None) -> Forward:
    """The unit on x [B, T, C, H, W], stored in one of maps.ORDERS and not empty.

    weight: n convolution weights [1, 2, 3, 3, 3] in the paper's axis order. affine [n, 2]: weight and bias of each BN
    (1 and 0 without BN). fixed [n, 2]: mean and variance for the gates that do not use the batch's (0 and 1, with eps
    0, without BN); None when all do.
    """
    unit, passes = plan.unit, plan.passes
    order = passes.map_order(maps.storage_order(x))
    inner = guide = None
    statistics = {}

    def gate(context: int, guide: Tensor | None, guide_context: int) -> tuple[Kept, Tensor]:
        rows, dims = unit.rows(context), _dims(x.shape, context, order)
        pooled, argmax = passes.pool(x, context, guide, guide_context)
        z, moments = passes.gate_conv(pooled, maps.arrange_weight(weight[rows], context, order).to(pooled.dtype), dims)
        count = [x.shape[0] * d * h * w for d, h, w in zip(dims[::3], dims[1::3], dims[2::3], strict=True)]
        statistics[context] = _statistics(plan, rows, moments, fixed, count)
        norm = _norm(plan.eps[rows], statistics[context], affine[rows])
        return Kept(pooled, argmax, norm), passes.gate_activate(z, norm, dims)

    if unit.inner:
        inner, guide = gate(unit.inner, None, maps.NONE)
        if unit.averaged:
            guide = average_over_channels(guide, x.shape, order)
    outer, recalibration = gate(unit.outer, guide, unit.inner_gate_context)
    y = passes.recalibrate(x, recalibration, unit.outer)
    return Forward(y, inner, outer, _by_rows(unit, statistics))


def backward(
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    inner: Kept | None,
    outer: Kept,
    statistics: Tensor,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the weights [n, 2, 3, 3, 3] and of the affine parameters [n, 2], for grad_y stored as x.

    Arguments as for forward and as kept by it. The gradient of x is None where it is not needed.
    """
    unit, passes = plan.unit, plan.passes
    order = passes.map_order(maps.storage_order(x))
    grad_weight, grad_affine = {}, {}

    def through_gate(context: int, kept: Kept, grad_gate: Tensor, z: Tensor, arranged: Tensor) -> Tensor:
        rows, dims = unit.rows(context), _dims(x.shape, context, order)
        sums = passes.gate_backward_reduce(grad_gate, z, kept.norm, dims)
        correction = _correction(plan, rows, sums, statistics[rows, 2:])
        grad_pooled, grad_arranged = passes.gate_backward(
            grad_gate, z, kept.norm, correction, kept.pooled, arranged, dims
        )
        grad_weight[context] = torch.cat(maps.restore_weight(grad_arranged, context, order))
        grad_affine[context] = sums.flip(1)
        return grad_pooled

    def again(context: int, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        dims = _dims(x.shape, context, order)
        arranged = maps.arrange_weight(weight[unit.rows(context)], context, order).to(kept.pooled.dtype)
        z, _ = passes.gate_conv(kept.pooled, arranged, dims)
        return arranged, z, passes.gate_activate(z, kept.norm, dims)

    arranged, z, recalibration = again(unit.outer, outer)
    grad_gate = passes.recalibrate_reduce(grad_y, x, unit.outer)
    grad_outer = through_gate(unit.outer, outer, grad_gate, z, arranged)
    guide = grad_inner = inner_argmax = None
    if unit.inner:
        arranged, z, guide = again(unit.inner, inner)
        grad_guide = passes.unpool_reduce(x, grad_outer, outer.argmax, unit.outer, unit.inner_gate_context)
        if unit.averaged:
            guide = average_over_channels(guide, x.shape, order)
            grad_guide = spread_over_channels(grad_guide, x.shape, order)
        grad_inner, inner_argmax = through_gate(unit.inner, inner, grad_guide, z, arranged), inner.argmax
    grad_x = None
    if needs_x:
        grad_x = passes.unpool(
            grad_y,
            recalibration,
            grad_outer,
            outer.argmax,
            unit.outer,
            guide,
            unit.inner_gate_context,
            grad_inner,
            inner_argmax,
            unit.inner,
        )
    return grad_x, _by_rows(unit, grad_weight), _by_rows(unit, grad_affine)


def average_over_channels(gate: Tensor, sizes: Sequence[int], order: str) -> Tensor:
    """STinC2's inner gate: a spacetime gate [B, M], averaged over C, as a channel-shaped one [B, T * H * W]."""
    g_t, g_h, g_w = maps.unpack(gate, sizes, maps.SPACETIME, order)  # [B, C, H, W], [B, T, C, W], [B, T, H, C]
    mean = (g_t.mean(1)[:, None] + g_h.mean(2)[:, :, None] + g_w.mean(3)[..., None]) / 3
    return maps.pack([mean], maps.CHANNEL, order)


def spread_over_channels(grad: Tensor, sizes: Sequence[int], order: str) -> Tensor:
    """The transpose of average_over_channels: [B, T * H * W] to [B, M]."""
    _, t, c, h, w = sizes
    (grad,) = maps.unpack(grad / (3 * c), sizes, maps.CHANNEL, order)
    spread = (
        grad.sum(1)[:, None].expand(-1, c, h, w),
        grad.sum(2)[:, :, None].expand(-1, t, c, w),
        grad.sum(3)[..., None].expand(-1, t, h, c),
    )
    return maps.pack(spread, maps.SPACETIME, order)


@functools.lru_cache(maxsize=256)
def _dims(sizes: Sequence[int], context: int, order: str) -> list[int]:
    return [length for dims in maps.map_dims(sizes, context, order) for length in dims]


def _by_rows(unit: Unit, parts: dict[int, Tensor]) -> Tensor:
    """One tensor of the parts of both contexts, in the order of unit.letters."""
    return torch.cat([parts[context] for context in (maps.CHANNEL, maps.SPACETIME) if context in parts])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a column [n, 1], filled on the device: no copy from the host, so a CUDA graph can hold it."""
    if len(set(values)) == 1:
        return like.new_full((len(values), 1), values[0])
    return torch.cat([like.new_full((1, 1), value) for value in values])


def _norm(eps: Sequence[float], statistics: Tensor, affine: Tensor) -> Tensor:
    added = eps[0] if len(set(eps)) == 1 else _column(eps, statistics)
    rstd = (statistics[:, 1:2] + added).rsqrt()
    return torch.cat((statistics[:, :1], rstd, affine.to(statistics.dtype)), 1)


def _statistics(plan: Plan, rows: slice, moments: Tensor, fixed: Tensor | None, count: Sequence[int]) -> Tensor:
    """Statistics [n, 3] of the gates of one context, as in Forward, from the moments [n, 2] of the local batch."""
    batch = plan.batch[rows]
    share = _column([1 / k if own else 0.0 for k, own in zip(count, batch, strict=True)], moments)
    if not all(batch):
        fixed = fixed[rows].to(moments.dtype)
        moments = torch.cat([(moments if own else fixed)[i : i + 1] for i, own in enumerate(batch)])
    statistics = torch.cat((moments, share), 1)
    if not any(plan.groups[rows]):
        return statistics
    return _by_group(plan.groups[rows], statistics, torch.cat((moments, _column(count, moments)), 1), _joint)


def _joint(members: Tensor) -> Tensor:
    """Statistics of a joint batch from the mean, variance and count of its members [members, n, 3]: Chan's formula."""
    mean, var, count = members.split(1, 2)
    total = count.sum(0)
    joint = (count * mean).sum(0) / total
    joint_var = (count * (var + (mean - joint).square())).sum(0) / total
    return torch.cat((joint, joint_var, total.reciprocal()), 1)


def _correction(plan: Plan, rows: slice, sums: Tensor, share: Tensor) -> Tensor:
    """gate_backward's correction [n, 2]: the means of du and du * xhat over the batch of the statistics, or zero."""
    batch, groups = plan.batch[rows], plan.groups[rows]
    if any(groups):
        sums = _by_group(groups, sums, sums, lambda members: members.sum(0))
    if all(batch):
        return sums * share
    # Not sums * 0: a NaN in one clip must not reach the others through statistics that they do not share.
    return torch.where(share > 0, sums * share, 0.0) if any(batch) else torch.zeros_like(sums)


def _by_group(groups: Sequence[str], alone: Tensor, part: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Row i: that of ``alone`` for a gate without a group, else of the combined parts of the members, by rank."""
    rows = {"": alone} | {group: combine(gather(part, group)) for group in sorted(set(groups) - {""})}
    return torch.cat([rows[group][i : i + 1] for i, group in enumerate(groups)])


class AttentionInAttentionFunction(torch.autograd.Function):
    """y, statistics = apply(x, num_segments, plan, fixed, *parameters): a unit with exact first and second
    derivatives.

    x is [B * T, C, H, W] or [B, C, T, H, W], dense in a layout of maps.ORDERS and not empty; parameters are, per gate
    in plan.unit.letters, the weight of the convolution and the weight and bias of the BN (None for 1 and 0); plan,
    fixed and statistics as in forward of this module. Gradients flow to x and the parameters. The running statistics
    are the caller's business (running_statistics.py).
    """

    @staticmethod
    def forward(ctx, x, num_segments, plan, fixed, *parameters):
        clips = as_clips(x, num_segments)
        weight = parameters[::3]
        result = forward(plan, clips, weight, pack_affine(parameters), fixed)
        y = unviewed(as_input(result.y, x.ndim))
        ctx.plan, ctx.num_segments = plan, num_segments
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(result.statistics)
        ctx.save_for_backward(x, *parameters, result.statistics, *(result.inner or ()), *result.outer)
        return y, result.statistics

    @staticmethod
    def backward(ctx, grad_y, _grad_statistics):
        plan, n = ctx.plan, 3 * len(ctx.plan.batch)
        x, *saved = ctx.saved_tensors
        parameters, (statistics, *kept) = saved[:n], saved[n:]
        if grad_y is None:
            return (None,) * (4 + n)
        if backward_is_followed():

            def formula(x, *parameters):
                gates = gates_of(plan, parameters, statistics)
                return as_input(attention_in_attention(as_clips(x, ctx.num_segments), plan.unit, gates)[0], x.ndim)

            needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
            grad_x, *grads = gradients(formula, (x, *parameters), needs, grad_y)
            return grad_x, None, None, None, *grads
        clips, grad_clips = (as_clips(a, ctx.num_segments) for a in (x, stored_as(grad_y, x)))
        inner = Kept(*kept[:3]) if plan.unit.inner else None
        grad_x, grad_weight, grad_affine = backward(
            plan, grad_clips, clips, parameters[::3], inner, Kept(*kept[-3:]), statistics, ctx.needs_input_grad[0]
        )
        grads, grad_affine = [], grad_affine.mT.contiguous()  # DDP warns of gradients with other strides than [1]
        for i in range(0, n, 3):
            row = slice(i // 3, i // 3 + 1)
            for p, grad in zip(parameters[i:], (grad_weight[row], *grad_affine[:, row]), strict=False):
                grads.append(None if p is None else grad.to(p.dtype))
        return None if grad_x is None else as_input(grad_x, x.ndim), None, None, None, *grads


def pack_affine(parameters: Sequence[Tensor | None]) -> Tensor:
    """[n, 2], weight and bias of each BN, from parameters as AttentionInAttentionFunction takes them."""
    flat = []
    for weight, scale, shift in zip(*[iter(parameters)] * 3, strict=True):
        flat += [weight.new_ones(1) if scale is None else scale, weight.new_zeros(1) if shift is None else shift]
    return torch.cat(flat).view(-1, 2)


def gates_of(plan: Plan, parameters: Sequence[Tensor | None], statistics: Tensor) -> list[Gate]:
    """The gates of the reference, from parameters and statistics as AttentionInAttentionFunction has them."""
    gates = []
    for i, (weight, scale, shift) in enumerate(zip(*[iter(parameters)] * 3, strict=True)):
        mean, var, _ = statistics[i].split(1)
        norm = Norm(scale, shift, mean, var, training=plan.batch[i], eps=plan.eps[i])
        if plan.groups[i]:
            norm = norm._replace(process_group=resolve(plan.groups[i]))
        gates.append(Gate(weight, norm))
    return gates
