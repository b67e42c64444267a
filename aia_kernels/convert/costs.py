"""Whether the fused calls in a rewritten forward pay, as "auto" counts on a CPU, by the sizes of its inputs alone.

A call of this package costs Python around its operators, and what it saves grows with its input. Where all calls of a
forward save less than they cost, the module's own forward is called: it costs what it did before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .. import backends
from ..modules import counts
from ..modules.linear_attention import efficient_flow_is_faster, linear_flow_is_faster
from .cbam import FoundGates
from .memories import FoundMemory
from .normalizations import Normalization
from .products import Product
from .regions import Region
from .spellings import Reader
from .units import FoundUnit


class Attention(NamedTuple):
    """External attention, its block, or the double normalization alone.

    input: the place of the input by which is counted. rows, products: the rows of the attention map and the
    multiplications that folding leaves out, for an element of it. slots: of a row. once: the multiplications of
    folding itself. calls: what the call costs, in choices.CALL_COST.
    """

    input: int
    rows: float
    slots: int
    products: float
    once: int
    calls: float

    def is_left(self, x: Tensor) -> bool:
        """Whether the network's own operators take no longer."""
        saved = int(self.products * x.numel()) - self.once
        return backends.plain_is_faster(x.device, int(self.rows * x.numel()), self.slots, saved, self.calls)


class Gates(NamedTuple):
    """A gate of CBAM or of Attention in Attention: what it saves is traffic of x.

    input: as of Attention. evaluation, step: what the call costs in either, in choices.FOLDING_COST; 0 where it always
    pays. of_channels: whether it is a channel gate alone, for which PyTorch's pools of channels that lie side by side
    take less time than a pass.
    """

    input: int
    evaluation: float
    step: float
    of_channels: bool

    def is_left(self, x: Tensor) -> bool:
        """As of Attention."""
        calls = self.step if torch.is_grad_enabled() else self.evaluation
        if self.of_channels and not torch.is_grad_enabled() and not x.is_contiguous():
            calls = math.inf
        return calls > 0 and backends.published_flow_is_faster(x.device, x.numel(), 0, calls)


class Memory(NamedTuple):
    """Attention by a memory per sample.

    input: as of Attention. channels, keys, values, heads: sizes of the projections. softmax: whether it is efficient
    attention.
    """

    input: int
    channels: int
    keys: int
    values: int
    heads: int
    softmax: bool

    def is_left(self, x: Tensor) -> bool:
        """As of Attention. In 16 bits the passes of efficient attention are no slower at any size."""
        if x.dtype not in (torch.float32, torch.float64):
            return False
        if self.softmax:
            return efficient_flow_is_faster(x, self.channels, self.keys, self.values, self.heads)
        return self.heads == 1 and linear_flow_is_faster(x, self.channels, self.keys)


Cost = Attention | Gates | Memory

#: Measured in networks whose forwards were rewritten, against the same before (docs/benchmarks.md): what calls.block,
#: calls.normalize, a gate of CBAM's channels alone and one gate of a unit cost.
BLOCK_CALLS, NORMALIZE_CALLS, CHANNEL_GATE_CALLS, ONE_GATE_CALLS = 2.0, 0.4, 0.3, 0.1


def _inputs(reader: Reader) -> list[Node]:
    return [node for node in reader.graph.nodes if node.op == "placeholder"]


def _place_of(reader: Reader, x: Node) -> int | None:
    """The place of the input that has as many elements as x; None where none has, so that none tells the size of x."""
    sizes = {node: math.prod(shape) for node, shape in reader.shapes.items()}
    wanted = sizes.get(x)
    return next((i for i, node in enumerate(_inputs(reader)) if wanted and sizes.get(node) == wanted), None)


def of_unit(reader: Reader, unit: FoundUnit) -> Cost | None:
    """That of a unit with one gate. With more, the network's own operators are too many to be as fast."""
    place = _place_of(reader, unit.x)
    return None if place is None or len(unit.gates) > 1 else Gates(place, ONE_GATE_CALLS, 0.0, False)


def of_gates(reader: Reader, found: FoundGates) -> Cost | None:
    """That of CBAM's channel gate alone. A spatial gate always pays."""
    place = _place_of(reader, found.x)
    if place is None or found.spatial is not None:
        return None
    return Gates(place, CHANNEL_GATE_CALLS, CHANNEL_GATE_CALLS, True)


def of_memory(reader: Reader, found: FoundMemory) -> Cost | None:
    """That of attention by a memory per sample."""
    place = _place_of(reader, found.x)
    if place is None or reader.shapes[found.x] != reader.shapes[_inputs(reader)[place]]:
        return None
    keys, values = (rows.stop - rows.start for rows in (found.key, found.value))
    channels = reader.shapes[found.x][found.feature]
    return Memory(place, channels, keys, values, found.form.heads, found.form.feature == "softmax")


def of_attention(reader: Reader, found: Normalization, region: Region | None) -> Cost | None:
    """That of external attention, or of the double normalization where no region is around it, counted by the largest
    input: the map grows as it does."""
    known = [(math.prod(reader.shapes[x]), i) for i, x in enumerate(_inputs(reader)) if x in reader.shapes]
    sizes = reader.shapes.get(found.end)
    if not known or sizes is None:
        return None
    elements, place = max(known)
    slots = sizes[found.slots]
    rows = math.prod(sizes) / slots / elements
    if region is None:
        return Attention(place, rows, slots, 0.0, 0, NORMALIZE_CALLS)
    per_token, once = _saved_by_folding(region, slots)
    calls = 1.0 if region.block is None else BLOCK_CALLS
    return Attention(place, rows, slots, per_token * rows / region.form.heads, once, calls)


def _saved_by_folding(region: Region, slots: int) -> tuple[int, int]:
    """The multiplications that folding leaves out for a token, and those that it takes; as calls.attend folds."""
    heads, inner, outer = region.form.heads, region.inner, region.outer
    if heads > 1 and region.form.of != "key" and region.form.apart:
        if region.form.of == "x" or inner is None or outer is None:
            return 0, 0
        first, last = _sizes(inner), _sizes(outer)
        saved = counts.products_saved(heads, slots, first, last, None)
        return (saved, slots * (math.prod(first) + math.prod(last))) if saved > 0 else (0, 0)
    columns, saved, once = heads * slots, 0, 0
    if inner is not None:
        w, d = _sizes(inner)
        saved, once = saved + w * d + columns * (w - d), once + columns * w * d
    if outer is not None:
        o, v = _sizes(outer)
        saved, once = saved + o * v + columns * (v - o), once + columns * o * v
    return saved, once


def _sizes(product: Product) -> tuple[int, int]:
    """[out, in] of its matrix."""
    out, of = product.sizes
    return (of, out) if product.transposed else (out, of)
