"""Graphs of what a module computes: the shapes in them, how they are rewritten, and their source."""

from __future__ import annotations

import importlib
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node

from . import calls, costs
from .cbam import FoundGates, find_gates
from .look_alikes import look_alikes
from .memories import FoundMemory, find_memories
from .normalizations import Missed, Normalization, find_normalizations
from .products import Product
from .regions import Region, find_region, is_arranged, is_number, is_size
from .softmaxes import merge_softmaxes, name_softmaxes, settle
from .spellings import Reader, spelling
from .storage import storage_of
from .units import FoundGate, FoundUnit, find_units


def known_shapes(graph: Graph) -> dict[Node, tuple[int, ...]]:
    """The shapes that an exporter or a compiler has left in a graph."""
    found = {}
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, Tensor):
            sizes = tuple(size if isinstance(size, int) else size.node.hint for size in value.shape)
            if all(size is not None for size in sizes):
                found[node] = sizes
    return found


def has_fixed_shapes(graph: Graph) -> bool:
    """Whether a compiler or an exporter has made a graph for inputs of the shapes that it knows, and for no others."""
    inputs = [node.meta for node in graph.nodes if node.op == "placeholder"]
    made = any("example_value" in node.meta or isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes)
    values = [value for meta in inputs for value in (meta.get("val"), meta.get("example_value")) if value is not None]
    tensors = [value for value in values if isinstance(value, Tensor)]
    known = len(values) == len(inputs) and not any(isinstance(value, torch.SymInt) for value in values)
    return made and known and all(isinstance(size, int) for value in tensors for size in value.shape)


def casts_to_single(graph: Graph) -> bool:
    """Whether a graph casts something to float32."""
    named = (torch.float32 in (*node.args, *node.kwargs.values()) for node in graph.nodes)
    return any(named) or any(spelling(node) == "float" for node in graph.nodes)


class _Shapes(Interpreter):
    """Runs a graph and keeps the shape of each result."""

    def __init__(self, module: nn.Module, graph: Graph):
        super().__init__(module, graph=graph)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


def shapes_of(module: nn.Module, graph: Graph, inputs: Iterable[tuple[int, ...]]) -> dict[Node, tuple[int, ...]] | None:
    """The shape of every tensor in a graph, for a module on the meta device and inputs of these shapes; None where the
    graph does not run on them.
    """
    shapes = _Shapes(module, graph)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.no_grad(), torch.device("meta"), torch.autocast("cpu", enabled=False):
            shapes.run(*(i if isinstance(i, int) else torch.zeros(i, dtype=dtype) for i in inputs))
    except Exception:
        return None
    return shapes.found


class Fused(NamedTuple):
    """A call that was put into a graph: its node, what stood there, the name of the function that it calls, and how to
    count whether it pays, None where it always does or the inputs do not tell."""

    node: Node
    before: str
    now: str
    cost: costs.Cost | None = None


def rewrite(reader: Reader) -> tuple[list[Fused], list[Missed]]:
    """Put fused calls into a graph, in place.

    Returns:
        The calls; and what came close, and was left.
    """
    fused: list[Fused] = []
    missed: list[Missed] = []
    for unit in [*find_units(reader)]:
        if isinstance(unit, Missed):
            missed.append(unit)
        else:
            before = f"{unit.nodes[0].name} to {unit.end.name}"
            cost = costs.of_unit(reader, unit)
            fused.append(Fused(_recalibrate(reader, unit), before, unit.form.unit, cost))
    for gates in [*find_gates(reader)]:
        if isinstance(gates, Missed):
            missed.append(gates)
        else:
            before = f"{gates.nodes[0].name} to {gates.end.name}"
            cost = costs.of_gates(reader, gates)
            fused.append(Fused(_gated(reader, gates), before, gates.name, cost))
    for memory in [*find_memories(reader)]:
        if isinstance(memory, Missed):
            missed.append(memory)
        else:
            before = f"{memory.nodes[0].name} to {memory.end.name}"
            cost = costs.of_memory(reader, memory)
            fused.append(Fused(_remembered(reader, memory), before, memory.name, cost))
    merge_softmaxes(reader)
    if written_out := name_softmaxes(reader):
        doubled = (found for found in find_normalizations(reader) if isinstance(found, Normalization))
        settle(reader, written_out, {found.softmax for found in doubled})
    normalizations = [*find_normalizations(reader)]
    for found in normalizations or [*look_alikes(reader)]:
        if isinstance(found, Missed):
            missed.append(found)
            continue
        before, region = f"{found.softmax.name} to {found.end.name}", find_region(reader, found)
        cost = costs.of_attention(reader, found, region)
        if region is not None:
            now = "external_attention" if region.block is None else "external_attention_block"
            fused.append(Fused(_attend(reader, found, region), before, now, cost))
        else:
            fused.append(Fused(_normalize(reader, found), before, "double_normalize", cost))
    if fused:
        _remove_unused(reader)
    return fused, missed


