"""torch.func: grad, vmap and their compositions go through the reference and give its numbers."""

from __future__ import annotations

import external_cases
import pytest
import torch
from external_cases import FORMS, SIZES
from torch.func import functional_call, grad, jvp, vmap

import aia_kernels
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise

SHAPE = SHAPES["small"]
# float64 sums in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("name", UNITS)
def test_grad_and_vmap(name, backend_on):
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().to(backend_on[1]).eval()
    parameters = dict(module.named_parameters())
    xs = torch.stack([make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in range(3)])

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).sin().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        module(leaf).sin().sum().backward()
        torch.testing.assert_close(found[1][i], leaf.grad, **EXACT)
        for key, p in parameters.items():
            torch.testing.assert_close(found[0][key][i], p.grad, **EXACT)


def test_forward_mode(backend_on):
    module = randomise(aia_kernels.CinST(SHAPE.t)).double().to(backend_on[1]).eval().requires_grad_(False)
    x, tangent = (make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in (0, 1))
    _, found = jvp(module, (x,), (tangent,))
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found.sum(), (grad_x * tangent).sum(), **EXACT)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_grad_and_vmap_of_external_attention(form, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device).eval()
    parameters = dict(module.named_parameters())
    xs = torch.stack([external_cases.make_input(form, SIZES["small"], seed=s, device=device) for s in range(3)])

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).sin().sum()

    found = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        module(leaf).sin().sum().backward()
        torch.testing.assert_close(found[1][i], leaf.grad, **EXACT)
        for key, p in parameters.items():
            torch.testing.assert_close(found[0][key][i], p.grad, **EXACT)


@pytest.mark.parametrize("form", ["plain", "groups", "block"])
def test_forward_mode_of_external_attention(form, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device).eval().requires_grad_(False)
    x, tangent = (external_cases.make_input(form, SIZES["small"], seed=s, device=device) for s in (0, 1))
    _, found = jvp(module, (x,), (tangent,))
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found.sum(), (grad_x * tangent).sum(), **EXACT)
