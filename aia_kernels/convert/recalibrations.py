"""What the nodes of a graph are to Attention in Attention: pooled maps, gates, and x recalibrated by sums of gates.

    x -> maximum and mean over an axis -> convolution -> [BN] -> sigmoid -> gate         x * (c + sum of k * gate)

Each node is given a meaning, from those of its operands. Axes are followed as in axes.py, so it does not matter how a
network arranges them. What has no such meaning is a tensor of its own, from which another unit may start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..modules.submodules import is_gate_convolution
from .axes import Atom, Axis, after, leaves, named, reshaped
from .products import shape_of
from .spellings import Reader

#: The name of the atoms along which a tensor was repeated.
_REPEATED = "repeated"
#: Operations of torch that take two tensors, or a tensor and a number, and what they do.
_ARITHMETIC = ("add", "mul", "div")
_CONCATENATE = ("cat", "concat", "concatenate")


@dataclass(frozen=True, eq=False)
class Meaning:
    """axes: where each axis of the tensor comes from."""

    axes: tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Pooled(Meaning):
    """The maximum or the mean of a field over one of its axes; or both, joined along an axis of their own.

    of: the field. over: the axis. kinds: "max" or "mean", or both in their order.
    """

    of: Field
    over: Axis
    kinds: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Gate:
    """A gate: sigmoid(BN(conv3d(P))).

    of, over: what was pooled, and over which axis. order: the axes of the convolution. flipped: whether the mean comes
    before the maximum. convolution, norm: their calls; the norm may be absent.
    """

    of: Field
    over: Axis
    order: tuple[Axis, ...]
    flipped: bool
    convolution: Node
    norm: Node | None = None


@dataclass(frozen=True, eq=False)
class Convolved(Meaning):
    """A gate before its sigmoid."""

    gate: Gate


#: A gate, and the axes over which it was averaged; None stands for the number one.
Term = tuple[Gate, Axis] | None


@dataclass(frozen=True, eq=False)
class Field(Meaning):
    """base * sum of k * gate. base: the node with a tensor, or None for the sum alone. terms: k of each gate."""

    base: Node | None
    terms: dict[Term, float]

    @property
    def scale(self) -> float | None:
        """k of what is k * base; None of what has gates."""
        return self.terms[None] if [*self.terms] == [None] else None

    def times(self, factor: float) -> Field:
        """The same field, multiplied."""
        return replace(self, terms={term: k * factor for term, k in self.terms.items()})


@dataclass(frozen=True, eq=False)
class Stacked(Meaning):
    """Fields side by side along an axis of their own."""

    along: Atom
    fields: tuple[Field, ...]


def same(a: Field, b: Field) -> bool:
    """Whether two fields have the same values, up to the arrangement of their axes."""
    return a.base is b.base and a.terms == b.terms


def own_axis(axis: Axis) -> Axis:
    """The atoms of an axis that are longer than one and not repeated."""
    return tuple(atom for atom in leaves(axis) if atom.size != 1 and atom.name != _REPEATED)


class Meanings:
    """The meaning of each node of a graph that has one."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.found: dict[Node, Meaning] = {}
        self.others: dict[Node, str] = {}  # convolutions of pooled features that are no gate's, and how they differ
        for node in reader.graph.nodes:
            if node in reader.shapes:
                self.found[node] = self._of(node) or self._start(node)

    def _start(self, node: Node) -> Field:
        return Field(tuple(named(self.reader.shapes[node], "")), node, {None: 1.0})

    def field(self, node: Any) -> Field | None:
        """The field that a node is, or None."""
        found = self.found.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Field) else None

    def _of(self, node: Node) -> Meaning | None:
        reader = self.reader
        operation = reader.operation(node)
        if reader.changes_in_place(node) and operation != "sigmoid":
            return None
        if operation in _CONCATENATE or operation == "stack":
            return self._joined(node, operation)
        if operation in _ARITHMETIC:
            return self._arithmetic(node, operation)
        if operation in ("getitem", "values") and reader.operation(node.args[0]) == "max":
            first = operation == "values" or node.args[1] == 0
            return self._pooled(node.args[0], "max", node) if first else None
        operand = self.found.get(reader.operand(node))
        if operand is None:
            return None
        if operation in ("identity", "reshape", "permute"):
            axes = after(reader, node, operand.axes)
            return None if axes is None else replace(operand, axes=tuple(axes))
        if operation == "getitem":
            return self._indexed(node, operand)
        if operation in ("expand", "expand_as", "repeat"):
            return self._repeated(node, operand)
        if operation in ("mean", "sum", "amax"):
            return self._reduced(node, operation, operand)
        if operation == "conv":
            return self._convolved(node, operand)
        if operation == "batch_norm" and isinstance(operand, Convolved) and operand.gate.norm is None:
            return replace(operand, gate=replace(operand.gate, norm=node))
        if operation == "sigmoid" and isinstance(operand, Convolved):
            return Field(operand.axes, None, {(operand.gate, ()): 1.0})
        return None

    def _indexed(self, node: Node, operand: Meaning) -> Meaning | None:
        """What an index makes of a tensor that adds axes of length one, or leaves some out."""
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        shape, before = self.reader.shapes[node], self.reader.shapes[node.args[0]]  # type: ignore[index]
        whole = all(i is None or i is Ellipsis or i == slice(None) or i in (0, -1) for i in index)
        if not whole or math.prod(shape) != math.prod(before):
            return None
        axes = reshaped(operand.axes, shape)
        return None if axes is None else replace(operand, axes=tuple(axes))

    def _repeated(self, node: Node, operand: Meaning) -> Meaning | None:
        shape = self.reader.shapes[node]
        axes = [()] * (len(shape) - len(operand.axes)) + [*operand.axes]
        result = []
        for size, axis in zip(shape, axes, strict=True):
            if math.prod(atom.size for atom in leaves(axis)) == size:
                result.append(axis)
            elif math.prod(atom.size for atom in leaves(axis)) == 1:
                result.append((Atom(size, _REPEATED),))
            else:
                return None
        return replace(operand, axes=tuple(result))

    def _axis(self, node: Node, position: int) -> tuple[int, bool] | None:
        """The only axis over which a node reduces, and whether it stays with length one."""
        dim = self.reader.argument(node, position, "dim", "axis")
        if isinstance(dim, (list, tuple)) and len(dim) == 1:
            (dim,) = dim
        operand = self.reader.operand(node)
        if not isinstance(dim, int) or isinstance(dim, bool) or operand not in self.reader.shapes:
            return None
        keeps = bool(self.reader.argument(node, position + 1, "keepdim", "keepdims", default=False))
        return dim % len(self.reader.shapes[operand]), keeps

    def _pooled(self, node: Any, kind: str, result: Node) -> Pooled | None:
        """Of a node that pools a field over one axis of it."""
        field, found = self.field(self.reader.operand(node)), self._axis(node, 1)
        if field is None or field.base is None or found is None or result not in self.reader.shapes:
            return None
        dim, keeps = found
        over = own_axis(field.axes[dim])
        if len(over) != 1 or over != leaves(field.axes[dim]):
            return None
        axes = (*field.axes[:dim], *([(Atom(1),)] if keeps else []), *field.axes[dim + 1 :])
        return Pooled(axes, field, over, (kind,))

    def _reduced(self, node: Node, operation: str, operand: Meaning) -> Meaning | None:
        """A mean or a sum of what is stacked; a gate averaged over an axis; or what is pooled."""
        if (found := self._axis(node, 1)) is None:
            return None
        dim, keeps = found
        rest = (*operand.axes[:dim], *([(Atom(1),)] if keeps else []), *operand.axes[dim + 1 :])
        if isinstance(operand, Stacked):
            if leaves(operand.axes[dim]) != (operand.along,) or operation == "amax":
                return None
            total: Field | None = operand.fields[0]
            for field in operand.fields[1:]:
                total = None if total is None else _sum(total, field)
            share = 1.0 / len(operand.fields) if operation == "mean" else 1.0
            return None if total is None else replace(total.times(share), axes=rest)
        if operation == "sum":
            return None
        if isinstance(operand, Field) and operand.base is None:
            over = own_axis(operand.axes[dim])
            if operation != "mean" or len(over) > 1:
                return None
            return Field(rest, None, {_averaged(term, over): k for term, k in operand.terms.items()})
        return self._pooled(node, "max" if operation == "amax" else "mean", node)

    def _joined(self, node: Node, operation: str) -> Meaning | None:
        """A maximum and a mean side by side; or fields, stacked."""
        given = self.reader.argument(node, 0, "tensors")
        parts = [self.found.get(part) for part in given] if isinstance(given, (list, tuple)) else []
        dim = self.reader.argument(node, 1, "dim", "axis", default=0)
        if len(parts) < 2 or not isinstance(dim, int) or any(part is None for part in parts):
            return None
        first: Any = parts[0]
        rank = len(self.reader.shapes[node])
        dim %= rank
        flat = [tuple(map(own_axis, part.axes)) for part in parts]  # type: ignore[union-attr]
        if operation == "stack":
            axes = (*first.axes[:dim], (Atom(len(parts)),), *first.axes[dim:])
        elif all(self.reader.shapes[part][dim] == 1 for part in given):
            axes = (*first.axes[:dim], (Atom(len(parts)),), *first.axes[dim + 1 :])
        else:
            return None
        if any(other != flat[0] for other in flat):
            return None
        if all(isinstance(part, Field) and part.base is first.base for part in parts):
            return Stacked(axes, axes[dim][0], tuple(parts))  # type: ignore[arg-type]
        if len(parts) != 2 or not all(isinstance(part, Pooled) for part in parts):
            return None
        kinds = first.kinds + parts[1].kinds  # type: ignore[union-attr]
        alike = parts[1].over == first.over and same(parts[1].of, first.of)  # type: ignore[union-attr]
        return Pooled(axes, first.of, first.over, kinds) if alike and sorted(kinds) == ["max", "mean"] else None

    def _convolved(self, node: Node, operand: Meaning) -> Convolved | None:
        """The convolution of a gate on pooled features [B, 2, i, j, k]."""
        if not isinstance(operand, Pooled) or len(operand.kinds) != 2 or len(operand.axes) != 5:
            return None
        batch, features, *order = operand.axes
        mixed = [axis for axis in order if len(own_axis(axis)) != 1]
        if [atom.size for atom in leaves(features)] != [2] or mixed:
            return None
        if not self._is_of_a_gate(node):
            self.others[node] = (
                f"{node.name} takes a maximum and a mean, as a gate of Attention in Attention does, but is not its "
                "convolution: 3x3x3 from two features to one, padding 1, all else plain; no fused call serves"
            )
            return None
        gate = Gate(operand.of, operand.over, tuple(map(own_axis, order)), operand.kinds == ("mean", "max"), node)
        return Convolved((batch, (Atom(1),), *order), gate)

    def _is_of_a_gate(self, node: Node) -> bool:
        """Whether a convolution is 3x3x3 with zeros around, from two features to one; a bias does no harm."""
        reader = self.reader
        if (module := reader.module(node)) is not None:
            weight: Any = module.weight
            return tuple(weight.shape) == (1, 2, 3, 3, 3) and is_gate_convolution(module, with_bias=True)
        of_any_kind = "transposed" in str(getattr(node.target, "_schema", ""))  # aten.convolution
        whole = not of_any_kind or not reader.argument(node, 6, "transposed")
        groups = 8 if of_any_kind else 6
        settings = ((3, "stride", 1, 1), (4, "padding", 0, 1), (5, "dilation", 1, 1))
        plain = all(_all_are(reader.argument(node, i, name, default=d), v) for i, name, d, v in settings)
        shape = shape_of(reader, reader.argument(node, 1, "weight"))
        return whole and plain and reader.argument(node, groups, "groups", default=1) == 1 and shape == (1, 2, 3, 3, 3)

    def _arithmetic(self, node: Node, operation: str) -> Field | None:
        """The sum, the product or the quotient of fields and numbers."""
        operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
        if len(operands) != 2 or self.reader.argument(node, 2, "alpha", default=1) != 1:
            return None
        if node.kwargs.get("rounding_mode") is not None:
            return None
        numbers = [a for a in operands if isinstance(a, (int, float)) and not isinstance(a, bool)]
        fields = [field for a in operands if (field := self.field(a)) is not None]
        if len(numbers) + len(fields) != 2 or not fields:
            return None
        if len(fields) == 2:
            a, b = fields
            if operation == "add":
                return _sum(a, b)
            return self._product(operands, a, b) if operation == "mul" else None
        (field,), (number,) = fields, numbers
        if operation == "mul":
            return field.times(float(number))
        if operation == "div":
            return field.times(1.0 / number) if operands[1] is number and number else None
        if field.base is not None and number:
            return None
        terms = dict(field.terms)
        if number:
            terms[None] = terms.get(None, 0.0) + float(number)
        return replace(field, terms=terms)

    def _product(self, operands: Sequence[Any], a: Field, b: Field) -> Field | None:
        """base * gates, with the tensor on either side: a start, or another field whose own gates these are."""
        nodes = [*operands]
        if a.base is None:
            a, b, nodes = b, a, nodes[::-1]
        if a.base is None or b.base is not None or not _spread(b.axes, a.axes):
            return None
        if a.scale is not None:
            return replace(b.times(a.scale), base=a.base, axes=a.axes)
        if all(term is None or same(term[0].of, a) for term in b.terms):
            return replace(b, base=nodes[0], axes=a.axes)
        return None


