"""CBAM's algorithm, y = x g_c(x) g_s(x g_c), forward and backward, written once in terms of passes.

Forward (without one of the gates its lines fall away, and it is 1):

    P_c = pool over H, W of x          g_c = sigmoid(mlp(P_c))
    P_s = pool over C of x g_c         g_s = sigmoid(BN(conv(P_s)))         y = x g_c g_s

Backward, with U the transpose of a pool (the passes: schemas.py) and dA = dy g_s + U(dP_s), the gradient of A = x g_c:

    dg_s = sum over C of dy x g_c                       dP_s back through the spatial gate
    dg_c = sum over H, W of dy x g_s + x U(dP_s)        dP_c back through the channel gate
    dx = dA g_c + U(dP_c)

Both gates are known before the backward, so one pass over dy and x makes dg_s and the first part of dg_c; the second
part takes x alone. dA is as large as x and is never stored. Where the confounder x - y is wanted too (CaaM), dy is the
difference of both gradients, and that of the confounder joins dx.

The gates themselves are small: operators of PyTorch on [B, C] and on [B, 2, H, W], here with their transposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autocast import without_autocast
from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, save, saved, stored_as, unviewed
from ..common.process_groups import gather, joint_statistics, resolve
from ..reference import MLP, Gate, Norm, cbam
from .double_backward import backward_is_followed, gradients

#: Where the pools of a channel gate stand in pooled features, "mix" being the mean of both; others have no pass.
POOLS = {"max": (0,), "avg": (1,), "mix": (0, 1)}

#: Rows of the MLP's products beyond which those of PyTorch take over: they first copy the weights into panels, which as
#: many rows pay for.
MOST_ROWS = 32


class Plan(NamedTuple):
    """What is constant about a call.

    passes has those of schemas.CBAM_PASSES as attributes. pool_types: of POOLS, of the channel gate. batch: the spatial
    gate normalizes by the statistics of the batch. eps: added to its variance. group: the name of the process group
    that shares the statistics, or "". confounder: x - y is wanted too.
    """

    passes: Any
    pool_types: tuple[str, ...] = ("avg", "max")
    batch: bool = False
    eps: float = 0.0
    group: str = ""
    confounder: bool = False


class Parameters(NamedTuple):
    """Of both gates, in any type: the channel gate's MLP, where it has one, then of the spatial gate, where there is
    one, the weight [1, 2, k, k] of the convolution and of its BN, of one element each, the scale (1 if None) and the
    shift (0), and, where BN does not use the batch's, the mean (0) and the variance (1)."""

    weight_1: Tensor | None
    bias_1: Tensor | None
    weight_2: Tensor | None
    bias_2: Tensor | None
    conv: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    var: Tensor | None


#: Parameters that have a gradient.
LEARNED = len(Parameters._fields) - 2


class Kept(NamedTuple):
    """What is kept for the backward beside x, in accumulate_dtype but for the indices.

    Of the channel gate: the pooled features [B, 2, C], the index of each maximum [B, C], the MLP's hidden layer behind
    its ReLU [B, pools, hidden] and g_c [B, C]. Of the spatial gate: the pooled features [B, 2, H, W], the index of each
    maximum [B, H, W], the convolution's result z and g_s [B, 1, H, W], and BN's mean, variance and the share of one
    element in them, 1 / count or 0 where they are not the batch's [1, 3].
    """

    channel_pooled: Tensor | None
    channel_argmax: Tensor | None
    hidden: Tensor | None
    channel: Tensor | None
    spatial_pooled: Tensor | None
    spatial_argmax: Tensor | None
    z: Tensor | None
    spatial: Tensor | None
    statistics: Tensor | None


@without_autocast
def forward(plan: Plan, x: Tensor, parameters: Parameters, keeps: bool = True) -> tuple[list[Tensor], Kept]:
    """y and, where the plan says so, the confounder, on x [B, C, H, W], contiguous or channels_last and not empty.

    keeps: a backward follows; else fixed statistics of BN need not come out.
    """
    p, passes = _wide(parameters, x), plan.passes
    channel_pooled = channel_argmax = hidden = channel = spatial_pooled = spatial_argmax = z = statistics = spatial = (
        None
    )
    if p.weight_1 is not None:
        channel_pooled, channel_argmax = passes.cbam_pool_positions(x)
        hidden, channel = _channel_gate(plan, channel_pooled, p)
    if p.conv is not None:
        spatial_pooled, spatial_argmax = passes.cbam_pool_channels(x, channel)
        z = _convolve(passes, spatial_pooled, p.conv)
        if hasattr(passes, "cbam_spatial_gate") and not plan.group:
            spatial, statistics = passes.cbam_spatial_gate(z, p.scale, p.shift, p.mean, p.var, plan.eps, plan.batch)
        elif keeps or plan.batch:
            statistics = _statistics(plan, z, p)
            spatial = _spatial_gate(plan, z, *statistics[0].split(1)[:2], p)
        else:
            spatial = _spatial_gate(plan, z, *_fixed(z, p), p)
    results = passes.cbam_recalibrate(x, channel, spatial, plan.confounder)
    of_spatial = spatial_pooled, spatial_argmax, z, spatial, statistics
    return results, Kept(channel_pooled, channel_argmax, hidden, channel, *of_spatial)


