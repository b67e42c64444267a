"""A softmax that is written out: exp, divided by its own sum. And one that is called twice."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .normalizations import division
from .spellings import Reader


class WrittenOut(NamedTuple):
    """A softmax that was put into a graph, and the node in the place of which it stands."""

    softmax: Node
    before: Node


def name_softmaxes(reader: Reader) -> list[WrittenOut]:
    """Put a softmax in the place of each that is written out; what it was made of stays in the graph, unused."""
    found = []
    for node in reader.graph.nodes:
        if node in reader.shapes and (parts := _softmax_of(reader, node)) is not None:
            with reader.graph.inserting_after(node):
                softmax = reader.graph.call_function(torch.softmax, parts)
            reader.shapes = {**reader.shapes, softmax: reader.shapes[node]}
            node.replace_all_uses_with(softmax)
            softmax.meta = {name: value for name, value in node.meta.items() if name in ("val", "example_value")}
            found.append(WrittenOut(softmax, node))
    return found


def merge_softmaxes(reader: Reader) -> None:
    """Leave one of several softmaxes of the same logits over the same axis."""
    first: dict[Any, Node] = {}
    for node in reader.graph.nodes:
        if reader.operation(node) != "softmax" or not node.all_input_nodes:
            continue
        changed = any(reader.changes_in_place(user) for user in node.all_input_nodes[0].users)
        kept = first.setdefault((node.op, node.target, node.args, *sorted(node.kwargs.items())), node)
        changed = changed or any(map(reader.changes_in_place, (*kept.users, *node.users)))
        if kept is not node and not changed and reader.in_one_mode((kept, node)):
            node.replace_all_uses_with(kept)
            reader.graph.erase_node(node)


def settle(reader: Reader, found: list[WrittenOut], wanted: set[Node]) -> None:
    """Leave out what the wanted softmaxes were made of, and take the others back."""
    for softmax, before in reversed(found):
        if softmax not in wanted:
            softmax.replace_all_uses_with(before)
            reader.graph.erase_node(softmax)
    waiting = [before for softmax, before in found if softmax in wanted]
    while waiting:
        node = waiting.pop()
        if not node.users and not node._erased and node.op in ("call_function", "call_method", "call_module"):
            waiting += node.all_input_nodes
            reader.graph.erase_node(node)


def _softmax_of(reader: Reader, node: Node) -> tuple[Node, int] | None:
    """The logits and the axis of a softmax that a node is the last of, or None."""
    if reader.operation(node) == "exp":
        logits = reader.operand(node)
        if reader.operation(logits) == "log_softmax":
            dim = reader.argument(logits, 1, "dim", "axis")
            return (reader.operand(logits), dim) if isinstance(dim, int) else None
        if reader.operation(logits) == "sub" and len(logits.args) == 2:
            of, total = logits.args
            dim = _kept_axis(reader, total, "logsumexp")
            return (of, dim) if dim is not None and reader.operand(total) is of else None
        return None
    if (parts := division(reader, node)) is None:
        return None
    numerator, _, dim, eps, between = parts
    if reader.operation(numerator) != "exp" or reader.changes_in_place(numerator):
        return None
    logits = reader.operand(numerator)
    if not reader.in_one_mode((logits, numerator, *between, node)):
        return None
    shifted = _unshifted(reader, logits, dim)
    # A number beside a sum that is at least one, as where the maximum was taken away: 1e-8 of it is less than rounding.
    harmless = eps == 0.0 or (shifted is not None and not isinstance(eps, str) and 0.0 < eps <= 1e-8)
    return (logits if shifted is None else shifted, dim) if harmless else None


def _unshifted(reader: Reader, logits: Any, dim: int) -> Node | None:
    """The logits from which something was taken away that is one for each row of a softmax, which does not see it."""
    if reader.operation(logits) != "sub" or len(logits.args) != 2 or reader.changes_in_place(logits):
        return None
    of, shift = logits.args
    if of not in reader.shapes or shift not in reader.shapes or logits.kwargs:
        return None
    whole, taken = reader.shapes[of], reader.shapes[shift]
    one = not taken or (len(taken) == len(whole) and taken[dim] == 1)
    return of if one and reader.shapes[logits] == whole else None


def _kept_axis(reader: Reader, node: Any, operation: str) -> int | None:
    """The axis of a reduction that keeps it with length one."""
    if reader.operation(node) != operation or not reader.argument(node, 2, "keepdim", default=False):
        return None
    dim = reader.argument(node, 1, "dim", "axis")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    return dim if isinstance(dim, int) else None
