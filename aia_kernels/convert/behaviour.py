"""Whether the forward of a module is that of a fused layer: both run on copies with the same random numbers.

The copies live on the CPU in float64; in float32 where a forward casts to that and does not run in float64. They have
parameters, buffers, containers and dropouts of their own, so nothing about the model, its hooks or the generators
changes. The fused layer runs its reference. In evaluation and in training the output, every gradient and the buffers
afterwards must agree. And the forward must leave everything else as it was: its input, and the attributes, lists,
dictionaries and objects of the module and its submodules. If it keeps its attention map, counts its calls or adds up a
loss, somebody reads that afterwards. No copy can show what a forward does outside of its module: to a global variable,
a file, a screen.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import backends

# Both compute the same sums in float64 in another order, some with
# projections multiplied first, which leaves 1e-12. The least thing to tell apart, one more or less eps of 1e-9 in a
# double normalization, moves the outputs for published._tokens by over 1e-5.
TOLERANCE = 1e-7

#: The same for forwards that cast to float32 somewhere.
SINGLE_TOLERANCE = 1e-5

#: Much smaller and much larger inputs, which show what clamps them. Where the module makes no numbers of them, as a
#: softmax written out overflows, they tell nothing; nor in float32, whose logits of a thousand are off by 1e-4.
_SCALES = 1e-3, 1e3

#: The elements of all inputs up to which a graph is tried.
LARGEST = 2**18

#: Methods that a class may override without changing what a layer keeps, stores or does beside its forward.
_HARMLESS = {
    "__init__",
    "__repr__",
    "__dir__",
    "__annotate__",
    "__annotate_func__",
    "_get_name",
    "extra_repr",
    "forward",
}
_METHODS = {name for name, value in vars(nn.Module).items() if callable(value)} - _HARMLESS


def unlike(module: nn.Module) -> str | None:
    """Why the class of a module cannot be exchanged for one whose forward takes x alone, or None."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if kind.forward is nn.Module.forward:
        return "it has no forward: something else calls its submodules"
    if methods := overridden(kind, nn.Module):
        return f"its class overrides {', '.join(methods)}"
    _, *others = inspect.signature(kind.forward).parameters.values()
    if len(others) != 1 or others[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return f"its forward takes ({', '.join(map(str, others))}), expected x alone"
    return None


def overridden(kind: type[nn.Module], base: type[nn.Module]) -> list[str]:
    """The methods of nn.Module that a class overrides beyond its base, and that it would lose by a change of class."""
    owners = kind.__mro__[: kind.__mro__.index(base)]
    return sorted({name for owner in owners for name in vars(owner)} & _METHODS)


def signature(module: nn.Module) -> Any:
    """What decides which function of x and its parameters a module computes; hashable, and equal for modules alike."""
    attributes = {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}
    return (
        type(module),
        tuple((name, _hashable(value)) for name, value in sorted(attributes.items())),
        tuple(
            (name, None if p is None else p.shape)
            for name, p in (*module._parameters.items(), *module._buffers.items())
        ),
        tuple((name, None if child is None else signature(child)) for name, child in module._modules.items()),
    )


#: Makes the input of a module, or a tuple of its inputs: tensors in float64 on the CPU, and integers.
Example = Callable[[nn.Module, torch.Generator], Any]


def blank(module: nn.Module, training: bool, device: str = "cpu") -> nn.Module:
    """A copy of a module with any values, on a device: for what must not happen to the module itself."""
    return _Blank(device, training).copy(module)


def difference(
    module: nn.Module,
    layer: type[nn.Module],
    settings: Mapping[str, Any],
    example: Example,
    of_other_rank: Example | None = None,
    tolerance: float = TOLERANCE,
    several: bool = False,
    may_fail: bool = False,
    dtype: torch.dtype = torch.float64,
) -> str | None:
    """How the forward of a module differs from that of a fused layer with the same submodules and settings, or None.

    of_other_rank: makes an input that the forward may refuse, but must not compute otherwise than the fused layer.
    tolerance: of the largest number of a result, if above 1. several: whether the forward may return several tensors.
    may_fail: whether it may refuse the first input too. dtype: of parameters, buffers and inputs.
    """
    with undisturbed():
        generator = torch.Generator().manual_seed(0)
        numbers: dict[Hashable, Tensor] = {}
        examples = [(example(module, generator), may_fail)]
        if of_other_rank is not None:
            examples.append((of_other_rank(module, generator), True))
        for made, refuses in examples:
            given = made if isinstance(made, tuple) else (made,)
            inputs = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in given)
            for training, marked in ((False, False), (True, False), (True, True)):
                copies = [_Copier(numbers, generator, training, marked, dtype).copy(module) for _ in range(2)]
                try:
                    copies[1].__class__ = layer
                except TypeError as error:
                    return f"Python cannot exchange its class: {line(error)}"
                vars(copies[1]).update(settings)
                when = "with a marked dropout" if marked else "in training" if training else "in evaluation"
                if (reason := _unlike_in_a_run(*copies, inputs, refuses, when, tolerance, several)) is not None:
                    return reason
                # A rewritten forward has the clamps that were recorded.
                exact = not training and tolerance <= TOLERANCE and not hasattr(layer, "_recipe")
                if exact and (reason := _unlike_at_a_scale(*copies, inputs)) is not None:
                    return reason
    return None