def _attend(reader: Reader, found: Normalization, region: Region) -> Node:
    """Put one call in the place of a region."""
    graph, block = reader.graph, region.block
    nodes = region.nodes if block is None else (*region.nodes, *block.nodes)
    with graph.inserting_before(nodes[-1]):
        products = region.inner, region.key, region.value, region.outer
        weights = tuple(
            None
            if p is None
            else _matrix(graph, p, region.scale if p is region.key else 1.0, region.form.heads, *innermost)
            for p, innermost in zip(products, region.innermost, strict=True)
        )
        biases = tuple(None if p is None else _tensor(graph, p.bias) for p in products)
        stored = _stored(reader, region.x, nodes)
        if block is not None and block.residual is not None:
            stored |= _stored_as_residual(reader, region.x, block.residual, nodes[-1])
        if block is None:
            dropout = _dropout(reader, region.dropout)
            arguments: Any = region.x, weights, biases, region.form, found.eps, dropout
            new = graph.call_function(calls.attend, arguments, stored)
        else:
            residual = block.residual is region.x or block.residual or False
            settings = _norm(reader, block.norm), found.eps, block.activation, residual
            new = graph.call_function(calls.block, (region.x, weights, biases, *settings), stored)
    _replace(reader, nodes[-1], new)
    for node in nodes[:-1]:
        for user in list(node.users):
            if is_size(reader, user) and reader.shapes[node] == reader.shapes[region.x]:
                user.replace_input_with(node, region.x)
    remove_with_sizes(reader, nodes)
    return new


def _recalibrate(reader: Reader, unit: FoundUnit) -> Node:
    """Put one call in the place of a unit of Attention in Attention."""
    graph = reader.graph
    with graph.inserting_before(unit.end):
        gates = tuple(_gate(reader, gate) for gate in unit.gates)
        stored = _stored(reader, unit.x, (unit.end,))
        new = graph.call_function(calls.recalibrate, (unit.x, unit.form, gates), stored)
    return _put(reader, unit.nodes, unit.end, new)


def _gated(reader: Reader, found: FoundGates) -> Node:
    """Put one call in the place of CBAM, or of one of its gates."""
    graph, channel, spatial = reader.graph, found.channel, found.spatial
    with graph.inserting_before(found.end):
        mlp: Any = None
        if channel is not None:
            products = channel.first, channel.second
            tensors = ((_matrix(graph, p, 1.0, 1, False, False), _tensor(graph, p.bias)) for p in products)
            mlp = (*(t for pair in tensors for t in pair), channel.pools)
        gate: Any = None
        if spatial is not None:
            gate = (*_convolution(reader, spatial.convolution), _norm(reader, spatial.norm), spatial.order)
        new = graph.call_function(calls.gates, (found.x, mlp, gate), _stored(reader, found.x, (found.end,)))
    return _put(reader, found.nodes, found.end, new)


