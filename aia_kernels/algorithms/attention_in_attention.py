"""The algorithm, y = x * G_outer(x * G_inner(x)), forward and backward, written once in terms of passes.

Forward, for a unit with an inner context i and an outer context o (without an inner one its lines fall away):

    P_i = pool(x)               G_i = gate(P_i)
    P_o = pool(x * G_i)         G_o = gate(P_o)         y = x * G_o

Backward, with U the transpose of pool (the passes: schemas.py):

    dG_o = reduce(dy * x)       dP_o = gate_backward(dG_o)
    dG_i = reduce(U(dP_o) * x)  dP_i = gate_backward(dG_i)        dx = dy * G_o + G_i * U(dP_o) + U(dP_i)

U(dP_o), the gradient of x * G_i, is as large as x and is never stored. Kept for the backward: x, and of each context
the pooled features, the index of the maximum and four numbers per gate; and an averaged gate, 1 / C of x. The
convolutions' results are recomputed: they would cost half as much memory as the pooled features, which the
convolutions' backward needs in any case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import maps
from ..common.layouts import as_clips, as_input, save, saved, stored_as, unviewed
from ..common.process_groups import gather, joint_statistics, resolve
from ..reference import Gate, Norm, Unit, attention_in_attention
from .double_backward import backward_is_followed, gradients


class Plan(NamedTuple):
    """What is constant about a call: the unit, the passes that compute it and, per gate in unit.letters, its BN.

    passes has the passes of schemas.PASSES as attributes and map_order(storage order of x), the order in which it
    packs maps. batch: normalize by the statistics of the batch. eps: added to the variance. groups: the name of the
    process group that shares the statistics, or "". wide_norms: scale and shift, and so their gradients, are of a wider
    type than the weights, as where a network in half precision keeps its norms in float32.
    """

    unit: Unit
    passes: Any
    batch: tuple[bool, ...]
    eps: tuple[float, ...]
    groups: tuple[str, ...]
    wide_norms: bool = False


class GateParameters(NamedTuple):
    """One gate's parameters, in any type: the weight [1, 2, 3, 3, 3] of its convolution in the paper's
    order of axes, and of one element each scale (1 if None) and shift (0) of its BN, and mean (0) and variance (1) of
    one that does not use the batch's."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Kept(NamedTuple):
    """What one context keeps for the backward: features [B, 2, M], indices [B, M], norm [n, 4] and statistics [n, 3],
    as in schemas.py."""

    pooled: Tensor
    argmax: Tensor
    norm: Tensor
    statistics: Tensor


class Forward(NamedTuple):
    """Result of forward: y, what is kept of each context, and of a unit that averages its inner gate the average."""

    y: Tensor
    inner: Kept | None
    outer: Kept
    averaged: Tensor | None = None


def forward(plan: Plan, x: Tensor, gates: Sequence[GateParameters]) -> Forward:
    """The unit on x [B, T, C, H, W], stored in one of maps.ORDERS and not empty; gates in the order of unit.letters."""
    unit, passes = plan.unit, plan.passes
    order = passes.map_order(maps.storage_order(x))
    if can_propagate(plan):
        weight, *norms = zip(*gates, strict=True)
        settings = plan.eps, plan.batch, unit.inner, unit.outer
        y, *kept = passes.propagate(x, _stored(unit, weight, order), *norms, *settings)
        return Forward(y, Kept(*kept[:4]) if unit.inner else None, Kept(*kept[-4:]))

    def gate(context: int, guide: Tensor | None, guide_context: int) -> tuple[Kept, Tensor]:
        rows, dims = unit.rows(context), _dims(x.shape, context, order)
        pooled, argmax = passes.pool(x, context, guide, guide_context)
        weight, *norms = zip(*gates[rows], strict=True)
        weight = maps.weights_in_order(weight, context, order)
        g, norm, statistics = passes.gate(pooled, weight, *norms, plan.eps[rows], plan.batch[rows], dims)
        if any(plan.groups[rows]):
            count = [x.shape[0] * d * h * w for d, h, w in zip(dims[::3], dims[1::3], dims[2::3], strict=True)]
            norm, statistics = _with_members(plan, rows, norm, statistics, count)
            g, _ = passes.gate_again(pooled, weight, norm, dims)
        return Kept(pooled, argmax, norm, statistics), g

    inner = guide = averaged = None
    if unit.inner:
        inner, guide = gate(unit.inner, None, maps.NONE)
        if unit.averaged:
            guide = averaged = average_over_channels(passes, guide, x.shape, order)
    outer, recalibration = gate(unit.outer, guide, unit.inner_gate_context)
    return Forward(passes.recalibrate(x, recalibration, unit.outer), inner, outer, averaged)


