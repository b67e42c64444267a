"""convert: a forward that leaves something behind, or takes an input of another rank, goes on doing so."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import aia_kernels


class Port(nn.Module):
    """The popular port: whatever the rank, over axis 1 and then over axis 2."""

    def __init__(self, d=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(d, slots, bias=False), nn.Linear(slots, d, bias=False)
        self.calls, self.seen, self.store = 0, [], {"losses": [0.0], "state": SimpleNamespace(count=0)}
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    def attend(self, x):
        attention = self.mk(x).softmax(1)
        return attention / attention.sum(2, keepdim=True)

    def forward(self, x):
        attention = self.attend(x)
        self.leave(x, attention)
        return self.mv(attention)

    def leave(self, x, attention):
        pass


class KeepsMap(Port):
    def leave(self, x, attention):
        self.attn = attention


class KeepsMapInEvaluation(Port):
    def leave(self, x, attention):
        if not self.training:
            self.attn = attention


class Branches(Port):
    """Where no trial goes: what it does otherwise is not seen."""

    def attend(self, x):
        return super().attend(x) * (2 if x.mean() > 100 else 1)


class BranchesOnAParameter(Port):
    def attend(self, x):
        return super().attend(x) * (2 if bool((self.mk.weight > 100).any()) else 1)


class BranchesOnEqualTensors(Port):
    def attend(self, x):
        return super().attend(x) * (2 if torch.equal(x[:1], x[1:2]) else 1)


class Appends(Port):
    def leave(self, x, attention):
        self.seen.append(attention)


class AddsALoss(Port):
    def leave(self, x, attention):
        self.store["losses"][0] = self.store["losses"][0] + attention.square().mean()


class CountsInAnObject(Port):
    def leave(self, x, attention):
        self.store["state"].count += 1


class CountsCalls(Port):
    def leave(self, x, attention):
        self.calls += 1


class CountsInABuffer(Port):
    def leave(self, x, attention):
        self.total += 1


class NewBuffer(Port):
    def leave(self, x, attention):
        self.register_buffer("last", attention.detach())


class OnAChild(Port):
    def leave(self, x, attention):
        self.mk.last = attention


class ChangesItsInput(Port):
    def leave(self, x, attention):
        x.detach().mul_(2)


class DropsByPython(Port):
    """Stochastic depth by Python's random numbers: a recording goes one way for good."""

    def attend(self, x):
        return super().attend(x) * (0 if self.training and random.random() < 0.1 else 1)


class DropsByNumpy(Port):
    def attend(self, x):
        return super().attend(x) * (0 if self.training and numpy.random.rand() < 0.1 else 1)


class OtherDropsByPython(DropsByPython):
    """No published layer: its forward would be rewritten."""

    def attend(self, x):
        return super().attend(x).pow(1.0)


LEAVING = {
    KeepsMap: "attn",
    KeepsMapInEvaluation: "attn",
    Appends: "seen",
    AddsALoss: "store",
    CountsInAnObject: "store",
    CountsCalls: "calls",
    CountsInABuffer: "total",
    NewBuffer: "last",
    OnAChild: "mk.last",
    ChangesItsInput: "input",
}


@pytest.mark.parametrize("kind", LEAVING, ids=lambda kind: kind.__name__)
def test_a_forward_that_leaves_something_behind_is_left_alone(kind):
    module = kind()
    report = aia_kernels.convert(module)
    assert type(module) is kind and not report.converted
    assert LEAVING[kind] in str(report)
    # Nothing of it happened to the model while it was tried.
    assert module.calls == module.total == module.store["state"].count == 0
    assert module.seen == [] and module.store["losses"] == [0.0] and not hasattr(module, "attn")


@pytest.mark.parametrize("kind", [Branches, BranchesOnAParameter, BranchesOnEqualTensors])
def test_a_forward_that_decides_by_numbers_is_left_alone(kind):
    module = kind()
    report = aia_kernels.convert(module)
    assert type(module) is kind and "its forward reads numbers out of tensors" in str(report)


class LastAxis(Port):
    def attend(self, x):
        attention = self.mk(x).softmax(1)
        return attention / attention.sum(-1, keepdim=True)


class TokensAlone(LastAxis):
    def attend(self, x):
        assert len(x.shape) == 3
        return super().attend(x)


TOKENS, MAPS = (2, 9, 6), (2, 3, 4, 6)


def watched(module):
    module.mk.register_forward_hook(lambda *_: None)
    return module


def counted(module):
    def call(x):
        with FlopCounterMode(display=False):
            return module(x)

    return call


@pytest.mark.parametrize("form", [lambda m: m, watched, counted, aia_kernels.to_reference])
@pytest.mark.parametrize("sizes", [TOKENS, MAPS])
def test_the_port_on_tokens_and_on_maps(sizes, form):
    """The fused layer and every way around its kernels normalize over the published axes."""
    module = Port().double()
    x = torch.randn(sizes, dtype=torch.float64)
    expected = module(x)
    assert len(aia_kernels.convert(module).converted) == 1
    torch.testing.assert_close(form(module)(x), expected, rtol=1e-12, atol=1e-12)


def test_another_rank_counts_where_the_forward_takes_it():
    """It is no published layer then, but it is found all the same."""
    model = LastAxis()
    report = aia_kernels.convert(model)
    assert [entry.now for entry in report.converted] == ["external_attention"]
    for sizes in ((2, 9, 6), (2, 3, 4, 6)):
        x = torch.randn(sizes)
        torch.testing.assert_close(model(x), LastAxis.forward(model, x))
    assert [entry.now for entry in aia_kernels.convert(TokensAlone()).converted] == ["ExternalAttention"]


@pytest.mark.parametrize("form", [lambda m: m, watched, counted, aia_kernels.to_reference])
def test_fewer_axes_are_refused_in_every_form(form):
    with pytest.raises(ValueError, match=r"x: got shape [(\[]3, 6[)\]], expected \[B, N, d\]"):
        form(aia_kernels.ExternalAttention(6, S=5))(torch.randn(3, 6))


@pytest.mark.parametrize("form", [lambda m: m, counted, aia_kernels.to_reference])
@pytest.mark.parametrize("name", ["MultiHeadExternalAttention", "TokenExternalAttention"])
def test_maps_are_refused_by_layers_on_tokens(name, form):
    layer = getattr(aia_kernels, name)(8, 8)
    with pytest.raises(ValueError, match=r"x: got shape [(\[]2, 3, 4, 8[)\]], expected \[B, N, d\]"):
        form(layer)(torch.randn(2, 3, 4, 8))


def test_settings_that_changed_since_hold_for_the_plain_layer_too():
    unit = aia_kernels.C(4).eval()
    unit.C_bn.bias.data.fill_(3)
    unit.use_BN = False
    x = torch.randn(4, 3, 5, 6)
    expected = unit(x)
    torch.testing.assert_close(aia_kernels.to_reference(unit)(x), expected)


def test_a_token_layer_with_memories_of_other_names_is_refused():
    class Swapped(aia_kernels.TokenExternalAttention):
        memories = ("linear_1", "linear_0")

    with pytest.raises(TypeError, match=r"Swapped: memories"):
        aia_kernels.to_reference(Swapped(6, 6))


@pytest.mark.parametrize("kind", [DropsByPython, DropsByNumpy, OtherDropsByPython])
def test_a_forward_that_decides_by_random_numbers_is_left_alone(kind):
    states = random.getstate(), str(numpy.random.get_state())
    (left,) = aia_kernels.convert(kind()).left_alone
    assert "random numbers by Python's random or by numpy" in left.reason
    assert (random.getstate(), str(numpy.random.get_state())) == states