def _unlike_at_a_scale(own: nn.Module, fused: nn.Module, inputs: tuple[Tensor | int, ...]) -> str | None:
    """How the results of two copies, which agree on inputs, differ on the same times one of _SCALES, or None."""
    for scale in _SCALES:
        scaled = [scale * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        with torch.no_grad():
            try:
                found = tree_leaves(own(*scaled))
            except Exception:  # it need not take them
                continue
            expected = tree_leaves(fused(*scaled))
        for one, other in zip(found, expected, strict=True):
            if not isinstance(one, Tensor) or not bool(one.isfinite().all()):
                continue
            distance = _distance(other, one)
            if not distance <= TOLERANCE * max(1.0, one.abs().max().item()):
                of = f"of numbers around {scale:g}, as a clamp would"
                return f"its y differs from that of {_called(type(fused))} by up to {distance:.2g} {of}"
    return None


def graph_difference(
    module: nn.Module, before: Graph, after: Graph, shapes: Sequence[tuple[int, ...] | None], fixed: bool
) -> str | None:
    """How two graphs of a module differ on random inputs of these shapes, or None: also where they are not compared,
    because a shape is unknown, all together are large, or the first does not run in float64. Unless the shapes are
    fixed, inputs of other sizes are tried, as far as the first graph takes them."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not known:
        return None
    trials = [known] if fixed else [known, *_other_sizes(known)]
    with undisturbed():
        for trial in trials:
            if sum(map(math.prod, trial)) <= LARGEST and (reason := _graphs_differ(module, (before, after), trial)):
                return reason
    return None


def _other_sizes(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Shapes with other lengths of the axes that are tokens or positions, and with more samples."""
    yield [(*shape[:2], *(size + 1 for size in shape[2:])) if len(shape) > 3 else shape for shape in shapes]
    for axis in (1, 2):
        yield [(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) if len(shape) == 3 else shape for shape in shapes]
    yield [(2 * shape[0], *shape[1:]) if shape else shape for shape in shapes]


def _graphs_differ(module: nn.Module, graphs: tuple[Graph, Graph], shapes: Sequence[tuple[int, ...]]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    numbers: dict[Hashable, Tensor] = {}
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    results: list[list[Any]] = []
    for graph in graphs:
        copier = _Copier(numbers, generator, module.training, False)
        root = nn.Module()
        for held in ("_parameters", "_buffers"):
            of = getattr(module, held).items()
            getattr(root, held).update({name: copier.tensor(name, p, id(p)) for name, p in of})
        root._modules.update({name: copier.copy(child) for name, child in module.named_children()})
        torch.manual_seed(0)
        try:
            results.append(tree_leaves(Interpreter(root, graph=graph).run(*inputs)))
        except Exception as error:
            return f"the fused graph fails: {type(error).__name__}: {line(error)}" if results else None
    expected, found = results
    if len(expected) != len(found):
        return f"it returns {len(expected)} tensors, and the fused graph {len(found)}"
    for wanted, made in zip(expected, found, strict=True):
        if isinstance(wanted, Tensor):
            distance = _distance(made, wanted)
            if not distance <= SINGLE_TOLERANCE * max(1.0, wanted.abs().max().item()):
                sizes = ", ".join(map(str, shapes))
                return f"its result for inputs of shape {sizes} differs from that of the fused graph by {distance:.2g}"
    return None


def _unlike_in_a_run(
    own: nn.Module,
    fused: nn.Module,
    inputs: tuple[Tensor | int, ...],
    may_fail: bool,
    when: str,
    tolerance: float,
    several: bool,
) -> str | None:
    """How the runs of two copies on the same inputs differ, or None."""
    before, layer = dict(_observed(own)), type(fused)
    shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else str(x) for x in inputs)
    read = _NumbersRead(own)
    try:
        with read:
            found = _run(own, inputs, several)
        drawn = _generators()
    except Exception as error:
        if may_fail:
            return None
        return f"its forward fails on an input of shape {shapes}: {type(error).__name__}: {line(error)}"
    if isinstance(found, str):
        return f"its forward returns {found}, expected a tensor"
    if read.found:
        return "its forward reads numbers out of tensors, as `if x.mean() > 0` does: others may decide otherwise"
    after = dict(_observed(own))
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        return f"its forward changes {', '.join(changed)}, which {_called(layer)} does not"
    try:
        expected = _run(fused, inputs, several)
        drawn_by_fused = _generators()
    except Exception as error:
        return f"{_called(layer)} fails on an input of shape {shapes}: {type(error).__name__}: {line(error)}"
    if drawn != drawn_by_fused:
        return "its forward draws random numbers by Python's random or by numpy, and decides by them"
    if found.keys() != expected.keys():
        return f"its forward changes {', '.join(sorted(found.keys() ^ expected.keys()))}"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            its, other = tuple(found[name].shape), tuple(value.shape)
            return f"its {name} has shape {its} on an input of shape {shapes}, that of {_called(layer)} {other}"
        distance = _distance(found[name], value)
        if not distance <= tolerance * max(1.0, value.abs().max().item()):
            return (
                f"its {name} differs from that of {_called(layer)} by up to {distance:.2g} {when} on an input of shape "
                f"{shapes}"
            )
    return None


def _called(layer: type[nn.Module]) -> str:
    """What a report calls a fused layer: one whose forward was rewritten has the name of its own class."""
    return "the fused forward" if hasattr(layer, "_recipe") else layer.__name__


def _observed(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a forward might leave behind in a module or its submodules, by name: everything but parameters and buffers,
    which are compared with those of the fused layer."""
    for path, child in module.named_modules():
        at = f"{path}." if path else ""
        for name, value in child.__dict__.items():
            if name not in _INTERNAL:
                yield at + name, _frozen(value)
        for held in (child._parameters, child._buffers, child._modules):
            yield from ((at + name, "held") for name in held)
        yield f"{at}training", child.training


def _frozen(value: Any, depth: int = 8) -> Any:
    """A value as it is now, to be compared with a later one: contents of containers and of plain objects, the identity
    of anything else."""
    if isinstance(value, Tensor):
        return "tensor", id(value), None if value.is_inference() else value._version
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value), repr(value)
    if depth == 0 or isinstance(value, (nn.Module, type)) or callable(value):
        return "identity", id(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return type(value), tuple((_frozen(k, depth - 1), _frozen(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_frozen(item, depth - 1) for item in value)
    if hasattr(value, "__dict__"):
        return type(value), _frozen(vars(value), depth - 1)
    return "identity", id(value)


_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)
_INTERNAL = {*nn.Module().__dict__, "_compiled_call_impl"}


def _hashable(value: Any) -> Any:
    """A setting as part of a signature; anything that is not a plain value stands for itself alone."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_hashable, value))
    return "identity", id(value)


class _LocalBatchNorm(_BatchNorm):
    """A batch norm of any rank that shares its statistics with nobody: the copies of one process talk to no other."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass


class _NumbersRead(TorchDispatchMode):
    """Whether a number becomes one of Python's, which decides what no trial on other numbers shows."""

    _READING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)

    def __init__(self, module: nn.Module):
        super().__init__()
        self.found = False
        # A batch norm without momentum reads how many batches it has seen.
        self._counts = {b.data_ptr() for b in module.buffers() if not b.is_floating_point()}

    def __torch_dispatch__(
        self, operator: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found |= operator in self._READING and args[0].data_ptr() not in self._counts
        return operator(*args, **(kwargs or {}))


class _Mark(nn.Module):
    """Takes the place of a dropout: a function without chance, such that no other place in the layer gives the same
    result.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + (3 * x).sin()


class _Copier:
    """Copies of modules as they are but for their hooks, with random parameters and buffers on the CPU.

    numbers: the values of each tensor, filled as they are wanted, so that all copies have the same.
    """

    def __init__(
        self,
        numbers: dict[Hashable, Tensor],
        generator: torch.Generator,
        training: bool,
        marked: bool,
        dtype: torch.dtype = torch.float64,
    ):
        self.numbers, self.generator, self.dtype = numbers, generator, dtype
        self.training, self.marked = training, marked
        self.known: dict[Hashable, Any] = {}  # copies by the identity of the original: what is shared stays shared

    def copy(self, module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        if id(module) in self.known:
            return self.known[id(module)]
        if isinstance(module, nn.Dropout):
            copy = self.known[id(module)] = _Mark() if self.marked else nn.Dropout(0.0)
            return copy
        kind = parametrize.type_before_parametrizations(module)
        copy = self.known[id(module)] = kind.__new__(kind)
        state = {name: _own(value) for name, value in module.__dict__.items()}
        state |= {name: OrderedDict() for name in _HOOKS}
        state |= {"training": self.training, "_compiled_call_impl": None}
        state["_parameters"] = {name: self.tensor(name, p, id(p)) for name, p in module._parameters.items()}
        state["_buffers"] = {name: self.tensor(name, b, id(b)) for name, b in module._buffers.items()}
        children = dict(module._modules)
        if parametrize.is_parametrized(module):
            # A forward sees the computed tensor alone: it becomes a parameter like any other.
            for name, parts in children.pop("parametrizations").items():
                state["_parameters"][name] = self.tensor(name, _computed(module, name, parts), (id(module), name))
        state["_modules"] = {name: self.copy(child) for name, child in children.items()}
        copy.__dict__.update(state)
        if isinstance(module, nn.SyncBatchNorm):
            copy.__class__ = _LocalBatchNorm
        return copy

    def tensor(self, name: str, tensor: Tensor | None, key: Hashable) -> Tensor | None:
        if tensor is None:
            return None
        if key not in self.known:
            if key not in self.numbers:
                self.numbers[key] = _random(name, tensor, self.generator)
            values = self.numbers[key].clone()
            values = values.to(self.dtype) if values.is_floating_point() else values
            trained = isinstance(tensor, nn.Parameter) or isinstance(key, tuple)
            self.known[key] = nn.Parameter(values) if trained else values
        return self.known[key]


class _Blank(_Copier):
    """Copies whose tensors have any values. On the meta device they have none; on the CPU torch imports less."""

    def __init__(self, device: str, training: bool):
        super().__init__({}, torch.Generator(), training, False)
        self.device = device

    def tensor(self, name: str, tensor: Tensor | None, key: Hashable) -> Tensor | None:
        if tensor is not None and key not in self.known:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            trained = isinstance(tensor, nn.Parameter) or isinstance(key, tuple)
            self.known[key] = nn.Parameter(empty) if trained else empty
        return None if tensor is None else self.known[key]


def _computed(module: nn.Module, name: str, parts: nn.Module) -> Tensor:
    """A parametrized tensor, computed as in evaluation: in training some parametrizations change each time."""
    modes = [(part, part.training) for part in parts.modules()]
    try:
        parts.eval()
        return getattr(module, name).detach()
    finally:
        for part, mode in modes:
            part.training = mode


def _own(value: Any) -> Any:
    """A copy of what a forward might change: containers, all the way down, and plain objects."""
    if isinstance(value, (list, set, tuple)) and type(value) in (list, set, tuple):
        return type(value)(map(_own, value))
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied (a lock, an open file) stays the model's own
        return value


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers unlike any default: weights keep the size of what they multiply, variances are positive."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    r = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
    if name == "running_var":
        r = 0.5 + 0.3 * r.abs()
    elif tensor.ndim > 1:
        r = r / math.sqrt(tensor[0].numel())
    else:
        r = (1 if name == "weight" else 0) + 0.3 * r
    return r


def _run(module: nn.Module, inputs: tuple[Tensor | int, ...], several: bool) -> dict[str, Tensor] | str:
    """The outputs, the gradients, the inputs and the buffers afterwards; or what came instead of a tensor."""
    inputs = tuple(x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs)
    given = [x * 1.0 if isinstance(x, Tensor) else x for x in inputs]  # no leaves: a forward may write into them
    torch.manual_seed(0)  # of both runs
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    y = module(*given)
    results = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
    if not isinstance(y, Tensor) and not (several and results):
        return f"a {type(y).__name__}"
    # A scalar, as torch imports its symbolic shapes, which takes seconds on a busy machine, for any other gradient.
    weights = [torch.linspace(-1.0, 1.5, y.numel(), dtype=y.dtype, device="cpu").view(y.shape).sin() for y in results]
    sum((y * weight).sum() for y, weight in zip(results, weights, strict=True)).backward()
    tensors = {"y" if len(results) == 1 else f"y {i}": y.detach() for i, y in enumerate(results)}
    for i, (x, x_given) in enumerate(zip(inputs, given, strict=True)):
        if not isinstance(x, Tensor):
            continue
        which = "" if len(inputs) == 1 else f" {i}"
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        tensors |= {f"gradient of x{which}": grad, f"input{which}": x_given.detach()}
    for name, p in module.named_parameters():
        tensors[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return tensors | {name: b.double() for name, b in module.named_buffers()}


def _generators() -> tuple[Any, str]:
    """Where the random numbers of Python and of numpy, where that is imported, have got to."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), repr(numpy.random.get_state()) if numpy else ""


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    distance = (found - expected).abs().max().item()
    return math.inf if math.isnan(distance) else distance


def line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return first if len(first) <= 160 else f"{first[:157]}..."


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The settings of a fresh process, whatever the caller has set; the caller's random numbers go on as before."""
    numpy = sys.modules.get("numpy")
    before, before_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with (
            backends.use_backend("reference"),
            torch.random.fork_rng(devices=()),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(before_numpy)
