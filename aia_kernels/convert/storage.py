"""How results are stored: a fused call gives its result the order of axes that the network's own had.

Who writes a network sees the strides of its tensors: `view` takes some and raises for others. They follow from the
operand that comes first in a sum, from weights of convolutions in channels_last, from a `contiguous()` somewhere. So
they are not deduced but looked at: a forward runs on small inputs, these and the weights in both layouts. Where a
compiler has made a graph, it says what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node

from ..common.layouts import in_order, memory_order, suggests_channels_last
from . import behaviour

Order = tuple[int, ...]


class Run(NamedTuple):
    """What was seen of a graph in one run. marked: whether the weights were in channels_last. single: whether the
    inputs were of one sample. orders: the memory_order of each tensor."""

    marked: bool
    single: bool
    orders: dict[Node, Order]


class Storage(NamedTuple):
    """How a result is stored: in the order of x, whatever that is, or in one that follows from what was seen.

    seen: of each run the order of x, marked, single, and the order of the result.
    """

    as_given: bool
    seen: tuple[tuple[Order, bool, bool, Order], ...]

    def store(self, y: Tensor, x: Tensor, weights: Iterable[Tensor]) -> Tensor:
        """y with its axes in the order that it has for such an x and such weights."""
        if self.as_given:
            return in_order(y, memory_order(x))
        first = self.seen[0][-1]
        if all(order == first for *_, order in self.seen):
            return in_order(y, first)
        known = {tuple(key): order for *key, order in self.seen}
        last, single = any(map(suggests_channels_last, weights)), y.shape[0] == 1
        given = memory_order(x)
        alike = [order for order, *_ in self.seen if _shown(order, x) == _shown(given, x)]
        keys = ((order, last, of) for of in (single, False) for order in (given, *alike, tuple(range(x.ndim))))
        return in_order(y, next((known[key] for key in keys if key in known), first))


def _shown(order: Order, x: Tensor) -> Order:
    """An order without axes of one, whose place nobody sees."""
    return tuple(axis for axis in order if x.shape[axis] > 1)


def storage_of(runs: Iterable[Run], x: Node, end: Node) -> Storage | None:
    """How the result of a node is stored, for what was seen; None where nothing was."""
    seen = [
        ((run.orders[x], run.marked, run.single), run.orders[end])
        for run in runs
        if x in run.orders and end in run.orders
    ]
    if not seen:
        return None
    return Storage(all(key[0] == y for key, y in seen), tuple((*key, order) for key, order in dict(seen).items()))


class _Orders(Interpreter):
    """Runs a graph and keeps the memory_order of each result."""

    def __init__(self, module: nn.Module, graph: Graph):
        super().__init__(module, graph=graph)
        self.found: dict[Node, Order] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = memory_order(result)
        return result


def seen_in_runs(module: nn.Module, graph: Graph, shapes: Iterable[tuple[int, ...] | int]) -> list[Run]:
    """What runs of the graph of a module on inputs of these shapes show. The module stays as it is."""
    runs, several = [], [*shapes]
    one = [shape if isinstance(shape, int) else (1, *shape[1:]) for shape in several]
    for single, sizes in ((False, several), (True, one)):
        for copy, inputs, marked in _layouts(module, sizes):
            orders = _Orders(copy, graph)
            try:
                orders.run(*inputs)
            except Exception:  # a view that does not take these strides, as in the network itself
                continue
            runs.append(Run(marked, single, orders.found))
    return runs


def _layouts(module: nn.Module, shapes: Iterable[tuple[int, ...] | int]) -> Iterator[tuple[nn.Module, list[Any], bool]]:
    """Copies of a module with inputs of these shapes: both contiguous, the inputs with their channels innermost, the
    weights of convolutions in channels_last, and both. Before these, each of several inputs alone with its channels
    innermost, to tell which of them a result follows."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    weights = [p for p in module.parameters() if p.ndim in _CHANNELS_LAST]
    shapes = [*shapes]
    tensors = [i for i, shape in enumerate(shapes) if not isinstance(shape, int)]
    alone = [{i} for i in tensors] if len(tensors) > 1 else []
    for marked in (False, True) if weights else (False,):
        for turned in (*alone, set(), {*tensors}):
            copy = behaviour.blank(module, module.training)
            for p in copy.parameters() if marked else ():
                if p.ndim in _CHANNELS_LAST:
                    p.data = p.data.to(memory_format=_CHANNELS_LAST[p.ndim])
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
                inputs: list[Any] = [i if isinstance(i, int) else torch.zeros(i, dtype=dtype) for i in shapes]
                for i in turned:
                    inputs[i] = _with_channels_innermost(inputs[i])
                yield copy, inputs, marked


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _with_channels_innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else x


def known_run(graph: Graph) -> list[Run]:
    """What a compiler or an exporter has left in a graph, as one run."""
    orders = {}
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, Tensor) and value.layout is torch.strided:
            strides = [stride if isinstance(stride, int) else stride.node.hint for stride in value.stride()]
            sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
            if None not in (*strides, *sizes):
                orders[node] = memory_order(torch.empty_strided(sizes, strides, device="meta"))
    return [Run(False, False, orders)] if orders else []


def of_published(module: nn.Module, example: Tensor) -> str:
    """How a published layer on maps stores y: "as x"; "as weights", in channels_last where a weight is; or
    "contiguous"."""
    found = {}
    for copy, (x,), marked in _layouts(module, [tuple(example.shape)]):
        try:
            found[memory_order(x), marked] = memory_order(copy(x))
        except Exception:
            continue
    last = memory_order(_with_channels_innermost(example))
    if found.get((last, False), last) == last:
        return "as x"
    return "as weights" if found.get((last, True)) == last else "contiguous"