def backward(
    plan: Plan,
    grad_y: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    inner: Kept | None,
    outer: Kept,
    needs_x: bool = True,
    averaged: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The gradients of x, of each weight and of each gate's scale and shift, for grad_y stored as x.

    Arguments as for forward and as kept by it; an average that was not kept is made again. The gradient of x is None
    where it is not needed.
    """
    unit, passes = plan.unit, plan.passes
    order = passes.map_order(maps.storage_order(x))
    if can_propagate(plan):
        kept, n = [*(inner or ()), *outer], len(weight)
        found = passes.propagate_back(grad_y, x, _stored(unit, weight, order), kept, unit.inner, unit.outer, needs_x)
        affine = [pair.view(-1, 1).unbind() for pair in found[n : n + len(kept) // 4]]
        pairs = [(of[i + 1], of[i]) for of in affine for i in range(0, len(of), 2)]
        return found[-1] if needs_x else None, _stored(unit, found[:n], order, back=True), pairs
    grad_weight, grad_affine = {}, {}

    def recompute(context: int, kept: Kept) -> tuple[list[Tensor], Tensor, Tensor]:
        in_order = maps.weights_in_order(weight[unit.rows(context)], context, order)
        return in_order, *passes.gate_again(kept.pooled, in_order, kept.norm, _dims(x.shape, context, order))

    def through_gate(context: int, kept: Kept, in_order: list[Tensor], grad_gate: Tensor, z: Tensor) -> Tensor:
        groups, dims = plan.groups[unit.rows(context)], _dims(x.shape, context, order)
        own = sums = None
        if plan.wide_norms or any(groups):
            own = passes.gate_backward_reduce(grad_gate, z, kept.norm, dims)
            sums = _by_group(groups, own, own, lambda members: members.sum(0))
        grad_pooled, grads, affine = passes.gate_backward(
            grad_gate, z, kept.norm, sums, kept.statistics, kept.pooled, in_order, dims
        )
        grad_weight[context] = maps.weights_in_order(grads, context, order, back=True)
        shift_and_scale = (affine if own is None else own).view(-1).split(1)
        grad_affine[context] = zip(shift_and_scale[1::2], shift_and_scale[::2], strict=True)
        return grad_pooled

    in_order, recalibration, z = recompute(unit.outer, outer)
    grad_gate = passes.recalibrate_reduce(grad_y, x, unit.outer)
    grad_outer = through_gate(unit.outer, outer, in_order, grad_gate, z)
    guide = grad_inner = inner_argmax = None
    if unit.inner:
        in_order, guide, z = recompute(unit.inner, inner)
        grad_guide = passes.unpool_reduce(x, grad_outer, outer.argmax, unit.outer, unit.inner_gate_context)
        if unit.averaged:
            guide = average_over_channels(passes, guide, x.shape, order) if averaged is None else averaged
            grad_guide = spread_over_channels(passes, grad_guide, x.shape, order)
        grad_inner, inner_argmax = through_gate(unit.inner, inner, in_order, grad_guide, z), inner.argmax
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
    return grad_x, by_gate(unit, grad_weight), by_gate(unit, grad_affine)


def can_propagate(plan: Plan) -> bool:
    """Whether the passes have all of forward and of backward as one: no averages, and nothing between that other
    processes or wider norms want."""
    if not hasattr(plan.passes, "propagate") or plan.unit.averaged or plan.wide_norms:
        return False
    return not any(plan.groups)


def can_evaluate(plan: Plan) -> bool:
    """Whether the passes have the unit as one, for a call that keeps nothing: all statistics fixed, and no averages."""
    return hasattr(plan.passes, "evaluate") and not any(plan.batch) and not plan.unit.averaged


def evaluate(plan: Plan, x: Tensor, gates: Sequence[GateParameters]) -> Tensor:
    """y of forward, where can_evaluate."""
    unit, order = plan.unit, plan.passes.map_order(maps.storage_order(x))
    weight, *norms = zip(*gates, strict=True)
    return plan.passes.evaluate(x, _stored(unit, weight, order), *norms, plan.eps, unit.inner, unit.outer)


def _stored(unit: Unit, weights: Sequence[Tensor], order: str, back: bool = False) -> list[Tensor]:
    """Views of the weights of a unit's gates with their axes in stored order, or back."""
    in_order = {c: maps.weights_in_order(weights[unit.rows(c)], c, order, back) for c in (unit.inner, unit.outer) if c}
    return by_gate(unit, in_order)


def by_gate(unit: Unit, parts: Mapping[int, Iterable[Any]]) -> list[Any]:
    """What belongs to the gates of each context, in the order of unit.letters."""
    return [part for context in (maps.CHANNEL, maps.SPACETIME) for part in parts.get(context, ())]


def statistics_of(unit: Unit, inner: Kept | None, outer: Kept) -> list[Tensor]:
    """The statistics [1, 3] of each gate, in the order of unit.letters."""
    kept = {unit.outer: outer} | ({unit.inner: inner} if unit.inner else {})
    rows = {context: of.statistics.split(1) if context > 1 else (of.statistics,) for context, of in kept.items()}
    return by_gate(unit, rows)


def average_over_channels(passes: Any, gate: Tensor, sizes: Sequence[int], order: str) -> Tensor:
    """STinC2's inner gate: a spacetime gate [B, M], averaged over C, as a channel-shaped one [B, T * H * W]."""
    if hasattr(passes, "average_gate"):
        return passes.average_gate(gate, sizes[1:], maps.ORDERS.index(order))
    g_t, g_h, g_w = maps.unpack(gate, sizes, maps.SPACETIME, order)  # [B, C, H, W], [B, T, C, W], [B, T, H, C]
    mean = (g_t.mean(1, keepdim=True) + g_h.mean(2, keepdim=True) + g_w.mean(3, keepdim=True)).div_(3)
    return maps.pack([mean], maps.CHANNEL, order)


def spread_over_channels(passes: Any, grad: Tensor, sizes: Sequence[int], order: str) -> Tensor:
    """The transpose of average_over_channels: [B, T * H * W] to [B, M]."""
    if hasattr(passes, "average_gate_back"):
        return passes.average_gate_back(grad, sizes[1:], maps.ORDERS.index(order))
    _, t, c, h, w = sizes
    (grad,) = maps.unpack(grad / (3 * c), sizes, maps.CHANNEL, order)
    spread = (
        grad.sum(1, keepdim=True).expand(-1, c, h, w),
        grad.sum(2, keepdim=True).expand(-1, t, c, w),
        grad.sum(3, keepdim=True).expand(-1, t, h, c),
    )
    return maps.pack(spread, maps.SPACETIME, order)


@functools.lru_cache(maxsize=256)
def _dims(sizes: Sequence[int], context: int, order: str) -> list[int]:
    return [length for dims in maps.map_dims(sizes, context, order) for length in dims]


def _with_members(
    plan: Plan, rows: slice, norm: Tensor, statistics: Tensor, count: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Norm [n, 4] and statistics [n, 3] as they are where the gates with a group share theirs with its members."""
    own = torch.cat((statistics[:, :2], _column(count, statistics)), 1)
    statistics = _by_group(plan.groups[rows], statistics, own, joint_statistics)
    rstd = (statistics[:, 1:2] + _column(plan.eps[rows], statistics)).rsqrt()
    return torch.cat((statistics[:, :1], rstd, norm[:, 2:]), 1), statistics


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a column [n, 1], filled on the device: no copy from the host, so a CUDA graph can hold it."""
    return torch.cat([like.new_full((1, 1), value) for value in values])


def _by_group(groups: Sequence[str], alone: Tensor, part: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Row i: that of ``alone`` for a gate without a group, else of the combined parts of the members, by rank."""
    rows = {"": alone} | {group: combine(gather(part, group)) for group in sorted(set(groups) - {""})}
    return torch.cat([rows[group][i : i + 1] for i, group in enumerate(groups)])


class AttentionInAttentionFunction(torch.autograd.Function):
    """A unit (arXiv 2204.09303) with exact first and second derivatives. Call its apply.

    Gradients flow to x and the parameters. Running statistics are read, never written.

    Args:
        x: [B * T, C, H, W] or [B, C, T, H, W], dense in a layout of maps.ORDERS and not empty.
        num_segments: T. Not used where x has five axes.
        plan: The unit, its passes and its norms.
        fixed: For each gate in plan.unit.letters the mean and the variance of GateParameters, in one sequence.
        *parameters: For each gate the weight, the scale and the shift of GateParameters.

    Returns:
        y, shaped and stored as x, and the list statistics_of the unit.
    """

    @staticmethod
    def forward(ctx, x, num_segments, plan, fixed, *parameters):
        clips = as_clips(x, num_segments)
        result = forward(plan, clips, gate_parameters(parameters, fixed))
        y = unviewed(as_input(result.y, x.ndim))
        inner, outer = result.inner, result.outer
        ctx.plan, ctx.num_segments = plan, num_segments
        ctx.set_materialize_grads(False)
        save(ctx, x, *parameters, result.averaged, *(inner or ()), *outer)
        # A list is passed through as it is: statistics are no part of the graph.
        return y, statistics_of(plan.unit, inner, outer)

    @staticmethod
    def backward(ctx, grad_y, _statistics):
        plan, n = ctx.plan, 3 * len(ctx.plan.batch)
        if grad_y is None:
            return (None,) * (4 + n)
        x, *rest = saved(ctx)
        parameters, averaged, kept = rest[:n], rest[n], rest[n + 1 :]
        inner, outer = Kept(*kept[:4]) if plan.unit.inner else None, Kept(*kept[-4:])
        if backward_is_followed():
            statistics = statistics_of(plan.unit, inner, outer)

            def y_of(x, *parameters):
                return as_input(formula(plan, as_clips(x, ctx.num_segments), parameters, statistics), x.ndim)

            needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
            grad_x, *grads = gradients(y_of, (x, *parameters), needs, grad_y)
            return grad_x, None, None, None, *grads
        clips, grad_clips = (as_clips(a, ctx.num_segments) for a in (x, stored_as(grad_y, x)))
        needs_x = ctx.needs_input_grad[0]
        grad_x, *grads = backward(plan, grad_clips, clips, parameters[::3], inner, outer, needs_x, averaged)
        grads = [g for weight, affine in zip(*grads, strict=True) for g in (weight, *affine)]
        grads = [
            None if p is None else g if g.dtype == p.dtype else g.to(p.dtype)
            for p, g in zip(parameters, grads, strict=True)
        ]
        return None if grad_x is None else as_input(grad_x, x.ndim), None, None, None, *grads


def gate_parameters(parameters: Sequence[Tensor | None], fixed: Sequence[Tensor | None]) -> list[GateParameters]:
    """The gates' parameters, from what AttentionInAttentionFunction takes."""
    by_three, by_two = iter(parameters), iter(fixed)
    return [GateParameters(*of) for of in zip(by_three, by_three, by_three, by_two, by_two, strict=True)]


def formula(plan: Plan, x: Tensor, parameters: Sequence[Tensor | None], statistics: Sequence[Tensor]) -> Tensor:
    """y of the reference on x [B, T, C, H, W], from parameters as AttentionInAttentionFunction takes them and the
    statistics_of the passes."""
    gates = []
    for i, (weight, scale, shift) in enumerate(zip(*[iter(parameters)] * 3, strict=True)):
        mean, var, _ = statistics[i][0].split(1)
        norm = Norm(scale, shift, mean, var, training=plan.batch[i], eps=plan.eps[i])
        if plan.groups[i]:
            norm = norm._replace(process_group=resolve(plan.groups[i]))
        gates.append(Gate(weight, norm))
    return attention_in_attention(x, plan.unit, gates)[0]
