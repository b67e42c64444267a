"""fuse: external attention of any wording is found by what flows, and nothing else moves."""

from __future__ import annotations

import copy
import pickle

import fuse_cases
import fuse_wordings
import pytest
import torch
import torch.nn.functional as F
from convert_cases import EXACT, TokenPerformer, assert_same_objects, tensors
from fuse_steps import assert_same_steps, build
from fuse_steps import inputs_of as inputs_of_shapes
from fuse_variants import VARIANTS, Checks, Memories, normalize
from fuse_wordings import WORDINGS, ALoopOverParts, SquareMaps
from torch import nn

import aia_kernels
from aia_kernels import models, testing
from aia_kernels.convert import compiler, flow
from benchmarks.published import external_attention as external

KINDS = fuse_cases.KINDS | VARIANTS | WORDINGS

# float32 sums of up to a hundred terms, through two normalizations and their gradients: 1e2 roundings of 6e-8.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
# Behind a norm that joined the values, gradients are differences of sums of sixty terms, of up to forty: either
# order of these sums rounds them by up to 60 * 40 * 6e-8 / 2.
BEHIND_NORM = {"rtol": 1e-5, "atol": 7e-5}


def inputs_of(kind, dtype=torch.float64):
    return inputs_of_shapes(KINDS[kind][1:], dtype)


class Unknown(nn.Module):
    """Takes 7 * 11 features, which nothing says."""

    def __init__(self):
        super().__init__()
        self.mk, self.mv = nn.Linear(7, 5), nn.Linear(5, 7)

    def forward(self, x):
        attn = self.mk(x.unflatten(2, (7, 11)).transpose(2, 3).transpose(1, 2)).softmax(2)
        return self.mv(attn / attn.sum(3, keepdim=True))


class AnyRank(Memories):
    """Any number of axes between the batch and the features."""

    def forward(self, x):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.mv(normalize(self.mk(flat))).view(x.shape)


