"""Layers inside of what PyTorch puts around a call: dispatch and function modes, tensor subclasses, defaults, autocast,
deterministic mode, profilers. A mode that only looks on changes nothing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import ClassVar

import pytest
import torch
from conftest import skip_unless_runnable, some_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from uses_layers import (
    FEW,
    LAYERS,
    MAIN,
    OF_TORCH,
    assert_close,
    assert_same_bits,
    batch,
    every_device,
    every_layer,
    every_layer_without_dropout,
    layer,
    left_by,
    main_layers,
    plain_step,
    step,
    towards,
    uses,
)

import aia_kernels

DOUBLE = torch.float64


class Dispatched(TorchDispatchMode):
    """Records operators by their names."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Records functions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


MODES = {
    "a dispatch mode": Dispatched,
    "a function mode": Called,
    "both modes": lambda: _both(),
    "profiler": lambda: torch.profiler.profile(record_shapes=True, profile_memory=True, with_stack=True),
    "autograd profiler": lambda: torch.autograd.profiler.profile(),
    "set_default_device": lambda: torch.device("cpu"),
    "set_default_dtype": lambda: _default_dtype(torch.float64),
    "set_default_dtype, half": lambda: _default_dtype(torch.bfloat16),
    "deterministic mode with NaN fill": lambda: _deterministic(),
    "no multithreading": lambda: torch.autograd.set_multithreading_enabled(False),
}


@contextlib.contextmanager
def _both():
    with Dispatched(), Called(), Dispatched():
        yield


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@every_layer
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_module_type(device, name, dtype):
    """Module.type casts the numbers of batches too, and torch's batch norm counts in any type."""
    module, other = layer(name, dtype, device).type(torch.bfloat16).type(dtype), layer(name, dtype, device)
    other.load_state_dict(module.state_dict())
    found = step(name, dtype=dtype, device=device, module=module)
    expected = step(name, dtype=dtype, device=device, module=other)
    assert all(found[key].dtype == dtype for key in found if key.endswith("num_batches_tracked"))
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}  # by another path: some roundings
    assert_close(found, {key: value.to(found[key].dtype) for key, value in expected.items()}, **bound)


@uses(MODES)
@every_layer
def test_modes(name, use):
    assert_same_bits(step(name, around=use), plain_step(name))


@every_layer
def test_a_recorder_of_operators_sees_the_layer(name):
    """All that runs passes the dispatcher: with a compiled backend passes of this package, else torch's operators."""
    seen = {}
    for backend in ("auto", "reference"):
        with Dispatched() as mode, aia_kernels.use_backend(backend):
            step(name)
        seen[backend] = {operator.split(".")[0] for operator in mode.seen}
    assert "aia_kernels" not in seen["reference"] and "aten" in seen["reference"]
    if not name.startswith(OF_TORCH) and aia_kernels.available_backends()["cpu"] is None:
        assert "aia_kernels" in seen["auto"]


@every_layer_without_dropout
def test_flops(name):
    """FlopCounterMode has hooks on all modules, so the published products run, one by one, and are counted. (Their
    dropout draws as published, not as folded.)"""
    counter = FlopCounterMode(display=False)
    assert_close(step(name, around=lambda: counter, dtype=DOUBLE), plain_step(name, DOUBLE))
    assert (counter.get_total_flops() > 0) == (not name.startswith(("TemporalShift", "double_normalize")))


class Marked(Tensor):
    """A plain subclass, which torch's functions hand on."""


