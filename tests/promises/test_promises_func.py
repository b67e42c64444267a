"""torch.func: grad, vmap and their compositions go through the reference and give its numbers."""

from __future__ import annotations

import external_cases
import pytest
import torch
from agreement import EXACT, assert_forward_mode, assert_grad_and_vmap
from external_cases import FORMS, SIZES
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, stack_module_state, vmap

import aia_kernels
from aia_kernels import functional
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise

SHAPE = SHAPES["small"]


@pytest.mark.parametrize("name", UNITS)
def test_grad_and_vmap(name, backend_on):
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().to(backend_on[1]).eval()
    xs = torch.stack([make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in range(3)])
    assert_grad_and_vmap(module, xs)


def assert_rows_of_a_jacobian(y, inputs, grads_y):
    """vmap over the gradients of one call, its graph made outside, gives what one gradient after the other does."""
    found = vmap(lambda grad_y: torch.autograd.grad(y, inputs, grad_y, retain_graph=True))(grads_y)
    for i, grad_y in enumerate(grads_y):
        for rows, expected in zip(found, torch.autograd.grad(y, inputs, grad_y, retain_graph=True), strict=True):
            torch.testing.assert_close(rows[i], expected, **EXACT)
    assert not any(rows.requires_grad for rows in found)


@pytest.mark.parametrize("name", UNITS)
def test_vmap_over_gradients_of_one_call(name, backend_on):
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().to(backend_on[1])
    x = make_input(SHAPE, torch.float64, device=backend_on[1]).requires_grad_()
    grads_y = torch.stack([make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in (1, 2, 3)])
    assert_rows_of_a_jacobian(module(x), (x, *module.parameters()), grads_y)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_gradients_of_one_call_of_external_attention(form, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device)
    x = external_cases.make_input(form, SIZES["small"], device=device).requires_grad_()
    y = module(x)
    assert_rows_of_a_jacobian(y, (x, *module.parameters()), torch.randn(3, *y.shape).to(y))


def test_ensemble_in_training(backend_on):
    """Each member has its own parameters and running statistics, and moves its own."""
    members = [randomise(aia_kernels.CinST(SHAPE.t)).double().to(backend_on[1]) for _ in range(2)]
    parameters, buffers = stack_module_state(members)
    xs = torch.stack([make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in (0, 1)])
    found = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(parameters, buffers, xs)
    for i, (member, x) in enumerate(zip(members, xs, strict=True)):
        torch.testing.assert_close(found[i], member(x), **EXACT)
        for key, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer, **EXACT)


@pytest.mark.parametrize("argument", ["x", "C_conv.weight", "H_bn.bias"])
def test_dual_numbers(argument, backend_on):
    """Forward mode without torch.func: no argument loses its tangent, whether or not gradients are wanted too."""
    module = randomise(aia_kernels.CinST(SHAPE.t)).double().to(backend_on[1]).eval()
    x = make_input(SHAPE, torch.float64, device=backend_on[1])
    inputs = {"x": x} | {key: p.detach() for key, p in module.named_parameters()}
    tangent = torch.randn_like(inputs[argument])

    def call(value):
        arguments = inputs | {argument: value}
        return functional_call(module, {k: v for k, v in arguments.items() if k != "x"}, (arguments["x"],))

    _, expected = jvp(call, (inputs[argument],), (tangent,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(inputs[argument], tangent))).tangent
    torch.testing.assert_close(found, expected, **EXACT)


def test_forward_mode(backend_on):
    module = randomise(aia_kernels.CinST(SHAPE.t)).double().to(backend_on[1]).eval()
    x, tangent = (make_input(SHAPE, torch.float64, seed=seed, device=backend_on[1]) for seed in (0, 1))
    assert_forward_mode(module, x, tangent)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_grad_and_vmap_of_external_attention(form, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device).eval()
    xs = torch.stack([external_cases.make_input(form, SIZES["small"], seed=s, device=device) for s in range(3)])
    assert_grad_and_vmap(module, xs)


@pytest.mark.parametrize("form", ["plain", "groups", "block"])
def test_forward_mode_of_external_attention(form, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device).eval()
    x, tangent = (external_cases.make_input(form, SIZES["small"], seed=s, device=device) for s in (0, 1))
    assert_forward_mode(module, x, tangent)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0)], ids=["over x", "over the values"])
def test_dropout_under_vmap(in_dims, external_on):
    """randomness="different" draws a mask for each sample, "same" one for all, also where x is the same for all."""
    x, value = (torch.ones(sizes, device=external_on[1]) for sizes in ((2, 9, 4), (3, 5)))
    key = torch.zeros(5, 4, device=external_on[1])
    arguments = [a if d is None else a.expand(6, *a.shape) for a, d in zip((x, value), in_dims, strict=True)]

    def attend(x, value):
        return functional.external_attention(x, key, value, dropout=0.5)

    same = vmap(attend, in_dims, randomness="same")(*arguments)
    assert all(torch.equal(o, same[0]) for o in same)
    different = vmap(attend, in_dims, randomness="different")(*arguments)
    # o is the sum of five values of 1 / 5, each doubled or dropped; six masks of 90 bits do not agree by chance.
    assert len({tuple(o.flatten().tolist()) for o in different}) == 6
    torch.testing.assert_close(different * 2.5, (different * 2.5).round())
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(attend, in_dims, randomness="error")(*arguments)
