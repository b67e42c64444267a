"""fuse and convert where a forward gives away what is made inside of a layer: as a result, or to a buffer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_cases import EXACT
from fuse_steps import assert_same_steps, build, inputs_of
from fuse_variants import Memories, normalize
from torch import nn

import aia_kernels


class Attention(Memories):
    shape = (2, 9, 6)

    def forward(self, x):
        attn = normalize(self.mk(x))
        return self.give(self.mv(attn), attn)


class Memory(nn.Module):
    """Efficient attention, and its memory."""

    shape = (2, 6, 9)

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Conv1d(6, 4, 1), nn.Conv1d(6, 4, 1), nn.Conv1d(6, 6, 1)

    def forward(self, x):
        memory = self.v(x) @ self.k(x).softmax(2).mT
        return self.give(memory @ self.q(x).softmax(1), memory)


class ChannelGate(nn.Module):
    shape = (2, 6, 4, 5)

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(6, 2, 1), nn.ReLU(), nn.Conv2d(2, 6, 1))

    def forward(self, x):
        gate = torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        return self.give(x * gate, gate)


class SpatialGate(nn.Module):
    shape = (2, 6, 4, 5)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        gate = self.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()
        return self.give(x * gate, gate)


class Unit(nn.Module):
    """Unit C, and its gate."""

    shape = (8, 6, 4, 5)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 1, 3, padding=1, bias=False), nn.BatchNorm3d(1)

    def forward(self, x):
        n, c, h, w = x.size(0), x.size(1), x.size(2), x.size(3)
        clips = x.view(n // 4, 4, c, h, w)
        pooled = torch.stack([clips.amax(2), clips.mean(2)], 1)
        gate = self.norm(self.conv(pooled)).sigmoid().transpose(1, 2)
        return self.give((clips * gate).view(n, c, h, w), gate)


KINDS = [Attention, Memory, ChannelGate, SpatialGate, Unit]


def returns(kind):
    """The kind, with a forward that returns both."""
    return type(kind.__name__, (kind,), {"give": lambda self, result, inner: (result, inner)})


def remembers(kind):
    """The kind, with a forward that copies what is inside into a buffer and makes nothing else of it."""

    class Remembers(kind):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

        def give(self, result, inner):
            self.seen.copy_(inner.detach().flatten()[:1])
            return result

    return Remembers


@pytest.mark.parametrize("given", [returns, remembers])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestInside:
    def test_graph(self, kind, given):
        model = build(given(kind))
        graph_module = torch.fx.symbolic_trace(copy.deepcopy(model))
        aia_kernels.fuse(graph_module, *inputs_of([kind.shape]))
        graph_module.graph.lint()
        assert_same_steps(graph_module, model, inputs_of([kind.shape]), **EXACT)

    def test_module(self, kind, given):
        model = build(given(kind))
        own = copy.deepcopy(model)
        aia_kernels.convert(model)
        assert_same_steps(model, own, inputs_of([kind.shape]), **EXACT)

    def test_compiled(self, kind, given):
        torch._dynamo.reset()
        model = build(given(kind))
        own = copy.deepcopy(model)
        compiled = torch.compile(model, backend=aia_kernels.fuse_backend, options={"backend": "eager"})
        assert_same_steps(compiled, own, inputs_of([kind.shape]), **EXACT)


@pytest.mark.parametrize("kind", [Memory, ChannelGate, SpatialGate, Unit], ids=lambda kind: kind.__name__)
def test_report_names_what_is_returned(kind):
    graph_module = torch.fx.symbolic_trace(build(returns(kind)))
    report = aia_kernels.fuse(graph_module, *inputs_of([kind.shape]))
    assert not report.converted
    assert "returns" in str(report), report
