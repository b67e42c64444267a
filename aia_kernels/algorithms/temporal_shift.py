"""The temporal shift as an autograd Function over one pass. Its transpose, and so its gradient, is itself reversed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.layouts import as_clips, as_input, unviewed, with_dense_clips
from ..reference import temporal_shift as reference


class TemporalShiftFunction(torch.autograd.Function):
    """y = apply(x, num_segments, fold, reverse, shift), differentiable as often as wanted.

    x is [B * T, C, H, W] or [B, C, T, H, W], stored in an order of maps.ORDERS and not empty; shift is a backend's pass
    (schemas.py: temporal_shift). Nothing is kept for the backward.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, num_segments: int, fold: int, reverse: bool, shift: Callable[[Tensor, int, bool], Tensor]
    ) -> Tensor:
        ctx.settings = num_segments, fold, not reverse, shift
        return unviewed(as_input(shift(as_clips(x, num_segments), fold, reverse), x.ndim))

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        dense = with_dense_clips(grad_y, ctx.settings[0])
        if torch._C._are_functorch_transforms_active():  # a vmap over grad_y
            num_segments, fold, reverse, _ = ctx.settings
            y = reference(as_clips(dense, num_segments), fold, reverse)
            return as_input(y, dense.ndim), None, None, None, None
        return TemporalShiftFunction.apply(dense, *ctx.settings), None, None, None, None
