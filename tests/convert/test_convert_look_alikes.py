"""convert: what looks like a published layer and computes something else is left alone, and the report says why."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_cases import TokenPerformer, assert_same_objects, assert_same_step, tensors
from torch import nn

import aia_kernels
from aia_kernels import testing
from benchmarks.published import attention_in_attention as units
from benchmarks.published import cbam, linear_attention
from benchmarks.published import external_attention as external


class GuideAsOutput(units.CinST):
    """As a relative of the published unit does: the gates alone, without x."""

    def flow(self, x):
        return super().flow(x) / x


class AddedGuide(units.CinST):
    """As another does: x + g_C(x) guides, not x * g_C(x)."""

    def flow(self, x):
        c = self.gate("C", units.pool(x, 2).permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        t, h, w = self.spacetime(lambda: x + c)
        return x * (t + h + w) / 3


class OtherWeights(units.ST):
    def flow(self, x):
        t, h, w = self.spacetime(lambda: x)
        return x * (t / 2 + h / 4 + w / 4)


class StoppedGradient(units.C):
    def flow(self, x):
        return super().flow(x.detach()) + x - x.detach()


class OwnTrain(units.C):
    def train(self, mode=True):
        super().train(mode)
        self.C_bn.eval()
        return self


class OwnKeys(units.C):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass


class Slots(units.C):
    __slots__ = ("more",)


class Masked(external.ExternalAttention):
    def forward(self, x, mask=None):
        return super().forward(x)


class Pair(external.ExternalAttention):
    def forward(self, x):
        return super().forward(x), None


class NoEps(TokenPerformer):
    def normalize(self, attention):
        return attention / attention.sum(dim=-1, keepdim=True)


class OtherEps(TokenPerformer):
    def normalize(self, attention):
        return attention / (1e-8 + attention.sum(dim=-1, keepdim=True))


class L2(TokenPerformer):
    def normalize(self, attention):
        return F.normalize(attention, dim=-1)


class LateDropout(TokenPerformer):
    def forward(self, x):
        q = self.q_linear(x)
        attention = self.normalize(self.linear_0(q).softmax(dim=-2))
        return q + self.proj_drop(self.proj(self.attn_drop(self.linear_1(attention))))


class NeedsMore(units.C):
    def flow(self, x):
        return super().flow(x) * self.scale


class Container(nn.Module):
    def __init__(self):
        super().__init__()
        self.mk, self.mv = nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False)


class LowRank(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def changed(make, **children):
    def build():
        module = make()
        for name, child in children.items():
            module.set_submodule(name, child)
        return module

    return build


def with_attributes(make, **attributes):
    def build():
        module = make()
        for name, value in attributes.items():
            owner, _, last = name.replace("__", ".").rpartition(".")
            setattr(module.get_submodule(owner), last, value)
        return module

    return build


def hooked():
    module = units.C(2)
    module.C_conv.register_forward_hook(lambda *_: None)
    return module


def pooling_hooked():
    module = units.C(2)
    module.sigmoid = nn.Sigmoid()
    module.sigmoid.register_forward_pre_hook(lambda *_: None)
    return module


def patched():
    module = units.C(2)
    module.forward = lambda x: x
    return module


def traced():
    return torch.jit.trace(external.ExternalAttention(6, 4), torch.randn(2, 5, 6))


class OverPositions(nn.Module):
    """Attention of each position to all others, with the submodules of linear attention."""

    def __init__(self, c: int, d: int):
        super().__init__()
        self.query_conv, self.key_conv, self.value_conv = (nn.Conv2d(c, k, 1) for k in (d, d, c))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return x + self.gamma * self.attend(q, k, v, x.shape).view_as(x)

    def attend(self, q, k, v, sizes):
        pairs = (q.mT @ k / 3).softmax(-1)
        return torch.einsum("bcm,bnm->bcn", v, pairs)


class OverRowsAndColumns(OverPositions):
    """Each position to those of its row and of its column, in one softmax."""

    def attend(self, q, k, v, sizes):
        q, k, v = (t.unflatten(2, sizes[2:]) for t in (q, k, v))
        of_column = torch.einsum("bdhw,bdiw->bhwi", q, k)
        both = torch.cat((of_column, torch.einsum("bdhw,bdhj->bhwj", q, k)), 3)
        column, row = both.softmax(3).split(sizes[2:], 3)
        return torch.einsum("bhwi,bciw->bchw", column, v) + torch.einsum("bhwj,bchj->bchw", row, v)


FRAMES = (4, 3, 5, 6)

#: Look-alikes, and what the report says of each.
LEFT_ALONE = {
    "other kernel": (
        changed(lambda: units.C(2), C_conv=nn.Conv3d(2, 1, 1, bias=False)),
        r"C_conv.kernel_size: got \(1,",
    ),
    "more features": (
        changed(lambda: units.ST(2), T_conv=nn.Conv3d(3, 1, 3, padding=1, bias=False)),
        "T_conv.in_channels: got 3",
    ),
    "circular padding": (
        with_attributes(lambda: units.C(2), C_conv__padding_mode="circular"),
        "padding_mode: got circular",
    ),
    "other norm": (changed(lambda: units.C(2), C_bn=nn.GroupNorm(1, 1)), "C_bn is a GroupNorm, expected a BatchNorm"),
    "missing norm": (with_attributes(lambda: units.C(2, use_BN=False), use_BN=True), "C_bn is a NoneType"),
    "added guide": (lambda: AddedGuide(2), "its y differs"),
    "other weights": (lambda: OtherWeights(2), "its y differs from that of ST |its gates have different factors"),
    "a missing attribute": (lambda: NeedsMore(2), "its forward fails .* no attribute 'scale'"),
    "hooks": (hooked, "C_conv has hooks"),
    "patched instance": (patched, "its forward was replaced on the instance"),
    "traced": (traced, "it is a TorchScript module"),
    "a Linear of another library": (
        changed(lambda: external.ExternalAttention(6, 4), mk=type("Linear", (nn.Module,), {})()),
        r"mk is a test_convert_look_alikes\.Linear, expected a Linear",
    ),
    "container": (Container, "it has no forward"),
    "other norm over slots": (L2, "normalize divides a softmax by its L2 norm"),
    "all pairs of positions": (
        lambda: OverPositions(6, 3),
        r"softmax is one softmax over pairs of tokens: .*\(matmul\).*scaled_dot_product_attention, with the scale",
    ),
    "pairs in rows and columns": (
        lambda: OverRowsAndColumns(6, 3),
        r"softmax is one softmax over pairs of tokens: .*\(einsum, einsum_1\).*no call of this package",
    ),
    "other heads": (
        with_attributes(lambda: external.MultiHeadExternalAttention(6, 2), num_heads=4),
        "num_heads: got 4",
    ),
    "strided": (
        changed(lambda: external.ExternalAttention2d(6, 5), conv1=nn.Conv2d(6, 6, 1, stride=2)),
        "conv1.stride: got",
    ),
}

#: Those that are no published layers, but have their double normalization or their gates; and the sizes of an input.
REWRITTEN = {
    "conv with bias": (changed(lambda: units.C(2), C_conv=nn.Conv3d(2, 1, 3, padding=1)), FRAMES),
    "two gates": (changed(lambda: units.C(2), T_conv=nn.Conv3d(2, 1, 3, padding=1)), FRAMES),
    "no segments": (with_attributes(lambda: units.C(2), num_segments=None), (2, 3, 4, 5, 6)),
    "guide as output": (lambda: GuideAsOutput(2), FRAMES),
    "stopped gradient": (lambda: StoppedGradient(2), FRAMES),
    "own train": (lambda: OwnTrain(2), FRAMES),
    "own keys": (lambda: OwnKeys(2), FRAMES),
    "slots": (lambda: Slots(2), FRAMES),
    "hooks on a part without parameters": (pooling_hooked, FRAMES),
    "more arguments": (lambda: Masked(6, 4), (2, 9, 6)),
    "memories of other sizes": (changed(lambda: external.ExternalAttention(6, 4), mv=nn.Linear(4, 5)), (2, 9, 6)),
    "no eps": (NoEps, (2, 9, 7)),
    "other eps": (OtherEps, (2, 9, 7)),
    "dropout elsewhere": (LateDropout, (2, 9, 7)),
    "adapted linear": (changed(TokenPerformer, proj=LowRank(5, 5)), (2, 9, 7)),
    "token memories without bias": (changed(TokenPerformer, linear_1=nn.Linear(6, 5, bias=False)), (2, 9, 7)),
    "no dropout": (
        changed(lambda: external.MultiHeadExternalAttention(6, 2), attn_drop=nn.Identity()),
        (2, 9, 6),
    ),
    "more layers": (
        changed(lambda: external.ExternalAttention2d(6, 5), conv2=nn.Sequential(nn.Conv2d(6, 6, 1))),
        (2, 6, 3, 4),
    ),
}


#: Published layers, and the sizes of an input.
PUBLISHED = {
    "C": (lambda kind: kind(2), units.C, FRAMES),
    "CinST": (lambda kind: kind(2), units.CinST, FRAMES),
    "ExternalAttention": (lambda kind: kind(6, 4), external.ExternalAttention, (2, 9, 6)),
    "ExternalAttention2d": (lambda kind: kind(6, 4), external.ExternalAttention2d, (2, 6, 3, 4)),
    "MultiHead": (lambda kind: kind(6, 2), external.MultiHeadExternalAttention, (2, 9, 6)),
    "CBAM": (lambda kind: kind(6, 2), cbam.CBAM, (2, 6, 5, 4)),
    "PositionLinearAttention": (lambda kind: kind(16), linear_attention.PositionLinearAttention, (2, 16, 4, 4)),
    "EfficientAttention": (lambda kind: kind(6, 4, 2, 4), linear_attention.EfficientAttention, (2, 6, 3, 4)),
}


#: Those whose y is an average of memories, and does not grow with x.
OF_MEMORIES_ALONE = ("ExternalAttention", "MultiHead")


def clamped(kind: type[nn.Module], of: str) -> type[nn.Module]:
    """A layer that clamps its x or its y, at numbers that are seldom met."""

    class Clamped(kind):
        def forward(self, x):
            return super().forward(x.clamp(-50, 50)) if of == "x" else super().forward(x).clamp(-50, 50)

    return Clamped


class TestLookAlikes:
    @pytest.mark.parametrize(
        "name, of", [(name, of) for name in PUBLISHED for of in "xy" if of == "x" or name not in OF_MEMORIES_ALONE]
    )
    def test_a_clamp_at_large_numbers_stays(self, name, of):
        make, kind, sizes = PUBLISHED[name]
        module = testing.randomise(make(clamped(kind, of)).double()).eval()
        own, x = copy.deepcopy(module), 1e3 * torch.randn(sizes, dtype=torch.float64)
        aia_kernels.convert(module)
        expected = own(x)
        assert of == "x" or expected.abs().max() == 50
        torch.testing.assert_close(module(x), expected)

    @pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("name", LEFT_ALONE)
    def test_left_alone_and_named(self, name):
        make, reason = LEFT_ALONE[name]
        module = make()
        model = nn.ModuleDict({"odd": module, "even": units.C(2)})
        kind, before = type(module), tensors(model)
        report = aia_kernels.convert(model)
        assert type(module) is kind
        assert isinstance(model["even"], aia_kernels.C)
        ((names, told, why),) = report.left_alone
        assert names == ("odd",)
        assert told.endswith(kind.__qualname__)
        assert "odd" in str(report)
        assert why in str(report)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(why)
        assert_same_objects(model, before)

    @pytest.mark.parametrize("name", REWRITTEN)
    def test_rewritten_and_the_same(self, name):
        make, sizes = REWRITTEN[name]
        module = make().double()
        own = copy.deepcopy(module)
        report = aia_kernels.convert(module)
        assert not report.left_alone
        assert len(report.converted) == 1
        assert not type(module).__module__.startswith("aia_kernels")
        assert_same_step(module, own, torch.randn(sizes, dtype=torch.float64))

    def test_more_results(self):
        module = Pair(6, 4)
        x = torch.randn(2, 9, 6)
        expected, _ = module(x)
        assert len(aia_kernels.convert(module).converted) == 1
        found, nothing = module(x)
        torch.testing.assert_close(found, expected)
        assert nothing is None

    def test_the_same_class_with_another_setting(self):
        """What was found out about one layer holds for those alone that are built and set alike."""
        model = nn.ModuleList(NeedsMore(2) for _ in range(4))
        for module, scale in zip(model, (1.0, 2.0, 1.0, 2.0), strict=True):
            module.scale = scale
        report = aia_kernels.convert(model)
        assert [entry.names for entry in report.converted] == [("0",), ("2",), ("1",), ("3",)]
        assert [type(module) is aia_kernels.C for module in model] == [True, False, True, False]
        x = torch.randn(FRAMES)
        for module in model:
            module.load_state_dict(model[0].state_dict())
            torch.testing.assert_close(module.eval()(x), module.scale * model[0].eval()(x))
