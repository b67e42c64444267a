"""The units: the algorithm over plain passes, every backend by error budget, derivatives, batch norm and odd input."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from agreement import EXACT, assert_same, assert_within_budget
from conftest import skip_unless_runnable
from plain_passes import PlainPasses
from torch import nn

import aia_kernels
from aia_kernels import backends, functional, testing
from aia_kernels.reference import UNITS, Gate, Norm
from aia_kernels.testing import SHAPES, Shape, make_input, randomise

ALL = tuple(UNITS)
LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unit(name: str, shape: Shape, dtype=torch.float64, device="cpu", **settings) -> nn.Module:
    return randomise(getattr(aia_kernels, name)(shape.t, **settings)).to(device, dtype)


@pytest.fixture(params=[None, "THWC", "CTHW"], ids=lambda order: f"plain-{order or 'as-x'}")
def plain_passes(request, monkeypatch) -> None:
    """Run the algorithm over the plain passes, in each way of packing maps."""
    monkeypatch.setattr(backends, "passes", lambda *_: PlainPasses(lambda order: request.param or order))
    monkeypatch.setattr(backends, "_resolve", lambda choice, *_: "reference" if choice == "reference" else "cpu")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_algorithm_over_plain_passes(name, layout, plain_passes):
    for train in (True, False):
        module = unit(name, SHAPES["prime"]).train(train)
        x, grad_y = (make_input(SHAPES["prime"], torch.float64, layout, seed) for seed in (0, 1))
        assert_same(testing.run(module, x, grad_y, "auto"), testing.run(module, x, grad_y, "reference"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_backend_by_error_budget(name, shape, dtype, compiled_on):
    backend, device = compiled_on
    # Layouts rotate through shapes and types, so that every pair of the two meets within the table.
    layout = testing.LAYOUTS[(list(SHAPES).index(shape) + LOW.index(dtype)) % len(testing.LAYOUTS)]
    x, grad_y = (make_input(SHAPES[shape], dtype, layout, seed, device) for seed in (0, 1))
    module = unit(name, SHAPES[shape], dtype, device)
    assert_within_budget(testing.compare(module, x, grad_y, backend))
    with backends.use_backend(backend), torch.no_grad():
        assert module(x).stride() == x.stride()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CinST", "STinC2"])
def test_backend_by_error_budget_small(name, dtype, compiled_on):
    backend, device = compiled_on
    shape = SHAPES["small"]
    x, grad_y = (make_input(shape, dtype, "channels_last", seed, device) for seed in (0, 1))
    assert_within_budget(testing.compare(unit(name, shape, dtype, device), x, grad_y, backend))


@pytest.mark.parametrize("name, layout", [("CinST", "contiguous"), ("STinC2", "channels_last")])
def test_triton_in_the_interpreter(name, layout):
    skip_unless_runnable("triton", "cpu")
    shape = Shape(1, 2, 3, 3, 5)
    x, grad_y = (make_input(shape, torch.float32, layout, seed) for seed in (0, 1))
    assert_within_budget(testing.compare(unit(name, shape, torch.float32), x, grad_y, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_ties(name, dtype, compiled_on):
    """x has five values only: the first index of each maximum takes the gradient."""
    backend, device = compiled_on
    shape = SHAPES["small"]
    x = (make_input(shape, torch.float64).mul(1.5).round().clamp(-2, 2)).to(device, dtype)
    grad_y = make_input(shape, dtype, seed=1, device=device)
    assert_within_budget(testing.compare(unit(name, shape, dtype, device).eval(), x, grad_y, backend))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_nan_and_infinity(name, value, compiled_on):
    backend, device = compiled_on
    shape = SHAPES["prime"]
    module = unit(name, shape, torch.float32, device).eval()
    x = make_input(shape, torch.float32, device=device)
    x[1, 2, 3, 4] = x[4, 0, 0, 0] = value
    grad_y = make_input(shape, torch.float32, seed=1, device=device)
    found, expected = (testing.run(module, x, grad_y, b) for b in (backend, "reference"))
    # The same elements are finite, and those agree: 1e-4 is float32's rounding times the sums of a few hundred terms.
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(found["grad x"].isnan(), expected["grad x"].isnan())


def functional_call(name: str, shape: Shape, norm: bool, device="cpu"):
    """A unit in training as a function of x and its parameters, with random float64 inputs for it."""
    letters, tensors = UNITS[name].letters, []
    for letter in letters:
        module = unit(name, shape, device=device)
        tensors.append(module.get_submodule(f"{letter}_conv").weight.detach().requires_grad_())
        if norm:
            bn = module.get_submodule(f"{letter}_bn")
            tensors += [bn.weight.detach().requires_grad_(), bn.bias.detach().requires_grad_()]

    def call(x, *tensors):
        step = 3 if norm else 1
        gates = [
            Gate(tensors[i], Norm(*tensors[i + 1 : i + 3], training=True) if norm else None)
            for i in range(0, len(tensors), step)
        ]
        return functional.attention_in_attention(x, name, gates, shape.t)

    return call, (make_input(shape, torch.float64, device=device).requires_grad_(), *tensors)


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no bn"])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name, norm, backend_on):
    call, inputs = functional_call(name, Shape(2, 2, 2, 2, 3), norm, backend_on[1])
    assert torch.autograd.gradcheck(call, inputs, fast_mode=name != "C")


@pytest.mark.parametrize("name", ALL)
def test_gradgradcheck(name, backend_on):
    call, inputs = functional_call(name, Shape(1, 2, 2, 2, 3), True, backend_on[1])
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_second_derivative_with_arguments_that_depend_on_each_other(backend_on):
    """The weight is computed from x: each gradient must be that of its own argument, not of both."""
    call, (x, weight, *rest) = functional_call("C", Shape(2, 2, 2, 2, 3), True, backend_on[1])

    def dependent(x, weight):
        return call(x, weight * x.mean(), *rest)

    assert torch.autograd.gradgradcheck(dependent, (x, weight), fast_mode=True)


@pytest.mark.parametrize("name", ["C", "CinST"])
def test_gradients_of_a_part_of_the_inputs(name, backend_on):
    backend, device = backend_on
    shape = SHAPES["small"]
    module = unit(name, shape, device=device)
    x, grad_y = (make_input(shape, torch.float64, seed=seed, device=device) for seed in (0, 1))
    expected = testing.run(module, x, grad_y, backend)
    only_parameters = copy.deepcopy(module)
    only_parameters(x).backward(grad_y)
    for key, p in only_parameters.named_parameters():
        assert torch.equal(p.grad, expected[f"grad {key}"])
    only_x = copy.deepcopy(module).requires_grad_(False)
    (grad_x,) = torch.autograd.grad(only_x(x.requires_grad_()), x, grad_y)
    assert torch.equal(grad_x, expected["grad x"])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_expanded_and_strided_gradients(layout, backend_on):
    _, device = backend_on
    shape = SHAPES["prime"]
    module = unit("CinST", shape, device=device).eval()
    x = make_input(shape, torch.float64, layout, device=device).requires_grad_()
    wide = torch.randn(*x.shape[:-1], 2 * x.shape[-1], dtype=torch.float64, device=device)
    expanded = torch.randn((), dtype=torch.float64, device=device).expand(x.shape)
    for grad_y in (expanded, wide[..., ::2], wide[..., : x.shape[-1]].contiguous().mT.contiguous().mT):
        assert grad_y.stride() != x.stride()
        (found,) = torch.autograd.grad(module(x), x, grad_y)
        (expected,) = torch.autograd.grad(module(x), x, torch.empty_like(x).copy_(grad_y))
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ALL)
def test_parameters_of_a_channels_last_network(name, backend_on):
    """The convolutions' weights follow their network's .to(memory_format=torch.channels_last_3d)."""
    backend, device = backend_on
    module = unit(name, SHAPES["small"], device=device)
    moved = copy.deepcopy(module).to(memory_format=torch.channels_last_3d)
    x, grad_y = (make_input(SHAPES["small"], torch.float64, "channels_last_3d", seed, device) for seed in (0, 1))
    assert_same(testing.run(moved, x, grad_y, backend), testing.run(module, x, grad_y, backend))


def test_input_of_other_strides(backend_on):
    backend, device = backend_on
    shape = SHAPES["prime"]
    module = unit("STinC", shape, device=device).eval()
    b, _, c, h, w = shape.b * shape.t, *shape[1:]
    base = torch.randn(b, 2 * c, h, w, dtype=torch.float64, device=device)
    channels_last = base.contiguous(memory_format=torch.channels_last)[:, ::2]
    for x in (base[:, ::2], channels_last, base[:, :c].mT.contiguous().mT, base[:1, :c].expand(b, -1, -1, -1)):
        dense = torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x)
        grad_y = torch.randn_like(dense)
        assert_same(testing.run(module, x, grad_y, backend), testing.run(module, dense, grad_y, backend))
    assert module(channels_last).is_contiguous(memory_format=torch.channels_last)


PAST_2_31 = {
    "small": Shape(2, 3, 44, 44, 5),
    "a batch": Shape(9, 8, 128, 512, 512),
    "a clip": Shape(1, 8, 1032, 512, 512),
}


@pytest.mark.parametrize("name, axis", [("C", 2), ("ST", 1)])
@pytest.mark.parametrize("size", PAST_2_31)
def test_past_2_31_elements(size, name, axis, compiled_on):
    """The end of x, where offsets are largest. C is local in H and ST in C: values reach one position far and gradients
    two, so a crop of 40 positions tells the last 32."""
    backend, device = compiled_on
    shape = PAST_2_31[size]
    if size != "small":
        if device == "cpu":
            pytest.skip("needs a GPU")
        if torch.cuda.mem_get_info()[0] < 8 * 2 * 2**31:
            pytest.skip("needs 32 GiB of GPU memory")
    module = unit(name, shape, torch.bfloat16, device).eval()
    sizes = shape.b * shape.t, *shape[2:]
    x, grad_y = (torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(2))
    found = testing.run(module, x, grad_y, backend)
    crops = (a.narrow(axis, sizes[axis] - 40, 40)[-shape.t :].contiguous().float() for a in (x, grad_y))
    expected = testing.run(copy.deepcopy(module).float(), *crops, "reference")
    for key in ("y", "grad x"):
        end, value = found[key].narrow(axis, sizes[axis] - 32, 32)[-shape.t :], expected[key].narrow(axis, 8, 32)
        # y and dx are of order one and rounded to eight bits.
        torch.testing.assert_close(end.float(), value, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("sizes", [(0, 5, 3, 4), (8, 0, 3, 4), (8, 5, 0, 4), (2, 5, 4, 3, 0), (2, 5, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ["C", "STinC2"])
def test_empty_input(name, sizes, backend_on):
    module = unit(name, Shape(2, 4, 5, 3, 4), device=backend_on[1])
    buffers = copy.deepcopy(dict(module.named_buffers()))
    x = torch.randn(sizes, dtype=torch.float64, device=backend_on[1], requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(p.grad.count_nonzero() == 0 for p in module.parameters())
    assert all(torch.equal(b, buffers[key]) for key, b in module.named_buffers())


def partly_frozen(module: nn.Module) -> None:
    module.get_submodule("H_bn").eval()


def cumulative(module: nn.Module) -> None:
    for bn in batch_norms(module):
        bn.momentum = None


def cumulative_without_a_count(module: nn.Module) -> None:
    for bn in batch_norms(module):
        bn.momentum = bn.num_batches_tracked = None


def mixed(module: nn.Module) -> None:
    for i, bn in enumerate(batch_norms(module)):
        bn.momentum, bn.eps = 0.1 * (i + 1), 10.0 ** -(i + 2)
        bn.track_running_stats = i != 1


def without_running_statistics(module: nn.Module) -> None:
    for key, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, key, nn.BatchNorm3d(1, track_running_stats=False).to(child.weight))


def without_affine(module: nn.Module) -> None:
    for key, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm3d):
            setattr(module, key, nn.BatchNorm3d(1, affine=False).to(child.weight))


def as_published(module: nn.Module) -> None:
    pass


def batch_norms(module: nn.Module) -> list[nn.BatchNorm3d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [
        as_published,
        partly_frozen,
        cumulative,
        cumulative_without_a_count,
        mixed,
        without_running_statistics,
        without_affine,
    ],
)
def test_batch_norm_as_its_submodule_says(change, train, backend_on):
    """Two steps beside the formula run through the submodules themselves, that is through torch's batch norm."""
    shape = SHAPES["small"]
    module = unit("CinST", shape, device=backend_on[1]).train(train)
    change(module)
    oracle = copy.deepcopy(module)
    for step in range(2):
        x, grad_y = (make_input(shape, torch.float64, seed=2 * step + k, device=backend_on[1]) for k in (0, 1))
        results = []
        for m, call in ((module, module), (oracle, oracle._through_submodules)):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            m.zero_grad()
            y.backward(grad_y)
            results.append({"y": y.detach(), "grad x": leaf.grad})
            results[-1] |= {key: p.grad for key, p in m.named_parameters()} | dict(m.named_buffers())
        assert_same(*results)


