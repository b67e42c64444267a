"""The temporal shift: a copy whose source lies a frame ahead, a frame behind or in place, by channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import maps
from . import tiles
from .checks import check_activation

#: Elements of a program, 16 to a thread.
BLOCK = 1 << 20 if triton.knobs.runtime.interpret else 2048


@tiles.launched
def temporal_shift_kernel(
    x_ptr,
    y_ptr,
    T: tl.constexpr,
    FRAME: tl.constexpr,
    STRIDE_T: tl.constexpr,
    CYCLE: tl.constexpr,
    FOLD: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [T * FRAME] of a clip x, stored in any order: three predicated loads, of which each element takes one.

    STRIDE_T elements lie between frames. Position i is of frame i // STRIDE_T % T and of channel folds: i % CYCLE below
    FOLD comes from STEP (1 or -1) frames on, below 2 * FOLD from as many back. Conditions compare i % CYCLE with a
    constant, and not the channel i // (H * W), so that the compiler sees whole vectors of equal conditions. Reads
    1 |X|, writes 1 |X|.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    count: tl.constexpr = (T * FRAME + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    clip = (pid // count).to(tl.int64) * (T * FRAME)
    i = (pid % count).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < T * FRAME
    t = i // STRIDE_T % T
    channel = i % CYCLE
    ahead = channel < FOLD
    behind = (channel < 2 * FOLD) & (channel >= FOLD)
    last: tl.constexpr = T - 1 if STEP == 1 else 0
    first: tl.constexpr = 0 if STEP == 1 else T - 1
    x_ptr += clip
    y = tl.load(x_ptr + i, mask=valid & (channel >= 2 * FOLD), other=0)
    next_frame = tl.load(x_ptr + (i + STEP * STRIDE_T), mask=valid & ahead & (t != last), other=0)
    previous_frame = tl.load(x_ptr + (i - STEP * STRIDE_T), mask=valid & behind & (t != first), other=0)
    y = tl.where(ahead, next_frame, tl.where(behind, previous_frame, y))
    tl.store(y_ptr + clip + i, y, mask=valid)


def temporal_shift(x: Tensor, fold: int, reverse: bool) -> Tensor:
    """The shift of x [B, T, C, H, W], stored as x (schemas.py)."""
    check_activation("x", x)
    _, t, c, h, w = x.shape
    if not 0 <= fold <= c // 2:
        raise ValueError(f"fold must be between 0 and half of the {c} channels, got {fold}")
    order, frame = maps.storage_order(x), c * h * w
    stride_t = {"TCHW": frame, "THWC": frame, "CTHW": h * w}[order]
    # Elements that the channels before a fold's end take, and after how many the channels begin anew.
    per_channel = {"TCHW": h * w, "THWC": 1, "CTHW": t * h * w}[order]
    y = torch.empty_like(x)
    tiles.launch(
        temporal_shift_kernel,
        x,
        (x.shape[0] * triton.cdiv(t * frame, BLOCK),),
        x,
        y,
        T=t,
        FRAME=frame,
        STRIDE_T=stride_t,
        CYCLE=c * per_channel,
        FOLD=fold * per_channel,
        STEP=-1 if reverse else 1,
        WIDE=(t + 1) * frame >= 2**31,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y
