"""fuse: the units of Attention in Attention are found by what flows, whatever their wording."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import some_of
from convert_cases import EXACT
from fuse_steps import (
    assert_copied_and_taken_back,
    assert_found,
    assert_found_in_a_graph,
    assert_found_when_compiled,
    assert_same_steps,
    build,
    called,
    inputs_of,
)
from torch import nn
from unit_variants import UNITS, ChannelInSpacetime, GateOfAxis, InABottleneck, OneAfterTheOther, SpacetimeInChannel

import aia_kernels
from benchmarks.published import attention_in_attention as published

# float32 sums of up to two hundred terms, twice, and of as many gradients: 1e2 roundings of 6e-8.
SINGLE = {"rtol": 1e-5, "atol": 2e-5}


class TestKinds:
    @some_of("call", [aia_kernels.fuse, aia_kernels.convert], aia_kernels.fuse)
    @pytest.mark.parametrize("kind", UNITS, ids=lambda kind: kind.__name__)
    def test_is_found_and_computes_the_same(self, kind, call, monkeypatch):
        assert_found(kind, UNITS[kind], call, SINGLE, monkeypatch)

    @pytest.mark.parametrize("name", published.UNITS)
    def test_the_published_flow(self, name):
        """fuse, which does not go by the published names, finds each unit in the published sequence of operations."""
        model = build(lambda: published.UNITS[name](4))
        own = copy.deepcopy(model)
        assert called(aia_kernels.fuse(model)) == [name]
        assert_same_steps(model, own, inputs_of([(8, 5, 6, 7)]), **EXACT)

    def test_no_gate_is_called(self):
        model, seen = build(SpacetimeInChannel), []
        aia_kernels.fuse(model)
        for child in model.gates.values():
            child.conv.register_forward_hook(lambda *_: seen.append(1))
        # What has a hook is called, as is all that the network called before.
        model(*inputs_of(UNITS[SpacetimeInChannel][1:]))
        assert len(seen) == 4

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_layout(self, layout):
        model, (x,) = build(ChannelInSpacetime), inputs_of(UNITS[ChannelInSpacetime][1:])
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        x = x.to(memory_format=layout)
        assert_same_steps(model, own, [x], **EXACT)
        assert model(x).is_contiguous(memory_format=layout)

    def test_copies_pickles_and_back(self):
        assert_copied_and_taken_back(OneAfterTheOther, UNITS[OneAfterTheOther])


class TestGraphs:
    @pytest.mark.parametrize("record", ["fx", "export"])
    @pytest.mark.parametrize("kind", [ChannelInSpacetime, SpacetimeInChannel, OneAfterTheOther])
    def test_graph(self, kind, record):
        graph = assert_found_in_a_graph(kind, UNITS[kind], record).graph
        assert not [node for node in graph.nodes if "max" in str(node.target)]

    @pytest.mark.parametrize("kind", [ChannelInSpacetime, InABottleneck])
    def test_compiled(self, kind, monkeypatch):
        assert_found_when_compiled(kind, UNITS[kind], monkeypatch)


class LookAlike(ChannelInSpacetime):
    """A channel gate, and what a function makes of it and of x."""

    def __init__(self, function, layers=None):
        super().__init__()
        del self.over_t, self.over_h, self.over_w
        self.function = function
        if layers is not None:
            self.over_c = layers

    def forward(self, x):
        v = x.view(-1, self.frames, *x.shape[1:])
        pooled = torch.stack((v.max(2)[0], v.mean(2)), 1)
        return self.function(v, self.over_c(pooled).sigmoid().transpose(1, 2)).flatten(0, 1)


def changed_in_place(v, gate):
    v = v.clone()
    return v.mul_(gate)


class TestLookAlikes:
    @pytest.mark.parametrize(
        "function, reason",
        [
            (lambda v, g: torch.cat((v * g, g.expand_as(v)), 2), "expand_as reads"),
            (lambda v, g: v * (1 - g), None),
            (lambda v, g: v * -g, None),
            (lambda v, g: v.square() * g, None),
            (lambda v, g: v * g * g.mean(3, keepdim=True), None),
            (changed_in_place, None),
        ],
    )
    def test_is_left_alone(self, function, reason):
        model, (x,) = build(lambda: LookAlike(function)), inputs_of([(8, 5, 6, 7)])
        own = copy.deepcopy(model)
        report = aia_kernels.fuse(model)
        assert_same_steps(model, own, [x], **EXACT)
        assert not report.converted
        assert reason is None or reason in str(report), report

    @pytest.mark.parametrize("kernel", [1, 5, 7])
    def test_other_kernels(self, kernel):
        layers = nn.Conv3d(2, 1, kernel, padding=kernel // 2)
        report = aia_kernels.fuse(build(lambda: nn.Sequential(LookAlike(lambda v, g: v * g, layers))))
        assert not report.converted

    def test_gates_over_two_axes(self):
        class TwoGates(nn.Module):
            def __init__(self):
                super().__init__()
                self.t, self.h = GateOfAxis(), GateOfAxis()

            def forward(self, x):
                return x * (self.t(x) + self.h(x.transpose(1, 3)).transpose(1, 3)) / 2

        report = aia_kernels.fuse(nn.Sequential(TwoGates()))
        ((names, _, reason),) = report.left_alone
        assert names == ("0",) and "there are 2 of them" in reason, report
