"""A forward is recorded as a graph, with the shape of every tensor in it.

torch.fx records it, on inputs that are computed along: so code may ask for the number of axes, decide by sizes, count
with them and loop over them. What holds for some sizes only is recorded as a condition (calls.expect). Numbers made of
sizes, int(math.sqrt(n)) among them, stay in the graph, as do torch.finfo and autocast; einops is recorded as what it
makes of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError

from . import calls
from .einops_proxies import understand_proxies
from .spellings import Reader, spelling


class DoesNotRun(Exception):
    """A forward does not run on the inputs that were tried."""


class _Proxy(Proxy):
    """Stands for a value of which the number of axes, or of sizes, is known."""

    def __len__(self) -> int:
        found = self.tracer.values[self.node]
        return len(found) if isinstance(found, torch.Size) else super().__len__()

    @property
    def ndim(self) -> int:
        return self.tracer.values[self.node].ndim

    @property
    def shape(self) -> Proxy:
        return self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})

    def dim(self) -> int:
        return self.ndim

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return self._number().__index__()

    def __float__(self) -> float:
        return float(self._number())

    def _number(self) -> Any:
        """What a number is now, where Python needs one: the recording holds where it is that again."""
        found = self.tracer.values[self.node]
        if not isinstance(found, (int, float)):
            raise TypeError(f"{self.node.name} is a {type(found).__name__}, and its numbers are not known")
        self.tracer.create_node("call_function", calls.expect_number, (self.node, found), {})
        return found


class _OfInt(type):
    """Answers for int."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is int

    def __hash__(cls) -> int:
        return hash(int)


class _Int(metaclass=_OfInt):
    """Takes the place of int while a forward is recorded: the whole part of a number that is recorded is recorded."""

    def __new__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Proxy):
            return args[0].tracer.create_proxy("call_function", int, args, {})
        return int(*args, **named)


def _recorded(function: Callable) -> Callable:
    """A function that is recorded where it is given something recorded."""

    def call(*args: Any, **named: Any) -> Any:
        given = next((a for a in (*args, *named.values()) if isinstance(a, Proxy)), None)
        if given is None:
            return function(*args, **named)
        return given.tracer.create_proxy("call_function", function, args, named)

    return call


@contextlib.contextmanager
def _recording_numbers(module: nn.Module) -> Iterator[None]:
    """Let int, round and torch.finfo take what is recorded, in the code of a module and of the functions beside it."""
    named = {base.__module__ for child in module.modules() for base in type(child).__mro__}
    own = [name for name in named if not name.startswith(("torch.", "aia_kernels.", "builtins"))]
    spaces = [vars(sys.modules[name]) for name in own if name in sys.modules]
    for space in spaces[:]:
        functions = [f for f in space.values() if isinstance(f, types.FunctionType)]
        spaces += [f.__globals__ for f in functions if not (f.__module__ or "torch").startswith("torch")]
    before = []
    for space in {id(space): space for space in (*spaces, vars(torch))}.values():
        for name, function in (("int", _Int), ("round", _recorded(round))):
            if space is not vars(torch) and name not in space:
                before.append((space, name, None))
                space[name] = function
        for name in [name for name, value in space.items() if value is torch.finfo or value is torch.iinfo]:
            before.append((space, name, space[name]))
    wrapped = {function: _recorded(function) for function in (torch.finfo, torch.iinfo)}
    for space, name, value in before:
        if value is not None:
            space[name] = wrapped[value]
    try:
        yield
    finally:
        for space, name, value in before:
            if value is None:
                del space[name]
            else:
                space[name] = value


