"""Layers found by what flows in a module, not by names: its own forward is recorded and rewritten.

The module gets a class of its own, derived from that which it had, whose forward is the rewritten one. Everything else
stays: parameters, submodules, hooks, methods. Inputs that the recorded forward does not hold for are recorded when they
first come, if they are of another rank or of sizes by which the forward decides. Where that fails, and with further
arguments, they go to the forward that the module had.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from .. import backends
from ..common.tracing import is_observed, is_traced, needs_reference
from ..modules.submodules import is_pointwise
from . import behaviour
from .calls import NotAsRecorded
from .costs import Cost
from .examples import Shapes, example_of, has_both_gates, has_gates, holds_a_gate_of_cbam, holds_gates, likely_shapes
from .graphs import casts_to_single, method_of, rewrite, source_of
from .names import names_in
from .normalizations import Missed
from .published import FUSED_LAYERS
from .recording import DoesNotRun, record, run
from .report import Converted, LeftAlone, Report, class_name
from .spellings import Reader, operation_of
from .storage import seen_in_runs

#: What the code of a forward names if there can be something to find.
_TELLING = ("softmax", "sigmoid")
_TELLING_ALONE = ("exp", "logsumexp")
#: The same of linear attention, where a module has linear maps beside.
_OF_MEMORIES = frozenset({"softplus", "norm", "normalize", "rsqrt", "l2_norm", "elu"})


class Recipe(NamedTuple):
    """How the forward of a module was rewritten.

    kind: its class before. sources: the code of the forward and the names that it uses, by training mode. ranks: the
    number of axes of each input that it holds for, None for an integer. read: the submodules that it reads without
    calling them, and what they compute. costs: those of the calls that may not pay, nothing where one always does.
    """

    kind: type[nn.Module]
    sources: Mapping[bool, tuple[str, Mapping[str, Any]]]
    ranks: tuple[int | None, ...]
    read: Mapping[str, str]
    costs: tuple[Cost, ...] = ()


class Flow(NamedTuple):
    """What was made of a module: the class that computes the same, and the names of the functions that it calls."""

    layer: type[nn.Module]
    calls: tuple[str, ...]


def is_rewritten(module: nn.Module) -> bool:
    """Whether the forward of a module has been rewritten."""
    return hasattr(type(module), "_recipe")


def own_class(module: nn.Module) -> Any:
    """The class that a module has, or had before its forward was rewritten."""
    recipe: Recipe | None = getattr(type(module), "_recipe", None)
    return type(module) if recipe is None else recipe.kind


def rewrite_forwards(
    report: Report,
    names: Mapping[nn.Module, list[str]],
    reasons: Mapping[nn.Module, str],
    seen: Mapping[nn.Module, Shapes] | None = None,
) -> None:
    """Rewrite the forwards of those modules of a model in which external attention or a unit of Attention in Attention
    flows, and report what was done.

    Args:
        report: Of what was done before; what is done here is added.
        names: The modules and their names.
        reasons: Why those that look like published layers are none. It is reported unless something is found here.
        seen: The shapes of the inputs of modules, where they are known.
    """
    done: dict[nn.Module, Flow | Missed | str] = {}
    tried: dict[Any, Flow | Missed | str | None] = {}
    inside = {part for module in names if type(module) in FUSED_LAYERS for part in module.modules()}
    for module in _in_turn(names):
        if module in inside or is_rewritten(module):
            continue
        if not (module in reasons or may_hold(module)):
            continue
        shapes = None if seen is None else seen.get(module)
        key = behaviour.signature(module), shapes
        if key not in tried:
            try:
                with behaviour.undisturbed():
                    tried[key] = rewritten(module, shapes)
            except Exception as error:  # whatever a forward of anybody's does: it is left alone
                tried[key] = f"its flow cannot be followed: {type(error).__name__}: {behaviour.line(error)}"
        if (found := tried[key]) is not None:
            done[module] = found
            if isinstance(found, Flow):
                report._ways_back.append(functools.partial(setattr, module, "__class__", type(module)))
                module.__class__ = found.layer
                inside |= {*module.modules()} if _is_whole(module) else set()
    for module, known_as in names.items():
        told = done.get(module)
        if isinstance(told, Flow):
            report.converted.append(
                Converted(tuple(known_as), class_name(module), " and ".join(dict.fromkeys(told.calls)))
            )
        elif isinstance(told, Missed) and any(isinstance(done.get(m), Missed) for m in [*module.modules()][1:]):
            continue  # it is told of a module inside
        elif reason := _likeliest(reasons.get(module), told):
            report.left_alone.append(LeftAlone(tuple(known_as), class_name(module), reason))


def _in_turn(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules in the order in which their forwards are looked at.

    Those inside come first, so that what is around calls them. But what has the gates of a unit of Attention in
    Attention or of CBAM, and nothing else, comes before the gates themselves. A module without parameters, a
    normalization of one's own, comes last: where it stands between two products, all of them are one call.
    """
    outside_first = [*modules]
    whole = [m for m in outside_first if _is_whole(m) and not type(m).__module__.startswith("torch.")]
    rest = [m for m in outside_first[::-1] if m not in {*whole}]
    return whole + sorted(rest, key=lambda module: next(module.parameters(), None) is None)


