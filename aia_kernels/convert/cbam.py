"""CBAM and its two gates in a graph: y = x * g_c(x) and y = x * g_s(x), however they are written.

    maximum and mean over positions -> linear, ReLU, linear, each -> sum -> sigmoid -> g_c
    maximum and mean over channels -> side by side -> convolution -> [BN] -> sigmoid -> g_s

A channel gate may also take the mean of both pools through its layers once. Pools may be a reduction over one axis
after another, an adaptive pool, or one as large as the map; the linear maps layers or 1x1 convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
_WHOLE_AXES = {
    f"{before}{kind}_pool{axes}d": now
    for before in ("adaptive_", "")
    for kind, now in (("avg", "mean"), ("max", "max"))
    for axes in (1, 2)
}
_REPEATED = "repeated"
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


class _Layers(NamedTuple):
    """The two linear maps of a channel gate, the pool before them, what stands between, all nodes but those of the
    pool, and the axes of the result."""

    first: Product
    second: Product
    pool: _Pool
    activation: str
    nodes: set[Node]
    axes: Sequence[Axis]


def find_gates(reader: Reader) -> Iterator[FoundGates | Missed]:
    """CBAM and its gates in a graph, the last first, and what comes close to them."""
    if not any(reader.operation(node) in ("sigmoid", *_OTHER_GATES) for node in reader.graph.nodes):
        return
    taken: set[Node] = set()
    search = _Search(reader)
    for node in reversed(reader.graph.nodes):
        if node in taken or reader.operation(node) != "mul" or reader.changes_in_place(node):
            continue
        try:
            found = search.gates(node)
        except _Differs as close:
            yield Missed(node, str(close), of_unit=True)
            continue
        if found is not None:
            taken |= {*found.nodes}
            yield found


class _Search:
    """Reads products of a tensor and a gate."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.axes: dict[Node, list[Axis]] = {}

    def _named(self, x: Node) -> list[Axis]:
        """The axes B, C, H and W of x: the same atoms whenever they are asked for, so that two axes of one length are
        told apart."""
        return self.axes.setdefault(x, named(self.reader.shapes[x], ""))

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
        before, source = self._down(source, _SPREAD)
        found: Any = self._spatial(source, x) or self._channel(source, x)
        if found is None:
            return None
        gate, nodes, axes = found
        if not self._is_spread(self._along([*path, *before], axes), x):
            return None
        if operation != "sigmoid":
            raise _Differs(f"{sigmoid.name} is a {operation}: a gate of CBAM is a sigmoid, as functional.cbam has it")
        return gate, {*nodes, *path, *before, sigmoid}

    def _is_spread(self, axes: Sequence[Axis] | None, x: Node) -> bool:
        """Whether each axis of a gate is that of x at which it stands, or is repeated along it."""
        if axes is None or len(axes) > 4:
            return False
        of_x = self._named(x)[4 - len(axes) :]
        return all(not found or found == expected for found, expected in zip(_kept(axes), _kept(of_x), strict=True))

    def _along(self, path: Sequence[Node], axes: Sequence[Axis] | None) -> Sequence[Axis] | None:
        """The axes after nodes that arrange or repeat a tensor, the last of them first; None where they are lost."""
        for node in reversed(path):
            if axes is None:
                return None
            operation = self.reader.operation(node)
            if operation in LAYOUT or operation == "getitem":
                axes = self._after(node, tuple(axes))
            elif operation in _SPREAD:
                axes = _repeated(axes, self.reader.shapes.get(node, ()))
            elif operation != "batch_norm":
                return None
        return axes

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

    def _spatial(self, node: Node, x: Node) -> tuple[SpatialGate, set[Node], Sequence[Axis] | None] | None:
        """The spatial gate before its sigmoid, its nodes and its axes."""
        path, node = self._down(node, LAYOUT)
        if self.reader.operation(node) in ("relu", *_OTHER_ACTIVATIONS):
            if self._spatial(self.reader.operand(node), x) is not None:
                raise _Differs(
                    f"{node.name} is a {self.reader.operation(node)} between the convolution and the sigmoid: CBAM's "
                    "spatial gate has none there, as functional.cbam has it"
                )
            return None
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
        b, _, h, w = self._named(x)
        return SpatialGate(node, norm, order), {*nodes, *path, node}, self._along(path, (b, (Atom(1),), h, w))

    def _side_by_side(self, node: Any, x: Node) -> tuple[str, set[Node]] | None:
        """In which order the maximum and the mean of x over channels are the features of a node, and its nodes."""
        path, joined = self._down(node, ("identity",))
        b, _, h, w = self._named(x)
        map_axes, kept_axes = (b, h, w), (b, (), h, w)
        operation = self.reader.operation(joined)
        if operation not in ("cat", "concat", "concatenate", "stack"):
            pool = self._pool(joined, x)
            if pool is None or _kept(pool.axes) != _kept(kept_axes) or [*pool.shares.values()] != [0.5, 0.5]:
                return None
            return "mix", {*pool.nodes, *path}
        parts, dim = (
            self.reader.argument(joined, 0, "tensors"),
            self.reader.argument(joined, 1, "dim", "axis", default=0),
        )
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (1, -3):
            return None
        pools = [pool for part in parts if (pool := self._pool(part, x)) is not None]
        expected = _kept(map_axes if operation == "stack" else kept_axes)
        kinds = [[*pool.shares.items()] for pool in pools if _kept(pool.axes) == expected]
        if sorted(kinds) != [[("max", 1.0)], [("mean", 1.0)]]:
            return None
        nodes = {node for pool in pools for node in pool.nodes}
        return f"{kinds[0][0][0]}, {kinds[1][0][0]}", {*nodes, *path, joined}

    def _channel(self, node: Node, x: Node) -> tuple[ChannelGate, set[Node], Sequence[Axis] | None] | None:
        """The channel gate before its sigmoid, its nodes and its axes."""
        addends, nodes = self._addends(node)
        layers = [layer for addend, path in addends if (layer := self._layers(addend, path, x)) is not None]
        if len(layers) != len(addends) or not 1 <= len(layers) <= 2:
            return None
        names = tuple(_NAMES.get(tuple(sorted(layer.pool.shares.items())), "") for layer in layers)
        if sorted(names) not in (["avg", "max"], ["avg"], ["max"], ["mix"]):
            return None
        first, *others = layers
        if any(_kept(layer.axes) != _kept(first.axes) for layer in others):
            return None
        if len({(one.weight, one.bias, two.weight, two.bias) for one, two, *_ in layers}) > 1:
            raise _Differs(
                f"{first.first.node.name} and {others[0].first.node.name} are different layers for the two pools of x: "
                "CBAM's channel gate takes both through the same, as functional.cbam does"
            )
        if first.activation != "relu":
            raise _Differs(
                f"{first.second.node.name} comes after a {first.activation}: the layers of CBAM's channel gate have a "
                "ReLU between them, as functional.cbam has it"
            )
        nodes |= {node for layer in layers for node in (*layer.pool.nodes, *layer.nodes)}
        return ChannelGate(first.first, first.second, names), nodes, first.axes

    def _addends(self, node: Any, after_it: tuple[Node, ...] = ()) -> tuple[list[tuple[Node, list[Node]]], set[Node]]:
        """What a node is the sum of, each with the nodes that arrange it afterwards; and all nodes from there on."""
        path, node = self._down(node, LAYOUT)
        path = [*after_it, *path]
        if self.reader.operation(node) != "add" or self.reader.argument(node, 2, "alpha", default=1) != 1:
            return [(node, path)], {*path}
        found, nodes = [], {*path, node}
        for operand in node.args[:2]:
            if operand == 0 and not isinstance(operand, Node):  # where Python's sum begins
                continue
            more, inside = self._addends(operand, tuple(path))
            found += more
            nodes |= inside
        return found, nodes

    def _layers(self, second_node: Node, path: list[Node], x: Node) -> _Layers | None:
        """The two linear maps of a pool of x of which the second is a node, and how a path arranges their result."""
        if (second := product_of(self.reader, second_node)) is None:
            return None
        between, activated = self._down(second.source, LAYOUT)
        activation = self.reader.operation(activated)
        if activation not in ("relu", *_OTHER_ACTIVATIONS):
            return None
        before, start = self._down(self.reader.operand(activated), LAYOUT)
        if (first := product_of(self.reader, start)) is None or (pool := self._pool(first.source, x)) is None:
            return None
        b, c, *_ = self._named(x)
        if [axis for axis in _kept(pool.axes) if axis] != [axis for axis in _kept((b, c)) if axis]:
            return None
        hidden = (Atom(first.out),)
        axes = self._along([*between, *before], _mapped(first, pool.axes, c, hidden))
        axes = self._along(path, _mapped(second, axes, hidden, c))
        if axes is None:
            return None
        nodes = {second_node, *between, activated, *before, start}
        return _Layers(first, second, pool, activation, nodes, axes)

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
                now = _OF_AXES.get(operation) or _WHOLE_AXES.get(operation)
                if now is None or kind not in ("", now):
                    return None
                kind = now
                path.append(node)
            node = reader.operand(node)
        axes: Any = tuple(self._named(x))
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
            alike = _kept(a.axes) == _kept(b.axes) and not a.shares.keys() & b.shares.keys()
            return _Pool(a.shares | b.shares, a.axes, (*a.nodes, *b.nodes, node)) if alike else None
        divides_a_number = operation == "div" and node.args[0] in numbers
        if operation == "add" or len(numbers) != 1 or len(pools) != 1 or divides_a_number:
            return None
        factor = float(numbers[0]) if operation == "mul" else 1.0 / numbers[0]
        (pool,) = pools
        return _Pool({kind: k * factor for kind, k in pool.shares.items()}, pool.axes, (*pool.nodes, node))

    def _after(self, node: Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
        """The axes of a tensor after a node that pools or arranges it."""
        reader = self.reader
        operation = reader.operation(node)
        if operation in ("getitem", "values"):
            found = axes if not self._adds_axes(node) else reshaped(axes, reader.shapes[node])
            return None if found is None else tuple(found)
        if operation in LAYOUT:
            found = after(reader, node, axes)
            return None if found is None else tuple(found)
        if operation in _WHOLE_AXES:
            last = 1 if operation.endswith("1d") else 2
            whole = self._takes_all(node, operation, axes[-last:]) if len(axes) > last else False
            return (*axes[:-last], *((Atom(1),) for _ in range(last))) if whole else None
        dims = reader.argument(node, 1, "dim", "axis")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, (list, tuple)) or not dims or not all(type(d) is int for d in dims):
            return None
        dims, keeps = {d % len(axes) for d in dims}, reader.argument(node, 2, "keepdim", "keepdims", default=False)
        return tuple((Atom(1),) if i in dims else axis for i, axis in enumerate(axes) if keeps or i not in dims)

    def _takes_all(self, node: Node, operation: str, axes: Sequence[Axis]) -> bool:
        """Whether a pool is as large as the last axes of its operand, whatever their lengths are, and adds nothing."""
        reader = self.reader
        if operation.startswith("adaptive"):
            taken = next((reader.shapes[n] for n in (node, *node.users) if n in reader.shapes), ())
            return tuple(taken[-len(axes) :]) == (1,) * len(axes)
        padding, dilation = reader.argument(node, 3, "padding", default=0), 1
        if "max" in operation:
            dilation = reader.argument(node, 4, "dilation", default=1)
        elif reader.argument(node, 6, "divisor_override") is not None:
            return False
        plain = {*_each(padding)} == {0} and {*_each(dilation)} == {1}
        lengths = [*self._lengths(reader.argument(node, 1, "kernel_size"))]
        lengths = lengths * len(axes) if len(lengths) == 1 else lengths
        return plain and len(lengths) == len(axes) and all(map(self._is_length, lengths, axes))

    def _lengths(self, kernel: Any) -> Iterator[tuple[Node, int] | int | None]:
        """The lengths of a kernel: numbers, and tensors with the axis of which the length is asked; None for others."""
        kernel = kernel.args[0] if self.reader.operation(kernel) == "Size" else kernel  # torch.Size, as Dynamo has it
        for given in _each(kernel):
            sizes, index = given, slice(None)
            if self.reader.operation(given) == "getitem":
                sizes, index = given.args[:2]
            if self.reader.operation(sizes) == "size":
                index = self.reader.argument(sizes, 1, "dim", default=index)
            t = self.reader.operand(sizes) if self.reader.operation(sizes) in ("size", "shape") else None
            if isinstance(given, int) or t not in self.reader.shapes or not isinstance(index, (int, slice)):
                yield given if isinstance(given, int) else None
                continue
            dims = range(len(self.reader.shapes[t]))[index]
            yield from ((t, dim) for dim in ([dims] if isinstance(dims, int) else dims))

    def _is_length(self, given: tuple[Node, int] | int | None, axis: Axis) -> bool:
        """Whether this is the length of an axis whenever the graph runs."""
        if given is None:
            return False
        if isinstance(given, int):
            return self.reader.fixed and given == math.prod(atom.size for atom in leaves(axis))
        t, dim = given
        if t in self.axes:  # otherwise one with the sizes of x, as x times another gate
            return leaves(self.axes[t][dim]) == leaves(axis)
        return self.reader.shapes[t][dim] == math.prod(atom.size for atom in leaves(axis))


