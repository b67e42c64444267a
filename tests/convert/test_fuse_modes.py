"""fuse and convert where autocast or no_grad is set inside a forward, and where a size is one by chance."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_cases import EXACT
from fuse_steps import assert_same_steps, build
from fuse_variants import Memories, normalize
from torch import nn

import aia_kernels

X = (2, 9, 6)

# What one call does in another order than several: sums of nine terms in float32.
SINGLE = {"rtol": 1e-5, "atol": 1e-6}


class MapInSingle(Memories):
    """The map is made without autocast, and meets the values under it."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            attn = normalize(self.mk(x.to(self.mk.weight.dtype)))
        return self.mv(attn)


class SoftmaxInSingle(Memories):
    """Both products run under autocast, the normalization does not."""

    def forward(self, x):
        logits = self.mk(x)
        with torch.autocast("cpu", enabled=False):
            attn = normalize(logits.float())
        return self.mv(attn)


class AllInSingle(Memories):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.mv(normalize(self.mk(x.to(self.mk.weight.dtype))))


class LowInside(Memories):
    """Autocast is switched on for the product with the keys alone."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.mk(x)
        return self.mv(normalize(logits.float()))


class Fails(Memories):
    """What follows the map fails for some sizes, where autocast is off."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            o = self.mv(normalize(self.mk(x)))
            return o.reshape(-1, 2, 6)


class Asks(Memories):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            x = x.float() * 2
        return self.mv(normalize(self.mk(x)))


class MapWithoutGradient(Memories):
    def forward(self, x):
        with torch.no_grad():
            attn = normalize(self.mk(x))
        return self.mv(attn)


class ValuesWithoutGradient(Memories):
    def forward(self, x):
        attn = normalize(self.mk(x))
        with torch.no_grad():
            o = self.mv(attn)
        return o + attn.sum()


class SoftmaxTwice(Memories):
    """One softmax of two of the same logits has no gradient."""

    def forward(self, x):
        logits = self.mk(x)
        with torch.no_grad():
            weight = logits.softmax(1).amax(1, keepdim=True)
        attn = logits.softmax(1)
        return self.mv(attn / (1e-9 + attn.sum(2, keepdim=True))) + weight.sum(2, keepdim=True)


class Windows(nn.Module):
    """The tokens of windows, cut out of a map that is padded to a multiple of their side."""

    def __init__(self, c=6, slots=5, side=7):
        super().__init__()
        self.side, self.memories = side, Memories(c, slots)

    def forward(self, x):
        (b, c, h, w), side = x.shape, self.side
        x = F.pad(x, (0, -w % side, 0, -h % side))
        rows, columns = x.shape[2] // side, x.shape[3] // side
        windows = x.view(b, c, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, c)
        o = self.memories.mv(normalize(self.memories.mk(windows)))
        o = o.view(b, rows, columns, side, side, c).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return o[..., :h, :w]


