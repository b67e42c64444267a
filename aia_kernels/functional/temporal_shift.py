"""The temporal shift as a function: check, choose a path, call. The paths are those of Attention in Attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..algorithms.temporal_shift import TemporalShiftFunction
from ..common.autocast import no_autocast
from ..common.layouts import as_clips, as_input, stored_as, with_dense_clips
from ..common.tracing import is_traced, needs_reference
from ..operators.temporal_shift import temporal_shift_by
from ..reference import temporal_shift as reference
from . import sharded
from .checks import check_clips, check_integer

FAMILY = "temporal_shift"


def temporal_shift(x: Tensor, num_segments: int = 8, fold_div: int = 8) -> Tensor:
    """Shift a part of the channels by one frame in time (arXiv 1811.08383), in one pass.

    The first C // fold_div channels of a frame come from the next frame of its clip, as many again from the previous
    one, 0 where there is none, and the others stay.

    Args:
        x: [B * T, C, H, W] with T = num_segments, contiguous or channels_last, or [B, C, T, H, W], contiguous or
            channels_last_3d. Other strides cost a copy. float32, bfloat16, float16 or float64.
        num_segments: T, the frames of a clip. Not used where x has five axes.
        fold_div: At least 2; a share of 2 / fold_div of the channels moves.

    Returns:
        y, shaped and stored as x, in its type.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    num_segments, fold_div = check_clips(x, num_segments), check_integer("fold_div", fold_div)
    if fold_div < 2:
        raise ValueError(f"fold_div: got {fold_div}, expected at least 2: two parts of the channels move")
    if sharded.is_distributed(x):
        return sharded.temporal_shift(temporal_shift, x, num_segments, fold_div)
    if x.numel() == 0:
        return x.clone()
    fold = x.shape[1] // fold_div
    x = with_dense_clips(x, num_segments)
    backend = backends.select(x.device, x.dtype, FAMILY)
    if backend == "reference" or needs_reference():
        clips = as_clips(x, num_segments)
        with no_autocast(x):  # it would change the type of a concatenation
            return as_input(stored_as(reference(clips, fold), clips), x.ndim)
    if is_traced():
        return as_input(temporal_shift_by(as_clips(x, num_segments), fold, False, backend), x.ndim)
    shift = backends.passes(backend, FAMILY).temporal_shift
    if torch.is_grad_enabled() and x.requires_grad:
        return TemporalShiftFunction.apply(x, num_segments, fold, False, shift)
    return as_input(shift(as_clips(x, num_segments), fold, False), x.ndim)
