"""Layers in the records of torch.fx.symbolic_trace, where each is one call, and of torch.jit.trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from uses_layers import LAYERS, MAIN, WITHOUT_DROPOUT, assert_same_bits, batch, layer, step

import aia_kernels

#: Others are functions, whose caller is followed.
OF_LAYERS = [name for name in LAYERS if "double_normalize" not in name]


@pytest.mark.parametrize("name", OF_LAYERS)
def test_symbolic_trace(name):
    """A network with the layer in it is recorded, and the record does what the network does, in training too."""
    assert_same_bits(
        step(name, lambda module: torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), module))), step(name)
    )
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer(name))).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == (["0", "1.both"] if name == "CaaM" else ["0", "1"])


def test_the_record_of_several_results():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = aia_kernels.CausalCBAM(6, 2)

        def forward(self, x):
            causal, confounder = self.gates(x)
            return causal - confounder

    both, x = Both().eval(), torch.randn(2, 6, 4, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(both)(x), both(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in MAIN if "double_normalize" not in name])
def test_what_symbolic_trace_cannot_record_is_named(name):
    """A call of the layer inside its own forward would call itself, or run what a subclass adds twice."""
    module = layer(name)
    with pytest.raises(TypeError, match=rf"^{type(module).__name__}: torch\.fx\.symbolic_trace .*to_reference"):
        torch.fx.symbolic_trace(module)

    class Doubled(type(module)):
        def forward(self, x):
            return 2 * super().forward(x)

    module.__class__ = Doubled
    with pytest.raises(TypeError, match=r"^Doubled: torch\.fx\.symbolic_trace"):
        torch.fx.symbolic_trace(nn.Sequential(module))


# torch compares the record with one of dense copies, and that of a part of a tensor has a copy in it.
@pytest.mark.parametrize("name", [name for name in WITHOUT_DROPOUT if not name.endswith("part")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_other_batches(name):
    """The record of two samples takes six."""
    module = layer(name, torch.float64).eval()
    x = batch(name, torch.float64)
    traced = torch.jit.trace(copy.deepcopy(module), x)
    more = LAYERS[name].stored(torch.cat((x, 2 * x, -x)))
    torch.testing.assert_close(traced(more), module(more), rtol=1e-11, atol=1e-11)
