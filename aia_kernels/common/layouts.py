"""Views of x as its layer sees it. x is copied where no kernel fits its strides, or where it is a view of the negative
of what is stored (torch.Tensor.is_neg).

A function settles the layout of its input when it is called. A registered operator settles it once more when it runs: a
recorded program may get inputs with other strides than it was recorded with, and tracers leave out a copy that did
nothing then.
"""

from __future__ import annotations

import array
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import maps
from .tracing import is_symbolic, needs_reference


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, contiguous and no views of negatives; None stays None."""
    return [None if t is None else t.contiguous().resolve_neg() for t in tensors]


def stored_as(grad_y: Tensor, x: Tensor) -> Tensor:
    """grad_y with the strides of x: a gradient may be expanded (that of a sum), without memory or in another layout.
    Where only strides of axes of one differ, a view will do."""
    without_memory = not torch.compiler.is_compiling() and grad_y._is_zerotensor()  # compilers have none
    if not without_memory and grad_y.stride() == x.stride():
        return grad_y.resolve_neg()
    if not without_memory and _may_be_viewed(grad_y) and _same_but_for_axes_of_one(grad_y, x):
        return grad_y.resolve_neg().as_strided(x.shape, x.stride())
    return torch.empty_like(x).copy_(grad_y)


def _may_be_viewed(t: Tensor) -> bool:
    """Whether as_strided is the same as a view: nothing follows it or stands for another tensor."""
    return type(t) is Tensor and not (t.requires_grad or is_symbolic() or needs_reference())


def _same_but_for_axes_of_one(t: Tensor, x: Tensor) -> bool:
    strides = zip(t.shape, t.stride(), x.stride(), strict=True)
    return t.shape == x.shape and all(size == 1 or own == wanted for size, own, wanted in strides)


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The axes of a tensor from the outermost in memory to the innermost. Of several that it may be, that of
    contiguous, or of channels_last."""
    axes = tuple(range(t.ndim))
    if t.is_contiguous():
        return axes
    if t.ndim > 2 and t.movedim(1, -1).is_contiguous():
        return (0, *axes[2:], 1)
    return tuple(sorted(_by_strides(t), key=lambda axis: t.shape[axis] > 1))


def _by_strides(t: Tensor) -> list[int]:
    """The axes of a tensor, the outermost first, in the order in which torch's elementwise operators store what they
    make of it: sorted by strides, where an axis along which it is expanded is neither above nor below another."""
    found = [*reversed(range(t.ndim))]
    for i in range(1, len(found)):
        moved = i
        for j in reversed(range(i)):
            inner, outer = ((t.stride(axis), t.shape[axis]) for axis in (found[j], found[moved]))
            if inner[0] and outer[0] and inner > outer:
                found[j], found[moved] = found[moved], found[j]
                moved = j
            elif inner[0] and outer[0] and inner[0] < outer[0]:
                break
    return found[::-1]