class Logging(Tensor):
    """A wrapper that holds a tensor and logs what is done to it."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        wrappers = {id(t.inner): t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)}
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        # What an operator changed in place comes back as the wrapper that it came in.
        return tree_map_only(Tensor, lambda t: wrappers[id(t)] if id(t) in wrappers else cls(t), func(*args, **kwargs))


class MarkedParameter(nn.Parameter):
    """A subclass of parameters, as lazily or specially initialized ones are."""


@every_layer
def test_plain_subclasses(name):
    """x and the parameters of subclasses that add nothing."""
    module = layer(name)
    for holder in module.modules():
        for key, p in list(holder.named_parameters(recurse=False)):
            setattr(holder, key, MarkedParameter(p.detach()))
    x = batch(name).as_subclass(Marked).requires_grad_()
    torch.manual_seed(2)
    y = module(x)
    y.backward(towards(y))
    found = {key: t if t is None else t.as_subclass(Tensor) for key, t in left_by(module, x, y).items()}
    assert_same_bits(found, plain_step(name))


def negative_view(t: Tensor) -> Tensor:
    """The same values as a view of their negatives, which a kernel must not take for its own."""
    return torch._neg_view(t.neg())


@some_of(
    "name, backend",
    itertools.product(MAIN, ("cpu", "triton")),
    *[(name, "cpu") for name in FEW],
    ("ExternalAttention2d, channels_last", "triton"),
    ("TemporalShift", "triton"),
)
def test_negative_views(name, backend):
    """x, the gradient and the parameters."""
    skip_unless_runnable(backend, "cpu")
    with aia_kernels.use_backend(backend):
        expected = step(name)
        module, x = layer(name), negative_view(batch(name)).requires_grad_()
        for holder in module.modules():
            for key, p in list(holder.named_parameters(recurse=False)):
                setattr(holder, key, nn.Parameter(negative_view(p.detach())))
        torch.manual_seed(2)
        y = module(x)
        y.backward(negative_view(towards(y)))
        found = {key: t if t is None else t.resolve_neg() for key, t in left_by(module, x, y).items()}
    assert_same_bits(found, expected)


@every_layer
def test_wrapped_input(name):
    """x in a wrapper, which sees what is done to it: the numbers are those without it."""
    module = layer(name, DOUBLE)
    Logging.seen.clear()
    x = Logging(batch(name, DOUBLE)).requires_grad_()
    torch.manual_seed(2)
    y = module(x)
    assert isinstance(y, Logging) and Logging.seen
    y.backward(Logging(towards(y.inner)))
    unwrapped = {key: t.inner if isinstance(t, Logging) else t for key, t in left_by(module, x, y).items()}
    assert_close(unwrapped, plain_step(name, DOUBLE))


@every_layer_without_dropout
def test_two_tensor(name):
    """torch's own example of a wrapper: two tensors at once, x and parameters, both right."""
    module, other = layer(name, DOUBLE).eval(), layer(name, DOUBLE).eval()
    twice = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    for path, p in module.named_parameters():
        holder, _, key = path.rpartition(".")
        pair = TwoTensor(p.detach().clone(), other.get_parameter(path).detach().clone())
        setattr(twice.get_submodule(holder), key, nn.Parameter(pair))
    xs = batch(name, DOUBLE).contiguous(), batch(name, DOUBLE, seed=5).contiguous()
    x = TwoTensor(*(t.clone() for t in xs)).requires_grad_()
    y = twice(x)
    y.sum().backward()
    for which, of, inner in (("a", module, xs[0]), ("b", other, xs[1])):
        leaf = inner.clone().requires_grad_()
        expected = of(leaf)
        expected.sum().backward()
        assert_close(
            {"y": getattr(y, which).detach(), "x": getattr(x.grad, which)}, {"y": expected.detach(), "x": leaf.grad}
        )
        for (key, p), q in zip(twice.named_parameters(), of.parameters(), strict=True):
            torch.testing.assert_close(getattr(p.grad, which), q.grad, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layer_without_dropout
@every_device
def test_autocast(device, name, dtype):
    """Inside of autocast a step is what the plain PyTorch form of the layer gives there, within the type's rounding:
    products of 8 bits, added up over at most 64 terms, and passed through up to four of them in a row."""
    module, x = layer(name, device=device), batch(name, device=device)
    x = x.to(dtype) if dtype == torch.bfloat16 else x
    plain = aia_kernels.to_reference(copy.deepcopy(module))
    results = []
    for of in (module, plain):
        leaf = x.detach().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = of(leaf)
        y.backward(towards(y))
        results.append(left_by(of, leaf, y))
    found, expected = results
    assert found["y"].dtype == expected["y"].dtype and found["grad x"].dtype == x.dtype
    scale = expected["y"].abs().max()
    assert (found["y"].float() - expected["y"].float()).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * scale


@every_layer
def test_autocast_around_backward_alone(name):
    """Backward runs in the types of forward, whoever calls it: autocast there changes nothing."""
    module, x = layer(name), batch(name).requires_grad_()
    torch.manual_seed(2)
    y = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(towards(y))
    if name.startswith(("Token", "MultiHead", "ExternalAttention2d", "CATT", "CaaM", "Halo")):
        return  # torch's own products around the passes follow autocast there
    assert_same_bits(left_by(module, x, y), plain_step(name))


@main_layers
def test_autocast_is_not_left_on(name):
    with torch.autocast("cpu", torch.bfloat16):
        layer(name)(batch(name))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert LAYERS[name].draws or torch.equal(layer(name)(batch(name)), plain_step(name)["y"])
