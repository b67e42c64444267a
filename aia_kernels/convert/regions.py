"""External attention around a double normalization: the products before and after it, and what their axes are.

    x -> [inner] -> key -> double normalization -> value -> [outer]

with axes moved, joined and split in between, heads among them, and a dropout on the map. Axes are followed from x on,
so it does not matter how a network arranges them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from torch.fx import Node

from .axes import Axis, after, leaves, named
from .calls import Form
from .normalizations import TYPE_INFORMATION, Normalization
from .products import Product, applied, product_of
from .spellings import Reader

LAYOUT = ("identity", "reshape", "permute")

#: What makes a number of numbers; of tensors too, some of them.
_NUMBERS = ("getitem", "mul", "floordiv", "mod", "add", "sub", "div", "pow", "neg", "prod", "int", "round", "floor")
_NUMBERS += ("ceil", "sqrt", "isqrt", "finfo", *TYPE_INFORMATION)


class Block(NamedTuple):
    """What follows a region where one call computes it too: activation(BN(o) + residual), or relu(o + x).

    norm: the call of the batch norm, or None. residual: what is added, or None. activation: its name, or None. nodes:
    from behind the region to the last of them.
    """

    norm: Node | None
    residual: Node | None
    activation: str | None
    nodes: tuple[Node, ...]


class Region(NamedTuple):
    """What one call can compute.

    x: where it starts. end: the node with its result. nodes: all in between, that with the result too. inner, key,
    value, outer: the products; the first and the last may be absent. dropout: a call, or None. form: how the axes are
    arranged. innermost: for each of the four products, whether its rows, and whether its columns, have the heads
    innermost. scale: what the logits are multiplied with. block: what follows, or None.
    """

    x: Node
    end: Node
    nodes: tuple[Node, ...]
    inner: Product | None
    key: Product
    value: Product
    outer: Product | None
    dropout: Node | None
    form: Form
    innermost: tuple[tuple[bool, bool], ...]
    scale: float
    block: Block | None = None


def find_region(reader: Reader, found: Normalization) -> Region | None:
    """The largest region around a double normalization that one call can compute."""
    if found.dtype is not None:
        return None
    for before, after_ in ((1, 1), (1, 0), (0, 1), (0, 0)):
        upward = _upward(reader, found, before)
        downward = _downward(reader, found, after_)
        if upward is None or downward is None:
            continue
        x, path, products = upward
        first = products[0]
        nearer = first.source, path[path.index(first.node) :], products
        for start in (upward, nearer) if first.source is not x else (upward,):
            if (region := _Walk(reader, found, *start, *downward).region()) is not None:
                return region
    return None


def _through(reader: Reader, node: Node, scaled: bool = False) -> tuple[list[Node], Node]:
    """The nodes that only arrange axes, or multiply with a number, from a node on against the flow, and what they
    arrange."""
    path = []
    while isinstance(reader.operand(node) if isinstance(node, Node) else None, Node) and (
        reader.operation(node) in LAYOUT or (scaled and _scale(reader, node) is not None)
    ):
        path.append(node)
        node = reader.operand(node)
    return path, node


def _scale(reader: Reader, node: Node) -> float | None:
    """The number with which a node multiplies a tensor, or None."""
    operation = reader.operation(node)
    if operation not in ("mul", "div") or len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or not number:
        return None
    return float(number) if operation == "mul" else 1.0 / number


def _upward(reader: Reader, found: Normalization, more: int) -> tuple[Node, list[Node], list[Product]] | None:
    """x, the nodes from x to the logits, and the products among them: the key and, where more is 1, one before it."""
    path, node = _through(reader, reader.operand(found.softmax), scaled=True)
    products: list[Product] = []
    for _ in range(1 + more):
        product = product_of(reader, node)
        if product is None:
            break
        rest, node = _through(reader, product.source, scaled=True)
        path += [product.node, *rest]
        products.insert(0, product)
    return (node, path[::-1], products) if len(products) == 1 + more else None


def _downward(reader: Reader, found: Normalization, more: int) -> tuple[list[Node], list[Product], Node | None] | None:
    """The nodes after a normalization up to its last product, the products among them, and the dropout."""
    node, path = found.end, []
    products: list[Product] = []
    dropout: Node | None = None
    while len(products) < 1 + more:
        data = [user for user in node.users if not is_size(reader, user)]
        if len(data) != 1:
            return None
        (user,) = data
        path.append(user)
        if reader.operation(user) == "dropout" and not products and not dropout:
            dropout = user
        elif (product := product_of(reader, user)) is not None and product.source is node:
            products.append(product)
        elif reader.operation(user) not in LAYOUT or reader.operand(user) is not node:
            return None
        node = user
    return path, products, dropout


def is_size(reader: Reader, node: Node) -> bool:
    """Whether a node asks for the sizes of a tensor alone, or for its type."""
    return reader.operation(node) in ("size", "shape", "dtype")


def is_number(reader: Reader, node: Node) -> bool:
    """Whether a node makes a size, or a number of sizes or of a type, and does nothing else."""
    made = is_size(reader, node) or reader.operation(node) in _NUMBERS
    return made and not reader.changes_in_place(node)


def is_arranged(reader: Reader, node: Node) -> bool:
    """Whether a node arranges the axes of a tensor, or repeats it, and does nothing else."""
    arranged = reader.operation(node) in (*LAYOUT, "expand", "repeat") and reader.module(node) is None
    return arranged and not reader.changes_in_place(node)


def read_elsewhere(reader: Reader, nodes: Iterable[Node], end: Node) -> str | None:
    """Why one call cannot stand in the place of nodes up to an end: a mode that is on at some of them, or a user
    outside; None if it can. Sizes and numbers made of them may be used inside alone; numbers made of other things stay
    where something outside uses them."""
    if not reader.in_one_mode(nodes):
        return "autocast or no_grad is on at a part of it alone"
    inside = set(nodes)

    def serves(node: Node) -> bool:
        if node in reader.shapes or not (is_size(reader, node) or is_number(reader, node)):
            return False
        return all(user in inside or serves(user) for user in node.users)

    def stays(node: Node) -> bool:
        number = node not in reader.shapes and is_number(reader, node)
        return number and all(given not in inside or stays(given) for given in node.all_input_nodes)

    for node in inside - {end}:
        for user in () if stays(node) else node.users:
            if user.op == "output":
                return f"the forward returns {node.name} as well"
            unused = not user.users and not reader.changes_in_place(user)
            if user not in inside and not unused and not serves(user):
                return f"{user.name} reads {node.name} as well"
    return None


class _Walk:
    """Follows the axes from x to the end, and reads off what they are."""

    def __init__(
        self,
        reader: Reader,
        found: Normalization,
        x: Node,
        up: list[Node],
        before: list[Product],
        down: list[Node],
        behind: list[Product],
        dropout: Node | None,
    ):
        self.reader, self.found, self.x, self.dropout = reader, found, x, dropout
        self.products = {p.node: p for p in (*before, *behind)}
        self.inner, self.key = (None, *before)[-2:]
        self.value, self.outer = (*behind, None)[:2]
        between = [found.softmax, *(n for n in reader.graph.nodes if n in found.inner), found.end]
        self.nodes = (*up, *between, *down)
        moved = _through(reader, found.numerator)[0][::-1]
        self.steps = [*up, *moved, found.end, *down]
        self.read: dict[Node, Axis] = {}  # the axis that each product contracts, and that it makes
        self.made: dict[Node, Axis] = {}

    def region(self) -> Region | None:
        if self.x not in self.reader.shapes or not self._is_closed():
            return None
        axes = self._follow()
        region = None if axes is None else self._read_off(axes)
        if region is None or axes is None or (block := self._block(region, axes)) is None:
            return region
        return region._replace(block=block)

    def _block(self, region: Region, axes: list[Axis]) -> Block | None:
        """The batch norm, residual and activation that follow a region, as far as one call computes them too."""
        form, made = region.form, self.made[(self.outer or self.value).node]
        positions = tuple(range(2, len(self.start)))
        if (form.batch, form.feature, form.tokens, form.heads) != ((0,), 1, positions, 1) or self.dropout is not None:
            return None
        expected = [leaves(axis) for axis in (self.start[0], made, *self.start[2:])]
        node, block, found = region.end, Block(None, None, None, ()), None
        followed: list[Axis] | None = axes
        while positions and self._only_sizes_of_x(node):
            users = [user for user in node.users if not is_size(self.reader, user)]
            if len(users) != 1 or followed is None:
                break
            arranged, (user,) = [leaves(axis) for axis in followed], users
            if self.reader.operation(user) in LAYOUT and self.reader.operand(user) is node:
                followed = None if block.residual or block.activation else after(self.reader, user, followed)
                block = block._replace(nodes=(*block.nodes, user))
            elif (joined := self._joined(block, node, user)) is not None and (
                arranged == expected or (joined.norm is user and arranged[1] == leaves(made))
            ):
                block = joined
            else:
                break
            node = user
            done = followed is not None and [leaves(axis) for axis in followed] == expected
            whole = block.norm or (block.residual is self.x and block.activation == "relu")
            if done and whole and self.reader.in_one_mode((*region.nodes, *block.nodes)):
                found = block
        return found

    def _joined(self, block: Block, node: Node, user: Node) -> Block | None:
        """A block that ends with a node, with what uses that; None where no call computes both."""
        reader, nodes = self.reader, (*block.nodes, user)
        operation = reader.operation(user)
        if block.activation:
            return None
        if operation in ("relu", "silu") or (
            operation == "gelu" and reader.argument(user, 1, "approximate", default="none") == "none"
        ):
            return block._replace(activation=operation, nodes=nodes)
        if block.residual:
            return None
        if operation == "batch_norm" and block.norm is None:
            return block._replace(norm=user, nodes=nodes)
        if operation == "add" and len(user.args) == 2 and not user.kwargs:
            other = next((a for a in user.args if a is not node), None)
            same = other in reader.shapes and reader.shapes[other] == reader.shapes.get(node)
            if same and not (reader.changes_in_place(user) and user.args[0] is other):
                return block._replace(residual=other, nodes=nodes)
        return None

    def _only_sizes_of_x(self, node: Node) -> bool:
        """Whether the sizes that are asked of a node are those of x."""
        asked = any(is_size(self.reader, user) for user in node.users)
        return not asked or self.reader.shapes.get(node) == self.reader.shapes[self.x]

    def _is_closed(self) -> bool:
        """Whether nothing else needs a result from inside, but for sizes that x has as well; and x stays what it is.
        What arranges x before the first product may be used by others, and stays what it is too."""
        inside, shapes = set(self.nodes), self.reader.shapes
        views = [self.x, *itertools.takewhile(lambda node: node not in self.products, self.nodes)]
        changes = (user for node in views for user in node.users if self.reader.operand(user) is node)
        if any(map(self.reader.changes_in_place, changes)) or not self.reader.in_one_mode(self.nodes):
            return False
        for node in self.nodes[len(views) - 1 : -1]:
            for user in set(node.users) - inside:
                if not is_size(self.reader, user):
                    return False
                if shapes.get(node) != shapes[self.x] and not self._serves(user, inside):
                    return False
        return True

    def _serves(self, node: Node, inside: set[Node]) -> bool:
        """Whether a number is used inside alone."""
        if not node.users:
            return is_number(self.reader, node)
        return all(u in inside or (u not in self.reader.shapes and self._serves(u, inside)) for u in node.users)

    def _follow(self) -> list[Axis] | None:
        self.scale = 1.0
        self.start = named(self.reader.shapes[self.x], "x")
        axes: list[Axis] | None = self.start
        for node in self.steps:
            if axes is None:
                return None
            if node is self.found.end:
                self.tokens, self.slots = axes[self.found.tokens], axes[self.found.slots]
            elif (product := self.products.get(node)) is not None:
                self.read[node] = axes[product.axis]
                axes, self.made[node] = applied(product, axes)
            elif (scale := _scale(self.reader, node)) is not None:
                self.scale *= scale
            elif node is not self.dropout:
                axes = after(self.reader, node, axes)
        return axes

    def _read_off(self, axes: list[Axis]) -> Region | None:
        """The region with what its axes are, from those of its result; None for what no call computes."""
        contracted = set(leaves(self.read[(self.inner or self.key).node]))
        feature = next((i for i, axis in enumerate(self.start) if contracted <= set(leaves(axis))), None)
        whole = [leaves(axis) for i, axis in enumerate(self.start) if i != feature]
        if feature is None or any(len(atoms) != 1 for atoms in whole):
            return None
        places = {leaves(axis)[0]: i for i, axis in enumerate(self.start) if i != feature}
        tokens = leaves(self.tokens)
        heads = self._heads(feature)
        if heads is None or not tokens or not all(atom in places for atom in tokens):
            return None
        atoms, of, innermost = heads
        apart = bool(atoms) and self._keeps(atoms)
        kept, made = atoms if apart and self.outer is None else (), leaves(self.made[(self.outer or self.value).node])
        batch = tuple(atom for atom in places if atom not in tokens)
        known, flat = [*batch, *tokens, *kept, *made], [leaves(axis) for axis in axes]
        found = [atom for axis in flat for atom in axis]
        if len(kept) > 1 or len(made) != 1 or len(found) != len(known) or set(found) != set(known):
            return None
        form = Form(
            *(tuple(places[atom] for atom in part) for part in (batch, tokens)),
            *(feature, math.prod(atom.size for atom in atoms), of, apart),
            tuple(tuple(known.index(atom) for atom in axis) for axis in flat),
        )
        products = self.inner, self.key, self.value, self.outer
        return Region(self.x, self.steps[-1], self.nodes, *products, self.dropout, form, innermost, self.scale)

    def _keeps(self, heads: Axis) -> bool:
        """Whether the value product leaves the heads apart."""
        return not set(heads) & set(leaves(self.read[self.value.node]))

    def _heads(self, feature: int) -> tuple[Axis, str, tuple[tuple[bool, bool], ...]] | None:
        """The atoms of the heads, what makes them (Form.of), and for each product whether its rows and its columns have
        them innermost; None for what no call computes."""
        if self.inner is not None and leaves(self.read[self.inner.node]) != leaves(self.start[feature]):
            return None
        features = _split(self.made[self.inner.node] if self.inner else self.start[feature], self.read[self.key.node])
        slots = _split(self.made[self.key.node], self.slots)
        joined = _split(self.read[self.value.node], self.slots)
        if features is None or slots is None or joined is None or (features[0] and slots[0]):
            return None
        (atoms, innermost), of = (features, "inner" if self.inner else "x") if features[0] else (slots, "key")
        apart = not joined[0]
        if joined[0] not in ((), atoms) or (of == "x" and (innermost or not apart)):
            return None
        rows, columns = [of == "inner" and innermost, of == "key" and innermost, False, False], [False] * 4
        columns[2] = joined[1]
        if self.outer is not None:
            back = _split(self.read[self.outer.node], self.made[self.value.node])
            if back is None or back[0] != (atoms if apart else ()):
                return None
            columns[3] = back[1]
        elif atoms and of == "key" and apart:
            return None
        return atoms, of, tuple(zip(rows, columns, strict=True))


def _split(whole: Axis, part: Axis) -> tuple[Axis, bool] | None:
    """The atoms of an axis beside a part of it, and whether they stand behind it, innermost; None if it has no such
    part."""
    whole, part = leaves(whole), leaves(part)
    if whole[len(whole) - len(part) :] == part:
        return whole[: len(whole) - len(part)], False
    if whole[: len(part)] == part:
        return whole[len(part) :], True
    return None
