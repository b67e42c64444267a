"""An ordinary call of a unit on the CPU is one operator for each direction; any other call gives the same and takes its
own way."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import aia_kernels
from aia_kernels import backends, functional
from aia_kernels.reference import UNITS
from aia_kernels.testing import randomise

if backends.select("cpu", torch.float32, "attention_in_attention") != "cpu":
    pytest.skip("only the C++ of the CPU has them", allow_module_level=True)

#: Float64 sums in another order, of at most some hundred terms of order one, through batch norms of little variance.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ORDINARY = [*UNITS]
FORMS = {
    "contiguous": lambda: torch.randn(8, 5, 3, 4, dtype=torch.float64),
    "channels_last": lambda: FORMS["contiguous"]().to(memory_format=torch.channels_last),
    "5d": lambda: torch.randn(2, 5, 4, 3, 7, dtype=torch.float64),
    "channels_last_3d": lambda: FORMS["5d"]().to(memory_format=torch.channels_last_3d),
}


class Calls:
    """How often a unit was one operator, forward and backward."""

    def __init__(self, monkeypatch):
        self.calls = [0, 0]
        passes = backends.passes("cpu", "attention_in_attention")
        for i, name in enumerate(("unit_propagate_", "unit_propagate_back")):
            monkeypatch.setattr(passes, name, functools.partial(self._counted, i, getattr(passes, name)))

    def _counted(self, i, original, *arguments):
        self.calls[i] += 1
        return original(*arguments)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    return Calls(monkeypatch).calls


@pytest.fixture
def no_other_way(monkeypatch):
    """A context in which the modules' own reading of an ordinary call, and nothing else, leads to a result."""

    @contextlib.contextmanager
    def alone():
        with monkeypatch.context() as patch:
            patch.setattr(functional, "attention_in_attention", None)
            yield

    return alone