def _is_whole(module: nn.Module) -> bool:
    """Whether a module has the gates of one layer, and nothing else."""
    return has_gates(module) or has_both_gates(module)


#: How the reasons begin that say little of a layer that is not the published one.
_VAGUE = ("its forward fails", "its forward sets autocast", "its y ")


def _likeliest(as_published: str | None, told: Missed | str | None) -> str | None:
    """The reason that helps: what comes close to external attention; why it is not the published layer of which it has
    the submodules, if that names something and not only how far results are apart; or why its flow is unknown."""
    vague = as_published is None or as_published.startswith(_VAGUE)
    if isinstance(told, Missed) and (vague or not (told.of_unit or told.faint)):
        return None if told.faint and as_published is None else told.reason
    if isinstance(told, Missed):
        return as_published
    return told or as_published if vague else as_published


def may_hold(module: nn.Module) -> bool:
    """Whether the forward of a module, its other methods and the functions that these call name a softmax, or a module
    that is one; or whether it has the parameters of gates."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if holds_gates(module) or has_both_gates(module) or holds_a_gate_of_cbam(module):
        return True
    for child in module.children():
        if isinstance(child, (nn.Softmax, nn.Softmax2d, nn.Sigmoid)) or (_is_open(child) and may_hold(child)):
            return True
    names = names_in(own_class(module))
    if not _OF_MEMORIES.isdisjoint(names) and sum(map(_is_linear, module.children())) >= (
        1 if names & {"einsum", "matmul", "bmm"} else 3
    ):
        return True
    return any(word in name.lower() for name in names for word in _TELLING) or not names.isdisjoint(_TELLING_ALONE)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_pointwise(module)


def rewritten(
    module: nn.Module, seen: Shapes | None = None, ranks: tuple[int | None, ...] | None = None
) -> Flow | Missed | str | None:
    """The class that gives a module the same forward by fused calls; or what comes close to external attention in it;
    or why nothing is known of it; or None, where nothing comes close.

    Args:
        module: Any module; it is not changed.
        seen: The shapes of its inputs, where they are known.
        ranks: The number of axes of each, None for an integer, where that is known.
    """
    if "forward" in module.__dict__:
        return None
    if (inputs := _inputs(module)) is None:
        return None
    if asked := sorted(name for child in module.modules() for name in names_in(own_class(child)) if _asks(name)):
        serves = "torch.compile(model, backend=aia_kernels.fuse_backend) fuses what it computes"
        return f"its forward may take another way under autocast ({asked[0]}); {serves}"
    likely = [(seen, seen)] if seen is not None else list(likely_shapes(module, inputs))
    if ranks is not None:
        likely = [pair for pair in likely if _ranks(pair[0]) == ranks]
    first = _attempt(module, inputs, likely, opened=False)
    is_one_call = isinstance(first, Flow) and "double_normalize" not in first.calls
    if is_one_call and not holds_gates(module) and not has_both_gates(module):
        return first
    second = _attempt(module, inputs, likely, opened=True)
    if isinstance(second, Flow) and (not isinstance(first, Flow) or _fuses_more(second, first)):
        return second
    return second if isinstance(second, Missed) and not isinstance(first, Flow) else first or second


def _asks(name: str) -> bool:
    """Whether a function of torch tells how autocast is set: what comes of it, no trial shows."""
    return name.startswith(("is_autocast_", "get_autocast_"))


def _fuses_more(flow: Flow, other: Flow) -> bool:
    """Whether what was made of a module with its submodules opened is to be preferred."""
    parts = "double_normalize", "ChannelGate", "SpatialGate"
    if "CBAM" in flow.calls and "CBAM" not in other.calls:
        return True
    alone = [sum(call in parts for call in of.calls) for of in (flow, other)]
    return alone[0] < alone[1] or (alone[0] == alone[1] == 0 and len(flow.calls) > len(other.calls))


def _inputs(module: nn.Module) -> list[str] | None:
    """The names of what a forward takes that has no default; None if it takes nothing, or keywords alone."""
    parameters = list(inspect.signature(own_class(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return [p.name for p in needed] if 1 <= len(needed) <= 4 and parameters[: len(needed)] == needed else None


def _ranks(shapes: Shapes) -> tuple[int | None, ...]:
    return tuple(None if isinstance(shape, int) else len(shape) for shape in shapes)


def _attempt(
    module: nn.Module, inputs: list[str], likely: list[tuple[Shapes, Shapes]], opened: bool
) -> Flow | Missed | str | None:
    """One attempt, with the forwards of submodules recorded in their places or not."""
    graphs: dict[bool, Graph] = {}
    calls: list[str] = []
    costs: list[Cost | None] = []
    read: dict[str, str] = {}
    for training in (True, False):
        recorded = _recorded(module, inputs, training, opened, likely)
        if isinstance(recorded, Exception):
            told = f"{type(recorded).__name__}: {behaviour.line(recorded)}"
            suspicious = {"sum", "normalize"} & names_in(own_class(module))
            serves = "torch.compile(model, backend=aia_kernels.fuse_backend) fuses what it computes"
            return f"its forward cannot be recorded by torch.fx: {told}; {serves}" if suspicious else None
        if recorded is None:
            return "its forward runs on no input that its parameters suggest; fuse(model, *inputs) is told one"
        graph, known, shapes = recorded
        before = _called(graph)
        runs = seen_in_runs(behaviour.blank(module, training), graph, shapes[0])
        fused, missed = rewrite(Reader(module, graph, known, runs=runs))
        if not fused:
            return missed[0] if missed else None
        likely, graphs[training], calls = [shapes], graph, [call.now for call in fused]
        costs = [call.cost for call in fused]
        read |= {name: operation_of(module.get_submodule(name)) for name in sorted(before - _called(graph))}
    sources = {training: source_of(graph) for training, graph in graphs.items()}
    recipe = Recipe(
        own_class(module),
        sources,
        _ranks(likely[0][0]),
        read,
        tuple(cost for cost in costs if cost is not None) if None not in costs else (),
    )
    layer: Any = rewritten_class(recipe)
    single = any(casts_to_single(graph) for graph in graphs.values())
    reason = _compared(module, layer, likely[0], single, torch.float64)
    if single and reason is not None and reason.startswith("its forward fails"):
        reason = _compared(module, layer, likely[0], single, torch.float32)
    return Flow(layer, tuple(calls)) if reason is None else reason


def _compared(
    module: nn.Module, layer: Any, shapes: tuple[Shapes, Shapes], single: bool, dtype: torch.dtype
) -> str | None:
    """How a rewritten forward differs from that of the module, on the inputs as recorded and on others, or None."""
    tolerance = behaviour.SINGLE_TOLERANCE if single else behaviour.TOLERANCE
    reason = None
    for sizes, tried, may_fail in ((shapes[0], "as recorded", False), (shapes[1], "on others", True)):
        layer._tried = tried
        example = example_of(sizes, large=may_fail)
        reason = reason or behaviour.difference(module, layer, {}, example, None, tolerance, True, may_fail, dtype)
    layer._tried = None
    return reason


def _recorded(
    module: nn.Module, inputs: list[str], training: bool, opened: bool, likely: list[tuple[Shapes, Shapes]]
) -> tuple[Graph, Mapping[Node, tuple[int, ...]], tuple[Shapes, Shapes]] | Exception | None:
    """The graph of a forward, the shapes in it, and those of its inputs, the first of the likely ones on which it runs;
    None if it runs on none of them; or what prevents that it is recorded."""
    reason: Exception | None = None
    for shapes in likely:
        copy = behaviour.blank(module, training)
        kind: Any = type(copy)
        copy.__class__ = _taking(kind, len(inputs))
        try:
            run(behaviour.blank(copy, training), shapes[0])
            return *record(copy, lambda name: _is_called(module.get_submodule(name), opened), shapes[0]), shapes
        except DoesNotRun:
            continue
        except Exception as error:
            reason = reason or error
    return reason


def _called(graph: Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _is_called(module: nn.Module, opened: bool) -> bool:
    """Whether a recorded forward calls a submodule, whose hooks then see it."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if is_rewritten(module) or any(kind.__module__.startswith("aia_kernels.") for kind in type(module).__mro__):
        return True
    return not opened and not _is_open(module)