def _remembered(reader: Reader, found: FoundMemory) -> Node:
    """Put one call in the place of attention by a memory per sample."""
    graph = reader.graph
    with graph.inserting_before(found.end):
        weights, biases = [], []
        for rows in (found.query, found.key, found.value):
            product, part = rows.product, slice(rows.start, rows.stop)
            weight, bias = _matrix(graph, product, 1.0, 1, False, False), _tensor(graph, product.bias)
            if product.out > rows.stop - rows.start:
                weight = graph.call_function(operator.getitem, (weight, part))
                bias = None if bias is None else graph.call_function(operator.getitem, (bias, part))
            weights.append(weight)
            biases.append(bias)
        if found.outer is not None:
            weights.append(_matrix(graph, found.outer, 1.0, 1, False, False))
            biases.append(_tensor(graph, found.outer.bias))
        form = calls.MemoryForm(
            *found.form[:3], found.factors, found.averaged, found.residual, found.feature, found.out
        )
        arguments = found.x, tuple(weights), tuple(biases), found.gamma, form
        stored = _stored(reader, found.x, (*found.nodes, found.end))
        new = graph.call_function(calls.remember, arguments, stored)
    return _put(reader, found.nodes, found.end, new)


def _put(reader: Reader, nodes: Sequence[Node], end: Node, new: Node) -> Node:
    """Put a call, which is returned, in the place of nodes up to an end."""
    reader.shapes = {**reader.shapes, new: reader.shapes[end]}
    _replace(reader, end, new)
    unused = {user for node in nodes[:-1] for user in node.users if not user.users}
    remove_with_sizes(reader, {*nodes} | unused)
    return new


def _stored(reader: Reader, x: Node, nodes: Sequence[Node]) -> dict[str, Any]:
    """What tells a call how its result is stored: that of the last of the nodes in whose place it stands, and the
    weights of the convolutions among them."""
    storage = storage_of(reader.runs, x, nodes[-1])
    if storage is None or storage.as_given:
        return {} if storage is None else {"storage": storage}
    weights: dict[Any, None] = {}
    for node in (n for n in nodes if reader.operation(n).startswith("conv")):
        if (weight := _convolution(reader, node)[0]) is not None:
            weights[weight] = None
    return {"storage": storage, "convolutions": tuple(weights)}


def _stored_as_residual(reader: Reader, x: Node, residual: Node, end: Node) -> dict[str, Any]:
    """What tells a call that its result is stored as what is added, and not as x: it came first in the sum."""
    of_x, of_residual = (storage_of(reader.runs, node, end) for node in (x, residual))
    if of_residual is None or not of_residual.as_given or (of_x is not None and of_x.as_given):
        return {}
    return {"storage": of_residual, "stored_as": residual}


def _convolution(reader: Reader, node: Node) -> tuple[Node | None, ...]:
    """The weight and the bias of a convolution that is a module or a function."""
    weight, bias = (reader.argument(node, i, name) for i, name in ((1, "weight"), (2, "bias")))
    if reader.module(node) is not None:
        weight, bias = f"{node.target}.weight", None if bias is None else f"{node.target}.bias"
    return tuple(_tensor(reader.graph, held) for held in (weight, bias))


def _gate(reader: Reader, found: FoundGate) -> tuple:
    """What calls.recalibrate takes of a gate."""
    form = calls.GateForm(found.order, found.gate.flipped, found.scale)
    return form, *_convolution(reader, found.gate.convolution), _norm(reader, found.gate.norm)


def _dropout(reader: Reader, node: Node | None) -> Any:
    """What calls.attend takes of a dropout that is a module or a function."""
    if node is None:
        return None
    return reader.dropout_of(node) if reader.module(node) is None else reader.graph.get_attr(str(node.target))


