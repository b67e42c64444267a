"""The temporal shift by a named backend as a registered operator. Its gradient is itself, reversed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common.layouts import dense_clips
from .registration import differentiate, register


def _shift(x: Tensor, fold: int, reverse: bool, backend: str) -> Tensor:
    return backends.passes(backend, "temporal_shift").temporal_shift(dense_clips(x), fold, reverse)


def _fake(x, fold, reverse, backend):
    return torch.empty_like(dense_clips(x))


def _setup(ctx, inputs, output):
    _, ctx.fold, ctx.reverse, ctx.backend = inputs


def _autograd(ctx, grad_y: Tensor):
    return temporal_shift_by(dense_clips(grad_y), ctx.fold, not ctx.reverse, ctx.backend), None, None, None


temporal_shift_by = register(
    "temporal_shift_by", "(Tensor x, int fold, bool reverse, str backend) -> Tensor", _shift, _fake
)
differentiate("temporal_shift_by", _setup, _autograd)
