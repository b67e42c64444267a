"""Linear and efficient attention as modules: the published layers, precision, memory, and what "auto" leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from agreement import EXACT, assert_same, assert_within_budget
from kept_memory import kept_bytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import aia_kernels
from aia_kernels import (
    ChannelLinearAttention,
    EfficientAttention,
    PositionLinearAttention,
    functional,
    modules,
    testing,
)
from aia_kernels.backends import choices
from aia_kernels.common.layouts import as_tokens, stored_as
from benchmarks.published import linear_attention as published

LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COST = choices.FOLDING_COST


class Layer(NamedTuple):
    """A layer, its published form, and the sizes of an input that both take."""

    make: Callable[[], nn.Module]
    published: Callable[[], nn.Module]
    sizes: tuple[int, ...] = (2, 8, 5, 5)


LAYERS = {
    "linear": Layer(lambda: PositionLinearAttention(8), lambda: published.PositionLinearAttention(8)),
    "linear, scale 2": Layer(
        lambda: PositionLinearAttention(8, 2, 1e-3), lambda: published.PositionLinearAttention(8, 2, 1e-3)
    ),
    "kernel": Layer(lambda: PositionLinearAttention(8, 4, feature="softplus"), lambda: published.KernelAttention(8, 4)),
    "channels": Layer(lambda: ChannelLinearAttention(1e-3), lambda: published.ChannelLinearAttention(1e-3)),
    "efficient": Layer(
        lambda: EfficientAttention(8, 4, 2, 6), lambda: published.EfficientAttention(8, 4, 2, 6), (2, 8, 5, 3)
    ),
    "efficient, wide": Layer(
        lambda: EfficientAttention(4, 12, 3, 9), lambda: published.EfficientAttention(4, 12, 3, 9), (3, 4, 2, 7)
    ),
}


def inputs(sizes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, *sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return tuple(a.clone() for a in pair)


def step(module: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad_y)
    return {"y": y.detach(), "grad x": x.grad} | {f"grad {key}": p.grad for key, p in module.named_parameters()}


def calls(module: nn.Module) -> list[int]:
    """Counts the calls of the first submodule, by its forward: hooks would be noticed."""
    counted = []
    child = next(module.children())
    forward = type(child).forward

    def counting(self, *arguments):
        counted.append(1)
        return forward(self, *arguments)

    child.__class__ = type("Counting", (type(child),), {"forward": counting})
    return counted


class TestPublished:
    @pytest.mark.parametrize("name", LAYERS)
    def test_keys_shapes_and_initialization(self, name):
        made = []
        for make in LAYERS[name][:2]:
            torch.manual_seed(0)
            made.append(make().state_dict())
        assert list(made[0]) == list(made[1])
        for key, value in made[0].items():
            assert torch.equal(value, made[1][key]), key

    @pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("name", LAYERS)
    def test_the_same_step(self, name, form, linear_on):
        layer = LAYERS[name]
        expected = testing.randomise(layer.published()).double().to(linear_on[1])
        module = layer.make().double().to(linear_on[1])
        module.load_state_dict(expected.state_dict(), strict=True)
        x, grad_y = inputs(layer.sizes, device=linear_on[1])
        found = step(module, x.contiguous(memory_format=form), grad_y)
        assert_same(found, step(expected, x, grad_y))
        assert found["y"].is_contiguous(memory_format=form)

    @pytest.mark.parametrize("sizes", [(2, 8, 3, 7), (2, 8, 11), (2, 8, 2, 3, 2)], ids=str)
    @pytest.mark.parametrize("name", ["linear", "kernel", "channels", "efficient"])
    def test_any_height_points_and_volumes(self, name, sizes, linear_on):
        """A row of as many positions is the same to attention."""
        module = testing.randomise(LAYERS[name].make()).double().to(linear_on[1])
        x, _ = inputs(sizes, device=linear_on[1])
        y = module(x)
        row = module(x.flatten(2).unsqueeze(2))
        torch.testing.assert_close(y.flatten(2), row.flatten(2), **EXACT)
        assert y.shape == x.shape

    @pytest.mark.parametrize("name", ["linear", "kernel", "efficient"])
    def test_submodules_with_hooks_are_called(self, name, linear_on):
        module = testing.randomise(LAYERS[name].make()).double().to(linear_on[1])
        x, grad_y = inputs(LAYERS[name].sizes, device=linear_on[1])
        expected, seen = step(module, x, grad_y), []
        next(module.children()).register_forward_hook(lambda *_: seen.append(1))
        assert_same(step(module, x, grad_y), expected)
        assert seen == [1]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_error_budget(name, dtype, linear_compiled_on):
    backend, device = linear_compiled_on
    module = testing.randomise(LAYERS[name].make()).to(device, dtype)
    x, grad_y = inputs(LAYERS[name].sizes, dtype, device)
    assert_within_budget(testing.compare(module, x, grad_y, backend))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_leaves_the_residual_alone(name, linear_on):
    module = testing.randomise(LAYERS[name].make()).to(linear_on[1])
    x, _ = inputs(LAYERS[name].sizes, torch.float32, linear_on[1])
    expected = module(x)
    with torch.autocast(linear_on[1], dtype=torch.bfloat16):
        assert torch.equal(module(x), expected)
        # x + gamma * o in PyTorch has the type of gamma where x is narrower.
        as_published = LAYERS[name].published().to(linear_on[1])
        narrow = x.bfloat16()
        assert module(narrow).dtype == as_published(narrow).dtype


class TestCost:
    #: The sizes for which the issue was written have 32 x 32 positions at least.
    @pytest.mark.parametrize("channels, positions", [(64, 32 * 32), (512, 32 * 32), (64, 64 * 64)])
    @pytest.mark.parametrize("name", ["linear", "kernel", "efficient", "efficient, half"])
    def test_bytes_kept_for_backward(self, name, channels, positions, linear_compiled_on):
        module = {
            "linear": lambda: PositionLinearAttention(channels),
            "kernel": lambda: PositionLinearAttention(channels, feature="softplus"),
            "efficient": lambda: EfficientAttention(channels, channels // 8, 1, channels),
            "efficient, half": lambda: EfficientAttention(channels, channels // 2, 8, channels // 2),
        }[name]().to(linear_compiled_on[1])
        x = torch.randn(1, channels, 32, positions // 32, device=linear_compiled_on[1], requires_grad=True)
        # What autograd keeps of the folding is as large as parameters: the joined keys and queries.
        parameters = 2 * module.get_parameter("key_conv.weight" if "eff" not in name else "keys.weight").numel() + 64
        limit = 1.3 * x.numel() + 2 * parameters
        assert kept_bytes(module, x) <= 4 * limit

    @pytest.mark.parametrize("name", ["linear", "efficient"])
    def test_a_third_of_the_products(self, name, linear_compiled_on):
        """0.5 C^2 multiplications a token in the place of 1.5 C^2, with C^2 C / 8 beside them once a sample."""
        x, c, d = torch.randn(1, 64, 64, 64, device=linear_compiled_on[1]), 64, 8
        matrices = [torch.randn(size, device=x.device) for size in ((d, c), (d, c), (c, c), (c, c))]
        call, other = {
            "linear": (
                lambda: functional.linear_attention(x, *matrices[:3]),
                published.PositionLinearAttention(c).to(x.device),
            ),
            "efficient": (
                lambda: functional.efficient_attention(x, *matrices),
                published.EfficientAttention(c, d, 1, c).to(x.device),
            ),
        }[name]
        flops = []
        for run in (call, lambda: other(x)):  # a module would see the counter's hooks, and call its submodules
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                run()
            flops.append(counter.get_total_flops())
        assert flops[0] < {"linear": 0.37, "efficient": 0.25}[name] * flops[1]


class TestWhatAutoLeavesToThePublishedFlow:
    @pytest.fixture(autouse=True)
    def as_installed(self, monkeypatch, fused_at_any_size) -> None:
        monkeypatch.setattr(choices, "FOLDING_COST", COST)

    @pytest.mark.parametrize("name", ["linear", "kernel", "efficient"])
    def test_small_maps(self, name):
        module = testing.randomise(LAYERS[name].make()).double()
        x, grad_y = inputs(LAYERS[name].sizes)
        with aia_kernels.use_backend("cpu"):
            expected = step(copy.deepcopy(module), x, grad_y)
        for form in (
            torch.contiguous_format,
            torch.channels_last,
        ):  # parameters are read at once, and no submodule is called
            found = step(copy.deepcopy(module), x.contiguous(memory_format=form), grad_y)
            assert_same(found, expected)
            assert found["y"].is_contiguous(memory_format=form)
        called = calls(module)
        module.forward = type(module).forward.__get__(module)  # the copies above must not be counted
        found = step(module, x, grad_y)
        assert called
        assert_same(found, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_narrow_types(self, dtype, form):
        """A step with as many keys as values is the published flow's; an evaluation is the passes'."""
        module = testing.randomise(EfficientAttention(8, 8, 2, 8)).to(dtype)
        x, grad_y = inputs((2, 8, 3, 5), dtype)
        x = x.contiguous(memory_format=form)
        found, expected = step(module, x, grad_y), module._through_submodules(x)
        assert torch.equal(found["y"], expected) and found["y"].is_contiguous(memory_format=form)
        assert all(t.isfinite().all() for t in found.values())
        with torch.no_grad():
            y = module(x)
            with aia_kernels.use_backend("cpu"):
                assert torch.equal(y, module(x))

    @pytest.mark.parametrize(
        "make, sizes, left",
        [
            (lambda: PositionLinearAttention(16), (1, 16, 4, 4), False),
            (lambda: PositionLinearAttention(64), (1, 64, 32, 32), False),
            (lambda: PositionLinearAttention(512), (1, 512, 8, 8), True),
            (lambda: PositionLinearAttention(512), (1, 512, 16, 16), False),
            (lambda: EfficientAttention(64, 8, 1, 64), (1, 64, 8, 8), True),
            (lambda: EfficientAttention(64, 8, 1, 64), (1, 64, 16, 16), False),
            (lambda: EfficientAttention(64, 8, 1, 64), (1, 64, 64, 64), False),
            (lambda: EfficientAttention(64, 64, 8, 8), (1, 64, 64, 64), True),
        ],
    )
    def test_by_counting(self, make, sizes, left):
        module = make()
        assert module._published_is_faster(torch.randn(sizes)) == left
        with aia_kernels.use_backend("cpu"):
            assert not module._published_is_faster(torch.randn(sizes))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: PositionLinearAttention(0), ValueError, "in_places: got 0"),
        (lambda: PositionLinearAttention(7), ValueError, "in_places: got 7, expected at least scale = 8"),
        (lambda: PositionLinearAttention(8, scale=1.5), TypeError, "scale: got 1.5"),
        (lambda: PositionLinearAttention(8, feature="relu"), ValueError, "feature: got 'relu'"),
        (lambda: EfficientAttention(8, 5, 2, 6), ValueError, "key_channels: got 5"),
        (lambda: EfficientAttention(8, 4, 2, 5), ValueError, "value_channels: got 5"),
        (lambda: EfficientAttention(8, 4, 0, 5), ValueError, "head_count: got 0"),
        (lambda: PositionLinearAttention(8)(torch.randn(8, 8)), ValueError, r"x: got shape \(8, 8\)"),
        (lambda: PositionLinearAttention(8)(torch.randn(1, 6, 2, 2)), ValueError, r"key: got shape \(1, 8\)"),
        (lambda: EfficientAttention(8, 4, 2, 6)(torch.randn(1, 6, 2, 2)), ValueError, r"key: got shape \(4, 8\)"),
        (lambda: ChannelLinearAttention()(torch.randn(2, 2)), ValueError, r"x: got shape \(2, 2\)"),
        (lambda: ChannelLinearAttention().double()(torch.randn(1, 2, 2, 2)), TypeError, "gamma: got torch.float64"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_kernel_attention_is_the_feature():
    module, other = modules.KernelLinearAttention(8, 2), PositionLinearAttention(8, 2, feature="softplus")
    other.load_state_dict(testing.randomise(module).state_dict(), strict=True)
    x = torch.randn(1, 8, 3, 4)
    assert torch.equal(module(x), other(x))


def test_strides_of_axes_of_one_cost_no_copy():
    """A batch of one in channels_last has another stride of the batch than a product gives: y was copied for it."""
    x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    tokens, result = as_tokens(x), torch.randn(1, 64, 64)
    assert tokens.stride() != result.stride()
    found = stored_as(result, tokens)
    assert found.stride() == tokens.stride() and found.data_ptr() == result.data_ptr() and torch.equal(found, result)
    turned = result.mT
    assert torch.equal(stored_as(turned, tokens), turned) and stored_as(turned, tokens).stride() == tokens.stride()
    negative = torch._neg_view(result)
    assert torch.equal(stored_as(negative, tokens), -result) and not stored_as(negative, tokens).is_neg()