def _norm(reader: Reader, node: Node | None) -> Any:
    """What calls.block takes of a batch norm that is a module or a function."""
    if node is None or reader.module(node) is not None:
        return None if node is None else reader.graph.get_attr(str(node.target))
    names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    if node.target is not torch.nn.functional.batch_norm:  # torch.batch_norm, as ATen has it
        names = ["weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"]
    defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
    given = {n: reader.argument(node, i, n, default=defaults.get(n)) for i, n in enumerate(names, 1)}
    return tuple(given[n] for n in ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"))


def _matrix(graph: Graph, product: Product, scale: float, heads: int, rows: bool, columns: bool) -> Node:
    weight = _tensor(graph, product.weight)
    found = graph.call_function(calls.matrix, (weight, product.sizes, product.transposed, heads, rows, columns))
    return found if scale == 1.0 else graph.call_function(operator.mul, (found, scale))


def _tensor(graph: Graph, held: Node | str | None) -> Node | None:
    return graph.get_attr(held) if isinstance(held, str) else held


def _replace(reader: Reader, old: Node, new: Node) -> None:
    new.meta = {name: value for name, value in old.meta.items() if name in ("val", "example_value")}
    for run in reader.runs:
        if old in run.orders:
            run.orders[new] = run.orders[old]
    old.replace_all_uses_with(new)


def _normalize(reader: Reader, found: Normalization) -> Node:
    """Put a double normalization of the logits, moved as its map was moved, in the place of one that was found."""
    graph = reader.graph
    logits, numerator = found.softmax.all_input_nodes[0], found.numerator
    if numerator is found.softmax:
        numerator = logits
    arguments = (numerator, found.tokens, found.slots, found.eps, found.dtype)
    stored = _stored(reader, numerator, (found.end,))
    with graph.inserting_before(found.end):
        new = graph.call_function(calls.normalize, arguments, stored)
    _replace(reader, found.end, new)
    found.softmax.replace_all_uses_with(logits)
    remove([found.end, *found.inner, found.softmax])
    return new


def _remove_unused(reader: Reader) -> None:
    """Remove sizes, numbers made of them, and arranged or repeated tensors that nothing uses any more."""
    for node in reversed(reader.graph.nodes):
        if not node.users and (is_number(reader, node) or is_arranged(reader, node)):
            reader.graph.erase_node(node)


def remove(nodes: Iterable[Node]) -> None:
    """Remove those nodes of which nothing is left that uses them."""
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            node.graph.erase_node(node)


def remove_with_sizes(reader: Reader, nodes: Iterable[Node]) -> None:
    """Remove nodes, and the numbers that were asked of them for one another."""
    nodes = set(nodes)
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user not in nodes and user not in reader.shapes and user.target not in calls.CONDITIONS:
                nodes.add(user)
                waiting.append(user)
    remove(nodes)


class Imported(NamedTuple):
    """Stands for a module of Python, which cannot be pickled."""

    name: str


def source_of(graph: Graph) -> tuple[str, Mapping[str, Any]]:
    """The source of a graph as a method forward, and the names that it uses."""
    code = graph.python_code("self")
    named = {n: Imported(v.__name__) if isinstance(v, types.ModuleType) else v for n, v in code.globals.items()}
    return _with_autocast(code.src, named), named


def _with_autocast(source: str, names: Mapping[str, Any]) -> str:
    """A source, a statement a line, with the lines between entering and leaving autocast in a with statement."""
    entering = [name for name, value in names.items() if value is calls.enter_autocast]
    leaving = [name for name, value in names.items() if value is calls.exit_autocast]
    lines, depth = [], 0
    for line in source.splitlines():
        indent, (statement, *after) = "    " * depth, line.split(";  ", 1)
        if (made := _call_of(statement, entering)) is not None:
            start = statement[: len(statement) - len(statement.lstrip())]
            lines += [f"{indent}{start}with {made}:", f"{indent}    {start}pass"]
            depth += 1
        elif _call_of(statement, leaving) is not None:
            depth -= 1
        else:
            lines.append(indent + line)
            continue
        lines += [indent + start + statement for statement in after if made is not None]
    return "\n".join(lines)


def _call_of(statement: str, functions: Iterable[str]) -> str | None:
    """The call of one of some functions in an assignment, or None."""
    _, equals, made = statement.partition(" = ")
    return made if equals and made.startswith(tuple(f"{name}(" for name in functions)) else None


def method_of(source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    """The method forward of a source."""
    found = ((n, importlib.import_module(v.name) if isinstance(v, Imported) else v) for n, v in names.items())
    space: dict[str, Any] = dict(found)
    exec(source, space)
    return space["forward"]
