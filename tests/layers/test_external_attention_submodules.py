"""External attention's layers do what their submodules say: hooks, patches, parametrizations, batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import EXACT, assert_same
from external_layers import LAYERS, MAIN, inputs, layer, see_calls, step
from torch import nn

from aia_kernels import ExternalAttention2d
from aia_kernels.modules.submodules import must_be_called


class Adapter(nn.Module):
    """A layer that somebody has wrapped: it has no weight of its own."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.5 * self.inner(x)


class Double(nn.Module):
    """A parametrization that counts how often its weight is computed."""

    calls = 0

    def forward(self, weight):
        type(self).calls += 1
        return 2 * weight


class Scaled(torch.Tensor):
    """Three times its values, in linear layers and convolutions alone."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values):
        scaled = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        scaled.values = values
        return scaled

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Scaled(tensors["values"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d):
            x, weight, *rest = args
            return function(x, 3 * weight.values, *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(f"{function} of {cls.__name__}")


SUBMODULES = [(name, key) for name in MAIN for key, _ in LAYERS[name].make().named_modules() if key]


class TestSubmodules:
    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
    @pytest.mark.parametrize("name, key", [pair for pair in SUBMODULES if pair[1] != "proj_drop"], ids="-".join)
    def test_hooks_are_called(self, name, key, kind):
        module = layer(name)
        x, grad_y = inputs(name)
        expected = step(copy.deepcopy(module), x, grad_y)
        seen = []
        getattr(module.get_submodule(key), f"register_{kind}_hook")(lambda *_: seen.append(key))
        assert_same(step(module, x, grad_y), expected)
        assert seen == [key]

    @pytest.mark.parametrize("name, key", SUBMODULES, ids="-".join)
    def test_a_patched_forward_is_called(self, name, key):
        """As tools do that move weights between devices: the attribute of one object, not of its class."""
        module = layer(name)
        x, _ = inputs(name)
        expected, seen = copy.deepcopy(module)(x), []
        part = module.get_submodule(key)
        original = part.forward
        part.forward = lambda x: seen.append(key) or original(x)
        torch.testing.assert_close(module(x), expected, **EXACT)
        assert seen == [key]

    @pytest.mark.parametrize(
        "name, key", [p for p in SUBMODULES if p[1] not in ("conv2", "conv2.1", "attn_drop", "proj_drop")], ids="-".join
    )
    def test_parametrized_weight_is_read_once(self, name, key):
        """Once, because a parametrization such as spectral_norm moves its state whenever the weight is read."""
        module = layer(name)
        x, grad_y = inputs(name)
        doubled = copy.deepcopy(module)
        with torch.no_grad():
            doubled.get_submodule(key).weight.mul_(2)
        part = module.get_submodule(key)
        nn.utils.parametrize.register_parametrization(part, "weight", Double())
        assert not must_be_called(part)
        expected, Double.calls = step(doubled, x, grad_y), 0
        found = step(module, x, grad_y)
        assert Double.calls == 1
        original = found.pop(f"grad {key}.parametrizations.weight.original")
        torch.testing.assert_close(original, 2 * expected.pop(f"grad {key}.weight"), **EXACT)
        assert_same(found, expected)

    @pytest.mark.parametrize("name, key", SUBMODULES, ids="-".join)
    def test_a_wrapped_submodule_is_called(self, name, key):
        module = layer(name).eval()
        x, _ = inputs(name)
        parent, _, attribute = key.rpartition(".")
        setattr(module.get_submodule(parent), attribute, Adapter(module.get_submodule(key)))
        if key == "conv2":  # the sum of a wrapped block and x, by hand
            z = 1.5 * module.conv2.inner(module.linear_1(functional_attention(module, x)).view(x.shape))
            torch.testing.assert_close(module(x), (z + x).relu(), **EXACT)
        else:
            expected = see_calls(copy.deepcopy(module))(x)
            torch.testing.assert_close(module(x), expected, **EXACT)
            plain = layer(name).eval()(x)
            unseen = key in ("proj_drop",)
            assert unseen or not torch.allclose(module(x), plain)

    @pytest.mark.parametrize("name, key", SUBMODULES, ids="-".join)
    def test_a_sequence_is_called(self, name, key):
        """Of another kind, with the forward of its kind, as adapters and exporters leave them."""
        module = layer(name)
        x, grad_y = inputs(name)
        expected = step(copy.deepcopy(module), x, grad_y)
        parent, _, attribute = key.rpartition(".")
        setattr(module.get_submodule(parent), attribute, nn.Sequential(module.get_submodule(key)))
        found = step(module, x, grad_y)
        assert_same({name.replace(f"{key}.0", key, 1): value for name, value in found.items()}, expected)

    @pytest.mark.parametrize("name", MAIN)
    def test_hooks_of_all_modules_see_every_submodule(self, name):
        module = layer(name)
        x, grad_y = inputs(name)
        expected, seen = step(copy.deepcopy(module), x, grad_y), []
        with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m)):
            assert_same(step(module, x, grad_y), expected)
        assert {id(m) for m in seen} == {id(m) for m in module.modules()}

    @pytest.mark.parametrize("name", MAIN)
    def test_a_weight_of_another_kind_of_tensor(self, name):
        """As weight-only quantization leaves them: the tensor knows the product of its layer, and no view or matmul."""
        module = layer(name).requires_grad_(False)
        x, _ = inputs(name)
        expected = copy.deepcopy(module)(x)
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                part.weight = nn.Parameter(Scaled(part.weight / 3), requires_grad=False)
        torch.testing.assert_close(module(x), expected, **EXACT)

    def test_quantized_submodules_are_called(self):
        """A layer whose weight is no tensor: it has a forward of its own, and only that."""

        class Quantized(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.scale = linear.weight.detach().abs().max() / 127
                self.integers = (linear.weight.detach() / self.scale).round().to(torch.int8)
                self.bias = linear.bias

            def weight(self):
                return self.integers * self.scale

            def forward(self, x):
                return nn.functional.linear(x, self.weight(), self.bias)

        module, exact = layer("multi-head").eval(), layer("multi-head").eval()
        x, _ = inputs("multi-head")
        with torch.no_grad():
            for key in ("trans_dims", "linear_0", "linear_1", "proj"):
                quantized = Quantized(getattr(exact, key))
                getattr(exact, key).weight.copy_(quantized.weight())
                setattr(module, key, quantized)
        torch.testing.assert_close(module(x), exact(x), **EXACT)

    def test_convolutions_that_are_no_product_per_token(self):
        """Replaced by grouped, wider or biased ones, or the batch norm by another norm: run as they are."""
        x, grad_y = inputs("block")
        replacements = {
            "conv1": nn.Conv2d(6, 6, 1, groups=2),
            "conv1 of 3x3": nn.Conv2d(6, 6, 3, padding=1),
            "linear_1": nn.Conv1d(5, 6, 1, bias=True),
            "conv2.0": nn.Conv2d(6, 6, 1, bias=True),
            "conv2.1": nn.GroupNorm(2, 6),
            "conv2": nn.Conv2d(6, 6, 1),
        }
        for key, replacement in replacements.items():
            module = layer("block")
            parent, _, attribute = key.split(" ")[0].rpartition(".")
            setattr(module.get_submodule(parent), attribute, replacement.double())
            oracle = see_calls(copy.deepcopy(module))
            assert_same(step(module, x, grad_y), step(oracle, x, grad_y))

    def test_biases_that_the_published_layers_do_not_have(self):
        """Replaced by linear layers with them, or without: still folded, and right."""
        x, grad_y = inputs("plain")
        module = layer("plain")
        module.mk, module.mv = nn.Linear(7, 5).double(), nn.Linear(5, 7).double()
        found, expected = (step(m, x, grad_y) for m in (module, see_calls(copy.deepcopy(module))))
        assert_same(found, expected)
        x, grad_y = inputs("multi-head")
        module = layer("multi-head")
        module.proj, module.linear_1 = nn.Linear(24, 6, bias=False).double(), nn.Linear(64, 3, bias=False).double()
        assert_same(step(module, x, grad_y), step(see_calls(copy.deepcopy(module)), x, grad_y))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("change", ["published", "frozen", "cumulative", "untracked", "without buffers", "plain"])
    def test_batch_norm_as_its_submodule_says(self, change, train, backend_on):
        """Two steps beside torch's batch norm, which the published form runs."""
        module = layer("block", device=backend_on[1]).train(train)
        bn = module.conv2[1]
        if change == "frozen":
            bn.eval()
        elif change == "cumulative":
            bn.momentum = None
        elif change == "untracked":
            bn.track_running_stats, bn.momentum, bn.eps = False, 0.3, 1e-2
        elif change in ("without buffers", "plain"):
            settings = {"track_running_stats": False} if change == "without buffers" else {"affine": False}
            module.conv2[1] = nn.BatchNorm2d(6, **settings).to(x_like := module.conv1.weight).train(train)
            del x_like
        oracle = see_calls(copy.deepcopy(module))
        for seed in range(2):
            x, grad_y = inputs("block", device=backend_on[1], seed=seed)
            assert_same(step(module, x, grad_y), step(oracle, x, grad_y))
            for found, expected in zip(module.buffers(), oracle.buffers(), strict=True):
                torch.testing.assert_close(found, expected, **EXACT)

    def test_converted_to_synchronized_batch_norm(self):
        module = layer("block")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
        assert isinstance(converted.conv2[1], nn.SyncBatchNorm)
        x, grad_y = inputs("block")
        assert_same(step(converted, x, grad_y), step(module, x, grad_y), rtol=0, atol=0)  # nobody to share with


def functional_attention(module: ExternalAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The attention map [B, k, N] of a block, by hand."""
    p = module.linear_0(module.conv1(x).flatten(2)).softmax(2)
    return p / (1e-9 + p.sum(1, keepdim=True))