def _is_open(module: nn.Module) -> bool:
    """Whether a submodule is recorded in its place in any case: a sequence, or one without parameters."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is nn.Sequential.forward or next(module.parameters(), None) is None


@functools.cache
def _taking(kind: Any, inputs: int) -> type[nn.Module]:
    """A class whose forward takes so many inputs and no more: what has a default keeps it."""
    names = ", ".join("xyzw"[:inputs])
    space: dict[str, Any] = {"kind": kind}
    exec(f"def forward(self, {names}):\n    return kind.forward(self, {names})", space)
    return type(kind.__name__, (kind,), {"forward": space["forward"], "__module__": kind.__module__})


def rewritten_class(recipe: Recipe) -> type[nn.Module]:
    """The class of a recipe: that which the module had, with another forward."""
    kind = recipe.kind
    own = _Forwards(recipe)
    others: dict[Any, _Forwards | None] = {}
    names = list(inspect.signature(kind.forward).parameters)[1 : 1 + len(recipe.ranks)]
    left: dict[Any, bool] = {}  # whether calls with inputs of some sizes are left to the forward that the module had

    @functools.wraps(kind.forward)
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if recipe.costs and not named and not layer._tried and _is_left(recipe, inputs, left):
            return kind.forward(self, *inputs)
        given = (*inputs, *(named[name] for name in names[len(inputs) :] if name in named))
        if len(given) == len(inputs) + len(named) == len(recipe.ranks):
            if own.hold(self, given):
                try:
                    return own(self, *given)
                except NotAsRecorded:
                    if layer._tried == "as recorded":
                        raise
            other = None if layer._tried else _other_forwards(self, kind, given, others)
            if other is not None and other.hold(self, given):
                with contextlib.suppress(NotAsRecorded):
                    return other(self, *given)
        return kind.forward(self, *inputs, **named)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = tuple(kind.__reduce_ex__(self, protocol))[2:]
        return _new, (recipe,), *state

    members: Any = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "_recipe": recipe,
        "_tried": None,  # while it is compared: whether on the inputs for which it was recorded, or on others
    }
    layer: Any = type(kind.__name__, (kind,), members | {"__qualname__": kind.__qualname__, "__doc__": kind.__doc__})
    return layer


#: The sizes of inputs of which a class remembers whether its calls pay.
_MOST_SIZES = 64


def _is_left(recipe: Recipe, inputs: tuple[Any, ...], known: dict[Any, bool]) -> bool:
    """Whether "auto" leaves an ordinary call on a CPU to the forward that the module had, as the fused calls cost as
    much as they save; known: answers for earlier calls."""
    # This runs in every call, so nothing here is a call that need not be one.
    key: Any = torch.is_grad_enabled()
    for x in inputs:
        if type(x) is not Tensor:
            return False
        key = key, x.shape, x.dtype, x.is_contiguous(), x.is_cpu
    if is_observed() or backends.chosen_backend() != "auto" or len(inputs) != len(recipe.ranks):
        return False
    if (answer := known.get(key)) is None:
        answer = all(cost.is_left(inputs[cost.input]) for cost in recipe.costs)
        if len(known) < _MOST_SIZES:
            known[key] = answer
    return answer


class _Forwards:
    """The rewritten forwards of a recipe, by training mode."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.forwards = {training: method_of(*source) for training, source in recipe.sources.items()}

    def hold(self, module: nn.Module, inputs: tuple[Any, ...]) -> bool:
        """Whether they hold for these inputs and for the submodules as they are now."""
        return all(
            isinstance(x, int) if rank is None else isinstance(x, Tensor) and x.ndim == rank
            for x, rank in zip(inputs, self.recipe.ranks, strict=True)
        ) and all(operation_of(module.get_submodule(name)) == operation for name, operation in self.recipe.read.items())

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        return self.forwards[module.training](module, *inputs)


