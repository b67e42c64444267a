"""The forms of external attention that have no passes of their own, on Triton's interpreter and on the CUDA emulator:
blocks with other norms, activations and residuals, memories of each sample, and what fuse puts into a graph."""

from __future__ import annotations

import copy

import fuse_cases
import fuse_wordings
import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT
from conftest import some_of
from fuse_steps import assert_same_steps, build, inputs_of
from torch import nn

import aia_kernels
from aia_kernels import ExternalAttention2d, backends, functional, testing
from aia_kernels.backends.matmul_passes import MatmulPasses

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, None: lambda y: y}


@pytest.fixture(params=["triton", "emulator"])
def passes_called(request, monkeypatch):
    """How often external attention takes the passes of a backend, which is chosen for the test."""
    name, called = request.param, []
    if name == "triton" and (reason := backends.why_not(name, "cpu", torch.float64, "external_attention")) is not None:
        pytest.skip(reason)
    found = backends.passes(name, "external_attention") if name == "triton" else None
    found = MatmulPasses(request.getfixturevalue("emulator")) if found is None else found
    monkeypatch.setattr(backends, "passes", lambda *_: called.append(1) or found)
    with aia_kernels.use_backend("triton" if name == "triton" else "cpu"):
        yield called


def published(block, x):
    """The block in the operators of PyTorch."""
    p = block.linear_0(block.conv1(x).flatten(2)).softmax(2)
    z = block.conv2(block.linear_1(p / (1e-9 + p.sum(1, keepdim=True))).unflatten(2, x.shape[2:]))
    return ACTIVATIONS[block.activation](z + x if block.residual else z)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "norm, activation, residual",
    [
        (nn.BatchNorm2d, "gelu", True),
        (nn.BatchNorm2d, None, False),
        (lambda c: nn.GroupNorm(2, c), "relu", True),
        (None, "silu", False),
    ],
    ids=["BN, GELU", "BN alone", "GroupNorm, ReLU", "SiLU alone"],
)
def test_block(norm, activation, residual, train, passes_called):
    block = testing.randomise(ExternalAttention2d(6, 5, norm=norm, activation=activation, residual=residual))
    block = block.double().train(train)
    own = copy.deepcopy(block)
    own.forward = lambda x: published(own, x)
    assert_same_steps(block, own, inputs_of([(2, 6, 3, 4)]), **EXACT)
    assert passes_called


@pytest.mark.parametrize("group", [None, 3])
def test_memories_of_samples(group, passes_called):
    x, key, value = (a.requires_grad_() for a in inputs_of([(2, 7, 6), (2, 2, 6, 3), (2, 2, 4, 6)]))
    p = (x.unflatten(2, (2, 3)).transpose(1, 2) @ key.mT).softmax(2).unflatten(3, (-1, group or 6))
    attention = (p / (1e-9 + p.sum(4, keepdim=True))).flatten(3)
    expected = (attention @ value.mT).transpose(1, 2).flatten(2)
    found = functional.external_attention(x, key, value, heads=2, eps=1e-9, group=group)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.linspace(-1.0, 1.0, found.numel(), dtype=torch.float64).view(found.shape)
    grads = (torch.autograd.grad(o, (x, key, value), grad) for o in (found, expected))
    torch.testing.assert_close(*grads, **EXACT)
    assert passes_called


@some_of(
    "kind",
    [
        fuse_cases.NormOfGroups,
        fuse_cases.OtherOrder,
        fuse_cases.MemoriesFromData,
        fuse_cases.MemoriesAsParameters,
        fuse_cases.OnVolumes,
        fuse_wordings.WrittenOut,
        fuse_wordings.SquareMaps,
    ],
    fuse_cases.NormOfGroups,
    fuse_cases.MemoriesFromData,
)
def test_fused(kind, passes_called):
    model = build(kind)
    own = copy.deepcopy(model)
    assert aia_kernels.fuse(model).converted
    passes_called.clear()  # of the comparison
    _, *shapes = (fuse_cases.KINDS | fuse_wordings.WORDINGS)[kind]
    assert_same_steps(model, own, inputs_of(shapes), **EXACT)
    assert passes_called