@without_autocast
def backward(
    plan: Plan,
    grad_y: Tensor,
    grad_confounder: Tensor | None,
    x: Tensor,
    parameters: Parameters,
    kept: Kept,
    needs_x: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, None where it is not needed, and of the LEARNED parameters, None for absent ones, in
    accumulate_dtype. The gradients of y and of the confounder are stored as x."""
    p, passes, grads = _wide(parameters, x), plan.passes, [None] * LEARNED
    spatial, grad_spatial_pooled, grad_channel_pooled = kept.spatial, None, None
    grad_channel, grad_spatial = passes.cbam_recalibrate_reduce(grad_y, grad_confounder, x, kept.channel, spatial)
    if spatial is not None:
        grad_spatial_pooled, *grads[4:] = _spatial_gate_backward(plan, grad_spatial, kept, p)
    if kept.channel is not None:
        if spatial is not None:
            through_spatial = passes.cbam_unpool_reduce(x, grad_spatial_pooled, kept.spatial_argmax)
            grad_channel = grad_channel + through_spatial
        grad_channel_pooled, *grads[:4] = _channel_gate_backward(plan, grad_channel, kept, p)
    grads = [None if q is None else grad for q, grad in zip(parameters, grads, strict=False)]
    if not needs_x:
        return None, grads
    of_channel = kept.channel, grad_channel_pooled, kept.channel_argmax
    of_spatial = spatial, grad_spatial_pooled, kept.spatial_argmax
    return passes.cbam_unpool(grad_y, grad_confounder, *of_channel, *of_spatial), grads


def _wide(parameters: Parameters, x: Tensor) -> Parameters:
    dtype = accumulate_dtype(x.dtype)
    return Parameters(*[p if p is None or p.dtype is dtype else p.to(dtype) for p in parameters])


def _selection(plan: Plan) -> list[tuple[int, ...]] | None:
    """Of which pooled features each pool is the mean, None where the pools are these as they are."""
    return None if sorted(plan.pool_types) == ["avg", "max"] else [POOLS[name] for name in plan.pool_types]


def _selected(pooled: Tensor, selection: list[tuple[int, ...]] | None) -> Tensor:
    """The pools [B, pools, C] of a channel gate of pooled features [B, 2, C]."""
    if selection is None:
        return pooled
    return torch.stack([pooled[:, places].mean(1) for places in selection], 1)


def _has_products(passes: Any, pooled: Tensor) -> bool:
    """Whether passes have the MLP as one, and take pools [B, pools, C] in less time than PyTorch's products."""
    return hasattr(passes, "cbam_channel_gate") and pooled.shape[0] * pooled.shape[1] <= MOST_ROWS


def _channel_gate(plan: Plan, pooled: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """The hidden layer [B, pools, hidden] and g_c [B, C]. The second map is linear: the pools are added before it."""
    pooled = _selected(pooled, _selection(plan))
    if _has_products(plan.passes, pooled):
        return plan.passes.cbam_channel_gate(pooled, *contiguous(*p[:4]))
    hidden = F.linear(pooled, p.weight_1, p.bias_1).relu()
    bias = None if p.bias_2 is None else p.bias_2 * hidden.shape[1]
    return hidden, F.linear(hidden.sum(1), p.weight_2, bias).sigmoid()


def _channel_gate_backward(plan: Plan, grad: Tensor, kept: Kept, p: Parameters) -> tuple[Tensor, ...]:
    """The gradients of the pooled features [B, 2, C], and of weight_1, bias_1, weight_2 and bias_2."""
    hidden, g, selection = kept.hidden, kept.channel, _selection(plan)
    pooled = _selected(kept.channel_pooled, selection)
    if _has_products(plan.passes, pooled):
        of_gate = pooled, hidden, g, *contiguous(p.weight_1, p.weight_2)
        grad_pooled, *grads = plan.passes.cbam_channel_gate_backward(grad, *of_gate)
    else:
        grad = grad * g * (1 - g)
        # As relu's own backward: what does not pass is 0, though the gradient be infinite or NaN.
        grad_hidden = torch.where(hidden <= 0, 0.0, (grad @ p.weight_2).unsqueeze(1))
        flat = grad_hidden.flatten(0, 1)
        grad_pooled = (flat @ p.weight_1).view_as(pooled)
        grads = [flat.mT @ pooled.flatten(0, 1), flat.sum(0), grad.mT @ hidden.sum(1), grad.sum(0) * hidden.shape[1]]
    if selection is not None:
        of_pools, grad_pooled = grad_pooled, torch.zeros_like(kept.channel_pooled)
        for i, places in enumerate(selection):
            grad_pooled[:, places] += of_pools[:, i : i + 1] / len(places)
    return grad_pooled, *grads


def _statistics(plan: Plan, z: Tensor, p: Parameters) -> Tensor:
    """BN's mean, variance and the share of one element in them, [1, 3]."""
    if not plan.batch:
        mean, var = _fixed(z, p)
        return torch.stack((mean, var, torch.zeros_like(mean)), 1)
    var, mean = torch.var_mean(z, correction=0)
    if plan.group:
        own = torch.stack((mean, var, torch.full_like(mean, z.numel()))).unsqueeze(0)
        return joint_statistics(gather(own, plan.group))
    return torch.stack((mean, var, torch.full_like(mean, 1 / z.numel()))).unsqueeze(0)


def _fixed(z: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """BN's mean and variance where they are not the batch's, [1] each."""
    return (z.new_zeros(1), z.new_ones(1)) if p.mean is None else (p.mean.reshape(1), p.var.reshape(1))


def _spatial_gate(plan: Plan, z: Tensor, mean: Tensor, var: Tensor, p: Parameters) -> Tensor:
    """g_s = sigmoid(scale (z - mean) / sqrt(var + eps) + shift)."""
    return torch.ops.aten.native_batch_norm(z, p.scale, p.shift, mean, var, False, 0.0, plan.eps)[0].sigmoid_()


def _spatial_gate_backward(plan: Plan, grad: Tensor, kept: Kept, p: Parameters) -> tuple[Tensor, ...]:
    """The gradients of the pooled features [B, 2, H, W], and of conv, scale and shift."""
    if hasattr(plan.passes, "cbam_spatial_gate_backward") and not plan.group:
        of_gate = kept.z, kept.spatial, kept.statistics, p.scale, plan.eps
        dz, grad_scale, grad_shift = plan.passes.cbam_spatial_gate_backward(grad, *of_gate)
        grad_pooled, grad_conv = _convolve_backward(plan.passes, dz, kept.spatial_pooled, p.conv)
        return grad_pooled, grad_conv, grad_scale, grad_shift
    du = torch.ops.aten.sigmoid_backward(grad, kept.spatial)
    mean, var, share = kept.statistics[0].split(1)
    if plan.group:
        dz, grad_scale, grad_shift = _shared_norm_backward(plan, du, kept.z, mean, var, share, p.scale)
    else:
        rstd = torch.rsqrt(var + plan.eps) if plan.batch else None
        of_norm = mean, var, mean, rstd, plan.batch, plan.eps, [True, True, True]
        scale = torch.ones_like(mean) if p.scale is None else p.scale
        dz, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(du, kept.z, scale, *of_norm)
    grad_pooled, grad_conv = _convolve_backward(plan.passes, dz, kept.spatial_pooled, p.conv)
    return grad_pooled, grad_conv, grad_scale, grad_shift


def _shared_norm_backward(
    plan: Plan, du: Tensor, z: Tensor, mean: Tensor, var: Tensor, share: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, and the gradients of scale and shift, where a process group shares the statistics:
    dz = scale rstd (du - mean of du - xhat mean of (du xhat)), the means as sums of all times the share of an element.
    """
    rstd = torch.rsqrt(var + plan.eps)
    xhat = (z - mean) * rstd
    own = torch.stack((du.sum(), (du * xhat).sum()))
    mean_du, mean_product = gather(own, plan.group).sum(0) * share
    dz = (du - mean_du - xhat * mean_product) * (rstd if scale is None else rstd * scale)
    return dz, own[1:], own[:1]


def _convolve(passes: Any, pooled: Tensor, weight: Tensor) -> Tensor:
    """z [B, 1, H, W], by the pass of a backend that has one."""
    if hasattr(passes, "cbam_convolve"):
        return passes.cbam_convolve(pooled, weight.contiguous())
    return F.conv2d(pooled, weight, padding=weight.shape[-1] // 2).contiguous()


def _convolve_backward(passes: Any, grad: Tensor, pooled: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the pooled features and of the weight."""
    if hasattr(passes, "cbam_convolve_backward"):
        return passes.cbam_convolve_backward(grad, pooled, weight.contiguous())
    pad = weight.shape[-1] // 2
    geometry = [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, True, False]
    grad_pooled, grad_weight, _ = torch.ops.aten.convolution_backward(grad, pooled, weight, None, *geometry)
    return grad_pooled.contiguous(), grad_weight


def formula(
    plan: Plan, x: Tensor, parameters: Sequence[Tensor | None], statistics: Tensor | None
) -> tuple[Tensor, ...]:
    """y and, where the plan says so, the confounder of the reference, from the LEARNED parameters and the statistics
    that BN used."""
    p, gate = Parameters(*parameters, None, None), None
    if p.conv is not None:
        mean, var, _ = statistics[0].split(1)
        group = resolve(plan.group) if plan.group else None
        gate = Gate(p.conv, Norm(p.scale, p.shift, mean, var, training=plan.batch, eps=plan.eps, process_group=group))
    mlp = None if p.weight_1 is None else MLP(*p[:4])
    y, confounder, _ = cbam(x, mlp, gate, plan.pool_types)
    return (y, confounder) if plan.confounder else (y,)


def typed(grads: Sequence[Tensor | None], parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients shaped and typed as their parameters, None for absent ones."""
    return [None if p is None else g.to(p.dtype).view_as(p) for g, p in zip(grads, parameters, strict=True)]


class CbamFunction(torch.autograd.Function):
    """CBAM with exact first and second derivatives. Call its apply.

    Gradients flow to x and the parameters. Running statistics are read, never written.

    Args:
        x: [B, C, H, W], contiguous or channels_last and not empty.
        plan: What is constant.
        fixed: The mean and the variance of Parameters.
        *parameters: The LEARNED fields of Parameters.

    Returns:
        y, the confounder or None, both stored as x, and a list of the statistics [1, 3] or None.
    """

    @staticmethod
    def forward(ctx, x, plan, fixed, *parameters):
        results, kept = forward(plan, x, Parameters(*parameters, *fixed))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        save(ctx, x, *parameters, *kept)
        # A list is passed through as it is: statistics are no part of the graph.
        return *map(unviewed, results), *(() if plan.confounder else (None,)), [kept.statistics]

    @staticmethod
    def backward(ctx, grad_y, grad_confounder, _statistics):
        plan = ctx.plan
        if grad_y is None and grad_confounder is None:
            return (None,) * (3 + LEARNED)
        x, *rest = saved(ctx)
        parameters, kept = rest[:LEARNED], Kept(*rest[LEARNED:])
        if backward_is_followed():
            needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]
            grad_x, *grads = followed(plan, x, parameters, kept.statistics, needs, (grad_y, grad_confounder))
            return grad_x, None, None, *grads
        grad_y, grad_confounder = stored_gradients(grad_y, grad_confounder, x)
        of = x, Parameters(*parameters, None, None), kept
        grad_x, grads = backward(plan, grad_y, grad_confounder, *of, ctx.needs_input_grad[0])
        return grad_x, None, None, *typed(grads, parameters)


def followed(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    statistics: Tensor | None,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of x and of the parameters that need one, by the formula, for those of y and the confounder."""
    given = [grad for grad in grads if grad is not None]
    needs = [need and a is not None for need, a in zip(needs, (x, *parameters), strict=True)]

    def results_of(x, *parameters):
        found = formula(plan, x, parameters, statistics)
        wanted = [result for result, grad in zip(found, grads, strict=False) if grad is not None]
        return wanted[0] if len(wanted) == 1 else torch.stack(wanted)

    return gradients(results_of, (x, *parameters), needs, given[0] if len(given) == 1 else torch.stack(given))


def stored_gradients(grad_y: Tensor | None, grad_confounder: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both gradients stored as x; where nothing came of y but of the confounder, that of y is 0."""
    grad_y = torch.zeros_like(x) if grad_y is None else stored_as(grad_y, x)
    return grad_y, None if grad_confounder is None else stored_as(grad_confounder, x)