class RowsInALoop(Memories):
    """Each row of a map [B, H, W, C] for itself."""

    def forward(self, x):
        return torch.stack([self.mv(normalize(self.mk(x[:, i]))) for i in range(x.shape[1])], 1)


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_is_found_and_computes_the_same(self, kind, monkeypatch):
        model = build(kind)
        before, keys, own = tensors(model), list(model.state_dict()), copy.deepcopy(model)
        seen = []
        model.register_forward_hook(lambda *_: seen.append(1))
        report = aia_kernels.fuse(model)
        assert KINDS[kind][0] in [entry.now for entry in report.converted], report
        assert not report.left_alone, report
        assert_same_objects(model, before)
        assert list(model.state_dict()) == keys
        assert not seen
        if kind is fuse_cases.HeadsWithDropout:
            model.drop.p = own.drop.p = 0.0  # the fused layer draws its masks in another order
        # What casts to float32 inside rounds to it.
        rounded = kind in (fuse_cases.InSinglePrecision, fuse_cases.SinglePrecisionSoftmax)
        of_norm = fuse_cases.NoActivation, fuse_cases.OtherActivation, fuse_cases.OtherResidual, fuse_cases.NormOfGroups
        single = BEHIND_NORM if kind in of_norm else SINGLE
        for dtype, tolerance in ((torch.float64, SINGLE if rounded else EXACT), (torch.float32, single)):
            for training in (True, False):
                model.to(dtype).train(training)
                own.to(dtype).train(training)
                assert_same_steps(model, own, inputs_of(kind, dtype), **tolerance)
        assert len(seen) == 4
        if hasattr(type(model), "_recipe"):
            monkeypatch.setattr(kind, "forward", None)  # it is not called
            model(*inputs_of(kind, dtype))

    def test_no_product_is_called(self):
        """What is fused is not called as well."""
        model = build(fuse_cases.NoActivation)
        aia_kernels.fuse(model)
        called = []
        for name, child in model.named_modules():
            child.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        assert list(type(model)._recipe.read) == ["conv1", "conv2.0", "conv2.1", "linear_0", "linear_1"]
        # But one that has a hook is, as is all that the network called before.
        model(*inputs_of(fuse_cases.NoActivation))
        assert called == ["", "conv1", "linear_0", "linear_1", "conv2", "conv2.0", "conv2.1"]

    @pytest.mark.parametrize("inner", ["q", "mk"])
    def test_a_product_with_a_hook_is_called(self, inner):
        model = build(fuse_cases.ResultAndMore)
        own, seen = copy.deepcopy(model), []
        model.get_submodule(inner).register_forward_hook(lambda *_: seen.append(1))
        report = aia_kernels.fuse(model)
        assert [entry.now for entry in report.converted] == [
            "external_attention" if inner == "q" else "double_normalize"
        ]
        assert not seen
        assert_same_steps(model, own, inputs_of(fuse_cases.ResultAndMore), **EXACT)
        assert seen == [1]

    def test_other_sizes_that_decide(self, monkeypatch):
        """A condition on sizes that is not as it was recorded: the forward that the module had runs, and only then."""
        model = build(Checks)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        few, many = (torch.randn(3, n, 6, dtype=torch.float64) for n in (2, 4))
        assert_same_steps(model, own, [few], **EXACT)
        with pytest.raises(AssertionError):
            model(torch.randn(3, 9, 7))
        monkeypatch.setattr(Checks, "forward", None)
        model(many)

    def test_other_ranks(self, monkeypatch):
        """Tokens, maps with the features last, and the tokens of one sample: each is recorded when it first comes."""
        model = build(AnyRank)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 9, 6), (3, 4, 5, 6), (2, 2, 3, 4, 6))]
        for x in (*inputs, *inputs):
            assert_same_steps(model, own, [x], **EXACT)
        monkeypatch.setattr(AnyRank, "forward", None)  # it is not called
        for x in inputs[:2]:
            model(x)

    def test_other_sizes_of_a_loop(self, monkeypatch):
        """How often a loop runs is recorded; another number is another recording, as long as they are few."""
        model = build(RowsInALoop)
        own = copy.deepcopy(model)
        report = aia_kernels.fuse(model, torch.randn(2, 3, 4, 6))
        assert "external_attention" in str(report)
        inputs = [torch.randn(2, rows, 4, 6, dtype=torch.float64) for rows in (3, 2, 5)]
        for x in inputs:
            assert_same_steps(model, own, [x], **EXACT)
        monkeypatch.setattr(RowsInALoop, "forward", None)
        for x in inputs:
            model(x)
        monkeypatch.undo()
        for rows in range(1, 20):
            x = torch.randn(1, rows, 4, 6, dtype=torch.float64)
            torch.testing.assert_close(model(x), own(x), **EXACT)

    def test_a_square_map_of_any_size(self):
        model = build(SquareMaps)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        assert len(type(model)._recipe.sources) == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow, "_other_forwards", None)  # the first recording holds for all
            for side in (3, 4, 8):
                assert_same_steps(model, own, [torch.randn(2, side**2, 6, dtype=torch.float64)], **EXACT)

    def test_what_was_lent_to_the_recording_is_given_back(self):
        for kind in (SquareMaps, ALoopOverParts):
            aia_kernels.fuse(build(kind))
        assert not hasattr(fuse_wordings, "int") and isinstance(torch.finfo, type)

    def test_dropout_on_the_map(self):
        model = build(fuse_cases.HeadsWithDropout)
        aia_kernels.fuse(model)
        (x,) = inputs_of(fuse_cases.HeadsWithDropout)
        model.drop.p = 1.0
        of_nothing = F.linear(model.m_v.bias.repeat(3), model.narrow.weight, model.narrow.bias)
        torch.testing.assert_close(model(x), of_nothing.expand(3, 9, 6), **EXACT)
        assert not torch.allclose(model.eval()(x), of_nothing)

    def test_further_arguments_go_to_its_own_forward(self):
        model = build(fuse_cases.ResultAndMore)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        (x,) = inputs_of(fuse_cases.ResultAndMore)
        mask = torch.rand(3, 5, 20) > 0.5
        for arguments in ({"mask": mask}, {"scale": 2.0}, {"mask": mask, "scale": 3.0}):
            torch.testing.assert_close(model(x, **arguments), own(x, **arguments), **EXACT)
        torch.testing.assert_close(model(x=x), own(x=x), **EXACT)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_and_low_precision(self, dtype):
        """Types are those of the network, and values those of float64 to a few roundings."""
        model, (x,) = build(fuse_cases.NoActivation).eval(), inputs_of(fuse_cases.NoActivation)
        own, expected = copy.deepcopy(model).float(), model(x)
        aia_kernels.fuse(model)
        model.float()
        with torch.autocast("cpu", dtype):
            found, before = model(x.float()), own(x.float())
        assert found.dtype == before.dtype
        bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
        assert model.to(dtype)(x.to(dtype)).dtype == dtype

    def test_inputs_that_no_parameter_suggests(self):
        model = nn.Sequential(nn.Linear(3, 77), Unknown())
        own, x = copy.deepcopy(model), torch.randn(2, 9, 3)
        assert "fuse(model, *inputs) is told one" in str(aia_kernels.fuse(model))
        report = aia_kernels.fuse(model, x)
        assert [entry.names for entry in report.converted] == [("1",)]
        torch.testing.assert_close(model(x), own(x), **SINGLE)

    def test_inside_a_network_and_shared(self):
        layer = build(fuse_cases.NormsAround)
        model = nn.Sequential(layer, nn.ModuleDict({"again": layer})["again"], build(fuse_cases.Products))
        own = copy.deepcopy(model)
        report = aia_kernels.convert(model)
        assert [entry.names for entry in report.converted] == [("0", "1"), ("2",)]
        assert_same_steps(model, own, inputs_of(fuse_cases.Products), **EXACT)
        assert aia_kernels.fuse(model).converted == []

    def test_and_back(self):
        model = build(fuse_cases.NoActivation)
        own = copy.deepcopy(model)
        report = aia_kernels.fuse(model)
        assert isinstance(model, fuse_cases.NoActivation)
        assert type(model) is not fuse_cases.NoActivation
        assert aia_kernels.to_reference(copy.deepcopy(model)).forward.__func__ is fuse_cases.NoActivation.forward
        assert report.undo() is model
        assert type(model) is fuse_cases.NoActivation
        assert_same_steps(model, own, inputs_of(fuse_cases.NoActivation), **EXACT)

    @pytest.mark.parametrize("kind", [fuse_cases.HeadsByOtherNames, fuse_cases.NoOutput, fuse_cases.ResultAndMore])
    def test_compiled_in_one_graph(self, kind):
        torch._dynamo.reset()
        model, own = build(kind), build(kind)
        aia_kernels.fuse(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same_steps(compiled, own, inputs_of(kind), **EXACT)
        torch._dynamo.reset()

    def test_copies_and_pickles(self):
        model = build(fuse_cases.NoActivation)
        aia_kernels.fuse(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other)._recipe.sources[True][0] == type(model)._recipe.sources[True][0]
            assert_same_steps(other, copy.deepcopy(model), inputs_of(fuse_cases.NoActivation), rtol=0, atol=0)


class Spelling(nn.Module):
    def __init__(self, function, module=None):
        super().__init__()
        self.function, self.softmax = function, module

    def forward(self, logits):
        return self.function(logits) if self.softmax is None else self.function(self.softmax(logits))


def second(a):
    return a / a.sum(2, keepdim=True)


#: Ways to write a softmax over axis 1 and L1 over axis 2, of logits [B, N, M], with an eps of 1e-6 or none.
SPELLINGS = {
    "F.softmax": lambda x: second(F.softmax(x, dim=1)),
    "torch.softmax": lambda x: second(torch.softmax(x, -2)),
    "method": lambda x: second(x.softmax(dim=-2)),
    "negative and positive": lambda x: (a := x.softmax(1)) / a.sum(dim=-1, keepdim=True),
    "eps first": lambda x: (a := x.softmax(1)) / (1e-6 + a.sum(dim=2, keepdim=True)),
    "eps last": lambda x: (a := x.softmax(1)) / (a.sum(dim=2, keepdim=True) + 1e-6),
    "torch.add": lambda x: (a := x.softmax(1)) / torch.add(torch.sum(a, 2, True), 1e-6),
    "list of axes": lambda x: (a := x.softmax(1)) / a.sum([2], keepdim=True),
    "unsqueeze": lambda x: (a := x.softmax(1)) / (a.sum(2).unsqueeze(-1) + 1e-6),
    "index": lambda x: (a := x.softmax(1)) / a.sum(-1)[:, :, None],
    "index with dots": lambda x: (a := x.softmax(1)) / (1e-6 + a.sum(-1)[..., None]),
    "expand": lambda x: (a := x.softmax(1)) / a.sum(2, keepdim=True).expand_as(a),
    "div": lambda x: torch.div((a := x.softmax(1)), a.sum(2, keepdim=True)),
    "method div": lambda x: (a := x.softmax(1)).div(a.sum(2, keepdim=True) + 1e-6),
    "reciprocal": lambda x: (a := x.softmax(1)) * a.sum(2, keepdim=True).reciprocal(),
    "one over": lambda x: (a := x.softmax(1)) * (1.0 / (a.sum(2, keepdim=True) + 1e-6)),
    "normalize": lambda x: F.normalize(x.softmax(1), p=1, dim=2),
    "norm": lambda x: (a := x.softmax(1)) / a.norm(p=1, dim=2, keepdim=True),
    "linalg": lambda x: (a := x.softmax(1)) / torch.linalg.vector_norm(a, 1, 2, keepdim=True),
    "abs": lambda x: (a := x.softmax(1)) / a.abs().sum(2, keepdim=True),
    "clamp": lambda x: (a := x.softmax(1)) / a.sum(2, keepdim=True).clamp(min=1e-12),
    "transposed before": lambda x: (a := x.transpose(1, 2).softmax(2)) / (a.sum(1, keepdim=True) + 1e-6),
    "transposed between": lambda x: (a := x.softmax(1).transpose(1, 2)) / (a.sum(1, keepdim=True) + 1e-6),
    "permuted between": lambda x: (a := x.softmax(1).permute(2, 0, 1)) / (a.sum(0, keepdim=True) + 1e-6),
    "split between": lambda x: (a := x.softmax(1).unflatten(2, (2, 3))) / (a.sum(3, keepdim=True) + 1e-6),
    "tokens first": lambda x: (a := x.transpose(0, 1).softmax(0)) / a.sum(2, keepdim=True),
    "mT": lambda x: ((a := x.mT.softmax(-1)) / a.sum(-2, keepdim=True)).mT.contiguous(),
}


class TestSpellings:
    @pytest.mark.parametrize("name", SPELLINGS)
    def test_in_a_graph(self, name):
        graph_module = torch.fx.symbolic_trace(Spelling(SPELLINGS[name]))
        x = torch.randn(3, 7, 6, dtype=torch.float64)
        expected = SPELLINGS[name](x)
        own = str(graph_module.graph)
        report = aia_kernels.fuse(graph_module, x)
        assert [entry.now for entry in report.converted] == ["double_normalize"], report
        assert not [node for node in graph_module.graph.nodes if "softmax" in str(node.target)]
        torch.testing.assert_close(graph_module(x), expected, **EXACT)
        report.undo()
        assert str(graph_module.graph) == own
        torch.testing.assert_close(graph_module(x), expected, **EXACT)

    def test_as_a_module(self):
        module = Spelling(second, nn.Softmax(dim=1))
        assert len(aia_kernels.fuse(torch.fx.symbolic_trace(module)).converted) == 1

    def test_exported(self):
        program = torch.export.export(Spelling(SPELLINGS["eps first"]), (torch.randn(3, 7, 6),))
        graph_module = program.module()
        assert len(aia_kernels.fuse(graph_module).converted) == 1
        x = torch.randn(3, 7, 6)
        torch.testing.assert_close(graph_module(x), SPELLINGS["eps first"](x), **SINGLE)


#: What comes close to external attention, and what the report says of it.
LOOK_ALIKES = {
    "one axis": (lambda x: (a := x.softmax(2)) / a.sum(-1, keepdim=True), "both go over one axis"),
    "the batch": (lambda x: (a := x.softmax(1)) / a.sum(0, keepdim=True), "axis 0 is the batch"),
    "the batch, moved": (lambda x: (a := x.softmax(1).mT.transpose(0, 1)) / a.sum(1, keepdim=True), "axis 0 is"),
    "sigmoid": (lambda x: (a := x.sigmoid()) / a.sum(2, keepdim=True), "its map is a sigmoid"),
    "L2": (lambda x: F.normalize(x.softmax(1), dim=2), "divides a softmax by its L2 norm"),
    "softmax twice": (lambda x: x.softmax(1).softmax(2), "softmax_1 is a softmax of a softmax"),
    "exp": (lambda x: (a := x.exp()) / a.sum(2, keepdim=True), "its map is an exp"),
    "read in between": (lambda x: (a := x.softmax(1)) / a.sum(2, keepdim=True) + a, "add reads the map before"),
    "split tokens": (
        lambda x: (a := x.softmax(1).unflatten(1, (2, 3))) / a.sum(1, keepdim=True),
        "the axis of its softmax, 1, is split",
    ),
}

#: What only looks like it from afar: nothing is said.
UNRELATED = {
    "softmax": lambda x: x.softmax(1),
    "of another": lambda x: x.softmax(1) / x.sum(2, keepdim=True),
    "two axes": lambda x: (a := x.softmax(1)) / a.sum((1, 2), keepdim=True),
    "mean": lambda x: (a := x.softmax(1)) / a.mean(2, keepdim=True),
    "large clamp": lambda x: (a := x.softmax(1)) / a.sum(2, keepdim=True).clamp(min=1e-9),
    "large eps of normalize": lambda x: F.normalize(x.softmax(1), 1.0, 2, eps=1e-9),
    "scaled": lambda x: (a := x.softmax(1)) / (2 * a.sum(2, keepdim=True)),
    "other place": lambda x: (a := x.softmax(1)) / a.sum(2).unsqueeze(1),
    "floor": lambda x: torch.div((a := x.softmax(1)), a.sum(2, keepdim=True), rounding_mode="floor"),
}


class OneSoftmax(nn.Module):
    """External attention without the second normalization."""

    def __init__(self):
        super().__init__()
        self.mk, self.mv = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.mv(self.mk(x).softmax(1))


class LookAlike(OneSoftmax):
    """The submodules of external attention, and something else between them."""

    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        return self.mv(self.between(self.mk(x).softmax(1)))


class WithoutSoftmax(LookAlike):
    def forward(self, x):
        return self.mv(self.between(self.mk(x)))


#: What stands between the two linear maps of a layer, beside or behind a softmax over the tokens, and how it is told.
BETWEEN = {
    "scaled sum": (lambda a: a / (2 * a.sum(2, keepdim=True)), "softmax over axis 1, sum over axis 2, mul, div"),
    "mean": (lambda a: a / a.mean(2, keepdim=True), "softmax over axis 1, mean over axis 2, div"),
    "large clamp": (lambda a: a / a.sum(2, keepdim=True).clamp(min=1e-9), "sum over axis 2, clamp, div"),
    "large eps of normalize": (lambda a: F.normalize(a, 1.0, 2, 1e-9), "normalize"),
    "masked": (
        lambda a: (a := a.masked_fill(a > 0.5, 0)) / a.sum(2, keepdim=True),
        "masked_fill, sum over axis 2, div",
    ),
    "largest": (
        lambda a: (a := torch.where(a >= a.topk(2, 2)[0][..., -1:], a, 0)) / a.sum(2, keepdim=True),
        "softmax over axis 1, topk over axis 2, ge, where, sum over axis 2, div",
    ),
    "scaled map": (lambda a: (a := 2 * a) / (1 + a.sum(2, keepdim=True)), "mul, sum over axis 2, add, div"),
    "maximum": (lambda a: a / a.amax(2, keepdim=True), "amax over axis 2, div"),
    "both axes": (lambda a: a / a.sum((1, 2), keepdim=True), "sum over axis (1, 2), div"),
    "difference": (lambda a: a - a.mean(2, keepdim=True), "mean over axis 2, sub"),
    "detached": (lambda a: a / a.sum(2, keepdim=True).detach(), "sum over axis 2, detach, div"),
}
#: The same without that softmax.
INSTEAD = {
    "sum first": (lambda a: (a / a.sum(2, keepdim=True)).softmax(1), "stand sum over axis 2, div, softmax over axis 1"),
    "sigmoid": (lambda a: a.sigmoid(), "between mk and mv stands sigmoid"),
    "exp": (lambda a: (a := a.exp()) / a.sum(2, keepdim=True), "its map is an exp"),
}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        return (self.q(x) @ k.transpose(1, 2)).softmax(-1) @ v


class Segmentation(nn.Module):
    """A small network for segmentation: a trunk, external attention between convolutions, a classifier."""

    def __init__(self, attention):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1))
        self.attention, self.head = attention, nn.Conv2d(6, 4, 1)

    def forward(self, images):
        scores = self.head(self.attention(self.trunk(images)))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear")


