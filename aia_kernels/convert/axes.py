"""Where the axes of a tensor go when it is reshaped and permuted.

An axis is a tuple of atoms, the outermost first. Joining two axes joins their tuples; splitting one splits its atoms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from .spellings import Reader, spelling


class Atom:
    """A part of an axis that no reshape seen so far has split; if one has, its parts, the outermost first."""

    def __init__(self, size: int, name: str = ""):
        self.size, self.name = size, name
        self.parts: tuple[Atom, ...] = ()

    def split(self, inner: int) -> None:
        """Split off the innermost part of a size."""
        self.parts = Atom(self.size // inner, self.name), Atom(inner, self.name)

    def __repr__(self) -> str:
        return f"{self.name}{self.size}"


Axis = tuple[Atom, ...]


def leaves(axis: Iterable[Atom]) -> Axis:
    """The atoms of an axis, each split as far as it is by now."""
    return tuple(leaf for atom in axis for leaf in (leaves(atom.parts) if atom.parts else (atom,)))


def named(sizes: Sequence[int], name: str) -> list[Axis]:
    """Axes of one atom each."""
    return [(Atom(size, name),) for size in sizes]


def reshaped(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
    """The axes after a reshape to these sizes; None where that mixes parts of axes."""
    rest = list(leaves(atom for axis in axes for atom in axis))
    result: list[Axis] = []
    for size in sizes:
        axis: list[Atom] = []
        if size == 1 and rest and rest[0].size == 1:
            axis.append(rest.pop(0))
        while (missing := size // math.prod(atom.size for atom in axis)) > 1:
            if not rest:
                return None
            atom = rest.pop(0)
            if missing % atom.size:
                if atom.size % missing:
                    return None
                atom.split(atom.size // missing)
                atom, inner = atom.parts
                rest.insert(0, inner)
            axis.append(atom)
        result.append(tuple(axis))
    if any(atom.size != 1 for atom in rest):
        return None
    return [*result[:-1], (*result[-1], *rest)] if result else None  # of length one: it stands anywhere


def order_of(node: Node, rank: int) -> list[int] | None:
    """Of a node that permutes the axes of its operand: the axis of that for each of its own."""
    operand = torch.empty(tuple(range(2, 2 + rank)), device="meta")  # sizes that tell the axes apart
    try:
        if node.op == "call_method":
            moved = getattr(operand, str(node.target))(*node.args[1:], **node.kwargs)
        else:
            kwargs = {name: value for name, value in node.kwargs.items() if name not in ("input", "self")}
            moved = node.target(operand, *node.args[1:], **kwargs)  # type: ignore[operator]
    except Exception:  # an argument that is no number: what torch says of it
        return None
    return [size - 2 for size in moved.shape] if isinstance(moved, torch.Tensor) else None


def after(reader: Reader, node: Node, axes: Sequence[Axis]) -> list[Axis] | None:
    """The axes of a node that reshapes or permutes, from those of its operand; None where they cannot be followed."""
    operation = reader.operation(node)
    if operation == "identity":
        return list(axes)
    if operation == "permute":
        order = order_of(node, len(axes))
        return None if order is None else [axes[i] for i in order]
    if node not in reader.shapes:
        return None
    found = reshaped(axes, reader.shapes[node])
    # An axis that has the length one by chance, such as the number of windows in a small map, is another one next time.
    if found is None or reader.fixed:
        return found
    return found if all(axis or _is_literal(reader, node, i) for i, axis in enumerate(found)) else None


def _is_literal(reader: Reader, node: Node, axis: int) -> bool:
    """Whether the code of a reshape itself says that an axis has the length one."""
    if reader.module(node) is not None or spelling(node) == "unsqueeze":
        return True
    if spelling(node) == "unflatten":
        return all(isinstance(size, int) and size > 0 for size in reader.argument(node, 2, "sizes", default=(None,)))
    if spelling(node) not in ("view", "reshape", "_unsafe_view"):
        return False
    given = node.args[1:] or tuple(node.kwargs.get(name) for name in ("shape", "size") if name in node.kwargs)
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return axis < len(sizes) and type(sizes[axis]) is int and sizes[axis] == 1


def moved_axis(reader: Reader, start: Node, path: Sequence[Node], axis: int) -> int | None:
    """Where an axis of start stands after the nodes of a path; None if it is not alone there, or unknown."""
    if start not in reader.shapes:
        return None
    first = named(reader.shapes[start], "")
    axes: list[Axis] | None = first
    for node in path:
        axes = None if axes is None else after(reader, node, axes)
    if axes is None:
        return None
    return next((i for i, found in enumerate(axes) if leaves(found) == leaves(first[axis])), None)
