"""What every function on clips asks of its input."""

from __future__ import annotations

from torch import Tensor

from .common import check_integer, check_tensor


def check_clips(x: Tensor, num_segments: int) -> int:
    """Refuse what is not [B * num_segments, C, H, W] or [B, C, T, H, W] of a floating-point type; returns num_segments,
    which is not asked of the latter."""
    check_tensor("x", x)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B * T, C, H, W] or [B, C, T, H, W]")
    if x.ndim == 4:
        num_segments = check_integer("num_segments", num_segments)
        if num_segments < 1:
            raise ValueError(f"num_segments: got {num_segments}, expected at least 1")
        if x.shape[0] % num_segments:
            raise ValueError(
                f"x: got a batch of {x.shape[0]} frames, expected a multiple of num_segments = {num_segments}"
            )
    return num_segments
