"""Attention by a memory per sample in a graph: linear and efficient attention, however they are written.

Which tensors are projections of one x is read off. What is made of them is not: it is computed on random numbers in
float64, and compared with the formulas of this package for each number of heads, each feature map and each eps that
stands there. So any wording is found: einsum or matmul, heads in a loop or an axis, the sums in any order.

    x -> queries, keys and values, one product each or joined -> anything -> o -> [product] -> [factor] -> [+ x]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..reference import Form, Weights
from ..reference.linear_attention import linear_attention
from .axes import Atom, Axis, after, leaves, named
from .normalizations import Missed
from .products import Product, applied, product_of, shape_of
from .regions import LAYOUT, is_number, is_size, read_elsewhere
from .spellings import Reader

_CONTRACTIONS = ("matmul", "bmm", "einsum", "baddbmm")
_OTHER_FEATURES = ("elu", "relu", "exp", "celu", "selu", "sigmoid", "gelu", "silu", "square", "cos")
#: The largest region that is looked at, in nodes: heads in a loop make many.
_MOST = 400
#: Of the largest number of o: both are computed in float64, in another order. An eps of 1e-6 moves o by 1e-8.
_TOLERANCE = 1e-11
#: Much smaller and much larger projections, which show what clamps them, and how far o may be off. Small ones may have
#: an eps of 1e-12 beside their length, large ones lose digits where a softmax is written out.
_SCALES = {1e-8: 1e-3, 1e2: 1e-9, 1e6: 1e-6}


class Rows(NamedTuple):
    """Some of the features that a product makes."""

    product: Product
    start: int
    stop: int


class FoundMemory(NamedTuple):
    """What one call can compute.

    x: the tensor. end: the node with the result. nodes: all in between, that too. query, key, value: the projections.
    outer: the product behind o, or None. form: as of the reference. gamma: a node with one number, or None. factors: of
    o, and of what the product behind makes of it, beside gamma. averaged: whether o is divided by the number of tokens
    besides. residual: whether x is added. feature: the axis of the features of x. out: for each axis of the result, the
    axes of x that are joined in it.
    """

    x: Node
    end: Node
    nodes: tuple[Node, ...]
    query: Rows
    key: Rows
    value: Rows
    outer: Product | None
    form: Form
    gamma: Node | None
    factors: tuple[float, float]
    averaged: bool
    residual: bool
    feature: int
    out: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """That of the function which is called."""
        return "efficient_attention" if self.form.feature == "softmax" else "linear_attention"


class _Region(NamedTuple):
    """What lies between projections of one x and a node: the projections, and the nodes from there on."""

    roots: tuple[Product, ...]
    nodes: tuple[Node, ...]


class _Core(NamedTuple):
    """o, and how its axes are arranged. averaged: whether it is divided by the number of tokens, beside the factor.
    order: where the axes of samples, tokens and features stand in it."""

    query: Rows
    key: Rows
    value: Rows
    form: Form
    factor: float
    averaged: bool
    order: list[int]
    axes: list[Axis]
    features: Axis


def find_memories(reader: Reader) -> Iterator[FoundMemory | Missed]:
    """All of them in a graph, the last first, and what comes close."""
    products = {node: made for node in reader.graph.nodes if (made := product_of(reader, node)) is not None}
    if not products or not any(reader.operation(node) in _CONTRACTIONS for node in reader.graph.nodes):
        return
    taken: set[Node] = set()
    told: set[Node] = set()
    for node in reversed(reader.graph.nodes):
        if node in taken or reader.operation(node) not in (*_CONTRACTIONS, "mul", "div", "add", "sub", *LAYOUT, "cat"):
            continue
        region = _region(reader, products, node)
        if region is None or told & {*region.nodes}:
            continue
        found = _Search(reader, region, node).memory()
        if isinstance(found, FoundMemory):
            taken |= {*found.nodes}
            yield found
        elif found is not None:
            told |= {*region.nodes}
            yield found


def _region(reader: Reader, products: Mapping[Node, Product], end: Node) -> _Region | None:
    """What is between projections of one tensor and a node, if there is nothing but operations and sizes."""
    if end in products:
        return None
    roots: dict[Node, Product] = {}
    inside: set[Node] = set()
    waiting = [end]
    contractions = 0
    while waiting:
        node = waiting.pop()
        if node in inside or node in roots:
            continue
        if node in products:
            roots[node] = products[node]
            continue
        made = node in reader.shapes or not (is_size(reader, node) or is_number(reader, node))
        if node.op in ("placeholder", "get_attr", "output") or len(inside) > _MOST:
            return None
        if made:
            if reader.changes_in_place(node) or reader.operation(node) in ("", "conv", "batch_norm", "dropout"):
                return None
            contractions += reader.operation(node) in _CONTRACTIONS
            waiting += node.all_input_nodes
            inside.add(node)
        elif not is_size(reader, node):
            waiting += node.all_input_nodes
            inside.add(node)
    sources = {product.source for product in roots.values()}
    if contractions < 2 or len(sources) != 1 or not 1 <= len(roots) <= 3:
        return None
    ordered = [node for node in reader.graph.nodes if node in inside or node in roots]
    return _Region(tuple(roots[node] for node in ordered if node in roots), tuple(ordered))


class _Search:
    """Compares what is made of some projections with the formulas."""

    def __init__(self, reader: Reader, region: _Region, end: Node):
        self.reader, self.region, self.end = reader, region, end
        self.x = region.roots[0].source
        self.start_axes = named(reader.shapes[self.x], "x") if self.x in reader.shapes else []

    def memory(self) -> FoundMemory | Missed | None:
        """The call, or what comes close to one, or None."""
        shape = self.reader.shapes.get(self.x, ())
        axes = {product.axis for product in self.region.roots}
        if not 3 <= len(shape) <= 5 or len(axes) != 1 or any(p.order is not None for p in self.region.roots):
            return None
        (self.feature,) = axes
        if self.feature == 0 or self._is_a_map_of_tokens(shape):
            return None
        numbers, o = self._computed(0)
        if o is None or not bool(torch.isfinite(o).all()):
            return None
        core = self._core(numbers, o)
        if core is None:
            return self._other_feature()
        if not self._is_so_at_any_scale(core):
            told = "of numbers around one, but not of much smaller or larger ones: something clamps them"
            return Missed(self.end, f"{self.end.name} is linear or efficient attention {told}", of_unit=True)
        general = core if self.reader.fixed else self._for_any_number(core)
        if general is None:
            told = f"for {math.prod(self._lengths(0))} tokens, but not for other numbers of them"
            return Missed(self.end, f"{self.end.name} is linear or efficient attention {told}", of_unit=True)
        return self._described(general)

    def _is_a_map_of_tokens(self, shape: tuple[int, ...]) -> bool:
        """Whether something in between has as many numbers as there are pairs of tokens."""
        tokens = math.prod(shape[1:]) // shape[self.feature]
        found = (self.reader.shapes.get(node, ()) for node in self.region.nodes)
        return any(sizes.count(tokens) > 1 for sizes in found if tokens > 1)

    def _other_feature(self) -> Missed | None:
        """What is a memory of each sample by another feature map, as far as the names of operations tell."""
        words = [n.name for n in self.region.nodes if self.reader.operation(n) in _OTHER_FEATURES]
        if not words or len(self.region.roots) < 3:
            return None
        return Missed(
            self.end,
            f"{self.end.name} is made of projections of {self.x.name} as linear attention is, with another feature map "
            f"({', '.join(words)}): functional.linear_attention has (1, k / |k|) and softplus, "
            "functional.efficient_attention softmaxes over tokens and over features",
            of_unit=True,
        )

    def _computed(self, more: int, scale: float = 1.0) -> tuple[dict[Node, Tensor], Tensor | None]:
        """Random numbers of a scale for the projections, and what the region makes of them. more: added to each length
        of x but those of its samples and features."""
        generator, values = torch.Generator().manual_seed(0), {}
        numbers = {}
        for product in self.region.roots:
            shape = self._shape(product.node, more)
            numbers[product.node] = scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        values.update(numbers)
        try:
            with torch.no_grad(), torch.device("cpu"):
                for node in self.region.nodes:
                    if node not in values:
                        values[node] = self._value(node, values, more)
        except Exception:  # whatever an operation says of float64 or of what it is given: it is not read
            return numbers, None
        o = values[self.end]
        return numbers, o if isinstance(o, Tensor) and o.dtype == torch.float64 else None

    def _shape(self, node: Node, more: int) -> tuple[int, ...]:
        """The shape of a node where lengths of x are larger: those that it has at the same axes are too."""
        before = self.reader.shapes[self.x]
        return tuple(
            size + more if 0 < i < len(before) and i != self.feature and size == before[i] else size
            for i, size in enumerate(self.reader.shapes[node])
        )

    def _value(self, node: Node, values: dict[Node, Any], more: int) -> Any:
        def of(operand: Node) -> Any:
            if operand in values:
                return values[operand]
            if is_size(self.reader, operand):  # of a tensor that is not made here
                start: Any = operand.args[0]
                values[start] = values.get(start, torch.empty(self._shape(start, more), device="meta"))
            values[operand] = self._value(operand, values, more)
            return values[operand]

        args, kwargs = (map_arg(given, of) for given in (node.args, node.kwargs))
        if node.op == "call_module":
            return self.reader.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _assignments(self) -> Iterator[tuple[Rows, Rows, Rows]]:
        """Which of the features that were made may be queries, keys and values."""
        roots = self.region.roots
        parts = 4 - len(roots)
        for split in roots if len(roots) == 2 else roots[:1]:
            rows = []
            for product in roots:
                count = parts if product is split else 1
                if product.out % count:
                    return
                each = product.out // count
                rows += [Rows(product, i * each, (i + 1) * each) for i in range(count)]
            if len(rows) == 3:
                yield from itertools.permutations(rows)  # type: ignore[misc]

    def _eps(self) -> list[float]:
        """The numbers that stand there and may be an eps."""
        given = (a for node in self.region.nodes for a in (*node.args, *node.kwargs.values()))
        return sorted({0.0, *(a for a in given if isinstance(a, float) and 0.0 < a <= 0.1)})

    def _core(self, numbers: dict[Node, Tensor], o: Tensor) -> _Core | None:
        """The formula by which o was made, up to a factor."""
        samples = self.reader.shapes[self.x][0]
        for rows in self._assignments():
            query, key, value = (row.stop - row.start for row in rows)
            if query != key or samples * math.prod(self._lengths(0)) * value != o.numel():
                continue
            for heads in range(1, min(64, math.gcd(query, value)) + 1):
                if query % heads or value % heads:
                    continue
                features = tuple(map(Atom, (heads, value // heads)[heads == 1 :]))
                first = [*self.start_axes[:1], *self._tokens(), *((atom,) for atom in features)]
                arranged = [axes for axes in _arrangements(first, len(features)) if _lengths(axes) == tuple(o.shape)]
                for form, axes in itertools.product(self._forms(heads), arranged):
                    order = [first.index((atom,)) for axis in axes for atom in axis]
                    core = _Core(*rows, form, 1.0, False, order, axes, features)
                    if (factor := self._factor(core, numbers, o)) is not None:
                        return core._replace(factor=factor)
        return None

    def _is_so_at_any_scale(self, core: _Core) -> bool:
        """Whether the formula holds for small and large numbers too, as far as they do not overflow in the network's
        own words."""
        for scale, tolerance in _SCALES.items():
            numbers, o = self._computed(0, scale)
            if o is None or not bool(torch.isfinite(o).all()):
                continue
            factor = self._factor(core, numbers, o, tolerance=tolerance)
            if factor is None or not math.isclose(factor, core.factor, rel_tol=tolerance):
                return False
        return True

    def _factor(
        self, core: _Core, numbers: dict[Node, Tensor], o: Tensor, more: int = 0, tolerance: float = _TOLERANCE
    ) -> float | None:
        """The number by which o is larger than the formula; None where it is something else."""
        query, key, value = (
            numbers[r.product.node].movedim(self.feature, 1)[:, r.start : r.stop].flatten(2) for r in core[:3]
        )
        sizes = query.shape[0], *self._lengths(more), *_lengths((atom,) for atom in core.features)
        found = _formula(core.form, query, key, value).reshape(sizes).permute(core.order)
        if found.numel() != o.numel():
            return None
        found = found.reshape(o.shape)
        factor = ((found * o).sum() / found.square().sum()).item()
        error = (o - factor * found).abs().max().item()
        return _rounded(factor) if factor and error <= tolerance * o.abs().max().item() else None

    def _for_any_number(self, core: _Core) -> _Core | None:
        """The same with the factor that holds for any number of tokens, or None. Code that runs for one number alone is
        taken as it is."""
        numbers, o = self._computed(1)
        if o is None:
            return None if self._counts_tokens() else core
        factor = self._factor(core, numbers, o, 1)
        if factor is None or math.isclose(factor, core.factor, rel_tol=_TOLERANCE):
            return None if factor is None else core
        summed = core.factor * math.prod(self._lengths(0))
        if not math.isclose(factor * math.prod(self._lengths(1)), summed, rel_tol=_TOLERANCE):
            return None
        return core._replace(factor=_rounded(summed), averaged=True)

    def _forms(self, heads: int) -> Iterator[Form]:
        yield Form("softmax", heads)
        for feature, eps in itertools.product(("l2", "softplus"), self._eps()):
            yield Form(feature, heads, eps)

    def _described(self, core: _Core) -> FoundMemory | Missed | None:
        """The largest call around o."""
        reader, shape = self.reader, self.reader.shapes[self.x]
        best: FoundMemory | None = None
        node, nodes, axes, features = self.end, [*self.region.nodes], core.axes, core.features
        outer: Product | None = None
        gamma, factor, residual = None, 1.0, False
        while True:
            out = self._out(axes, features)
            if out is not None and _lengths((features,)) == (shape[self.feature],):
                of = (
                    *core[:3],
                    outer,
                    core.form,
                    gamma,
                    (core.factor, factor),
                    core.averaged,
                    residual,
                    self.feature,
                    out,
                )
                found = FoundMemory(self.x, node, tuple(nodes), *of)
                best = found if read_elsewhere(reader, found.nodes, node) is None else best
            users = [user for user in node.users if not is_size(reader, user)]
            if len(users) != 1 or residual or reader.changes_in_place(user := users[0]):
                break
            operation = reader.operation(user)
            product = product_of(reader, user)
            other = next((a for a in user.args[:2] if a is not node), None)
            if operation in LAYOUT and reader.operand(user) is node:
                followed = after(reader, user, axes)
                if followed is None:
                    break
                axes = followed
            elif product is not None and product.source is node and outer is None and gamma is None:
                if leaves(axes[product.axis]) != leaves(features) or core.form.feature != "softmax":
                    break
                outer = product
                axes, features = applied(product, axes)
            elif operation == "mul" and len(user.args) == 2 and gamma is None and self._is_a_number(other):
                gamma, factor = (gamma, factor * other) if isinstance(other, (int, float)) else (other, factor)
            elif operation == "add" and len(user.args) == 2 and other is self.x and not user.kwargs:
                if out != tuple((i,) for i in range(len(shape))):
                    break
                residual = True
            else:
                break
            node = user
            nodes.append(node)
        return best or self._unfit(core)

    def _unfit(self, core: _Core) -> Missed:
        told = read_elsewhere(self.reader, self.region.nodes, self.end)
        made, expected = core.value.stop - core.value.start, self.reader.shapes[self.x][self.feature]
        reason = told or f"its values have {made} features, or more axes than {self.x.name}, with {expected}"
        return Missed(self.end, f"{self.end.name} is linear or efficient attention, but {reason}", of_unit=True)

    def _is_a_number(self, given: Any) -> bool:
        if isinstance(given, (int, float)):
            return not isinstance(given, bool)
        shape = shape_of(self.reader, given)
        return isinstance(given, Node) and given.op in ("get_attr", "placeholder") and shape in ((1,), ())

    def _out(self, axes: list[Axis], features: Axis) -> tuple[tuple[int, ...], ...] | None:
        """For each axis of a result the axes of x that are joined in it; None where one is split."""
        whole = {leaves(axis): i for i, axis in enumerate(self.start_axes) if i != self.feature}
        whole[leaves(features)] = self.feature
        out = []
        for axis in axes:
            left, joined = leaves(axis), []
            while left:
                part = next((atoms for atoms in whole if left[: len(atoms)] == atoms), None)
                if part is None:
                    return None
                joined.append(whole[part])
                left = left[len(part) :]
            out.append(tuple(joined))
        return tuple(out) if sorted(i for axis in out for i in axis) == [*range(len(self.start_axes))] else None

    def _counts_tokens(self) -> bool:
        """Whether what is made may depend on the number of tokens by more than its shape."""
        reader = self.reader

        def asks(given: Any) -> bool:
            return isinstance(given, Node) and given not in reader.shapes and is_number(reader, given)

        return any(
            reader.operation(node) == "mean" or (reader.operation(node) not in LAYOUT and any(map(asks, node.args)))
            for node in self.region.nodes
            if node in reader.shapes
        )

    def _lengths(self, more: int) -> list[int]:
        """Those of the axes of tokens, each with so many more."""
        return [size + more for size in _lengths(self._tokens())]

    def _tokens(self) -> list[Axis]:
        return [axis for i, axis in enumerate(self.start_axes) if i not in (0, self.feature)]


def _arrangements(first: list[Axis], of_features: int) -> Iterator[list[Axis]]:
    """How o may be arranged: samples, tokens, and heads and features, of which the last are one axis or two."""
    batch, *tokens = first[: len(first) - of_features]
    parts = first[len(first) - of_features :]
    joined, flat = sum(parts, ()), sum(tokens, ())
    for token_axes in ([flat], tokens)[: len(tokens)]:
        yield [batch, joined, *token_axes]
        yield [batch, *token_axes, joined]
        if of_features == 2:
            heads, features = parts
            yield [batch, heads, features, *token_axes]
            yield [batch, heads, *token_axes, features]
            yield [batch, *token_axes, heads, features]
            yield [(*batch, *heads), features, *token_axes]
            yield [(*batch, *heads), *token_axes, features]


def _lengths(axes: Iterable[Axis]) -> tuple[int, ...]:
    return tuple(math.prod(atom.size for atom in axis) for axis in axes)


def _rounded(factor: float) -> float:
    """One for what is one up to rounding."""
    return 1.0 if abs(factor - 1.0) < _TOLERANCE else factor


def _formula(form: Form, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """o [B, N, heads * v] of queries, keys [B, heads * d, N] and values [B, heads * v, N], by the reference: x is what
    they are joined in, and its projections pick them."""
    x = torch.cat((key, query, value), 1).mT
    eye = torch.eye(x.shape[2], dtype=x.dtype, device="cpu")
    keys = 2 * key.shape[1]
    output = eye[keys:].unflatten(0, (form.heads, -1))  # where the values stand in x, o goes
    weights = Weights(eye[:keys], None, eye[keys:].unflatten(0, (form.heads, -1)), None, output.mT, None, None)
    return linear_attention(x, weights, form._replace(residual=False))[..., keys:]
