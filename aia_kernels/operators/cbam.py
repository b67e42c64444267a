"""CBAM as two registered operators.

Arguments and results are those of forward and backward in algorithms/cbam.py. What is absent or not wanted is empty
among the results. fixed [1, 2] is the mean and the variance of BN, or None where it uses the batch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..algorithms import cbam as algorithm
from ..algorithms.cbam import LEARNED, Kept, Parameters, Plan, stored_gradients, typed
from ..algorithms.double_backward import backward_is_followed
from ..common.dtypes import accumulate_dtype
from ..common.layouts import contiguous, save, saved, with_dense_maps
from .registration import differentiate, register

_PARAMETERS = (
    "Tensor? weight_1, Tensor? bias_1, Tensor? weight_2, Tensor? bias_2, Tensor? conv, Tensor? scale, Tensor? shift"
)
_KEPT = (
    "Tensor channel_pooled, Tensor channel_argmax, Tensor hidden, Tensor channel, Tensor spatial_pooled, "
    "Tensor spatial_argmax, Tensor z, Tensor spatial, Tensor statistics"
)
_SETTINGS = "str[] pool_types, bool batch, float eps, str group, bool confounder, str backend"
_FORWARD = f"(Tensor x, {_PARAMETERS}, Tensor? fixed, {_SETTINGS}) -> (Tensor y, Tensor confounder, {_KEPT})"
_BACKWARD = (
    f"(Tensor grad_y, Tensor? grad_confounder, Tensor x, {_PARAMETERS}, {_KEPT}, {_SETTINGS}) -> (Tensor grad_x, "
    "Tensor grad_weight_1, Tensor grad_bias_1, Tensor grad_weight_2, Tensor grad_bias_2, Tensor grad_conv, "
    "Tensor grad_scale, Tensor grad_shift)"
)


def _plan(pool_types, batch, eps, group, confounder, backend) -> Plan:
    return Plan(backends.passes(backend, "cbam"), tuple(pool_types), batch, eps, group, confounder)


def _filled(x: Tensor, tensors) -> list[Tensor]:
    return [x.new_empty(0) if t is None else t for t in tensors]


def _forward(x, *rest):
    parameters, fixed, plan = rest[:LEARNED], rest[LEARNED], _plan(*rest[LEARNED + 1 :])
    of_bn = (None, None) if fixed is None else fixed[0].split(1)
    x = with_dense_maps(x)
    results, kept = algorithm.forward(plan, x, Parameters(*contiguous(*parameters), *of_bn))
    return *results, *(() if plan.confounder else (x.new_empty(0),)), *_filled(x, kept)


def _backward(grad_y, grad_confounder, x, *rest):
    parameters, kept, plan = rest[:LEARNED], rest[LEARNED : LEARNED + len(Kept._fields)], _plan(*rest[-6:])
    x = with_dense_maps(x)
    grad_y, grad_confounder = stored_gradients(grad_y, grad_confounder, x)
    found = Kept(*(t if t.numel() else None for t in contiguous(*kept)))
    of = x, Parameters(*contiguous(*parameters), None, None), found
    grad_x, grads = algorithm.backward(plan, grad_y, grad_confounder, *of)
    return grad_x, *_filled(x, grads)


def fake_forward(x, *rest):
    """What cbam_forward returns, without values."""
    weight_1, _, _, _, conv, _, _ = rest[:LEARNED]
    pool_types, _, _, _, confounder, _ = rest[LEARNED + 1 :]
    b, c, h, w = x.shape
    wide = x.new_empty((0,), dtype=accumulate_dtype(x.dtype))
    kept = [x.new_empty(0) for _ in Kept._fields]
    if weight_1 is not None:
        hidden = wide.new_empty((b, len(pool_types), weight_1.shape[0]))
        kept[:4] = wide.new_empty((b, 2, c)), x.new_empty((b, c), dtype=torch.int32), hidden, wide.new_empty((b, c))
    if conv is not None:
        argmax = x.new_empty((b, h, w), dtype=torch.int32)
        maps = (wide.new_empty((b, 1, h, w)) for _ in range(2))
        kept[4:] = wide.new_empty((b, 2, h, w)), argmax, *maps, wide.new_empty((1, 3))
    y = torch.empty_like(with_dense_maps(x))
    return y, torch.empty_like(y) if confounder else x.new_empty(0), *kept


def _fake_backward(grad_y, grad_confounder, x, *rest):
    dtype = accumulate_dtype(x.dtype)
    grads = [x.new_empty(0) if p is None else x.new_empty(p.shape, dtype=dtype) for p in rest[:LEARNED]]
    return torch.empty_like(with_dense_maps(x)), *grads


def _setup(ctx, inputs, output):
    x, *parameters = inputs[: 1 + LEARNED]
    ctx.settings = inputs[2 + LEARNED :]
    _y, _confounder, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    save(ctx, x, *parameters, *kept)


def _autograd(ctx, grad_y: Tensor | None, grad_confounder: Tensor | None, *_):
    if grad_y is None and grad_confounder is None:
        return (None,) * len(ctx.needs_input_grad)
    confounder = ctx.settings[4]
    x, *rest = saved(ctx)
    parameters, kept = rest[:LEARNED], rest[LEARNED:]
    grads = grad_y, grad_confounder if confounder else None
    if backward_is_followed():
        needs = ctx.needs_input_grad[: 1 + LEARNED]
        found = algorithm.followed(_plan(*ctx.settings), x, parameters, kept[-1], needs, grads)
    else:
        grads = stored_gradients(*grads, x)
        grad_x, *of_parameters = cbam_backward(*grads, x, *parameters, *kept, *ctx.settings)
        found = grad_x, *typed(of_parameters, parameters)
    return *found, *(None,) * (len(ctx.needs_input_grad) - 1 - LEARNED)


cbam_forward = register("cbam_forward", _FORWARD, _forward, fake_forward)
cbam_backward = register("cbam_backward", _BACKWARD, _backward, _fake_backward)
differentiate("cbam_forward", _setup, _autograd, "cbam_backward")
