"""Products with a matrix in a graph: 1x1 convolutions, linear layers, matmul, einsum."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Node

from ..modules.submodules import is_pointwise
from .axes import Axis, named, order_of
from .spellings import Reader


class Product(NamedTuple):
    """A linear map of one axis, the same for all others.

    node: its result, whose axes are those of source but for axis. source: what it is applied to. axis: counted from the
    first. weight: a node, or the name of a parameter. sizes: those of the matrix that the weight is, [out, in], or
    [in, out] where transposed. bias: a node, the name of a parameter, or None. order: for each axis of the result that
    of the source, where it moves them.
    """

    node: Node
    source: Node
    axis: int
    weight: Node | str
    sizes: tuple[int, int]
    transposed: bool
    bias: Node | str | None
    order: tuple[int, ...] | None = None

    @property
    def out(self) -> int:
        """The features of the result."""
        return self.sizes[1] if self.transposed else self.sizes[0]


def product_of(reader: Reader, node: Any) -> Product | None:
    """The product that a node is, or None."""
    operation = reader.operation(node)
    if operation in ("linear", "conv"):
        return _layer(reader, node, operation)
    if operation in ("matmul", "mm", "bmm"):
        return _matmul(reader, node, *node.args[:2])
    if operation == "addmm" and len(node.args) == 3 and not node.kwargs:
        found = _matmul(reader, node, *node.args[1:])
        bias = node.args[0]
        shape = shape_of(reader, bias)
        right = found is not None and found.source is node.args[1] and shape is not None
        return found._replace(bias=bias) if found and right and shape == (found.out,) else None
    if operation == "tensordot":
        return _tensordot(reader, node)
    return _einsum(reader, node) if operation == "einsum" else None


def _layer(reader: Reader, node: Node, operation: str) -> Product | None:
    weight: Any
    bias: Any
    if (module := reader.module(node)) is not None:
        shape = tuple(module.weight.shape)  # type: ignore[union-attr]
        weight, bias = f"{node.target}.weight", None if module.bias is None else f"{node.target}.bias"
        plain = isinstance(module, nn.Linear) or is_pointwise(module)
    else:
        weight, bias = reader.argument(node, 1, "weight"), reader.argument(node, 2, "bias")
        shape = shape_of(reader, weight)
        plain = operation == "linear" or _is_plain(reader, node, shape)
    source, rank = reader.operand(node), reader.rank(node)
    if not plain or shape is None or len(shape) < 2 or rank is None or (operation == "conv" and rank != len(shape)):
        return None
    axis = rank - 1 if operation == "linear" else 1
    return Product(node, source, axis, weight, shape[:2], False, bias)


def _is_plain(reader: Reader, node: Node, shape: tuple[int, ...] | None) -> bool:
    """Whether a convolution that is called as a function is a product for each position."""
    if shape is None or math.prod(shape[2:]) != 1:
        return False

    def all_are(value: Any, expected: int) -> bool:
        return value in (expected, "valid", "same") or (isinstance(value, (list, tuple)) and set(value) <= {expected})

    settings = (("stride", 1), ("padding", 0), ("dilation", 1))
    plain = all(all_are(reader.argument(node, 3 + i, n, default=v), v) for i, (n, v) in enumerate(settings))
    whole = "transposed" not in str(getattr(node.target, "_schema", ""))
    return plain and whole and reader.argument(node, 6, "groups", default=1) == 1


def shape_of(reader: Reader, weight: Any) -> tuple[int, ...] | None:
    """The shape of a weight: of a tensor in the graph, or of a parameter that it names."""
    if weight in reader.shapes:
        return reader.shapes[weight]
    if isinstance(weight, Node) and weight.op == "get_attr":
        found: Any = reader.root
        for name in str(weight.target).split("."):
            found = getattr(found, name, None)
        return tuple(found.shape) if isinstance(found, Tensor) else None
    return None


def _matmul(reader: Reader, node: Node, a: Any = None, b: Any = None) -> Product | None:
    """a @ b, where one of both is a single matrix."""
    left, right = _single(reader, a), _single(reader, b)
    rank = reader.rank(node)
    if rank is None or not isinstance(a, Node) or not isinstance(b, Node):
        return None
    if right is not None and reader.rank(a) == rank:
        matrix, sizes, transposed = right
        return Product(node, a, rank - 1, matrix, sizes, not transposed, None)
    if left is not None and reader.rank(b) == rank:
        return Product(node, b, rank - 2, *left, None)
    return None


def _single(reader: Reader, node: Any) -> tuple[Node, tuple[int, int], bool] | None:
    """The matrix that is one for all samples, before it was repeated for each, if it was; its sizes, and whether it was
    transposed then."""
    transposed = False
    while (operation := reader.operation(node)) in ("expand", "repeat", "permute", "identity"):
        operand, rank = reader.operand(node), reader.rank(node)
        before, after = shape_of(reader, operand), shape_of(reader, node)
        if operation == "permute":
            order = None if rank is None else order_of(node, rank)
            if rank is None or rank < 3 or order != [*range(rank - 2), rank - 1, rank - 2]:
                break
            transposed = not transposed
        elif before is None or after is None or before[-2:] != after[-2:]:
            return None
        node = operand
    shape = shape_of(reader, node)
    if shape is None or len(shape) < 2 or math.prod(shape[:-2]) != 1:
        return None
    return node, (shape[-2], shape[-1]), transposed


def _tensordot(reader: Reader, node: Node) -> Product | None:
    """A tensor and a matrix, with one axis of each."""
    x, matrix, *dims = (*node.args, *(node.kwargs[name] for name in ("dims",) if name in node.kwargs))
    found, rank = _single(reader, matrix), reader.rank(x)
    if found is None or rank is None or reader.rank(node) != rank or len(dims) != 1 or matrix not in reader.shapes:
        return None
    (given,) = dims
    axes = ((rank - 1,), (0,)) if given == 1 else tuple((a,) if isinstance(a, int) else tuple(a) for a in given)
    if len(axes) != 2 or any(len(a) != 1 for a in axes) or len(reader.shapes[matrix]) != 2:
        return None
    axis, contracted = axes[0][0] % rank, axes[1][0] % 2
    weight, sizes, transposed = found
    order = (*(i for i in range(rank) if i != axis), axis)
    moved = None if axis == rank - 1 else order
    return Product(node, x, axis, weight, sizes, (contracted == 0) != transposed, None, moved)


def _einsum(reader: Reader, node: Node) -> Product | None:
    """An einsum of a tensor and a matrix, in which one letter of the tensor gives way to another; axes may move."""
    equation: Any = node.args[0]
    operands = list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or equation.count("->") != 1:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    for matrix, tensor in ((1, 0), (0, 1)):
        rank, found = reader.rank(operands[tensor]), _single(reader, operands[matrix])
        if rank is None or found is None or len(w := letters[matrix]) != 2:
            continue
        dots = "ABCDEFGH"[: max(0, rank - len(letters[tensor].replace("...", "")))]
        x, y = (part.replace("...", dots) for part in (letters[tensor], result))
        weight, sizes, transposed = found
        for old, new in ((w[0], w[1]), (w[1], w[0])):
            if old in x and new not in x and len(set(x)) == len(x) and sorted(x.replace(old, new)) == sorted(y):
                order = tuple(x.index(old if letter == new else letter) for letter in y)
                moved = None if order == (*range(rank),) else order
                return Product(
                    node, operands[tensor], x.index(old), weight, sizes, (w[0] == old) != transposed, None, moved
                )
    return None


def applied(product: Product, axes: list[Axis]) -> tuple[list[Axis], Axis]:
    """The axes of the result of a product, from those of its source, and the one that it makes."""
    (made,) = named((product.out,), "made")
    result = [*axes[: product.axis], made, *axes[product.axis + 1 :]]
    return result if product.order is None else [result[i] for i in product.order], made
