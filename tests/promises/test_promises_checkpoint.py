"""Activation checkpointing, reentrant and not: the gradients of the plain step, bit for bit."""

from __future__ import annotations

import copy

import external_cases
import pytest
import torch
from external_cases import SIZES
from torch.utils.checkpoint import checkpoint

import aia_kernels
from aia_kernels import functional
from aia_kernels.testing import SHAPES, make_input, randomise


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["C", "CinST", "STinC2"])
def test_checkpoint(name, reentrant, backend_on):
    _, device = backend_on
    shape = SHAPES["small"]
    module = randomise(getattr(aia_kernels, name)(shape.t)).to(device)
    other = copy.deepcopy(module)
    grad_y = make_input(shape, torch.float32, seed=1, device=device)
    x = make_input(shape, torch.float32, device=device).requires_grad_()
    module(x).backward(grad_y)
    other_x = x.detach().clone().requires_grad_()
    checkpoint(other, other_x, use_reentrant=reentrant).backward(grad_y)
    assert torch.equal(x.grad, other_x.grad)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Dropping(torch.nn.Module):
    """external_attention under the generator's own state, which checkpointing restores."""

    def __init__(self):
        super().__init__()
        self.memories = external_cases.make("dropout", SIZES["small"], torch.float32)

    def forward(self, x):
        m = self.memories
        return functional.external_attention(x, m.memory_key, m.memory_value, heads=2, dropout=0.5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("form", ["plain", "block", "drawn anew"])
def test_checkpoint_of_external_attention(form, reentrant, external_on):
    device = external_on[1]
    drawn = form == "drawn anew"
    module = Dropping().to(device) if drawn else external_cases.make(form, SIZES["small"], torch.float32, device)
    form = "shared heads" if drawn else form
    other = copy.deepcopy(module)
    grad = external_cases.make_grad(form, SIZES["small"], torch.float32, device)
    x = external_cases.make_input(form, SIZES["small"], torch.float32, device=device).requires_grad_()
    torch.manual_seed(1)
    module(x).backward(grad)
    other_x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    checkpoint(other, other_x, use_reentrant=reentrant).backward(grad)
    assert torch.equal(x.grad, other_x.grad)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