def test_hooks_are_called(backend_on):
    module = unit("CinST", SHAPES["small"], device=backend_on[1])
    x = make_input(SHAPES["small"], torch.float64, device=backend_on[1])
    expected = copy.deepcopy(module)(x)
    seen = []
    module.H_conv.register_forward_hook(lambda *_: seen.append("H"))
    torch.testing.assert_close(module(x), expected, **EXACT)
    assert seen == ["H"]


@pytest.mark.parametrize(
    "name, submodule",
    [
        ("H_conv", nn.Conv3d(2, 1, 3, padding=1)),
        ("H_conv", nn.Conv3d(2, 1, 3, padding=2, dilation=2, bias=False)),
        ("H_conv", nn.Conv3d(2, 1, 3, padding=1, padding_mode="replicate", bias=False)),
        ("H_conv", nn.Conv3d(2, 1, 1, bias=False)),
        ("H_conv", nn.Sequential(nn.Conv3d(2, 1, 3, padding=1, bias=False))),
        ("H_bn", nn.Identity()),
        ("H_bn", nn.Sequential(nn.BatchNorm3d(1))),
        ("H_bn", nn.InstanceNorm3d(1, affine=True)),
    ],
    ids=["bias", "dilation", "padding mode", "pointwise", "sequence", "none", "norms", "instance norm"],
)
def test_replaced_submodule_is_called(name, submodule, backend_on):
    """A submodule with other settings or of another kind computes its own, not what the published one would."""
    module = unit("CinST", SHAPES["small"])
    setattr(module, name, copy.deepcopy(submodule).double())
    module.to(backend_on[1])
    oracle = copy.deepcopy(module)
    x = make_input(SHAPES["small"], torch.float64, device=backend_on[1])
    y, expected = module(x), oracle._through_submodules(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_parametrized_weight_is_read(backend_on):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = unit("C", SHAPES["small"], device=backend_on[1]).eval()
    doubled = copy.deepcopy(module)
    nn.utils.parametrize.register_parametrization(module.C_conv, "weight", Double())
    with torch.no_grad():
        doubled.C_conv.weight.mul_(2)
    x = make_input(SHAPES["small"], torch.float64, device=backend_on[1])
    torch.testing.assert_close(module(x), doubled(x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["C", "STinC2"])
def test_autocast(name, dtype, backend_on):
    """Parameters in float32, activations in either type: y has the type of x, each gradient that of its leaf."""
    backend, device = backend_on
    shape = SHAPES["prime"]
    module = unit(name, shape, torch.float32, device)
    x, grad_y = (make_input(shape, dtype, seed=seed, device=device) for seed in (0, 1))
    with torch.autocast(device, torch.bfloat16):
        results = testing.run(module, x, grad_y, backend)
        assert_within_budget(testing.compare(module, x, grad_y, backend, low=module))
    assert results["y"].dtype == results["grad x"].dtype == dtype
    assert {value.dtype for key, value in results.items() if "conv" in key or "bn" in key} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_half_network_with_norms_in_float32(name, dtype, backend_on):
    """As torch's batch norm takes them; the gradients of the norms are float32 too, not rounded to half first."""
    backend, device = backend_on
    shape = SHAPES["prime"]
    module = unit(name, shape, dtype, device)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm3d):
            norm.float()
    x, grad_y = (make_input(shape, dtype, seed=seed, device=device) for seed in (0, 1))
    results = testing.run(module, x, grad_y, backend)
    for gradients in (True, False):
        of_norms = [v for key, v in results.items() if "bn" in key and key.startswith("grad") == gradients]
        assert all(value.dtype == torch.float32 for value in of_norms)
        assert any((value != value.to(dtype)).any() for value in of_norms)  # one may be a half by chance, not all
    assert results["y"].dtype == results["grad x"].dtype == results[f"grad {module.unit.letters[0]}_conv.weight"].dtype
    assert_within_budget(testing.compare(module, x, grad_y, backend, low=module))
    with pytest.raises(TypeError, match=r"BN's weight of gate .: got torch.float64"):
        testing.run(module.apply(lambda m: m.double() if isinstance(m, nn.BatchNorm3d) else m), x, grad_y, backend)


def test_initialization_follows_the_published_order():
    """Construction, then the published initializers one by one, on the same random numbers."""
    published = {
        "C": {"C": ["kaiming"]},
        "ST": {"T": ["kaiming"], "H": ["kaiming"], "W": ["kaiming"]},
        "CinST": {"C": ["kaiming"], "T": ["xavier"], "H": ["xavier", "xavier"], "W": []},
        "STinC": {"C": ["xavier"], "T": ["kaiming"], "H": ["kaiming"], "W": ["kaiming"]},
        "STinC2": {"C": ["xavier"], "T": ["kaiming"], "H": ["kaiming"], "W": ["kaiming"]},
    }
    for name, gates in published.items():
        torch.manual_seed(7)
        convs = {letter: nn.Conv3d(2, 1, 3, padding=1, bias=False) for letter in gates}
        for letter, steps in gates.items():
            for step in steps:
                if step == "kaiming":
                    nn.init.kaiming_normal_(convs[letter].weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(convs[letter].weight)
        torch.manual_seed(7)
        module = getattr(aia_kernels, name)()
        for letter, conv in convs.items():
            assert torch.equal(module.get_submodule(f"{letter}_conv").weight, conv.weight)
        assert module.num_segments == 8 and module.use_BN


@pytest.mark.parametrize("name", ALL)
def test_functions_equal_modules(name, backend_on):
    module = unit(name, SHAPES["small"], device=backend_on[1]).eval()
    gates = []
    for letter in UNITS[name].letters:
        bn = module.get_submodule(f"{letter}_bn")
        norm = Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked)
        gates.append(Gate(module.get_submodule(f"{letter}_conv").weight, norm))
    x = make_input(SHAPES["small"], torch.float64, device=backend_on[1])
    assert torch.equal(getattr(functional, name)(x, *gates, num_segments=SHAPES["small"].t), module(x))


def test_five_dimensions_bring_their_own_segments(backend_on):
    module = unit("CinST", SHAPES["prime"], device=backend_on[1]).eval()
    ys = []
    for layout in testing.LAYOUTS:
        y = module(make_input(SHAPES["prime"], torch.float64, layout, device=backend_on[1]))
        ys.append(y if y.ndim == 4 else y.transpose(1, 2).flatten(0, 1))
    for a, b in pairwise(ys):
        torch.testing.assert_close(a, b, **EXACT)
