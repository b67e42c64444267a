"""Double normalizations in a graph: a softmax over one axis, divided by its sum over another.

What comes close and is something else is found too, and told with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .axes import moved_axis
from .calls import CONDITIONS
from .spellings import Reader, spelling

#: Operations that some networks have in the place of the softmax over tokens.
_OTHER_MAPS = ("sigmoid", "relu", "exp", "softplus", "tanh")

#: The least sum that a published form may divide by and count as one that divides by any: that of F.normalize.
_LEAST_SUM = 1e-12

#: What torch.finfo knows of a type that serves as an eps.
TYPE_INFORMATION = ("eps", "tiny", "smallest_normal", "resolution")


class Normalization(NamedTuple):
    """A double normalization in a graph.

    softmax: its first node. end: its last, the division. numerator: the first argument of the division: the softmax or,
    where axes are moved or split in between, what these make of it. tokens, slots: the axis of the softmax and that of
    the sum, of the numerator. eps: what is added to the sum, or its name in torch.finfo of the type of the map. dtype:
    to which the softmax casts, or None. inner: the nodes between the two ends.
    """

    softmax: Node
    end: Node
    numerator: Node
    tokens: int
    slots: int
    eps: float | str
    dtype: torch.dtype | None
    inner: frozenset[Node]


class Missed(NamedTuple):
    """What comes close to a double normalization, to external attention or to a unit: the node, and how it differs.

    faint: whether that says something only of a layer that has the submodules of external attention. of_unit: whether
    it is a unit of Attention in Attention that it comes close to.
    """

    node: Node
    reason: str
    faint: bool = False
    of_unit: bool = False


def find_normalizations(reader: Reader) -> Iterator[Normalization | Missed]:
    """All double normalizations of a graph in its order, and what comes close to one."""
    for node in reader.graph.nodes:
        if (parts := division(reader, node)) is not None and (found := _read(reader, node, *parts)) is not None:
            yield found
        elif (order := _order(reader, node)) is not None:
            yield Missed(
                node,
                f"{node.name} divides a softmax by its L{order:g} norm: external attention divides by the sum, "
                "torch.nn.functional.normalize with p=1",
            )
        elif reader.operation(node) == "softmax" and reader.operation(reader.operand(node)) == "softmax":
            yield Missed(
                node, f"{node.name} is a softmax of a softmax: external attention divides the first by its sum instead"
            )


def _order(reader: Reader, node: Node) -> float | None:
    """The order, other than 1, of the norm with which a node normalizes a softmax."""
    if reader.operation(node) != "normalize" or reader.operation(reader.operand(node)) != "softmax":
        return None
    order = reader.argument(node, 1, "p", default=2.0)
    return order if isinstance(order, (int, float)) and order != 1 else None


def division(reader: Reader, node: Node) -> tuple[Node, Node, int, float | str, set[Node]] | None:
    """Of a node that divides something by its own sum over an axis: that, the sum, the axis, eps, and the nodes
    between; else None."""
    operation, operand = reader.operation(node), reader.operand(node)
    if operation == "normalize":
        if reader.argument(node, 1, "p", default=2.0) != 1 or not isinstance(operand, Node):
            return None
        if not _counts_as_none(reader, reader.argument(node, 3, "eps", default=_LEAST_SUM)):
            return None
        return operand, node, reader.argument(node, 2, "dim", default=1), 0.0, set()
    divisor = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    between: set[Node] = set()
    if operation == "mul":
        pairs = [(operand, divisor), (divisor, operand)]
        operand, divisor = next(
            ((a, r) for a, b in pairs if (r := _reciprocal_of(reader, b, between)) is not None), (None, None)
        )
    elif operation != "div" or node.kwargs.get("rounding_mode") is not None:
        return None
    if not isinstance(operand, Node) or not isinstance(divisor, Node):
        return None
    found = _sum(reader, divisor, between)
    if found is None:
        return None
    total, dim, eps = found
    summed = _through_identities(reader, reader.operand(total), between)
    if summed is not _through_identities(reader, operand, set()):
        return None
    return operand, total, dim, eps, between


def _reciprocal_of(reader: Reader, node: Any, between: set[Node]) -> Node | None:
    """What a node is the reciprocal of; the nodes from there join between."""
    operation, found = reader.operation(node), None
    if operation == "mul" and len(node.args) == 2 and node.args[1] in (1, 1.0):  # how 1 / a is exported
        found = _reciprocal_of(reader, node.args[0], between)
    elif operation == "reciprocal":
        found = reader.operand(node)
    elif operation == "div" and node.args[0] in (1, 1.0) and not isinstance(node.args[0], Node):
        found = node.args[1]
    elif operation == "pow" and node.args[1] in (-1, -1.0):
        found = node.args[0]
    if found is not None:
        between.add(node)
    return found


def _counts_as_none(reader: Reader, least: Any) -> bool:
    """Whether a least sum serves against 0 / 0 alone, which the fused normalization does not have. A larger one makes A
    of small sums smaller."""
    number = _number(reader, least)
    return number is not None and (isinstance(number, str) or number <= _LEAST_SUM)


def _sum(reader: Reader, node: Node, between: set[Node]) -> tuple[Node, int, float | str] | None:
    """The sum over one axis from which a divisor is made, the axis, and eps. The nodes on the way join between."""
    eps: float | str = 0.0
    places: list[int] = []
    while True:
        between.add(node)
        operation, operand = reader.operation(node), reader.operand(node)
        if operation == "add":
            numbers = [n for a in node.args if (n := _number(reader, a)) is not None]
            tensors = [a for a in node.args if isinstance(a, Node) and a in reader.shapes]
            if len(numbers) != 1 or len(tensors) != 1 or reader.argument(node, 2, "alpha", default=1) != 1:
                return None
            (number,), (operand,) = numbers, tensors
            if isinstance(number, str) or isinstance(eps, str):
                if 0.0 not in (number, eps):
                    return None
                eps = number if eps == 0.0 else eps
            else:
                eps += number
        elif operation == "clamp":
            least = reader.argument(node, 1, "min")
            if not _counts_as_none(reader, least) or reader.argument(node, 2, "max") is not None:
                return None
        elif operation in ("masked_fill", "where"):
            # Likewise, in the place of a sum of zero.
            if (operand := _guarded(reader, node, between)) is None:
                return None
        elif spelling(node) == "unsqueeze":
            places.append(reader.argument(node, 1, "dim"))
        elif operation == "getitem":
            if (place := _new_axis(node.args[1])) is None:
                return None
            places.append(place)
        elif operation == "reshape":
            if (place := _added_axis(reader, node)) is None:
                return None
            places.append(place)
        elif operation in ("sum", "norm"):
            return _axis_of_sum(reader, node, places, eps)
        elif operation not in ("identity", "expand", "expand_as"):
            return None
        if not isinstance(operand, Node):
            return None
        node = operand


def _number(reader: Reader, given: Any) -> float | str | None:
    """A number, or its name in torch.finfo of the type of a tensor; None for what is neither."""
    if isinstance(given, (int, float)):
        return given
    name = spelling(given) if isinstance(given, Node) else ""
    if name not in TYPE_INFORMATION or reader.operation(given.args[0]) != "finfo":
        return None
    return name if spelling(given.args[0].args[0]) == "dtype" else None


def _axis_of_sum(
    reader: Reader, node: Node, places: list[int], eps: float | str
) -> tuple[Node, int, float | str] | None:
    """The axis of a sum which stands in its place in the divisor: kept, or put back where it was."""
    shift = 0
    if reader.operation(node) == "norm":
        order = reader.argument(node, 1, "p", "ord")
        if order != 1:
            return None
        shift = 1
    dim = reader.argument(node, 1 + shift, "dim", "axis")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or isinstance(dim, bool) or reader.argument(node, 3 + shift, "dtype") is not None:
        return None
    if reader.argument(node, 2 + shift, "keepdim", "keepdims", default=False):
        return (node, dim, eps) if not places else None
    if len(places) != 1:
        return None
    place, rank = places[0], reader.rank(reader.operand(node))
    same = place == dim if rank is None else place % rank == dim % rank
    return (node, dim, eps) if same else None


def _guarded(reader: Reader, node: Node, between: set[Node]) -> Node | None:
    """What is kept of a tensor that has another number where it is zero; the condition joins between."""
    if reader.operation(node) == "where":
        condition, of = node.args[0], node.args[-1]
    else:
        of, condition = node.args[0], node.args[1]
    if not isinstance(condition, Node) or not isinstance(of, Node) or reader.operation(condition) != "eq":
        return None
    if condition.args[0] is not of or condition.args[1] != 0:
        return None
    between.add(condition)
    return of


def _added_axis(reader: Reader, node: Node) -> int | None:
    """Where a reshape puts an axis of length one and does nothing else."""
    operand = reader.operand(node)
    if node not in reader.shapes or operand not in reader.shapes:
        return None
    before, after = reader.shapes[operand], reader.shapes[node]
    places = (i for i in range(len(after)) if after[i] == 1 and after[:i] + after[i + 1 :] == before)
    return next(places, None) if 1 not in before else None


def _new_axis(index: Any) -> int | None:
    """Where an index such as [:, None] or [..., None] puts an axis of length one; None if it does more."""
    index = index if isinstance(index, tuple) else (index,)
    if index.count(None) != 1 or any(not (i is None or i is Ellipsis or i == slice(None)) for i in index):
        return None
    place = index.index(None)
    return place - len(index) if Ellipsis in index[:place] else place


def _through_identities(reader: Reader, node: Any, between: set[Node]) -> Any:
    """What a node is a copy of, or the absolute value of what has no sign."""
    while reader.operation(node) in ("identity", "abs"):
        between.add(node)
        node = reader.operand(node)
    return node


def _read(
    reader: Reader, end: Node, numerator: Node, total: Node, dim: int, eps: float | str, between: set[Node]
) -> Normalization | Missed | None:
    """The double normalization of which a division is the end, or how it differs; None if there is no softmax."""
    path, node = [], numerator
    while reader.operation(node) in ("identity", "reshape", "permute"):
        path.append(node)
        node = reader.operand(node)
    operation = reader.operation(node)
    if operation in _OTHER_MAPS:
        article = "an" if operation == "exp" else "a"
        return Missed(
            end,
            f"its map is {article} {operation} ({node.name}) divided by its sum over axis {dim}: external attention "
            "has a softmax over the tokens in the place of it, and no fused call serves",
        )
    if operation != "softmax":
        return None
    first = -3 if isinstance(reader.module(node), torch.nn.Softmax2d) else reader.argument(node, 1, "dim", "axis")
    if not isinstance(first, int):
        return None
    dtype = reader.argument(node, 2, "dtype")
    found = Normalization(
        *(node, end, numerator, first, dim, eps, dtype if isinstance(dtype, torch.dtype) else None),
        frozenset({*path, *between, total} - {end}),
    )
    return _checked(reader, found, path[::-1])


def _checked(reader: Reader, found: Normalization, path: list[Node]) -> Normalization | Missed:
    """A double normalization with the axis of its softmax where the path has moved it, or why it is none."""
    softmax, end, rank = found.softmax, found.end, reader.rank(found.softmax)
    first = found.tokens if rank is None else found.tokens % rank
    tokens: int | None = first if not path else moved_axis(reader, softmax, path, first)
    if tokens is None:
        return Missed(end, f"the axis of its softmax, {first}, is split or joined with another before the sum")
    last = reader.rank(found.numerator)
    slots = found.slots if last is None else found.slots % last
    told = (
        f"{softmax.name} is a softmax over axis {found.tokens}, {end.name} divides by the sum over axis {found.slots}"
    )
    if tokens == slots:
        return Missed(
            end,
            f"{told}: both go over one axis, so the second does nothing. External attention takes the softmax over the "
            "tokens and the sum over the slots: functional.double_normalize(logits, dims=(tokens, slots))",
        )
    batch = moved_axis(reader, softmax, path, 0) if path else 0
    if rank != 2 and slots == batch:
        return Missed(
            end,
            f"{told}: axis 0 is the batch, so its samples are not independent. External attention sums over the slots "
            "of each token: functional.double_normalize(logits, dims=(tokens, slots))",
        )
    region = {softmax, *found.inner}
    users = {user for node in region for user in node.users} - {*region, end}
    used = sorted(user.name for user in users if not _serves(reader, user, region | {end}))
    if used:
        return Missed(end, f"{told}, but {', '.join(used)} reads the map before the division as well")
    if any(reader.changes_in_place(user) for user in reader.operand(softmax).users if user is not softmax):
        return Missed(end, f"{told}, but the logits are changed in place")
    if not reader.in_one_mode((*region, end)):
        return Missed(end, f"{told}, but autocast or no_grad is on at one of them alone")
    return found._replace(tokens=tokens, slots=slots)


def _serves(reader: Reader, node: Node, region: set[Node]) -> bool:
    """Whether a node makes a number, of sizes or of the type of the map, for what is inside of a region alone."""
    if node in reader.shapes or node.op == "output" or node.target in CONDITIONS:
        return False
    return all(user in region or _serves(reader, user, region) for user in node.users)
