"""External attention's layers: stored vectors in every form, folding, dropout."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import EXACT, assert_same, assert_within_budget
from conftest import skip_unless_runnable
from external_layers import CONSTANT, LAYERS, LOW, MAIN, UNSEEN, inputs, layer, see_calls, step
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from aia_kernels import ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention, testing

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("ea_*.npz"))
# The stored numbers and ours are the same sums in another order, some with projections multiplied first: 1e-9 leaves
# five digits for that in float64.
STORED = {"rtol": 1e-9, "atol": 1e-9}


class TestStoredVectors:
    MAKE = {  # noqa: RUF012
        "eanet": lambda x: ExternalAttention2d(x.shape[1]),
        "eamlp": lambda x: MultiHeadExternalAttention(x.shape[2], num_heads=2),
        "fightingcv": lambda x: ExternalAttention(x.shape[2], S=8),
    }

    def test_all_forms_are_stored(self):
        assert len(GOLDEN) == 4
        assert {path.name.split("_")[1] for path in GOLDEN} == set(self.MAKE)

    @pytest.mark.parametrize("form", ["folded", "by heads", "published"])
    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
    def test_golden(self, path, channels_last, form, backend_on):
        _, device = backend_on
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in np.load(path).items()}
        arrays = {name: a for name, a in arrays.items() if "num_batches" not in name or name.startswith("state.")}
        x = arrays["x"].to(device)
        if channels_last:
            x = x.mT.contiguous().mT if x.ndim == 3 else x.contiguous(memory_format=torch.channels_last)
        module = self.MAKE[path.name.split("_")[1]](x).double().train("_train" in path.stem)
        module.load_state_dict({name[6:]: a for name, a in arrays.items() if name.startswith("state.")}, strict=True)
        module.to(device)
        if isinstance(module, MultiHeadExternalAttention):
            module._saved_by_folding = lambda *_: 1 if form == "folded" else -1
        elif form == "by heads":
            pytest.skip("a form of several heads")
        found = step(see_calls(module) if form == "published" else module, x, arrays["grad_y"].to(device))
        expected = {}
        for name, value in arrays.items():
            if name != "x" and name != "grad_y" and not name.startswith("state."):
                expected[name.removeprefix("after.").replace("grad.", "grad ").replace("grad_x", "grad x")] = value
        assert_same({key: found[key].cpu() for key in expected}, expected, **STORED)


class TestFolding:
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", LAYERS)
    def test_folded_equals_the_published_form(self, name, train, layout, backend_on):
        module = layer(name, device=backend_on[1]).train(train)
        x, grad_y = inputs(name, device=backend_on[1])
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        if layout == "channels_last":
            x = x.contiguous(memory_format=form) if x.ndim == 4 else x.mT.contiguous().mT
        expected = step(see_calls(copy.deepcopy(module)), x, grad_y)
        found = step(module, x, grad_y)
        assert_same(found, expected)
        if x.ndim == 4:
            assert all(found[key].is_contiguous(memory_format=form) for key in ("y", "grad x"))

    @pytest.mark.parametrize("tokens", [1, 16, 64, 577])
    @pytest.mark.parametrize("dim, heads", [(12, 1), (64, 1), (64, 2), (128, 2), (128, 4), (96, 3)])
    def test_the_form_with_fewer_products_is_taken(self, dim, heads, tokens, backend_on):
        module, x = MultiHeadExternalAttention(dim, heads).eval(), torch.randn(2, tokens, dim)
        module, x = module.to(backend_on[1]), x.to(backend_on[1])
        flops = {}
        for form in ("chosen", "folded", "by heads"):
            if form != "chosen":
                module._saved_by_folding = lambda *_, form=form: 1 if form == "folded" else -1
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                module(x)
            flops[form] = counter.get_total_flops()
        assert flops["chosen"] == min(flops.values())

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("name", [name for name in LAYERS if name not in CONSTANT])
    def test_backend_by_error_budget(self, name, dtype, compiled_on):
        backend, device = compiled_on
        x, grad_y = inputs(name, dtype, device)
        for train in (True, False):
            assert_within_budget(testing.compare(layer(name, dtype, device).train(train), x, grad_y, backend))

    @pytest.mark.sanitizer
    @pytest.mark.parametrize("name", MAIN)
    def test_backend_by_error_budget_small(self, name, compiled_on):
        backend, device = compiled_on
        x, grad_y = inputs(name, torch.bfloat16, device)
        assert_within_budget(testing.compare(layer(name, torch.bfloat16, device), x, grad_y, backend))

    @pytest.mark.parametrize("name", MAIN)
    def test_triton_in_the_interpreter(self, name):
        skip_unless_runnable("triton", "cpu")
        x, grad_y = inputs(name, torch.float32)
        assert_within_budget(testing.compare(layer(name, torch.float32), x, grad_y, "triton"))

    @pytest.mark.parametrize("name", MAIN)
    def test_biases_without_effect_have_a_gradient_of_zero(self, name, backend_on):
        """Not none, which DistributedDataParallel would wait for, and not NaN where a bias is."""
        module = layer(name, device=backend_on[1])
        x, grad_y = inputs(name, device=backend_on[1])
        expected = step(copy.deepcopy(module), x, grad_y)
        unseen = {key: p for key, p in module.named_parameters() if key in UNSEEN}
        assert len(unseen) == {"plain": 0, "block": 1, "multi-head": 2}[name]
        with torch.no_grad():
            for p in unseen.values():
                p.fill_(math.nan)
        found = step(module, x, grad_y)
        for key in found:
            assert torch.equal(found[key], expected[key]), key
        for p in unseen.values():
            assert p.grad.count_nonzero() == 0

    @pytest.mark.parametrize("name", MAIN)
    def test_no_stale_product(self, name, backend_on):
        """Folded memories follow their parameters in evaluation too."""
        module = layer(name, device=backend_on[1]).eval().requires_grad_(False)
        x, _ = inputs(name, device=backend_on[1])
        module(x)
        for p in module.parameters():
            p.mul_(1.25)
        torch.testing.assert_close(module(x), see_calls(copy.deepcopy(module))(x), **EXACT)

    @pytest.mark.parametrize("name", MAIN)
    def test_frozen_parameters(self, name, backend_on):
        """Gradients of the others are those of the whole step, and frozen ones get none."""
        module = layer(name, device=backend_on[1])
        x, grad_y = inputs(name, device=backend_on[1])
        expected = step(copy.deepcopy(module), x, grad_y)
        first = next(module.parameters()).requires_grad_(False)
        found = step(module, x, grad_y)
        assert first.grad is None
        for key, value in found.items():
            assert value is None or torch.equal(value, expected[key]), key

    @pytest.mark.parametrize("name", ["plain", "block, many slots", "multi-head, folded"])
    def test_derivatives(self, name, backend_on):
        """First and second, in x and every parameter but the biases that have none."""
        if name == "block, many slots":
            module, sizes = testing.randomise(ExternalAttention2d(2, k=3)), (2, 2, 2, 2)
        elif name == "plain":
            module, sizes = testing.randomise(ExternalAttention(3, S=2)), (2, 4, 3)
        else:
            module, sizes = testing.randomise(MultiHeadExternalAttention(2, num_heads=1)), (1, 3, 2)
        module = module.double().to(backend_on[1]).eval()
        keys = [key for key, _ in module.named_parameters() if key not in UNSEEN]
        parameters = [module.get_parameter(key).detach().requires_grad_() for key in keys]
        x = torch.randn(sizes, dtype=torch.float64, device=backend_on[1], requires_grad=True)

        def call(x, *parameters):
            return functional_call(module, dict(zip(keys, parameters, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


class TestDropout:
    def test_the_seed_decides_the_mask(self, backend_on):
        module = layer("multi-head", device=backend_on[1])
        module.attn_drop.p = 0.5
        x, grad_y = inputs("multi-head", device=backend_on[1])
        steps = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            steps.append(step(module, x, grad_y))
        for key, value in steps[0].items():
            assert torch.equal(value, steps[1][key]), key
        assert not torch.equal(steps[0]["y"], steps[2]["y"])

    def test_what_is_kept_is_scaled(self, backend_on):
        """Over many masks the mean is the output without dropout: within five standard errors of it."""
        module = layer("multi-head", device=backend_on[1])
        x, _ = inputs("multi-head", device=backend_on[1])
        expected = copy.deepcopy(module).eval()(x)
        module.attn_drop.p = 0.3
        with torch.no_grad():
            ys = torch.stack([module(x) for _ in range(400)])
        error = (ys.mean(0) - expected).abs() / (ys.std(0) / math.sqrt(len(ys)))
        assert error.max() < 5

    @pytest.mark.parametrize("drop", ["attn_drop", "proj_drop"])
    def test_only_in_training_and_as_the_submodule_says(self, drop, backend_on):
        module = layer("multi-head", device=backend_on[1])
        x, _ = inputs("multi-head", device=backend_on[1])
        expected = module(x)
        part = getattr(module, drop)
        part.p = 0.5
        assert not torch.equal(module(x), expected)
        part.eval()
        assert torch.equal(module(x), expected)
        assert torch.equal(module.eval()(x), expected)
        part.p, part.training = 1.0, True
        everything_dropped = module(x)
        if drop == "proj_drop":
            assert everything_dropped.count_nonzero() == 0
        else:  # the biases of linear_1 and proj remain
            torch.testing.assert_close(everything_dropped, everything_dropped[:1, :1].expand_as(x), **EXACT)