class TestNetworks:
    @pytest.mark.parametrize("record", ["fx", "export"])
    def test_segmentation(self, record):
        torch.manual_seed(0)
        model = testing.randomise(Segmentation(external.ExternalAttention2d(6, 5))).double()
        own, images = copy.deepcopy(model), torch.randn(2, 3, 16, 24, dtype=torch.float64)
        if record == "fx":
            graph_module = torch.fx.symbolic_trace(model)
        else:
            graph_module = torch.export.export(model, (images,)).module()
        keys = list(graph_module.state_dict())
        report = aia_kernels.fuse(graph_module)
        assert [entry.now for entry in report.converted] == ["external_attention_block"], report
        assert list(graph_module.state_dict()) == keys
        assert_same_steps(graph_module, own, [images], **EXACT)

    def test_eamlp(self):
        """The network of the package with the published layers in the place of the fused ones."""
        torch.manual_seed(0)
        model = models.eamlp_7(img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, aia_kernels.MultiHeadExternalAttention):
                model.set_submodule(name, external.MultiHeadExternalAttention(24, 2))
            elif isinstance(layer, aia_kernels.TokenExternalAttention):
                k, d = layer.k, layer.proj.in_features
                model.set_submodule(name, TokenPerformer(layer.q_linear.in_features, d, k))
        model = testing.randomise(model).double().eval()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected = model(images)
        graph_module = torch.export.export(model, (images,)).module()
        report = aia_kernels.fuse(graph_module)
        assert [entry.now for entry in report.converted] == ["external_attention"] * 4, report
        torch.testing.assert_close(graph_module(images), expected, **EXACT)

    def test_a_change_in_place(self):
        """One call would read x after it was changed."""
        model = fuse_cases.ChangedInPlace().double()
        graph_module, x = torch.fx.symbolic_trace(model), torch.randn(2, 9, 6, dtype=torch.float64)
        report = aia_kernels.fuse(graph_module, x)
        assert [entry.now for entry in report.converted] == ["double_normalize"]
        torch.testing.assert_close(graph_module(x), model(x), **EXACT)

    @pytest.mark.parametrize("kind", [fuse_cases.HeadsByOtherNames, fuse_cases.OnPoints, fuse_cases.OtherOrder])
    def test_compiled(self, kind):
        """A network that was never converted; values, gradients and buffers of a step, two times."""
        torch._dynamo.reset()
        model, own, inputs = build(kind), build(kind), inputs_of(kind)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            rewrite = compiler.rewrite
            patch.setattr(compiler, "rewrite", lambda reader: seen.append(found := rewrite(reader)) or found)
            compiled = torch.compile(model, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"})
            for _ in range(2):
                assert_same_steps(compiled, own, inputs, **EXACT)
        assert [[call.now for call in fused] for fused, _ in seen] == [[KINDS[kind][0]]]
        torch._dynamo.reset()


class TestLookAlikes:
    @pytest.mark.parametrize("call", [aia_kernels.fuse, aia_kernels.convert])
    def test_one_softmax(self, call):
        report = call(nn.Sequential(OneSoftmax()))
        assert [entry.names for entry in report.left_alone] == [("0",)]
        assert "softmax is the only normalization between mk and mv" in str(report)
        report = call(nn.Sequential(SelfAttention()))
        assert not report.left_alone

    @pytest.mark.parametrize("name", [*BETWEEN, *INSTEAD])
    def test_what_stands_between_is_told(self, name):
        kind, (between, told) = (LookAlike, BETWEEN[name]) if name in BETWEEN else (WithoutSoftmax, INSTEAD[name])
        report = aia_kernels.convert(nn.Sequential(kind(between)))
        assert [entry.names for entry in report.left_alone] == [("0",)]
        assert told in str(report) and "external attention has a softmax over the tokens" in str(report)
        if "softmax over" in told:
            assert told in str(aia_kernels.fuse(nn.Sequential(kind(between))))

    def test_of_other_layers_nothing_is_told(self):
        squeeze = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 6))
        for call in (aia_kernels.fuse, aia_kernels.convert):
            assert not call(squeeze).left_alone
        assert not aia_kernels.fuse(torch.fx.symbolic_trace(squeeze), torch.randn(2, 9, 6)).left_alone

    @pytest.mark.parametrize("name", LOOK_ALIKES)
    def test_left_alone_with_a_reason(self, name):
        function, reason = LOOK_ALIKES[name]
        graph_module = torch.fx.symbolic_trace(Spelling(function))
        before = str(graph_module.graph)
        report = aia_kernels.fuse(graph_module, torch.randn(2, 6, 4))
        assert not report.converted
        assert [reason in entry.reason for entry in report.left_alone] == [True], report
        assert reason in str(report)
        assert str(graph_module.graph) == before

    @pytest.mark.parametrize("name", UNRELATED)
    def test_unrelated(self, name):
        report = aia_kernels.fuse(torch.fx.symbolic_trace(Spelling(UNRELATED[name])), torch.randn(2, 6, 6))
        assert not report.converted and not report.left_alone
        assert "the model is unchanged" in str(report)

    def test_of_a_published_name_on_other_inputs(self):
        """Not what goes wrong when it is given the tokens of the published layer."""

        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.mk, self.mv = nn.Linear(6, 5), nn.Linear(5, 6)

            def forward(self, x):
                _, h, w, c = x.shape
                attn = torch.stack([self.mk(sample.view(h * w, c)) for sample in x]).softmax(1)
                return self.mv(attn / attn.sum(2, keepdim=True))

        ((_, _, reason),) = aia_kernels.convert(Loop()).left_alone
        assert reason.startswith("its forward cannot be recorded by torch.fx: TraceError")

    def test_not_a_module(self):
        with pytest.raises(TypeError, match="model: got int"):
            aia_kernels.fuse(3)