def unit(name: str = "CinST", **settings) -> nn.Module:
    torch.manual_seed(0)
    return randomise(getattr(aia_kernels, name)(4, **settings)).double()


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """y, gradients and buffers of a step, and y without gradients."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        found = {"evaluated": copy.deepcopy(module)(x)}
    x = x.clone().requires_grad_()
    found["y"] = y = module(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    found |= {f"grad {key}": p.grad for key, p in module.named_parameters()} | dict(module.named_buffers())
    return found | {"grad x": x.grad}


def of_reference(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    with aia_kernels.use_backend("reference"):
        return step(module, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_calls(name, form, training, calls, no_other_way):
    module = unit(name).train(training)
    torch.manual_seed(2)
    x = FORMS[form]()
    with no_other_way():
        found = step(module, x)
    assert calls == [2, 1]
    assert found["y"].stride() == found["grad x"].stride() == found["evaluated"].stride() == x.stride()
    assert_close(found, of_reference(module, x), **EXACT)
    assert calls == [2, 1]


def without_bn():
    return unit(use_BN=False)


def frozen():
    module = unit()
    module.C_bn.weight.requires_grad_(False)
    module.T_conv.weight.requires_grad_(False)
    return module


def one_shared():
    module = unit()
    module.H_bn = module.C_bn
    module.W_conv = module.T_conv
    return module


def bare_norms():
    module = unit()
    for letter in "CTHW":
        old = getattr(module, f"{letter}_bn")
        new = nn.BatchNorm3d(1, affine=False, momentum=0.3).double()
        new.running_mean.copy_(old.running_mean), new.running_var.copy_(old.running_var)
        setattr(module, f"{letter}_bn", new)
    return module


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [without_bn, frozen, one_shared, bare_norms])
def test_other_parameters(make, training, calls):
    module = make().train(training)
    x = FORMS["contiguous"]()
    found = step(module, x)
    assert calls == [2, 1]
    assert_close(found, of_reference(module, x), **EXACT)


def hooked(module):
    module.T_conv.register_forward_hook(lambda *_: None)


def dilated(module):
    module.T_conv = nn.Conv3d(2, 1, 3, padding=2, dilation=2, bias=False).double()


def with_bias(module):
    module.T_conv = nn.Conv3d(2, 1, 3, padding=1).double()


def patched(module):
    module.T_conv.forward = lambda pooled: nn.Conv3d.forward(module.T_conv, pooled) * 2


def parametrized(module):
    parametrizations.weight_norm(module.T_conv)


def other_norm(module):
    module.T_bn = nn.Identity()


def one_in_evaluation(module):
    module.T_bn.eval()


def other_momentum(module):
    module.T_bn.momentum = 0.7


def cumulative(module):
    for letter in "CTHW":
        getattr(module, f"{letter}_bn").momentum = None


def untracked(module):
    module.T_bn.track_running_stats = False


def without_running(module):
    module.T_bn = nn.BatchNorm3d(1, track_running_stats=False).double()


def uncounted(module):
    for letter in "CTHW":
        getattr(module, f"{letter}_bn").num_batches_tracked = None


def shared_buffers(module):
    module.T_bn.running_mean = module.H_bn.running_mean


UNUSUAL = [
    *(hooked, dilated, with_bias, patched, parametrized, other_norm, one_in_evaluation, other_momentum, cumulative),
    *(untracked, without_running, uncounted, shared_buffers),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", UNUSUAL)
def test_unusual_submodules(change, training):
    module = unit().train(training)
    change(module)
    if change is one_in_evaluation:
        module.T_bn.eval()
    x = FORMS["contiguous"]()
    if change is patched:  # a copy of it would call the forward of the original
        x.requires_grad_()
        found = [module(x), *torch.autograd.grad(module(x).sum(), [x])]
        with aia_kernels.use_backend("reference"):
            assert_close(found, [module(x), *torch.autograd.grad(module(x).sum(), [x])], **EXACT)
        return
    assert_close(step(module, x), of_reference(module, x), **EXACT)


def test_submodules_that_are_gone():
    module = unit()
    del module.T_bn
    with pytest.raises(AttributeError, match="T_bn"):
        module(FORMS["contiguous"]())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "autocast", "expanded", "named backend"])
def test_what_takes_another_way(name, calls):
    module, x, context = unit("CinST").eval(), FORMS["contiguous"](), None
    if name == "float32":
        module.float()  # x is not: refused by name
        with pytest.raises(TypeError, match=r"weight of gate C: got torch\.float32"):
            module(x)
        return
    if name == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
        for letter in "CTHW":
            getattr(module, f"{letter}_bn").float()
    if name == "autocast":
        module, x, context = module.float(), x.float(), torch.autocast("cpu", torch.bfloat16)
    if name == "expanded":
        x = x[:1].expand(8, 5, 3, 4)
    if name == "named backend":
        context = aia_kernels.use_backend("reference")
    with torch.no_grad(), context or torch.no_grad():
        found = module(x)
        with aia_kernels.use_backend("reference"):
            expected = module(x)
    # In bfloat16 a rounding apart here and there.
    assert_close(found, expected, **(EXACT if found.dtype == torch.float64 else {"rtol": 2**-6, "atol": 2**-6}))
    assert calls == [int(name in ("bfloat16", "autocast", "expanded")), 0]


def test_a_single_value_in_training_is_refused(calls):
    module = unit("C")
    with pytest.raises(ValueError, match="more than one value per map"):
        module(torch.randn(1, 3, 1, 1, 1, dtype=torch.float64))
    assert calls == [0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(8, 16, 3, 3), (8, 64, 28, 28)], ids=["small", "large"])
def test_the_same_bits_for_every_number_of_threads(sizes, threads):
    module, x = unit().float(), torch.randn(sizes)
    expected = step(module, x)
    torch.set_num_threads(threads)
    assert_close(step(module, x), expected, rtol=0, atol=0)


def test_kept_memory_is_that_of_the_maps():
    """Features and indices of both contexts, and seven numbers of each gate, in parts of a multiple of 64 bytes."""
    module, x = unit().float(), torch.randn(8, 16, 5, 6, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    own = {id(p) for p in (x, *module.parameters())}
    b, t, c, h, w = 2, 4, 16, 5, 6
    maps = [b * t * h * w, b * (h * w * c + t * w * c + t * h * c)]
    parts = [7 * 4 * 4, *(bytes for m in maps for bytes in (2 * 4 * m, m))]
    others = [tensor for tensor in kept if id(tensor) not in own and tensor.numel() > x.ndim]
    assert sum(tensor.nbytes for tensor in others) == sum((part + 63) // 64 * 64 for part in parts)
    y.sum().backward()


@pytest.mark.parametrize("name", ["CinST", "STinC2"])
def test_hooks_of_single_tensors_that_are_saved(name):
    """They may give back the same values with other strides, as hooks that are in force in forward may."""

    unpacked = []

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        unpacked.append(tensor)
        return torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)

    module, x = unit(name), FORMS["channels_last"]()
    found = []
    for hooked in (False, True):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = copy.deepcopy(module)(leaf)
        for saved in y.grad_fn._raw_saved_tensors if hooked else ():
            with contextlib.suppress(RuntimeError):  # an empty one takes no hook
                saved.register_hooks(torch.clone, apart)
        found.append(torch.autograd.grad(y.sin().sum(), [leaf]))
        assert bool(unpacked) == hooked
    assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["contiguous", "5d"])
@pytest.mark.parametrize("name", ORDINARY)
def test_height_and_width_exchanged(name, form, training):
    """y lies in memory as x does, as that of the published code."""
    x, module = FORMS[form](), unit(name).train(training)
    weight, turned = torch.randn_like(x), x.mT.contiguous().mT

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x.requires_grad_(), *module.parameters()]
        with torch.no_grad():
            evaluated = copy.deepcopy(module)(x)
        y = module(x)
        assert y.stride() == evaluated.stride() == x.stride()
        gradients = torch.autograd.grad((y * weight).sum(), inputs)
        y.mul_(2)  # no view that autograd forbids to change
        return [y.detach(), evaluated, *gradients]

    assert turned.stride() != x.stride()
    assert_close(results(turned), results(x), **EXACT)
