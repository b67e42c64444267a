"""What a network has between two linear maps in the place of the double normalization, in its own words."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from .normalizations import Missed
from .products import product_of
from .regions import LAYOUT, is_size
from .spellings import Reader

_MAPS = ("softmax", "log_softmax", "softmin", "gumbel_softmax", "sigmoid", "relu", "exp", "softplus", "tanh")
_OF_AN_AXIS = ("sum", "mean", "norm", "normalize", "amax", "max", "min", "topk", "softmax")
_OTHERS = (
    "mul",
    "div",
    "add",
    "sub",
    "neg",
    "sqrt",
    "pow",
    "clamp",
    "reciprocal",
    "abs",
    "detach",
    "ge",
    "gt",
    "le",
    "lt",
)
_SELECTIONS = ("masked_fill", "where")
_OF_TWO = ("matmul", "mm", "bmm", "baddbmm", "einsum")
#: What is not told, as it changes nothing.
_SILENT = (*LAYOUT, "dropout", "expand", "expand_as", "getitem", "zeros_like", "type_as", "to", "float")


def look_alikes(reader: Reader) -> Iterator[Missed]:
    """The pairs of linear maps with something like the normalization of an attention map between them; and attention
    of tokens to tokens, which has no memory."""
    yield from _between_linear_maps(reader)
    for node in reader.graph.nodes:
        if reader.operation(node) == "softmax" and (told := _of_pairs(reader, node)):
            yield told


def _of_pairs(reader: Reader, softmax: Node) -> Missed | None:
    """A softmax of products of queries with keys whose map meets values; faint, as most transformers have one."""
    logits = _nearest_products(reader, softmax, back=True)
    values = _nearest_products(reader, softmax, back=False)
    if not logits or not values:
        return None
    told = (
        f"{softmax.name} is one softmax over pairs of tokens: its logits are products of queries and keys that are "
        f"both made of the input ({', '.join(node.name for node in logits)}); external attention has memories in the "
        "place of keys, and linear attention makes no map of pairs"
    )
    if len(logits) == len(values) == 1:
        call = "torch.nn.functional.scaled_dot_product_attention"
        serves = f"{call}, with the scale of these logits, computes it without keeping the map"
    else:
        serves = "no call of this package or of torch takes several products in one softmax"
    return Missed(softmax, f"{told}; {serves}", faint=True)


def _nearest_products(reader: Reader, start: Node, back: bool) -> list[Node]:
    """The products of two tensors of the input that a node is made of, or that are made of it, with no product of a
    parameter between."""
    found: dict[Node, None] = {}
    seen, ahead = {start}, [start]
    while ahead:
        node = ahead.pop()
        for other in node.all_input_nodes if back else node.users:
            if other in seen:
                continue
            seen.add(other)
            if product_of(reader, other) is not None:
                continue
            if reader.operation(other) in _OF_TWO:
                found[other] = None
            else:
                ahead.append(other)
    return sorted(found, key=[*reader.graph.nodes].index)


def _between_linear_maps(reader: Reader) -> Iterator[Missed]:
    """The pairs of linear maps with something like the normalization of an attention map between them."""
    for key in reader.graph.nodes:
        if product_of(reader, key) is None:
            continue
        inside = {key: frozenset([key])}  # what is made of the first product alone, and by what
        for node in reader.graph.nodes:
            operands = [operand for operand in node.all_input_nodes if operand in inside]
            value = product_of(reader, node) if operands else None
            if value is not None and value.source in inside:
                if told := _told(reader, key, node, [n for n in inside if n in inside[value.source]]):
                    yield told
            elif operands and _continues(reader, node, inside):
                inside[node] = frozenset([node]).union(*(inside[operand] for operand in operands))


def _continues(reader: Reader, node: Node, inside: dict[Node, frozenset[Node]]) -> bool:
    """Whether a node makes something of what is inside, of numbers, and of masks alone."""
    operation = reader.operation(node)
    if operation in _SELECTIONS or is_size(reader, node):
        return operation in _SELECTIONS
    alone = all(operand in inside or operand not in reader.shapes for operand in node.all_input_nodes)
    return alone and operation in (*_MAPS, *_OF_AN_AXIS, *_OTHERS, *_SILENT)


def _told(reader: Reader, key: Node, value: Node, between: list[Node]) -> Missed | None:
    """How what stands between two products differs from external attention; None where they have little in common."""
    between = [node for node in between if node is not key and reader.operation(node) not in _SILENT]
    softmaxes = [node for node in between if "softm" in reader.operation(node)]
    if not between or not any(reader.operation(node) in _MAPS for node in between):
        return None
    if softmaxes == between and len(between) == 1:
        told = (
            f"{softmaxes[0].name} is the only normalization between {key.name} and {value.name}: external attention "
            "divides the softmax over the tokens by its sum over the slots, as functional.double_normalize does"
        )
    else:
        words = ", ".join(_word(reader, node) for node in between)
        told = (
            f"between {key.name} and {value.name} stand{'s' * (len(between) == 1)} {words}: external attention has a "
            "softmax over the tokens there, divided by eps and its own sum over the slots, and nothing else, as "
            "functional.double_normalize(logits, dims=(tokens, slots), eps=eps) does"
        )
    return Missed((softmaxes or between)[0], told, faint=not softmaxes)


def _word(reader: Reader, node: Node) -> str:
    operation = reader.operation(node)
    place = 2 if operation in ("norm", "normalize", "topk") else 1
    axis = reader.argument(node, place, "dim", "axis") if operation in _OF_AN_AXIS or "softm" in operation else None
    return operation if axis is None else f"{operation} over axis {axis}"
