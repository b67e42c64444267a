"""CBAM and its two gates in a graph: y = x * g_c(x) and y = x * g_s(x), however they are written.

    maximum and mean over positions -> linear, ReLU, linear, each -> sum -> sigmoid -> g_c
    maximum and mean over channels -> side by side -> convolution -> [BN] -> sigmoid -> g_s

A channel gate may also take the mean of both pools through its layers once. Pools may be a reduction over one axis
after another, an adaptive pool, or one as large as the map; the linear maps layers or 1x1 convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Node
from torch.nn.modules.conv import Conv2d

from ..modules.cbam import is_map_convolution
from .axes import Atom, Axis, after, leaves, named, reshaped
from .normalizations import Missed
from .products import Product, product_of, shape_of
from .regions import LAYOUT, read_elsewhere
from .spellings import Reader

_SPREAD = (*LAYOUT, "expand", "expand_as", "repeat")
_OTHER_GATES = ("hardsigmoid", "tanh", "softmax", "softplus", "hardtanh", "clamp")
_OTHER_ACTIVATIONS = ("gelu", "silu", "hardswish", "tanh", "sigmoid", "elu", "leaky_relu", "relu6", "mish", "prelu")
_WHOLE_PLANE = {"adaptive_avg_pool2d": "mean", "adaptive_max_pool2d": "max", "avg_pool2d": "mean", "max_pool2d": "max"}
_OF_AXES = {"mean": "mean", "amax": "max", "max": "max"}


class ChannelGate(NamedTuple):
    """g_c: the two linear maps, and the names of its pools (functional.cbam)."""

    first: Product
    second: Product
    pools: tuple[str, ...]


class SpatialGate(NamedTuple):
    """g_s: the convolution and its norm, if it has one. order: how the maximum and the mean come to it: "max, mean",
    "mean, max", or "mix", their mean as one feature."""

    convolution: Node
    norm: Node | None
    order: str


class FoundGates(NamedTuple):
    """What one call can compute. x: what is recalibrated. end: the node with y. nodes: all in between, y too."""

    x: Node
    end: Node
    nodes: tuple[Node, ...]
    channel: ChannelGate | None
    spatial: SpatialGate | None

    @property
    def name(self) -> str:
        """That of the layer."""
        return "CBAM" if self.channel and self.spatial else "ChannelGate" if self.channel else "SpatialGate"


class _Differs(Exception):
    """What comes close to a gate is none, with the reason."""


class _Pool(NamedTuple):
    """k of each of the pools "max" and "mean" in a tensor, the axes of that tensor, and the nodes that make it."""

    shares: dict[str, float]
    axes: tuple[Axis, ...]
    nodes: tuple[Node, ...]


def find_gates(reader: Reader) -> Iterator[FoundGates | Missed]:
    """CBAM and its gates in a graph, the last first, and what comes close to them."""
    if not any(reader.operation(node) in ("sigmoid", *_OTHER_GATES) for node in reader.graph.nodes):
        return
    taken: set[Node] = set()
    for node in reversed(reader.graph.nodes):
        if node in taken or reader.operation(node) != "mul" or reader.changes_in_place(node):
            continue
        try:
            found = _Search(reader).gates(node)
        except _Differs as close:
            yield Missed(node, str(close), of_unit=True)
            continue
        if found is not None:
            taken |= {*found.nodes}
            yield found


class _Search:
    """Reads one product of a tensor and a gate."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def gates(self, end: Node) -> FoundGates | None:
        """Both gates of which this product is the end, or the one that it is by itself; None for another product."""
        if (outer := self._recalibrated(end)) is None:
            return None
        x, gate, nodes = outer
        found = self._found(x, end, nodes, gate)
        if isinstance(gate, SpatialGate):
            inner = self._recalibrated(x) if self._is_a_product(x) else None
            if inner is not None and isinstance(inner[1], ChannelGate):
                both = self._found(inner[0], end, {*nodes, *inner[2]}, gate)._replace(channel=inner[1])
                if self._other_reader(both) is None:
                    return both
        elif set(gate.pools) == {"avg"}:
            return None  # a squeeze and excitation, which is something else
        if (told := self._other_reader(found)) is not None:
            raise _Differs(f"{told}, and so {end.name} is no call of {found.name}")
        return found

    def _found(self, x: Node, end: Node, nodes: set[Node], gate: Any) -> FoundGates:
        inside = tuple(node for node in self.reader.graph.nodes if node in {*nodes, end})
        channel = gate if isinstance(gate, ChannelGate) else None
        return FoundGates(x, end, inside, channel, gate if channel is None else None)

    def _other_reader(self, found: FoundGates) -> str | None:
        """What reads something in between, or changes x."""
        for user in found.x.users:
            if self.reader.changes_in_place(user) and self.reader.operand(user) is found.x and not found.end < user:
                return f"{user.name} changes {found.x.name} in place"
        return read_elsewhere(self.reader, found.nodes, found.end)

    def _is_a_product(self, node: Node) -> bool:
        return self.reader.operation(node) == "mul" and not self.reader.changes_in_place(node)

    def _recalibrated(self, end: Node) -> tuple[Node, ChannelGate | SpatialGate, set[Node]] | None:
        """The tensor [B, C, H, W] that a product recalibrates, by which gate, and the nodes from there to the product,
        that too."""
        shapes = self.reader.shapes
        operands = [*end.args, *end.kwargs.values()]
        if len(operands) != 2 or not all(a in shapes for a in operands) or len(shapes.get(end, ())) != 4:
            return None
        for x, gate in (operands, operands[::-1]):
            if shapes[x] == shapes[end] and (found := self._gate(gate, x)) is not None:
                return x, found[0], {*found[1], end}
        return None

    def _gate(self, node: Node, x: Node) -> tuple[ChannelGate | SpatialGate, set[Node]] | None:
        """The gate that a node spreads over x, which it pools, and its nodes."""
        path, sigmoid = self._down(node, _SPREAD)
        operation, source = self.reader.operation(sigmoid), self.reader.operand(sigmoid)
        if operation not in ("sigmoid", *_OTHER_GATES) or source not in self.reader.shapes:
            return None
        b, c, h, w = self.reader.shapes[x]
        size = math.prod(self.reader.shapes[sigmoid])
        kept = [path[-1] if path else sigmoid, *path[:-1]]
        if any(self.reader.shapes.get(n, ())[-4:] not in _shapes_of_gates(b, c, h, w) for n in path[:1]):
            return None
        found: Any = None
        if size == b * h * w:
            found = self._spatial(source, x)
        if found is None and size == b * c:
            found = self._channel(source, x)
        if found is None:
            return None
        gate, nodes = found
        if operation != "sigmoid":
            raise _Differs(f"{sigmoid.name} is a {operation}: a gate of CBAM is a sigmoid, as functional.cbam has it")
        return gate, {*nodes, *kept, *path, sigmoid}

    def _down(self, node: Any, through: tuple[str, ...]) -> tuple[list[Node], Any]:
        """The nodes that only arrange or repeat a tensor, from a node against the flow, and what they start from."""
        path: list[Node] = []
        while isinstance(node, Node) and (self.reader.operation(node) in through or self._adds_axes(node)):
            path.append(node)
            node = self.reader.operand(node)
        return path, node

    def _adds_axes(self, node: Node) -> bool:
        """Whether an index leaves all elements in their order."""
        shapes, operand = self.reader.shapes, self.reader.operand(node)
        known = self.reader.operation(node) == "getitem" and node in shapes and operand in shapes
        return known and math.prod(shapes[operand]) == math.prod(shapes[node])

    def _spatial(self, node: Node, x: Node) -> tuple[SpatialGate, set[Node]] | None:
        """The spatial gate before its sigmoid."""
        path, node = self._down(node, LAYOUT)
        norm = None
        if self.reader.operation(node) == "batch_norm":
            norm = node
            more, node = self._down(self.reader.operand(node), LAYOUT)
            path += [norm, *more]
        if self.reader.operation(node) != "conv" or (pools := self._side_by_side(self.reader.operand(node), x)) is None:
            return None
        order, nodes = pools
        features = 1 if order == "mix" else 2
        if not _is_of_maps(self.reader, node, features):
            told = (
                "from the maximum and the mean over channels to one map, of an odd size, with zeros around, all plain"
            )
            raise _Differs(f"{node.name} takes a maximum and a mean as CBAM's spatial gate does, but is not {told}")
        return SpatialGate(node, norm, order), {*nodes, *path, node}

    def _side_by_side(self, node: Any, x: Node) -> tuple[str, set[Node]] | None:
        """In which order the maximum and the mean of x over channels are the features of a node, and its nodes."""
        path, joined = self._down(node, ("identity",))
        b, _, h, w = named(self.reader.shapes[x], "")
        operation = self.reader.operation(joined)
        if operation not in ("cat", "concat", "concatenate", "stack"):
            pool = self._pool(joined, x)
            kept = None if pool is None or len(self.reader.shapes[joined]) != 4 else _sizes(pool.axes)
            if kept != _sizes((b, h, w)) or pool is None or [*pool.shares.values()] != [0.5, 0.5]:
                return None
            return "mix", {*pool.nodes, *path}
        parts, dim = (
            self.reader.argument(joined, 0, "tensors"),
            self.reader.argument(joined, 1, "dim", "axis", default=0),
        )
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (1, -3):
            return None
        pools = [self._pool(part, x) for part in parts]
        kinds = [
            [*pool.shares.items()] for pool in pools if pool is not None and _sizes(pool.axes) == _sizes((b, h, w))
        ]
        if sorted(kinds) != [[("max", 1.0)], [("mean", 1.0)]]:
            return None
        nodes = {node for pool in pools if pool is not None for node in pool.nodes}
        return f"{kinds[0][0][0]}, {kinds[1][0][0]}", {*nodes, *path, joined}

    def _channel(self, node: Node, x: Node) -> tuple[ChannelGate, set[Node]] | None:
        """The channel gate before its sigmoid."""
        addends, nodes = self._addends(node)
        layers = [layer for addend in addends if (layer := self._layers(addend)) is not None]
        if len(layers) != len(addends) or not 1 <= len(layers) <= 2:
            return None
        pools = []
        b, c, *_ = named(self.reader.shapes[x], "")
        for first, _, _, inside in layers:
            pooled = first.source
            pool = self._pool(pooled, x)
            if pool is None or _sizes(pool.axes) != _sizes((b, c)):
                return None
            pools.append(pool.shares)
            nodes |= {*pool.nodes, *inside}
        names = tuple(_NAMES.get(tuple(sorted(shares.items())), "") for shares in pools)
        if sorted(names) not in (["avg", "max"], ["avg"], ["max"], ["mix"]):
            return None
        (first, second, activation, _), *others = layers
        held = {(one.weight, one.bias, other.weight, other.bias) for one, other, *_ in layers}
        if len(held) > 1:
            raise _Differs(
                f"{first.node.name} and {others[0][0].node.name} are different layers for the two pools of x: "
                "CBAM's channel gate takes both through the same, as functional.cbam does"
            )
        if activation != "relu":
            raise _Differs(
                f"{second.node.name} comes after a {activation}: the layers of CBAM's channel gate have a ReLU "
                "between them, as functional.cbam has it"
            )
        return ChannelGate(first, second, names), nodes

    def _addends(self, node: Any) -> tuple[list[Node], set[Node]]:
        """What a node is the sum of, and the nodes that add it up."""
        path, node = self._down(node, LAYOUT)
        if self.reader.operation(node) != "add" or self.reader.argument(node, 2, "alpha", default=1) != 1:
            return [node], {*path}
        found, nodes = [], {*path, node}
        for operand in node.args[:2]:
            if operand == 0 and not isinstance(operand, Node):  # where Python's sum begins
                continue
            more, inside = self._addends(operand)
            found += more
            nodes |= inside
        return found, nodes

    def _layers(self, node: Any) -> tuple[Product, Product, str, set[Node]] | None:
        """The two linear maps that end with a node, the activation between them, and their nodes."""
        path, end = self._down(node, LAYOUT)
        if (second := product_of(self.reader, end)) is None:
            return None
        between, activated = self._down(second.source, LAYOUT)
        activation = self.reader.operation(activated)
        if activation not in ("relu", *_OTHER_ACTIVATIONS):
            return None
        before, start = self._down(self.reader.operand(activated), LAYOUT)
        if (first := product_of(self.reader, start)) is None:
            return None
        return first, second, activation, {*path, end, *between, activated, *before, start}

    def _pool(self, node: Any, x: Node) -> _Pool | None:
        """A pool of x, or a sum of pools with factors."""
        reader = self.reader
        operation = reader.operation(node)
        if operation in ("add", "mul", "div") and node in reader.shapes:
            return self._combined(node, operation, x)
        path: list[Node] = []
        kind = ""
        while node is not x:
            if not isinstance(node, Node):
                return None
            if reader.operation(node) in LAYOUT or self._adds_axes(node):
                path.append(node)
            else:
                if reader.operation(node) in ("getitem", "values") and _is_first(reader, node):
                    path.append(node)
                    node = node.args[0]
                operation = reader.operation(node)
                now = _OF_AXES.get(operation) or _WHOLE_PLANE.get(operation)
                if now is None or kind not in ("", now):
                    return None
                kind = now
                path.append(node)
            node = reader.operand(node)
        axes: Any = tuple(named(reader.shapes[x], ""))
        for step in reversed(path):
            axes = self._after(step, axes)
            if axes is None:
                return None
        return _Pool({kind: 1.0}, axes, tuple(path)) if kind else None

    def _combined(self, node: Node, operation: str, x: Node) -> _Pool | None:
        if len(node.args) != 2 or self.reader.argument(node, 2, "alpha", default=1) != 1:
            return None
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        pools = [pool for a in node.args if isinstance(a, Node) and (pool := self._pool(a, x)) is not None]
        if operation == "add" and len(pools) == 2:
            a, b = pools
            alike = _sizes(a.axes) == _sizes(b.axes) and not a.shares.keys() & b.shares.keys()
            return _Pool(a.shares | b.shares, a.axes, (*a.nodes, *b.nodes, node)) if alike else None
        divides_a_number = operation == "div" and node.args[0] in numbers
        if operation == "add" or len(numbers) != 1 or len(pools) != 1 or divides_a_number:
            return None
        factor = float(numbers[0]) if operation == "mul" else 1.0 / numbers[0]
        (pool,) = pools
        return _Pool({kind: k * factor for kind, k in pool.shares.items()}, pool.axes, (*pool.nodes, node))

    def _after(self, node: Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
        """The axes of a tensor after a step of pooling."""
        reader = self.reader
        operation = reader.operation(node)
        if operation in ("getitem", "values"):
            found = axes if not self._adds_axes(node) else reshaped(axes, reader.shapes[node])
            return None if found is None else tuple(found)
        if operation in LAYOUT:
            found = after(reader, node, axes)
            return None if found is None else tuple(found)
        if operation in _WHOLE_PLANE:
            taken = next((reader.shapes[n] for n in (node, *node.users) if n in reader.shapes), ())
            is_sized = _tells_sizes(reader, node, operation)
            return (*axes[:-2], (Atom(1),), (Atom(1),)) if tuple(taken[-2:]) == (1, 1) and is_sized else None
        dims = reader.argument(node, 1, "dim", "axis")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or not dims or not all(type(d) is int for d in dims):
            return None
        dims, keeps = {d % len(axes) for d in dims}, reader.argument(node, 2, "keepdim", "keepdims", default=False)
        return tuple((Atom(1),) if i in dims else axis for i, axis in enumerate(axes) if keeps or i not in dims)


#: The names of pools by their shares.
_NAMES = {
    (("mean", 1.0),): "avg",
    (("max", 1.0),): "max",
    (("max", 0.5), ("mean", 0.5)): "mix",
}


def _shapes_of_gates(b: int, c: int, h: int, w: int) -> tuple[tuple[int, ...], ...]:
    return (b, c, 1, 1), (b, 1, h, w), (b, c, h, w)


def _sizes(axes: Any) -> tuple[int, ...]:
    """The lengths of the parts of axes that are longer than one, in their order."""
    return tuple(atom.size for axis in axes for atom in leaves(axis) if atom.size != 1)


def _is_first(reader: Reader, node: Node) -> bool:
    """Whether a node takes the values of a maximum, and not its indices."""
    of_maximum = reader.operation(node.args[0]) in ("max", "adaptive_max_pool2d", "max_pool2d")
    return of_maximum and (reader.operation(node) == "values" or node.args[1] == 0)


def _tells_sizes(reader: Reader, node: Node, operation: str) -> bool:
    """Whether a pool is as large as the map whatever the map is: by its kind, by the sizes that it is given, or as the
    whole graph is of these sizes."""
    if operation.startswith("adaptive"):
        return True
    given = reader.argument(node, 1, "kernel_size")
    given = given if isinstance(given, (list, tuple)) else (given,)
    of_one_size = "val" in node.meta or "example_value" in node.meta
    return of_one_size or any(isinstance(size, Node) for size in given)


def _is_of_maps(reader: Reader, node: Node, features: int) -> bool:
    """Whether a convolution is that of a spatial gate: of an odd size, with zeros around, from so many features to one;
    a bias does no harm."""
    if (module := reader.module(node)) is not None:
        plain = isinstance(module, Conv2d) and is_map_convolution(module, with_bias=True)
        return plain and isinstance(module, Conv2d) and tuple(module.weight.shape[:2]) == (1, features)
    shape = shape_of(reader, reader.argument(node, 1, "weight"))
    if shape is None or len(shape) != 4 or shape[:2] != (1, features) or shape[2] != shape[3] or shape[2] % 2 == 0:
        return False
    of_any_kind = "transposed" in str(getattr(node.target, "_schema", ""))  # aten.convolution
    if of_any_kind and reader.argument(node, 6, "transposed"):
        return False

    def all_are(value: Any, expected: int) -> bool:
        if value == "same":
            return expected == shape[2] // 2
        return value == expected or (isinstance(value, (list, tuple)) and set(value) == {expected})

    settings = ((3, "stride", 1, 1), (4, "padding", 0, shape[2] // 2), (5, "dilation", 1, 1))
    return all(all_are(reader.argument(node, i, name, default=d), v) for i, name, d, v in settings)
