"""A call is left to the network's own forward where its fused calls cost as much as they save, as "auto" counts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cbam_variants import ReducedOneAfterTheOther
from fuse_cases import MAPS, TOKENS
from fuse_steps import build, inputs_of
from fuse_variants import Memories, normalize
from memory_variants import KINDS as MEMORIES
from memory_variants import JoinedHeads, UnitVectors
from torch import nn

import aia_kernels
from aia_kernels import backends
from aia_kernels.backends import choices


class Tokens(Memories):
    def forward(self, x):
        return self.mv(normalize(self.mk(x)))


class Block(nn.Module):
    def __init__(self, c=6, slots=5):
        super().__init__()
        self.first, self.last = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1, bias=False)
        self.k, self.v, self.bn = nn.Conv1d(c, slots, 1), nn.Conv1d(slots, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        attention = normalize(self.k(self.first(x).flatten(2)), 2, 1)
        return (x + self.bn(self.last(self.v(attention).view_as(x)))).relu()


class Normalization(Memories):
    """Nothing but the double normalization can be one call."""

    def forward(self, x):
        return self.mv(normalize(self.mk(x)).tanh())


class Gate(nn.Module):
    """A unit with one gate, on clips [B, C, T, H, W]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        pooled = torch.stack([x.amax(1), x.mean(1)], 1)
        return x * self.conv(pooled).sigmoid()


KINDS = {
    Tokens: TOKENS,
    Block: MAPS,
    Normalization: TOKENS,
    Gate: (2, 4, 3, 4, 5),
    ReducedOneAfterTheOther: (2, 5, 4, 6),
    **{kind: MEMORIES[kind][1] for kind in (UnitVectors, JoinedHeads)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_small_calls_are_the_networks_own(kind, monkeypatch):
    """From the first call on, to the bit, and in copies and pickles too. Large ones are not, nor where a backend is
    asked for."""
    model, (x,) = build(kind, torch.float32).eval(), inputs_of([KINDS[kind]], torch.float32)
    calls, own = [], kind.forward
    with torch.no_grad():
        expected = model(x)
    report = aia_kernels.fuse(model)
    assert report.converted and not report.left_alone
    monkeypatch.setattr(kind, "forward", lambda self, x: calls.append(x.shape) or own(self, x))
    with torch.no_grad(), backends.use_backend("auto"):
        for cost, several in ((1 << 60, 3), (float("-inf"), 0)):
            calls.clear()
            for name in ("CALL_COST", "FOLDING_COST"):
                monkeypatch.setattr(choices, name, cost)
            for other in (copy.deepcopy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                y = other(x)
                assert torch.equal(y, expected) or not several
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # float32, sums in another order
            assert len(calls) == several
    for name in ("CALL_COST", "FOLDING_COST"):
        monkeypatch.setattr(choices, name, 1 << 60)
    with torch.no_grad(), backends.use_backend("reference"):
        copy.deepcopy(model)(x)
    assert not calls
