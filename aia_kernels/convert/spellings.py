"""What a node of a graph computes, whatever its spelling: a function, a method, a module or an operator of ATen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.submodules import must_be_called
from .storage import Run

#: One name for each operation that has several. An underscore at the end, which marks a change in place, is cut off.
_SAME = {
    "_softmax": "softmax",
    "_unsafe_view": "reshape",
    "add_": "add",
    "clamp_min": "clamp",
    "convolution": "conv",
    "divide": "div",
    "iadd": "add",
    "idiv": "div",
    "itruediv": "div",
    "linalg_norm": "norm",
    "linalg_vector_norm": "norm",
    "moveaxis": "movedim",
    "multiply": "mul",
    "relu_": "relu",
    "silu_": "silu",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
    "truediv": "div",
    "vector_norm": "norm",
    "view": "reshape",
}
_SAME |= {f"conv{n}d": "conv" for n in (1, 2, 3)}
_SAME |= dict.fromkeys(("flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"), "reshape")
_SAME |= dict.fromkeys(("contiguous", "clone", "alias"), "identity")
_SAME |= dict.fromkeys(("permute", "transpose", "movedim", "t", "T", "mT", "H", "mH", "adjoint"), "permute")
_SAME |= {name: _SAME[same] for name, same in _SAME.items() if same in _SAME}

#: Modules that stand for an operation, by their exact class.
_MODULES: dict[type[nn.Module], str] = {
    nn.Softmax: "softmax",
    nn.Softmax2d: "softmax",
    nn.Sigmoid: "sigmoid",
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.Dropout: "dropout",
    nn.Identity: "identity",
    nn.Flatten: "reshape",
    nn.Unflatten: "reshape",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}

_MISSING = object()


class Reader:
    """A graph with what its nodes need to be understood.

    Attributes:
        root: The module whose attributes the graph names.
        graph: The graph.
        shapes: The shape of the result of each node, as far as it is known.
        fixed: Whether the shapes are those of every call.
        runs: What is known of how the results are stored.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: Graph,
        shapes: Mapping[Node, tuple[int, ...]],
        fixed: bool = False,
        runs: Sequence[Run] = (),
    ):
        self.root, self.graph, self.shapes, self.fixed, self.runs = root, graph, shapes, fixed, runs

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def operation(self, node: Any) -> str:
        """The name of what a node computes; "" for what is no call, or a call of what has hooks."""
        if not isinstance(node, Node) or node.op in ("placeholder", "get_attr", "output"):
            return ""
        if (module := self.module(node)) is not None:
            return operation_of(module)
        name = spelling(node)
        if name.removesuffix("_") == "dropout" and not self.dropout_of(node):
            return "identity"
        if name == "getitem" and node.args[0] in self.shapes and _is_whole(node.args[1]):
            return "identity"
        return _SAME.get(name, _SAME.get(name.removesuffix("_"), name.removesuffix("_")))

    def changes_in_place(self, node: Node) -> bool:
        """Whether a call writes into its first argument."""
        name = spelling(node)
        module = self.module(node)
        return (
            (name.endswith("_") and not name.startswith("__"))
            or name in ("iadd", "isub", "imul", "itruediv", "idiv", "setitem")
            or bool(getattr(module, "inplace", node.kwargs.get("inplace", False)))
        )

    def in_one_mode(self, nodes: Iterable[Node]) -> bool:
        """Whether the same modes are on at all of these nodes, such as autocast and no_grad set them. One call in their
        place would run in one mode."""
        wanted, entered, found = {*nodes}, [], set()
        switched: dict[str, tuple] = {}
        for node in self.graph.nodes:
            name = spelling(node)
            if name.lstrip("_").startswith("enter_") or name.endswith("_increment_nesting"):
                entered.append(node)
            elif name.lstrip("_").startswith("exit_") or name.endswith("_decrement_nesting"):
                entered = entered[:-1]
            elif name.startswith("_set_"):
                switched[name] = node.args
            if node in wanted:
                found.add((*entered, *switched.items()))
        return len(found) <= 1

    def argument(self, node: Node, position: int, *names: str, default: Any = None) -> Any:
        """An argument of a call by its position, where the tensor stands at 0, or by one of its names; of a module, its
        attribute."""
        if (module := self.module(node)) is not None:
            found = next((getattr(module, name) for name in names if hasattr(module, name)), _MISSING)
        elif position < len(node.args):
            found = node.args[position]
        else:
            found = next((node.kwargs[name] for name in names if name in node.kwargs), _MISSING)
        return default if found is _MISSING else found

    def operand(self, node: Node) -> Any:
        """The tensor that a call is about."""
        return (
            node.args[0] if node.args else next((node.kwargs[n] for n in ("input", "self") if n in node.kwargs), None)
        )

    def dropout_of(self, node: Node) -> float:
        """The probability of a dropout that is called as a function; 0 where it is off."""
        on = self.argument(node, 2, "training", "train", default=True)
        return self.argument(node, 1, "p", default=0.5) if on else 0.0

    def rank(self, node: Any) -> int | None:
        """The number of axes of the result of a node, if it is known."""
        return len(self.shapes[node]) if node in self.shapes else None


def _is_whole(index: Any) -> bool:
    """Whether an index leaves a tensor as it is."""
    return all(i is Ellipsis or i == slice(None) for i in (index if isinstance(index, tuple) else (index,)))


def spelling(node: Node) -> str:
    """The name under which a function or method is called; an attribute that is a view counts as a method."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return getattr(node.target, "__name__", "")


def operation_of(module: nn.Module) -> str:
    """The name of what a module computes; "" for what is no operation of torch, or must be called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return ""
    if "forward" in module.__dict__:
        return ""
    if isinstance(module, _BatchNorm):
        return "" if must_be_called(module) else "batch_norm"
    kind = next((kind for kind in _MODULES if type(module).forward is kind.forward and isinstance(module, kind)), None)
    if kind is None or (kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dropout) and must_be_called(module)):
        return ""
    return _MODULES[kind]
