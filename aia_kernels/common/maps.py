"""Geometry of contexts, gates and their packed maps. Pure bookkeeping: no arithmetic on values.

An activation is seen as x [B, T, C, H, W], whatever its storage. Pooling over an axis leaves a *map* with that axis
removed. A *context* (arXiv 2204.09303, section 3) is a set of pooled axes:

=========== ====== ================================ =======================================
context     value  pooled axes                      logical map shapes (the paper's order)
=========== ====== ================================ =======================================
CHANNEL     1      C                                [B, T, H, W]
SPACETIME   3      T, H, W                          [B, C, H, W], [B, T, C, W], [B, T, H, C]
=========== ====== ================================ =======================================

The value of a context is the number of its maps. All maps of one context travel in one *packed* tensor [B, M]
(pooled features: [B, 2, M], channel 0 the maximum, channel 1 the mean), M the sum of the map sizes, the maps one
after the other in the order of the table. Inside its segment a map is contiguous; the order of its axes is a
backend's choice, described by ``map_order``, an arrangement of the letters T, C, H, W from which the pooled letter is
struck out. The 3x3x3 convolution of a gate is then a plain three-dimensional convolution over the segment with the
axes of its weight arranged alike, so no pass needs to know which gate it works on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

NONE, CHANNEL, SPACETIME = 0, 1, 3

POOLED_AXES = {NONE: "", CHANNEL: "C", SPACETIME: "THW"}

#: Axes of a gate's convolution in the published code, by pooled axis. Note W: (T, H, C).
GATE_AXES = {"C": "THW", "T": "CHW", "H": "TCW", "W": "THC"}

#: Storage orders of x that every pass takes without a copy (the batch axis is always outermost).
ORDERS = ("TCHW", "THWC", "CTHW")

_AXIS = {"T": 1, "C": 2, "H": 3, "W": 4}

#: The axes of each of ORDERS, the innermost first.
_INWARD = tuple((order, (*(_AXIS[letter] for letter in reversed(order)), 0)) for order in ORDERS)


def storage_order(x: Tensor) -> str | None:
    """The order in which x [B, T, C, H, W] is stored densely, one of ORDERS, or None.

    Axes of length one fit every order; the first that fits is returned. Strides are asked before lengths, so that a
    program traced with a symbol for a length holds for a length of one too.
    """
    strides, sizes = x.stride(), x.shape
    for order, axes in _INWARD:
        expected = 1
        for axis in axes:
            if strides[axis] != expected and sizes[axis] != 1:
                break
            expected *= sizes[axis]
        else:
            return order
    return None


def lengths(sizes: Sequence[int]) -> dict[str, int]:
    """Axis lengths by letter, from the sizes [B, T, C, H, W]."""
    return {letter: sizes[axis] for letter, axis in _AXIS.items()}


def map_axes(context: int, map_order: str) -> list[str]:
    """Stored axis letters of each map of a context, e.g. SPACETIME in THWC: HWC, TWC, THC."""
    return [map_order.replace(axis, "") for axis in POOLED_AXES[context]]


def map_dims(sizes: Sequence[int], context: int, map_order: str) -> list[tuple[int, int, int]]:
    """Stored lengths of each map of a context."""
    length = lengths(sizes)
    return [tuple(length[letter] for letter in axes) for axes in map_axes(context, map_order)]


def packed_size(sizes: Sequence[int], context: int) -> int:
    """M: elements of all maps of a context, per clip."""
    _, t, c, h, w = sizes
    if context == CHANNEL:
        return t * h * w
    if context == SPACETIME:
        return h * w * c + t * w * c + t * h * c
    return 0


def index_dtype(sizes: Sequence[int], context: int) -> torch.dtype:
    """The smallest integer type that holds an index along every pooled axis of the context."""
    length = lengths(sizes)
    longest = max(length[axis] for axis in POOLED_AXES[context])
    return torch.uint8 if longest <= 256 else torch.int16 if longest <= 32768 else torch.int32


def unpack(packed: Tensor, sizes: Sequence[int], context: int, map_order: str) -> list[Tensor]:
    """Views of a packed tensor [B, M] or [B, 2, M], one per map, in the paper's axis order (GATE_AXES).

    Returns tensors [B, *axes] or [B, 2, *axes]; none of them owns memory.
    """
    lead = packed.shape[:-1]
    views, start = [], 0
    for pooled, axes, dims in zip(
        POOLED_AXES[context], map_axes(context, map_order), map_dims(sizes, context, map_order), strict=True
    ):
        segment = packed.narrow(-1, start, math.prod(dims)).view(*lead, *dims)
        start += math.prod(dims)
        views.append(segment.permute(*range(len(lead)), *(len(lead) + axes.index(a) for a in GATE_AXES[pooled])))
    return views


def pack(maps: Sequence[Tensor], context: int, map_order: str) -> Tensor:
    """The inverse of unpack: maps [B, *axes] or [B, 2, *axes] in the paper's axis order into one tensor."""
    segments = []
    for pooled, axes, m in zip(POOLED_AXES[context], map_axes(context, map_order), maps, strict=True):
        lead = m.ndim - 3
        segments.append(m.permute(*range(lead), *(lead + GATE_AXES[pooled].index(a) for a in axes)).flatten(lead))
    return torch.cat(segments, -1)


@functools.lru_cache
def _weight_axes(context: int, map_order: str, back: bool) -> list[tuple[int, ...] | None]:
    """How the axes of each gate weight of a context are permuted from the paper's order to the stored one, or back;
    None where they are in that order."""
    permutations: list[tuple[int, ...] | None] = []
    for pooled, axes in zip(POOLED_AXES[context], map_axes(context, map_order), strict=True):
        found, wanted = (axes, GATE_AXES[pooled]) if back else (GATE_AXES[pooled], axes)
        permutations.append(None if found == wanted else (0, 1, *(2 + found.index(a) for a in wanted)))
    return permutations


def weights_in_order(weights: Sequence[Tensor], context: int, map_order: str, back: bool = False) -> list[Tensor]:
    """Views of the gate weights of a context, each [1, 2, 3, 3, 3] in the paper's axis order, in stored order; or
    back."""
    permutations = _weight_axes(context, map_order, back)
    return [w if axes is None else w.permute(axes) for w, axes in zip(weights, permutations, strict=True)]
