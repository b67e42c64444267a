"""The temporal shift by a named backend as a registered operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, ops
from ..layouts import dense_clips

temporal_shift_by = getattr(torch.ops, ops.NAMESPACE).temporal_shift_by.default


def _shift(x: Tensor, fold: int, reverse: bool, backend: str) -> Tensor:
    return backends.passes(backend, "temporal_shift").temporal_shift(dense_clips(x), fold, reverse)


def _setup(ctx, inputs, output):
    _, ctx.fold, ctx.reverse, ctx.backend = inputs


def _autograd(ctx, grad_y: Tensor):
    return temporal_shift_by(dense_clips(grad_y), ctx.fold, not ctx.reverse, ctx.backend), None, None, None


ops.implement("temporal_shift_by", _shift)
torch.library.register_autograd(f"{ops.NAMESPACE}::temporal_shift_by", _autograd, setup_context=_setup)