@contextlib.contextmanager
def _recording_autocast(tracer: _Tracer) -> Iterator[None]:
    """Let autocast be recorded where a forward, and no call inside of it, enters and leaves it."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    entered: dict[int, Node] = {}
    thread = threading.get_ident()

    def record_enter(self: torch.autocast) -> Any:
        if not tracer.computing and threading.get_ident() == thread:
            dtype = self.fast_dtype if self._enabled else None
            arguments = self.device, dtype, self._enabled, self._cache_enabled
            entered[id(self)] = tracer.create_node("call_function", calls.enter_autocast, arguments, {})
        return enter(self)

    def record_exit(self: torch.autocast, *raised: Any) -> Any:
        if not tracer.computing and raised[0] is None and id(self) in entered:
            tracer.create_node("call_function", calls.exit_autocast, (entered.pop(id(self)),), {})
        return leave(self, *raised)

    torch.autocast.__enter__, torch.autocast.__exit__ = record_enter, record_exit  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


class _Tracer(Tracer):
    """Records a forward and those of the modules that it calls, but for torch's own and those that is_called names.

    It computes what it records, so that code may ask for the number of axes, and loop over sizes.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_called: Callable[[str], bool], inputs: Iterable[Any]):
        super().__init__()
        self.is_called, self.inputs = is_called, iter(inputs)
        self.values: dict[Node, Any] = {}
        self.computing = False

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return self.is_called(name) or super().is_leaf_module(module, name)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_node(self, *arguments: Any, **named: Any) -> Node:
        node = super().create_node(*arguments, **named)
        if node.op != "output":
            self.computing = True
            try:
                with torch.no_grad():
                    self.values[node] = self._value(node)
            except Exception as error:
                raise DoesNotRun(error) from error
            finally:
                self.computing = False
        return node

    def _value(self, node: Node) -> Any:
        args, kwargs = (map_arg(given, self.values.__getitem__) for given in (node.args, node.kwargs))
        if node.op == "placeholder":
            return next(self.inputs)
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def call_module(self, m: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        within = self.computing or self._is_a_setting(m)
        return forward(*args, **kwargs) if within else super().call_module(m, forward, args, kwargs)

    def _is_a_setting(self, m: nn.Module) -> bool:
        """Whether m is a module that a forward makes as it runs, and has nothing of its own: nn.Softmax(1)(x)."""
        nothing = next(itertools.chain(m.parameters(), m.buffers()), None) is None
        return nothing and m not in (self.submodule_paths or {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        """A condition on sizes is what it is now: the recording says so, and holds where it is that again."""
        found = self.values.get(obj.node)
        if not isinstance(found, (bool, int)):
            return super().to_bool(obj)
        self.create_node("call_function", calls.expect, (obj.node, bool(found)), {})
        return bool(found)

    def iter(self, obj: Proxy) -> Iterator:
        """Pieces of a tensor are as many as they are now: the recording holds where they are that many again."""
        found = self.values.get(obj.node)
        if not isinstance(found, (tuple, list)):
            return super().iter(obj)
        if not isinstance(found, torch.Size) and spelling(obj.node) != "chunk":
            count = self.create_node("call_function", len, (obj.node,), {})
            self.create_node("call_function", calls.expect_number, (count, len(found)), {})
        return (obj[i] for i in range(len(found)))


def record(
    module: nn.Module, is_called: Callable[[str], bool], inputs: Iterable[tuple[int, ...] | int]
) -> tuple[Graph, dict[Node, tuple[int, ...]]]:
    """The graph of the forward of a module, in its mode, and the shape of every tensor in it. Whatever the forward does
    to the module, it does it here too: give it a copy.

    Args:
        module: Any module on the CPU.
        is_called: Whether the graph is to call a submodule of this name, as it always does torch's own.
        inputs: The shapes of the inputs; a number stands for itself.

    Returns:
        The graph, and the shapes.

    Raises:
        DoesNotRun: The forward does not take such inputs.
        Exception: The forward cannot be recorded: it depends on the values of tensors, or calls what takes no proxies.
    """
    understand_proxies()
    tracer = _Tracer(is_called, _zeros(module, inputs))
    with torch.autocast("cpu", enabled=False), _recording_numbers(module), _recording_autocast(tracer):
        graph = tracer.trace(module)
    shapes = {node: tuple(v.shape) for node, v in tracer.values.items() if isinstance(v, Tensor)}
    _refuse_late_conditions(Reader(module, graph, shapes))
    return graph, shapes


def run(module: nn.Module, inputs: Iterable[tuple[int, ...] | int]) -> None:
    """Call a module, as record takes it, on inputs of these shapes.

    Raises:
        DoesNotRun: The forward does not take such inputs.
        AttributeError, NameError, ImportError: It takes none.
    """
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            module(*_zeros(module, inputs))
    except (AttributeError, NameError, ImportError):
        raise
    except Exception as error:
        raise DoesNotRun(error) from error


def _zeros(module: nn.Module, inputs: Iterable[tuple[int, ...] | int]) -> list[Any]:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return [i if isinstance(i, int) else torch.zeros(i, dtype=dtype, device="cpu") for i in inputs]


def _refuse_late_conditions(reader: Reader) -> None:
    """Raise TraceError for a condition on sizes behind something that must not be done twice: where the condition is
    another than it was, the forward that the module had starts anew."""
    once = False
    for node in reader.graph.nodes:
        if node.target in calls.CONDITIONS and once:
            raise TraceError("a condition on sizes stands behind a change of buffers, or one in place")
        module = reader.module(node)
        buffers = module is not None and next(module.buffers(), None) is not None
        once = once or buffers or reader.operation(node) == "batch_norm" or reader.changes_in_place(node)