def _averaged(term: Term, over: Axis) -> Term:
    """A gate averaged over an axis; where it is repeated along that axis it stays what it is."""
    if term is None or not over or all(own_axis(axis) != over for axis in term[0].order):
        return term
    gate, before = term
    return gate, (*before, *over)


def _sum(a: Field, b: Field) -> Field | None:
    """The sum of two fields with one base, or None."""
    axes = _together(a.axes, b.axes)
    if a.base is not b.base or axes is None:
        return None
    terms = dict(a.terms)
    for term, k in b.terms.items():
        terms[term] = terms.get(term, 0.0) + k
    return Field(axes, a.base, terms)


def _together(a: tuple[Axis, ...], b: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes of two tensors that are spread to one another, or None where they do not fit."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    result = [*longer[: len(longer) - len(shorter)]]
    for x, y in zip(longer[len(result) :], shorter, strict=True):
        if own_axis(x) != own_axis(y) and own_axis(x) and own_axis(y):
            return None
        result.append(x if own_axis(x) or not own_axis(y) else y)
    return tuple(result)


def _spread(gates: tuple[Axis, ...], x: tuple[Axis, ...]) -> bool:
    """Whether gates are spread over x, and not x over them."""
    together = _together(x, gates)
    return len(gates) <= len(x) and together is not None and [*map(leaves, together)] == [*map(leaves, x)]


def _all_are(value: Any, expected: int) -> bool:
    same_size = value == "same" and expected == 1  # of a padding
    return value == expected or same_size or (isinstance(value, (list, tuple)) and set(value) == {expected})
