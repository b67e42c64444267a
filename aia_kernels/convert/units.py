"""The units of Attention in Attention in a graph: y = x * G_outer(x * G_inner(x)), however they are written.

Which tensor is recalibrated by which gates is read off in recalibrations.py. Here that is compared with the units. The
letters T, C, H and W follow from what is pooled: the axis of a lone gate is C, and so is the one over which no gate of
three is. The others are alike to a unit, as the weights of a gate can be turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Node

from ..common.maps import CHANNEL, NONE, SPACETIME
from ..reference import UNITS
from .axes import Atom, leaves
from .calls import ClipForm
from .normalizations import Missed
from .recalibrations import Field, Gate, Meanings, Term, own_axis, same
from .regions import LAYOUT, read_elsewhere
from .spellings import Reader


class FoundGate(NamedTuple):
    """A gate of a unit. order: the letters of the axes of its convolution. scale: of what it pools."""

    gate: Gate
    order: str
    scale: float


class FoundUnit(NamedTuple):
    """What one call can compute.

    x: the tensor that is recalibrated. end: the node with the result. nodes: all in between, that with the result too.
    form: how the axes are arranged. gates: in the order of the letters of the unit.
    """

    x: Node
    end: Node
    nodes: tuple[Node, ...]
    form: ClipForm
    gates: tuple[FoundGate, ...]


class _Context(NamedTuple):
    """The gates that recalibrate a field together: what they pool, the factor of their mean, the constant beside them,
    and the axes over which they are averaged."""

    gates: tuple[Gate, ...]
    of: Field
    factor: float
    constant: float
    averaged: tuple[Atom, ...]


def find_units(reader: Reader) -> Iterator[FoundUnit | Missed]:
    """All units of a graph, the last first, and what comes close to one."""
    if not any(reader.operation(node) == "sigmoid" for node in reader.graph.nodes):
        return
    meanings = Meanings(reader)
    inside: set[Node] = set()  # of units
    missed: dict[Node, Missed] = {}
    for node in reversed(reader.graph.nodes):
        field = meanings.field(node)
        if node in inside or field is None or field.base is None or field.scale is not None:
            continue
        if any(user not in missed and _goes_on(meanings, field, user) for user in node.users):
            continue
        if isinstance(found := _Search(meanings, node, field).unit(), Missed):
            missed[node] = found
        else:
            inside |= {*found.nodes}
            yield found
    told: set[Node] = set()
    for node, close in missed.items():
        within = _inside(meanings, node, meanings.field(node))
        if not inside & {*within} and node not in told:
            yield close
        told |= {*within}
    for node, reason in meanings.others.items():
        yield Missed(node, reason, of_unit=True)


def _goes_on(meanings: Meanings, field: Field, user: Node) -> bool:
    """Whether a user of a field is a part of the same recalibration: more gates are added, x is, or it is scaled."""
    after = meanings.field(user)
    if after is None or after.base is not field.base or meanings.reader.operation(user) in LAYOUT:
        return False
    return field.terms.keys() < after.terms.keys() or (
        field.terms.keys() == after.terms.keys() and len(user.all_input_nodes) == 1
    )


def _is_base(meanings: Meanings, node: Node, base: Node) -> bool:
    """Whether a node is the base of a unit, or an arrangement of it."""
    field, start = meanings.field(node), meanings.field(base)
    if field is None or start is None:
        return False
    return node is base or (same(field, start) and meanings.reader.operation(node) in (*LAYOUT, "getitem"))


def _inside(meanings: Meanings, end: Node, field: Field | None) -> list[Node]:
    """The nodes from the base to the end, in the order of the graph, without the base and its arrangements."""
    reader, inside, waiting = meanings.reader, set(), [end]
    while waiting and field is not None and field.base is not None:
        node = waiting.pop()
        if node in inside or _is_base(meanings, node, field.base):
            continue
        inside.add(node)
        parameters = reader.operation(node) in ("conv", "batch_norm")
        operands = [reader.operand(node)] if parameters else node.all_input_nodes
        waiting += [a for a in operands if a in reader.shapes or reader.operation(a) == "max"]
    return [node for node in reader.graph.nodes if node in inside]


class _Search:
    """Compares one recalibration with the units."""

    def __init__(self, meanings: Meanings, end: Node, field: Field):
        self.meanings, self.reader, self.end, self.field = meanings, meanings.reader, end, field
        self.base: Any = field.base
        self.nodes = _inside(meanings, end, field)

    def unit(self) -> FoundUnit | Missed:
        """The unit, or why there is none."""
        outer = _context(self.field.terms)
        if isinstance(outer, str):
            return self._missed(outer)
        scale, inner_scale = self._of_base(outer.of), 1.0
        inner: _Context | None = None
        if scale is None:
            found = _context(outer.of.terms) if outer.of.base is self.base else "what its gates pool is another tensor"
            if isinstance(found, str):
                return self._missed(found)
            inner, scale = found, found.factor
            inner_scale = self._of_base(inner.of) or 0.0
            if inner_scale == 0.0 or inner.constant:
                return self._missed("what its inner gates pool or recalibrate is not what its outer gates do")
        if scale <= 0.0 or inner_scale <= 0.0:
            return self._missed("a factor that is not positive turns its maximum into a minimum")
        x, letters = self._clips(outer, inner)
        if x is None:
            return self._missed(letters)
        return self._described(x, letters, outer, inner, scale, inner_scale)

    def _missed(self, reason: str) -> Missed:
        gates = sorted({term[0].convolution.name for term in self.field.terms if term is not None})
        return Missed(
            self.end,
            f"{self.end.name} multiplies {self.base.name} by gates ({', '.join(gates)}), but {reason}: a unit of "
            "Attention in Attention has one gate over C, or the mean of gates over T, H and W, of x or of x times the "
            "other of both, as functional.attention_in_attention",
            of_unit=True,
        )

    def _of_base(self, field: Field) -> float | None:
        """k of a field that is k * base; None of any other."""
        if field.base is self.base and field.scale is not None:
            return field.scale
        start = self.meanings.field(self.base)
        return 1.0 if start is not None and same(field, start) else None

    def _clips(self, outer: _Context, inner: _Context | None) -> tuple[Node | None, Any]:
        """The first arrangement of the base with T, C, H and W each on an axis, and their letters; or None and why."""
        gates = (*outer.gates, *(inner.gates if inner else ()))
        known = {gates[0].over, *gates[0].order}
        if len(known) != 4 or any({gate.over, *gate.order} != known for gate in gates):
            return None, "its gates do not see the same four axes"
        of_three = next((c.gates for c in (outer, inner) if c is not None and len(c.gates) == 3), None)
        alone = [c.gates[0].over for c in (outer, inner) if c is not None and len(c.gates) == 1]
        channels = {*alone} if of_three is None else known - {gate.over for gate in of_three}
        if len(channels) != 1 or (of_three is not None and {*alone} - channels):
            return None, "its gates pool other axes"
        (channel,) = channels
        for node in self.reader.graph.nodes:
            if node in self.reader.shapes and _is_base(self.meanings, node, self.base):
                field: Any = self.meanings.field(node)
                axes = [own_axis(axis) for axis in field.axes]
                if known <= {*axes}:
                    others = iter("THW")
                    return node, {axis: "C" if axis == channel else next(others) for axis in axes if axis in known}
        return None, "no arrangement of its tensor has each of their axes alone"

    def _described(
        self,
        x: Node,
        letters: dict[Any, str],
        outer: _Context,
        inner: _Context | None,
        scale: float,
        inner_scale: float,
    ) -> FoundUnit | Missed:
        contexts = [NONE if c is None else SPACETIME if len(c.gates) == 3 else CHANNEL for c in (inner, outer)]
        averaged = inner is not None and bool(inner.averaged)
        name = next((u.name for u in UNITS.values() if [u.inner, u.outer, u.averaged] == [*contexts, averaged]), None)
        channel = next(axis for axis, letter in letters.items() if letter == "C")
        if name is None or outer.averaged or (averaged and inner is not None and inner.averaged != channel):
            return self._missed("its contexts are those of no unit")
        by_letter = {}
        for context, k in ((inner, inner_scale), (outer, scale)):
            for gate in context.gates if context else ():
                order = "".join(letters[axis] for axis in gate.order)
                by_letter[letters[gate.over]] = FoundGate(gate, order, k)
        end = self._last()
        field, given = self.meanings.field(end), self.meanings.field(x)
        assert field is not None and given is not None
        places = {atom: i for i, axis in enumerate(given.axes) for atom in own_axis(axis)}
        axes = [own_axis(axis) for axis in given.axes]
        out = tuple(tuple(dict.fromkeys(places[atom] for atom in own_axis(axis))) for axis in field.axes)
        clips = tuple(next(i for i, axis in enumerate(axes) if letters.get(axis) == letter) for letter in "TCHW")
        batch = tuple(i for i in range(len(axes)) if i not in clips)
        form = ClipForm(batch, clips, out, name, *self._factors(outer, field))  # type: ignore[arg-type]
        nodes = tuple(_inside(self.meanings, end, self.field))
        if (used := self._used_elsewhere(nodes, x)) is not None:
            return self._missed(used)
        gates = tuple(by_letter[letter] for letter in UNITS[name].letters)
        return FoundUnit(x, end, nodes, form, gates)

    def _factors(self, outer: _Context, field: Field) -> tuple[float, float]:
        """What y is multiplied with, and how much of x is added."""
        (now,) = {k for term, k in field.terms.items() if term is not None}
        return now * len(outer.gates), field.terms.get(None, 0.0)

    def _last(self) -> Node:
        """The last of the nodes that only arrange the result."""
        node = self.end
        while len(node.users) == 1:
            (user,) = node.users
            after = self.meanings.field(user)
            arranges = self.reader.operation(user) in LAYOUT and self.reader.operand(user) is node
            if not arranges or after is None or not same(after, self.field):
                break
            node = user
        return node

    def _used_elsewhere(self, nodes: tuple[Node, ...], x: Node) -> str | None:
        """What reads something between x and the result, or changes x, as one call would not let it."""
        reader = self.reader
        for node in reader.graph.nodes:
            if node in reader.shapes and _is_base(self.meanings, node, self.base):
                for user in node.users:
                    if reader.changes_in_place(user) and reader.operand(user) is node:
                        return f"{user.name} changes it in place"
        return read_elsewhere(reader, nodes, nodes[-1])


def _context(terms: dict[Term, float]) -> _Context | str:
    """The gates of a field, or why they are no context."""
    gates = [(term, k) for term, k in terms.items() if term is not None]
    if len(gates) not in (1, 3):
        return f"there {'is' if len(gates) == 1 else 'are'} {len(gates)} of them"
    (first, averaged), k = gates[0]  # type: ignore[misc]
    if any(not same(term[0].of, first.of) for term, _ in gates):
        return "its gates pool different tensors"
    if any(term[1] != averaged for term, _ in gates):
        return "its gates are averaged over different axes"
    if any(abs(other - k) > 1e-6 * abs(k) for _, other in gates):
        return "its gates have different factors"
    constant = terms.get(None, 0.0)
    return _Context(tuple(term[0] for term, _ in gates), first.of, k * len(gates), constant, leaves(averaged))