#: The names of pools by their shares.
_NAMES = {
    (("mean", 1.0),): "avg",
    (("max", 1.0),): "max",
    (("max", 0.5), ("mean", 0.5)): "mix",
}


def _kept(axes: Iterable[Axis]) -> list[Axis]:
    """The parts of each axis that are longer than one and are not repeated."""
    return [tuple(atom for atom in leaves(axis) if atom.size != 1 and atom.name != _REPEATED) for axis in axes]


def _each(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _repeated(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
    """The axes of a tensor that is repeated to these sizes; None where an axis longer than one is."""
    before = [*[(Atom(1),)] * (len(sizes) - len(axes)), *axes]
    lengths = [math.prod(atom.size for atom in axis) for axis in before]
    if len(before) != len(sizes) or any(old not in (1, new) for old, new in zip(lengths, sizes, strict=True)):
        return None
    each = zip(before, lengths, sizes, strict=True)
    return [axis if old == new else (Atom(new, _REPEATED),) for axis, old, new in each]


def _mapped(product: Product, axes: Sequence[Axis] | None, of: Axis, to: Axis) -> list[Axis] | None:
    """The axes after a product that maps one axis to another; None where it is applied to another one."""
    if axes is None or product.order is not None or _kept([axes[product.axis]]) != _kept([of]):
        return None
    return [*axes[: product.axis], to, *axes[product.axis + 1 :]]


def _is_first(reader: Reader, node: Node) -> bool:
    """Whether a node takes the values of a maximum, and not its indices."""
    operation = reader.operation(node.args[0])
    of_maximum = operation == "max" or _WHOLE_AXES.get(operation) == "max"
    return of_maximum and (reader.operation(node) == "values" or node.args[1] == 0)


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
