"""fuse: linear and efficient attention are found by what they compute, whatever their wording."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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
from memory_variants import (
    KINDS,
    MAPS,
    DividedByTokens,
    HeadsInALoop,
    InANetwork,
    JoinedHeads,
    Softplus,
    TokensWithHeads,
    UnitVectors,
)
from torch import nn

import aia_kernels
from aia_kernels import backends
from aia_kernels.backends import choices
from aia_kernels.convert import calls, flow

# float32 sums of up to a hundred terms in another order, and of as many gradients, with small divisors in between.
SINGLE = {"rtol": 1e-4, "atol": 2e-5}


class TestKinds:
    @some_of("call", [aia_kernels.fuse, aia_kernels.convert], aia_kernels.fuse)
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_is_found_and_computes_the_same(self, kind, call, monkeypatch):
        assert_found(kind, KINDS[kind], call, SINGLE, monkeypatch)

    @pytest.mark.parametrize("kind", [UnitVectors, JoinedHeads, TokensWithHeads])
    def test_other_sizes_and_layouts(self, kind):
        model = build(kind)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        sizes = (3, 6, 7, 3) if len(KINDS[kind][1]) == 4 else (3, 21, 6)
        (x,) = inputs_of([sizes])
        assert_same_steps(model, own, [x], **EXACT)
        assert model(x).stride() == own(x).stride()
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            assert_same_steps(model, own, [x], **EXACT)
            assert model(x).stride() == own(x).stride()

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_what_is_too_small_goes_one_product_after_the_other(self, kind, monkeypatch):
        """In a forward whose inputs do not tell, as "auto" counts on a CPU; tests have small inputs fused elsewhere
        (conftest)."""
        monkeypatch.setattr(flow, "_is_left", lambda *_: False)
        model = build(kind)
        own = copy.deepcopy(model)
        assert called(aia_kernels.fuse(model)) == KINDS[kind][0]
        monkeypatch.setattr(choices, "FOLDING_COST", 1 << 60)
        for name in ("linear_attention", "efficient_attention"):
            monkeypatch.setattr(calls, name, None)  # it is not called
        with backends.use_backend("auto"):
            assert_same_steps(model, own, inputs_of([KINDS[kind][1]]), **EXACT)

    def test_copies_pickles_and_back(self):
        assert_copied_and_taken_back(JoinedHeads, KINDS[JoinedHeads])

    def test_a_projection_with_a_hook_is_called(self):
        model, seen = build(UnitVectors), []
        model.to_v.register_forward_hook(lambda *_: seen.append(1))
        assert not called(aia_kernels.fuse(model))
        model(*inputs_of([MAPS]))
        assert seen == [1]


class TestGraphs:
    @pytest.mark.parametrize("record", ["fx", "export"])
    @pytest.mark.parametrize("kind", [UnitVectors, JoinedHeads, HeadsInALoop])
    def test_graph(self, kind, record):
        assert_found_in_a_graph(kind, KINDS[kind], record)

    @pytest.mark.parametrize("kind", [UnitVectors, Softplus, JoinedHeads, DividedByTokens])
    def test_graph_of_any_size(self, kind):
        """What was told to fuse is one size of many."""
        own = build(kind)
        graph_module = torch.fx.symbolic_trace(build(kind))
        assert called(aia_kernels.fuse(graph_module, *inputs_of([MAPS]))) == KINDS[kind][0]
        for sizes in ((2, 6, 4, 5), (1, 6, 7, 3)):
            assert_same_steps(graph_module, own, inputs_of([sizes]), **EXACT)

    def test_compiled(self, monkeypatch):
        assert_found_when_compiled(InANetwork, (["linear_attention"], (2, 3, 5, 4)), monkeypatch)


class LookAlike(UnitVectors):
    """With another feature map, or something between."""

    def __init__(self, feature=F.softplus, between=lambda o: o, also=False):
        super().__init__()
        self.feature, self.between, self.also = feature, between, also

    def forward(self, x):
        q, k = self.feature(self.to_q(x).flatten(2)), self.feature(self.to_k(x).flatten(2))
        v = self.to_v(x).flatten(2)
        below = torch.matmul((k.sum(2) + 1e-6).unsqueeze(1), q)
        o = self.between(torch.matmul(torch.matmul(v, k.transpose(1, 2)), q) / below)
        return (o + k.sum() if self.also else o).view_as(x)


class Clamped(UnitVectors):
    """Linear attention but for numbers that are very small or large."""

    def __init__(self, of_keys=lambda t: F.normalize(t, dim=1), of_values=lambda t: t):
        super().__init__()
        self.of_keys, self.of_values = of_keys, of_values

    def forward(self, x):
        q, k = F.normalize(self.to_q(x).flatten(2), dim=1), self.of_keys(self.to_k(x).flatten(2))
        v = self.of_values(self.to_v(x).flatten(2))
        above = v.sum(2, keepdim=True) + v @ k.mT @ q
        return (above / (x.shape[2] * x.shape[3] + k.sum(2).unsqueeze(1) @ q)).view_as(x)


class RootOfTokens(DividedByTokens):
    """Divided by another function of the number of tokens: in a graph of one size it looks like a constant."""

    def forward(self, x):
        q, k, v = (t.flatten(2) for t in self.to_qkv(x).chunk(3, dim=1))
        o = v @ k.softmax(-1).mT @ q.softmax(1) / (x.shape[2] * x.shape[3]) ** 0.5
        return self.to_out(o.view(x.shape[0], -1, *x.shape[2:]))


class TestLookAlikes:
    @pytest.mark.parametrize(
        "make, reason",
        [
            (lambda: LookAlike(lambda t: F.elu(t) + 1), "with another feature map"),
            (lambda: LookAlike(lambda t: F.relu(t) + 0.1), "with another feature map"),
            (lambda: LookAlike(also=True), "reads"),
            (lambda: LookAlike(lambda t: t.square()), None),
            (RootOfTokens, "tokens, but not for other numbers of them"),
            (lambda: Clamped(of_keys=lambda t: F.normalize(t, dim=1, eps=1e-3)), "something clamps them"),
            (lambda: Clamped(of_keys=lambda t: F.normalize(t.clamp(-30.0, 30.0), dim=1)), "something clamps them"),
            (lambda: Clamped(of_values=lambda t: F.hardtanh(t, -1e3, 1e3)), "something clamps them"),
        ],
    )
    def test_is_left_alone(self, make, reason):
        model, (x,) = build(lambda: nn.Sequential(make())), inputs_of([MAPS])
        own = copy.deepcopy(model)
        report = aia_kernels.fuse(model)
        assert_same_steps(model, own, [x], **EXACT)
        assert not report.converted, report
        assert reason is None or reason in str(report), report

    def test_what_follows_is_called_as_before(self):
        model = build(lambda: LookAlike(between=torch.tanh))
        own = copy.deepcopy(model)
        assert called(aia_kernels.fuse(model)) == ["linear_attention"]
        assert_same_steps(model, own, inputs_of([MAPS]), **EXACT)

    def test_attention_of_all_pairs_is_none(self):
        class Pairs(TokensWithHeads):
            def forward(self, x):
                q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=-1)
                return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)

        assert not aia_kernels.fuse(build(lambda: nn.Sequential(Pairs()))).converted