#: The elements of all inputs up to which a forward is recorded anew for their sizes.
_SMALL = 2**20
#: The recordings that a class has beside its first. Who gives ever other sizes gets the forward that the module had.
_MOST = 8


def _other_forwards(
    module: nn.Module, kind: type[nn.Module], inputs: tuple[Any, ...], others: dict[Any, _Forwards | None]
) -> _Forwards | None:
    """The forwards for inputs for which the first recording does not hold, recorded at their first use: for their
    ranks where these are others, else for their sizes. None where there are none, or a record is being made of the
    call itself."""
    if not all(isinstance(x, (Tensor, int)) for x in inputs):
        return None
    shapes: Shapes = tuple(x if isinstance(x, int) else tuple(x.shape) for x in inputs)
    ranks = _ranks(shapes)
    first: Recipe = type(module)._recipe  # type: ignore[attr-defined]
    key = shapes if ranks == first.ranks else ranks
    if key not in others:
        size = sum(math.prod(shape) for shape in shapes if not isinstance(shape, int))
        if is_traced() or needs_reference() or len(others) >= _MOST or (key is shapes and size > _SMALL) or not size:
            return None
        others[key] = None  # while it is made, and where it cannot be
        with behaviour.undisturbed(), contextlib.suppress(Exception):
            bare = behaviour.blank(module, module.training)
            bare.__class__ = kind
            found = rewritten(bare, shapes) if key is shapes else rewritten(bare, ranks=ranks)
            if isinstance(found, Flow):
                others[key] = _Forwards(found.layer._recipe)  # type: ignore[attr-defined]
    return others[key]


def _new(recipe: Recipe) -> nn.Module:
    """An empty module of a recipe, for copies and pickles."""
    layer = rewritten_class(recipe)
    return layer.__new__(layer)