class FeaturesLast(Windows):
    """The same of a map with the features last, whose sides are multiples already."""

    def forward(self, x):
        (b, h, w, c), side = x.shape, self.side
        windows = x.view(b, h // side, side, w // side, side, c).transpose(2, 3).contiguous().view(-1, side**2, c)
        o = self.memories.mv(normalize(self.memories.mk(windows)))
        return o.view(b, h // side, w // side, side, side, c).transpose(2, 3).reshape(b, h, w, c)


def compiled(kind, dtype=torch.float64):
    torch._dynamo.reset()
    return torch.compile(build(kind, dtype), backend=aia_kernels.fuse_backend, options={"backend": "eager"})


def converted(kind, dtype=torch.float64):
    model = build(kind, dtype)
    assert len(aia_kernels.convert(model).converted) == 1
    return model


class TestAutocast:
    @pytest.mark.parametrize("form", [converted, compiled])
    @pytest.mark.parametrize("kind", [MapInSingle, SoftmaxInSingle, AllInSingle, LowInside])
    def test_types_are_those_of_the_forward(self, kind, form):
        """With autocast around it and without, the map and the result have the types that they have in the network."""
        model, own, x = form(kind, torch.float32), build(kind, torch.float32), 3 * torch.randn(X)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found, expected = model(x), own(x)
                low = kind is LowInside or (enabled and kind is SoftmaxInSingle)  # the logits
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    logits = own.mk(x)
            assert found.dtype == expected.dtype
            assert (found.dtype == torch.bfloat16) == (enabled and kind is not AllInSingle)
            attention, values = normalize(logits.float()), own.mv.weight
            if found.dtype == torch.bfloat16:
                attention, values = attention.bfloat16().float(), values.bfloat16().float()
                # One rounding of the result, and one step of an attention that lies between two numbers.
                bound = {"rtol": 2**-8, "atol": 2**-8 * (attention @ values.abs().T).max().item()}
            else:
                bound = SINGLE
            torch.testing.assert_close(found.float(), attention @ values.T, **bound)
            torch.testing.assert_close(found, expected, **bound)

    def test_it_is_left_as_it_was_by_what_fails(self):
        model = converted(Fails)
        x = torch.randn(1, 7, 6, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(RuntimeError):
                model(x)
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError):
            model(x)
        assert not torch.is_autocast_enabled("cpu")

    def test_a_question_for_it_is_refused(self):
        (left,) = aia_kernels.convert(build(Asks)).left_alone
        assert "another way under autocast (is_autocast_enabled)" in left.reason

    def test_compiled_in_one_graph(self):
        torch._dynamo.reset()
        model = torch.compile(converted(MapInSingle, torch.float32), backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.randn(X)).dtype == torch.bfloat16


class TestNoGrad:
    @pytest.mark.parametrize("kind", [MapWithoutGradient, ValuesWithoutGradient, SoftmaxTwice])
    def test_gradients_are_those_of_the_forward(self, kind):
        """Compiled and fused, what has no gradient in the network has none."""
        assert_same_steps(compiled(kind), build(kind), [torch.randn(X, dtype=torch.float64)], **EXACT)

    @pytest.mark.parametrize("kind", [MapWithoutGradient, ValuesWithoutGradient, SoftmaxTwice])
    def test_converted(self, kind):
        model = build(kind)
        aia_kernels.convert(model)
        assert_same_steps(model, build(kind), [torch.randn(X, dtype=torch.float64)], **EXACT)


class TestLengthsOfOne:
    @pytest.mark.parametrize("sizes", [(2, 6, 5, 7), (2, 6, 9, 10), (1, 6, 14, 21)])
    @pytest.mark.parametrize("told", [None, (2, 6, 7, 6), (1, 6, 15, 9)])
    def test_windows_of_any_number(self, sizes, told):
        """A map of one window is no rule for maps of several."""
        model, own = build(Windows), build(Windows)
        given = () if told is None else (torch.randn(told, dtype=torch.float64),)
        assert len(aia_kernels.fuse(model, *given).converted) == 1
        assert_same_steps(model, own, [torch.randn(sizes, dtype=torch.float64)], **EXACT)

    def test_maps_that_are_cut_are_tried(self):
        model, own = build(FeaturesLast), build(FeaturesLast)
        assert [entry.now for entry in aia_kernels.convert(model).converted] == ["external_attention"]
        for sizes in ((2, 7, 7, 6), (1, 14, 21, 6)):
            assert_same_steps(model, own, [torch.randn(sizes, dtype=torch.float64)], **EXACT)

    def test_graphs(self):
        graph, own = torch.fx.symbolic_trace(build(Windows)), build(Windows)
        aia_kernels.fuse(graph, torch.randn(2, 6, 5, 7, dtype=torch.float64))
        for sizes in ((2, 6, 5, 7), (1, 6, 9, 10)):
            assert_same_steps(graph, own, [torch.randn(sizes, dtype=torch.float64)], **EXACT)


class CastFirst(Memories):
    """It casts its input: in float64 it does not run."""

    def forward(self, x):
        return self.mv(normalize(self.mk(x.float())))


def test_what_runs_in_single_precision_alone():
    model = build(CastFirst, torch.float32)
    own = copy.deepcopy(model)
    assert len(aia_kernels.convert(model).converted) == 1
    x = torch.randn(X)
    torch.testing.assert_close(model(x.bfloat16()), own(x.bfloat16()), **SINGLE)