def in_order(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor itself if its axes lie so in memory, as of memory_order, and densely; else a copy of which they do.
    Axes of one get the strides that they would have in a new tensor: torch's convolutions and norms go by them."""
    turned = order != tuple(range(t.ndim))
    moved = t.permute(order) if turned else t
    if moved.is_contiguous() and 1 not in t.shape:
        return t
    moved = moved.contiguous().view(moved.shape)
    return moved.permute([order.index(i) for i in range(t.ndim)]) if turned else moved


#: The order of axes in which a map [B, C, H, W] in channels_last is stored, as in_order takes it.
CHANNELS_LAST = 0, 2, 3, 1


def with_exchanged(y: Tensor, x: Tensor) -> Tensor:
    """y, shaped as x, with its last two axes exchanged in memory where x is a dense tensor in which they are; else
    itself. Sizes and strides may be symbols, which nothing can be sorted by."""
    turned = x.mT
    if turned.is_contiguous():
        return y.mT.contiguous().mT
    if turned.movedim(1, -1).is_contiguous():
        return y.mT.movedim(1, -1).contiguous().movedim(-1, 1).mT
    return y


def suggests_channels_last(weight: Tensor) -> bool:
    """Whether a convolution with this weight writes channels_last whatever its input is. A kernel of one is contiguous
    and channels_last alike: its strides tell."""
    channels = weight.shape[1] if weight.ndim > 3 else 1
    return channels > 1 and weight.stride(1) == 1 and weight.stride(-1) == channels


def stored_for(y: Tensor, storage: str, weight: Tensor | None) -> Tensor:
    """y [B, C, H, W] "contiguous", or "as weights": contiguous unless a convolution with this weight writes
    channels_last."""
    if storage == "as weights" and weight is not None and suggests_channels_last(weight):
        return in_order(y, CHANNELS_LAST)
    return in_order(y, (0, 1, 2, 3))


def unviewed(y: Tensor) -> Tensor:
    """y itself, but no view of another tensor: autograd forbids to change in place a view that a Function returns."""
    return y.data


def as_clips(x: Tensor, num_segments: int) -> Tensor:
    """The view [B, T, C, H, W] of x, [B * T, C, H, W] or [B, C, T, H, W]."""
    if x.ndim != 4:
        return x.transpose(1, 2)
    frames, *sizes = x.shape
    return x.view(frames // num_segments, num_segments, *sizes)  # unflatten is written in Python


def as_input(y: Tensor, ndim: int) -> Tensor:
    """The inverse of as_clips: y [B, T, C, H, W] as [B * T, C, H, W] or [B, C, T, H, W]."""
    return y.flatten(0, 1) if ndim == 4 else y.transpose(1, 2)


def dense_clips(clips: Tensor) -> Tensor:
    """clips [B, T, C, H, W] themselves if they are stored in one of maps.ORDERS, else a copy that is."""
    if maps.storage_order(clips) is not None:
        return clips.resolve_neg()
    copy = clips.clone()  # keeps the order of the axes, channels last too
    return copy if maps.storage_order(copy) is not None else clips.contiguous()


def with_dense_clips(x: Tensor, num_segments: int) -> Tensor:
    """x itself, [B * T, C, H, W] or [B, C, T, H, W], if it is stored in one of maps.ORDERS, else a copy that is."""
    clips = as_clips(x, num_segments)
    dense = dense_clips(clips)
    return x if dense is clips else as_input(dense, x.ndim)


def as_tokens(x: Tensor) -> Tensor:
    """The view [B, N, C], N = H * W, of maps [B, C, H, W]; of points and volumes alike."""
    return x.flatten(2).mT


def as_maps(tokens: Tensor, x: Tensor) -> Tensor:
    """The inverse of as_tokens: the view [B, v, H, W] of tokens [B, N, v], the positions being those of x."""
    return tokens.mT.view(x.shape[0], -1, *x.shape[2:])  # unflatten is written in Python


def with_dense_maps(x: Tensor) -> Tensor:
    """x [B, C, H, W], of any number of positions' axes, itself if it is contiguous or channels_last, else a copy that
    is. The copy keeps the order of the axes where it can: that of some channels of channels_last is so too."""
    if _is_dense(x):
        return x.resolve_neg()
    copy = x.clone()
    return copy if _is_dense(copy) else x.contiguous()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def dense_tokens(x: Tensor) -> Tensor:
    """x [B, N, C] itself if it is stored densely, its features or (maps) its tokens contiguous, else a copy that is."""
    return x.resolve_neg() if x.is_contiguous() or x.mT.is_contiguous() else x.mT.contiguous().mT


def with_rows(x: Tensor) -> Tensor:
    """x [B, N, d] itself if features or tokens are contiguous and no two elements overlap, else a contiguous copy."""
    _, n, d = x.shape
    by_token = (d == 1 or x.stride(2) == 1) and (n == 1 or x.stride(1) >= d)
    by_feature = (n == 1 or x.stride(1) == 1) and (d == 1 or x.stride(2) >= n)
    return x.resolve_neg() if by_token or by_feature else x.contiguous()


def save(ctx: Any, x: Tensor, *kept: Tensor | None, parameters: Sequence[Tensor | None] = ()) -> None:
    """Keep the input of a layer and what came of it for a backward, and behind them parameters, which may come back
    with any strides: see saved.

    What came of x may be stored in its order, so the strides of x are kept too: as a tensor, since checkpointing takes
    tensors from a second forward, whose x a hook may have stored in another way than that of the first. Checkpointing
    is a hook itself: without one in force there is nothing to take the place of what is kept here.
    """
    ctx.strides = x.stride(), *(None if t is None else t.stride() for t in kept)
    replaced = not is_symbolic() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ctx.save_for_backward(_as_tensor(ctx.strides[0]) if replaced else None, x, *kept, *parameters)


def saved(ctx: Any) -> list[Tensor | None]:
    """What save kept, stored as it was then: hooks on saved tensors (offloading, compression) may give back the same
    values with other strides."""
    stored, *tensors = ctx.saved_tensors
    strides = ctx.strides
    if stored is not None and not is_symbolic():
        strides = tuple(stored.tolist()), *strides[1:]
    for i, stride in enumerate(strides):
        t = tensors[i]
        if t is not None and t.stride() != stride:
            tensors[i] = _restored(t, stride)
    return tensors


@functools.lru_cache(maxsize=1024)
def _as_tensor(stride: tuple[int, ...]) -> Tensor:
    """Made without an operator: a checkpoint replays those of its first forward, and the second may find it made."""
    with torch.inference_mode(False):
        return torch.frombuffer(array.array("q", stride), dtype=torch.int64)


def _restored(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    overlaps = any(step == 0 and size > 1 for size, step in zip(t.shape, stride, strict=True))
    if overlaps:  # an expanded parameter: no pass asks for its strides
        return t
    return torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
