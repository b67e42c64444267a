"""Modules with random parameters, and one step of them compared with that of another."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from aia_kernels import testing


def build(kind, dtype=torch.float64):
    """A module of a kind, with random parameters and buffers."""
    torch.manual_seed(0)
    return testing.randomise(kind()).to(dtype)


def inputs_of(shapes, dtype=torch.float64):
    """Random inputs of these shapes; numbers stay what they are."""
    generator = torch.Generator().manual_seed(1)
    return [
        given if isinstance(given, int) else torch.randn(given, generator=generator, dtype=torch.float64).to(dtype)
        for given in shapes
    ]


def step(module, inputs):
    """The output, every gradient, and the buffers of one step."""
    module.zero_grad()
    inputs = [x if isinstance(x, int) else x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(3)
    y = module(*inputs)
    y = torch.cat([part.flatten() for part in tree_leaves(y)])
    y.sin().sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in (*grads.items(), *module.named_buffers())}
    return {"y": y.detach(), **dict(enumerate(x.grad for x in inputs if isinstance(x, torch.Tensor))), **named}


def assert_same_steps(found, expected, inputs, **tolerance):
    found, expected = step(found, inputs), step(expected, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
