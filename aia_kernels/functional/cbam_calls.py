"""CBAM as one operator for each direction (algorithms/cbam_layer.py), where the CPU has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..algorithms.cbam import Plan
from ..algorithms.cbam_layer import Buffers, CbamLayerFunction, forward, serves

FAMILY = "cbam"


class CbamRead(NamedTuple):
    """What an ordinary call reads of the submodules of CBAM (modules.submodules.read_cbam_at_once).

    parameters: as of algorithms.cbam_layer, those of an absent spatial gate None. buffers: as there. batch, eps: of the
    spatial gate's BN.
    """

    parameters: Sequence[Tensor | None]
    buffers: Buffers
    batch: bool
    eps: float


def at_once(x: Tensor, read: CbamRead, pool_types: Sequence[str], confounder: bool) -> list[Tensor] | None:
    """y, and the confounder if it is wanted, of an ordinary call, the running statistics moved; None where x, a size,
    the pools or the backend is not ordinary, which says nothing yet."""
    if x.ndim != 4 or read.parameters[0].ndim != 2 or x.numel() <= max(x.shape):  # BN may have a single value, or none
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    first, first_bias, second, second_bias, *_ = read.parameters
    hidden, c = first.shape
    if c != x.shape[1] or second.shape != (c, hidden) or not hidden or type(pool_types) not in (list, tuple):
        return None
    if (first_bias is not None and first_bias.shape != (hidden,)) or (
        second_bias is not None and second_bias.shape != (c,)
    ):
        return None
    if backends.chosen_backend() not in ("auto", "cpu") or backends.select(x.device, x.dtype, FAMILY) != "cpu":
        return None
    plan = Plan(backends.passes("cpu", FAMILY), tuple(pool_types), read.batch, read.eps, confounder=confounder)
    return called(plan, x, read.parameters, read.buffers)[:-1] if serves(plan, x, True) else None


def called(plan: Plan, x: Tensor, parameters: Sequence[Tensor | None], buffers: Buffers) -> list[Tensor]:
    """What cbam_propagate_ returns, by way of autograd where somebody wants gradients."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        y, confounder, (kept,) = CbamLayerFunction.apply(x, plan, buffers, *parameters)
        return [y, confounder, kept] if plan.confounder else [y, kept]
    return forward(plan, x, parameters, buffers, False)
