"""functional.external_attention_block in all its forms, beside PyTorch's own operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT
from torch import nn

from aia_kernels import ExternalAttention2d, functional, testing
from aia_kernels.modules.submodules import norm_of

B, C, S, V = 2, 6, 5, 4  # a batch norm of C channels joins the values, one of V does not
NORMS = {
    "BN": nn.BatchNorm1d,
    "Sync": nn.SyncBatchNorm,
    "GroupNorm": lambda c: nn.GroupNorm(2, c),
    "none": lambda c: None,
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, None: lambda y: y, torch.tanh: torch.tanh}
RESIDUALS = ("x", "other", "none")


class Block(nn.Module):
    """The block with torch's own operations, or fused."""

    def __init__(self, norm, activation, residual, bias=True):
        super().__init__()
        v = C if residual == "x" else V
        self.key, self.value = nn.Parameter(torch.empty(S, C)), nn.Parameter(torch.empty(v, S))
        self.bias = nn.Parameter(torch.empty(v)) if bias else None
        self.norm, self.activation, self.residual, self.fused = NORMS[norm](v), activation, residual, True

    def forward(self, x, other):
        if self.fused:
            residual = {"x": True, "other": other, "none": False}[self.residual]
            read = isinstance(self.norm, nn.modules.batchnorm._BatchNorm)
            norm = norm_of(self.norm) if read else self.norm
            settings = {"value_bias": self.bias, "activation": self.activation, "residual": residual}
            return functional.external_attention_block(x, self.key, self.value, norm, **settings)
        p = (x.flatten(2).mT @ self.key.mT).softmax(1)
        z = (p / (1e-9 + p.sum(2, keepdim=True)) @ self.value.mT).mT
        z = z if self.bias is None else z + self.bias.unsqueeze(1)
        z = z if self.norm is None else self.norm(z)
        z = z.unflatten(2, x.shape[2:])
        added = {"x": x, "other": other, "none": 0.0}[self.residual]
        return ACTIVATIONS[self.activation](z + added)


def step(block, x, other):
    """Of two steps: y, all gradients, and the buffers."""
    found = {}
    for i in range(2):
        leaves = [(a + i).requires_grad_() for a in (x, other)]
        y = block(*leaves)
        block.zero_grad()
        y.sin().sum().backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in block.named_parameters()
        }
        grads |= {f"input {j}": a.grad for j, a in enumerate(leaves) if a.grad is not None}
        found |= {f"{i} y": y.detach(), **{f"{i} {name}": grad for name, grad in grads.items()}}
    return found | dict(block.named_buffers())


def inputs(block, shape=(3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (B, C, *shape), (B, C if block.residual == "x" else V, *shape)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_form(norm, activation, residual, train, external_on):
    block = testing.randomise(Block(norm, activation, residual)).to(external_on[1], torch.float64).train(train)
    own = copy.deepcopy(block)
    own.fused = False
    given = [a.to(external_on[1]) for a in inputs(block)]
    found, expected = step(block, *given), step(own, *given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(11,), (3, 4), (2, 3, 2)], ids=["points", "maps", "volumes"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_stored_as_x(residual, shape, last):
    block = testing.randomise(Block("BN", "gelu", residual)).double()
    own = copy.deepcopy(block)
    own.fused = False
    x, other = inputs(block, shape)
    if last:
        x, other = (a.movedim(1, -1).contiguous().movedim(-1, 1) for a in (x, other))
    y = block(x, other)
    assert y.stride() == (x if residual == "x" else other).stride()
    torch.testing.assert_close(y, own(x, other), **EXACT)


@pytest.mark.parametrize("norm, activation", [("BN", "gelu"), ("BN", None), ("none", "silu")])
def test_gradgradcheck(norm, activation):
    block = testing.randomise(Block(norm, activation, "x")).double()
    x, other = inputs(block, (2, 2))
    names = [name for name, _ in block.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, other))

    leaves = [a.detach().requires_grad_() for a in (x, *block.parameters())]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_empty_batches():
    for norm in ("BN", "GroupNorm", "none"):
        block = Block(norm, "gelu", "none")
        x = torch.randn(0, C, 3, 4, requires_grad=True)
        y = block(x, None)
        assert y.shape == (0, V, 3, 4)
        y.sum().backward()
        assert x.grad.shape == x.shape and not block.key.grad.any()


def test_a_norm_and_a_residual_in_other_types():
    """Under autocast the result has the type of the residual stream; without one, that of autocast."""
    x, other = (a.float() for a in inputs(Block("none", None, "other")))
    for residual, dtype in (("x", torch.float32), ("other", torch.float32), ("none", torch.bfloat16)):
        block = testing.randomise(Block("BN", "gelu", residual)).eval()
        given = x, other if residual != "x" else x
        with torch.autocast("cpu", torch.bfloat16):
            y = block(*given)
        assert y.dtype == dtype
        # The products of autocast round x, K, A and V: a few of 2**-8 of values of order one.
        torch.testing.assert_close(y.float(), block(*given), rtol=0, atol=0.05)


def kept(call, *leaves):
    """The bytes that a call keeps for its backward, beside its parameters and inputs."""
    own, storages = {t.untyped_storage()._cdata for t in leaves}, {}

    def keep(t):
        storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(s.nbytes() for key, s in storages.items() if key not in own)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", None])
def test_keeps_no_more_than_published(norm, activation):
    """Four slots for each channel, where the attention map is larger than x."""
    make = {"BN": nn.BatchNorm2d, "Sync": nn.BatchNorm2d, "GroupNorm": lambda c: nn.GroupNorm(4, c), "none": None}[norm]
    block = ExternalAttention2d(16, 64, norm=make, activation=activation)
    x = torch.randn(2, 16, 40, 40, requires_grad=True)
    fused = kept(lambda: block(x), x, *block.parameters(), *block.buffers())

    def published():
        p = block.linear_0(block.conv1(x).flatten(2)).softmax(2)
        z = block.conv2(block.linear_1(p / (1e-9 + p.sum(1, keepdim=True))).unflatten(2, x.shape[2:])) + x
        return ACTIVATIONS[activation](z)

    assert fused < kept(published, x, *block.parameters(), *block.buffers())


def test_parameters_of_the_forms():
    """Those of the published block, less what is left out."""
    assert list(ExternalAttention2d(6, norm=None).state_dict())[-1] == "conv2.0.weight"
    assert list(ExternalAttention2d(6, norm=None, projection=False).state_dict())[-1] == "linear_1.weight"
    assert "conv2.0.running_mean" in ExternalAttention2d(6, projection=False).state_dict()
    with pytest.raises(ValueError, match="activation: got 'tanh', expected 'relu', 'gelu', 'silu' or None"):
        ExternalAttention2d(6, activation="tanh")
