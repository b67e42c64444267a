"""Activation checkpointing, reentrant and not: the gradients of the plain step, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aia_kernels
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
    again = x.detach().clone().requires_grad_()
    checkpoint(other, again, use_reentrant=reentrant).backward(grad_y)
    assert torch.equal(x.grad, again.grad)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
