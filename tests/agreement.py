"""What tests assert of results: that two sets of them are the same, or within their budget, or those of torch.func."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from aia_kernels import testing

# float64 sums in another order: the values are of order one to a hundred, so this leaves four digits.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    """The same names with the same values, by default those of float64 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerance or EXACT), msg=lambda m, name=name: f"{name}: {m}")


def assert_within_budget(excesses: list[testing.Excess]) -> None:
    worst = excesses[0]
    assert worst.ratio <= 1, f"{worst.name}: error {worst.error:.3g}, budget {worst.budget:.3g}"


def assert_grad_and_vmap(module: nn.Module, xs: Tensor) -> None:
    """Gradients of a module for each x of a stack, by torch.func, are those of one backward after the other."""
    parameters = dict(module.named_parameters())

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


def assert_forward_mode(module: nn.Module, x: Tensor, tangent: Tensor) -> None:
    """The derivative along a tangent is the gradient's product with it."""
    module.requires_grad_(False)
    _, found = jvp(module, (x,), (tangent,))
    x = x.clone().requires_grad_()
    (grad_x,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found.sum(), (grad_x * tangent).sum(), **EXACT)
