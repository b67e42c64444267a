"""The registered operators of whole layers as plain ATen, for programs that must run where this package is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..algorithms.cbam import LEARNED
from ..common.layouts import stored_as
from ..reference import MLP, UNITS, Form, Gate, Norm, Weights
from . import attention_in_attention, cbam, external_attention, linear_attention, temporal_shift


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Give the specification of each operator that torch.export records for a layer, as a table of decompositions.

    ``program.run_decompositions(aia_kernels.decompositions())`` leaves only ATen operators in an exported program. To
    reach core ATen, add these to torch's own: ``table = torch.export.default_decompositions()``, then
    ``table.update(aia_kernels.decompositions())``. Operators that exchange statistics with a process group stay.

    Returns:
        A function of plain PyTorch for each operator.
    """
    return dict(_TABLE)


def _unit(x, weight, affine, fixed, unit, backend, batch, eps, groups, index=None):
    if any(groups):
        return NotImplemented
    gates = []
    for i, uses_batch in enumerate(batch):
        mean, var = (None, None) if uses_batch else fixed[i].split(1)
        gates.append(Gate(weight[i : i + 1], Norm(*affine[i].split(1), mean, var, training=uses_batch, eps=eps[i])))
    y, statistics = reference.attention_in_attention(x, UNITS[unit], gates)
    settings = unit, backend, batch, eps, groups, index
    _y, *kept, _statistics = attention_in_attention.fake_forward(x, weight, affine, fixed, *settings)
    return stored_as(y, x), *kept, statistics


def _double_normalize(logits, padding, group, eps, shards, backend):
    if shards:
        return NotImplemented
    _attention, mass = external_attention.fake_normalize(logits, padding, group, eps, shards, backend)
    return stored_as(reference.double_normalize(logits, group, eps, padding), logits), mass


def _external_attention(x, key, value, bias, padding, keep, group, eps, shards, scale, backend):
    if shards:
        return NotImplemented
    settings = padding, keep, group, eps, shards, scale, backend
    _o, *kept = external_attention.fake_attend(x, key, value, bias, *settings)
    o = reference.external_attention(x, key, value, bias, group, eps, padding, keep, scale)
    return o.contiguous(), *kept


def _external_attention_block(x, key, value, weight, bias, fixed, eps, batch, norm_eps, members, backend):
    if members:
        return NotImplemented
    settings = eps, batch, norm_eps, members, backend
    _y, *kept, _statistics = external_attention.fake_block(x, key, value, weight, bias, fixed, *settings)
    mean, var = (None, None) if batch else fixed.unbind(0)
    norm = Norm(weight, bias, mean, var, training=batch, eps=norm_eps)
    y, statistics = reference.external_attention_block(x, key, value, norm, eps)
    return stored_as(y, x), *kept, statistics


def _linear_attention(x, *arguments):
    *tensors, padding, feature, heads, eps, shards, _keeps_logits, _keeps_sums = arguments
    if shards:
        return NotImplemented
    _y, *kept = linear_attention.fake_forward(x, *arguments)
    y = reference.linear_attention(x, Weights(*tensors), Form(feature, heads, eps), padding)
    return stored_as(y, x), *kept


def _temporal_shift(x: Tensor, fold: int, reverse: bool, backend: str) -> Tensor:
    return stored_as(reference.temporal_shift(x, fold, reverse), x)


def _cbam(x, *rest):
    parameters, fixed = rest[:LEARNED], rest[LEARNED]
    pool_types, batch, eps, group, confounder, _backend = rest[LEARNED + 1 :]
    if group:
        return NotImplemented
    mean, var = (None, None) if fixed is None else fixed[0].split(1)
    norm = Norm(*parameters[5:], mean, var, training=batch, eps=eps)
    if not batch and fixed is None:  # no norm
        norm = None
    mlp = None if parameters[0] is None else MLP(*parameters[:4])
    gate = None if parameters[4] is None else Gate(parameters[4], norm)
    y, another, statistics = reference.cbam(x, mlp, gate, pool_types)
    _y, _confounder, *kept, empty = cbam.fake_forward(x, *rest)
    results = stored_as(y, x), stored_as(another, x) if confounder else x.new_empty(0)
    return *results, *kept, empty if statistics is None else statistics


# What a forward keeps for its backward comes from the fake implementation: uninitialized, and removed as unused, as
# the gradients of the decomposed program are those of ATen.
_TABLE = {
    attention_in_attention.unit_forward: _unit,
    external_attention.double_normalize_forward: _double_normalize,
    external_attention.external_attention_forward: _external_attention,
    external_attention.external_attention_block_forward: _external_attention_block,
    linear_attention.linear_attention_forward: _linear_attention,
    temporal_shift.temporal_shift_by: _temporal_shift,
    cbam.cbam_forward: _cbam,
}
