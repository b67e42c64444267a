"""External attention's passes between the framework's products, in the forms that are taken where a call is a launch.

Only a GPU takes them by itself. Here the CPU is made to."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_within_budget
from conftest import skip_unless_runnable
from external_cases import FORMS, SIZES, make, make_grad, make_input
from external_layers import LAYERS, LOW, inputs, layer

from aia_kernels import testing
from aia_kernels.backends import matmul_passes
from aia_kernels.functional.external_attention import _WithoutEffect

FAMILY = "external_attention"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    skip_unless_runnable("cpu", "cpu", FAMILY)
    monkeypatch.setattr(matmul_passes, "_is_launched", lambda _: True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", [name for name in FORMS if not name.startswith("normalize")])
def test_forms_by_error_budget(form, sizes, dtype):
    transposed = bool((list(SIZES).index(sizes) + LOW.index(dtype)) % 2)
    x = make_input(form, SIZES[sizes], dtype, transposed=transposed)
    # With one token z has no variance: its gradient in training is all rounding.
    module = make(form, SIZES[sizes], dtype).train(SIZES[sizes].n > 1)
    assert_within_budget(testing.compare(module, x, make_grad(form, SIZES[sizes], dtype), "cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYERS if "one" not in name])
def test_layers_by_error_budget(name, dtype):
    x, grad_y = inputs(name, dtype)
    assert_within_budget(testing.compare(layer(name, dtype), x, grad_y, "cpu"))


def test_without_effect():
    """The key passes as it is; the biases get zeros in their own types, whatever they and the gradient hold."""
    key = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    biases = torch.full((3,), torch.nan, requires_grad=True), torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    found = _WithoutEffect.apply(key, *biases)
    assert torch.equal(found, key)
    grad = torch.full_like(key, torch.inf)
    of_key, *others = torch.autograd.grad(found, (key, *biases), grad)
    assert torch.equal(of_key, grad)
    for bias, zeros in zip(biases, others, strict=True):
        assert zeros.dtype == bias.dtype and torch.equal(zeros, torch.zeros_like(bias))
    assert torch.autograd.gradgradcheck(lambda k: _WithoutEffect.apply(k, biases[0]).sin(), (key,))
