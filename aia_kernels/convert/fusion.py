"""fuse: the layers of this package found by what flows, in a model or in a graph."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from . import behaviour
from .examples import Shapes, likely_shapes
from .flow import rewrite_forwards
from .graphs import has_fixed_shapes, known_shapes, rewrite, shapes_of
from .report import Converted, LeftAlone, Report, names_of
from .spellings import Reader
from .storage import known_run, seen_in_runs


def fuse(model: nn.Module, *inputs: Any) -> Report:
    """Put fused calls in the place of external attention, the units of Attention in Attention, CBAM, linear and
    efficient attention, wherever they are written, and say what became of what.

    External attention is found by what flows, not by names: a softmax over the tokens, divided by its sum over the
    slots, and the linear maps around them. A softmax over the slots, divided by its sum over the tokens, is found as
    well. So are the units C, ST, CinST, STinC and STinC2: a tensor that is multiplied by gates, each a 3x3x3
    convolution of the maximum and the mean over an axis. So is CBAM, whole or one of its gates: x times a sigmoid of
    what linear maps make of both pools over positions, or a convolution of both over channels. And so are linear and
    efficient attention: what is made of projections of one x is compared with their formulas.

    A graph, as torch.fx.symbolic_trace and the module() of a torch.export.ExportedProgram give it, is rewritten in
    place. Of any other model each forward that has a softmax or gates is recorded and rewritten. The module gets a
    class derived from its own, and keeps its parameters, submodules, keys, hooks and settings. Inputs of another rank
    are recorded when they first come; inputs with further arguments go to its own forward. Before a forward is
    rewritten, it is compared with the new one on small random inputs: outputs, gradients and buffers, in evaluation and
    in training. A graph is compared with what it was before where its inputs have at most 2**18 elements together.

    Args:
        model: Any module.
        *inputs: Inputs of the model, for their shapes. Without them, and in a graph that knows no shapes, inputs are
            tried that the parameters suggest.

    Returns:
        What was fused, what comes close and was left alone, and why; its undo() takes everything back.

    Raises:
        TypeError: The model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    report = Report(model, _by="fuse")
    if isinstance(model, GraphModule):
        _fuse_graph(model, inputs, report)
    else:
        rewrite_forwards(report, names_of(model), {}, _seen(model, inputs) if inputs else None)
    return report


def _fuse_graph(module: GraphModule, inputs: tuple[Any, ...], report: Report) -> None:
    graph, before = module.graph, copy.deepcopy(module.graph)
    shapes = _shapes_in(module, graph, inputs)
    starts = [shapes.get(node) for node in graph.nodes if node.op == "placeholder"]
    fixed = not inputs and has_fixed_shapes(graph)
    runs, known = known_run(graph), [shape for shape in starts if shape is not None]
    if not runs and len(known) == len(starts) and sum(map(math.prod, known)) <= behaviour.LARGEST:
        runs = seen_in_runs(module, graph, known)
    fused, missed = rewrite(Reader(module, graph, shapes, fixed, runs))
    if fused and (reason := behaviour.graph_difference(module, before, graph, starts, fixed)) is not None:
        module.graph = before
        report.left_alone += [LeftAlone((call.node.name,), call.before, reason) for call in fused]
        return
    report.converted += [Converted((call.node.name,), call.before, call.now) for call in fused]
    report.left_alone += [LeftAlone((m.node.name,), m.node.name, m.reason) for m in missed if not m.faint]
    if fused:
        module.recompile()
        report._ways_back.append(functools.partial(setattr, module, "graph", before))


def _shapes_in(module: GraphModule, graph: Graph, inputs: tuple[Any, ...]) -> dict:
    """The shapes in a graph: those of inputs, those that it knows, or those of inputs that are likely."""
    if not inputs and (known := known_shapes(graph)):
        return known
    root = nn.Module()
    blank = {name: behaviour.blank(child, False, "meta") for name, child in module.named_children()}
    root._modules.update(blank)
    for held, of in ((root._parameters, module._parameters), (root._buffers, module._buffers)):
        held.update({name: None if p is None else p.detach().to("meta") for name, p in of.items()})
    if inputs:
        likely: Any = [tuple(tuple(x.shape) for x in inputs)]
    else:
        needed = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
        likely = (shapes for shapes, _ in likely_shapes(module, [str(node.target) for node in needed]))
    for shapes in likely:
        found = shapes_of(root, graph, shapes)
        if found is not None:
            return found
    return {}


def _seen(model: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, Shapes]:
    """The shapes of the inputs of each module in one call of a copy of a model on the meta device."""
    seen: dict[nn.Module, Shapes] = {}
    blank = behaviour.blank(model, False, "meta")
    originals = dict(zip(blank.modules(), model.modules(), strict=True))

    def see(module: nn.Module, given: tuple[Any, ...]) -> None:
        if all(isinstance(x, Tensor) for x in given):
            seen.setdefault(originals[module], tuple(tuple(x.shape) for x in given))

    for module in blank.modules():
        module.register_forward_pre_hook(see)
    with torch.no_grad(), torch.device("meta"):
        blank(*(x.to("meta") if isinstance(x, Tensor) else x for x in inputs))
    return seen
