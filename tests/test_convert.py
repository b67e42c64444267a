"""convert and to_reference: published layers of any origin become fused and plain ones, and nothing else moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import aia_kernels
from aia_kernels import models, testing
from aia_kernels.convert import behaviour
from aia_kernels.modules.submodules import must_be_called
from benchmarks.published import attention_in_attention as units
from benchmarks.published import external_attention as external

# float64 sums in another order, some with projections multiplied first: values of order one to a hundred.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class TokenPerformer(nn.Module):
    """The published flow of EAMLP's attention in its default T2T stages."""

    names = ("linear_0", "linear_1")

    def __init__(self, dim=7, in_dim=5, k=6, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.q_linear = nn.Linear(dim, in_dim)
        self.add_module(self.names[0], nn.Linear(in_dim, k, bias=False))
        self.add_module(self.names[1], nn.Linear(k, in_dim))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        q = self.q_linear(x)
        attention = self.attn_drop(self.normalize(self.get_submodule(self.names[0])(q).softmax(dim=-2)))
        return q + self.proj_drop(self.proj(self.get_submodule(self.names[1])(attention)))

    def normalize(self, attention):
        return attention / (1e-9 + attention.sum(dim=-1, keepdim=True))


class TokenTransformer(TokenPerformer):
    """The same in the T2t_vit_t networks."""

    names = ("linear_1", "linear_2")


#: Every published layer: how to make it, the sizes of an input, and the fused layer.
LAYERS = {
    **{name: (lambda unit=unit: unit(4), (8, 3, 5, 6), name) for name, unit in units.UNITS.items()},
    "CinST without BN": (lambda: units.CinST(2, use_BN=False), (4, 3, 5, 6), "CinST"),
    "EANet": (lambda: external.ExternalAttention2d(6, 5), (3, 6, 3, 4), "ExternalAttention2d"),
    "EAMLP": (lambda: external.MultiHeadExternalAttention(6, 2), (2, 9, 6), "MultiHeadExternalAttention"),
    "two linear": (lambda: external.ExternalAttention(6, 5), (2, 9, 6), "ExternalAttention"),
    "T2T performer": (TokenPerformer, (2, 9, 7), "TokenExternalAttention"),
    "T2T transformer": (TokenTransformer, (2, 9, 7), "TransformerTokenExternalAttention"),
}


def published(name: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return testing.randomise(LAYERS[name][0]()).to(dtype)


def make_input(name: str, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same_objects(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = tensors(model)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


def assert_same_step(found: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers of one forward and backward of both."""
    ys = []
    for module in (found, expected):
        module.zero_grad()
        ys.append(module(x))
        ys[-1].sin().sum().backward()
    torch.testing.assert_close(*ys, **EXACT)
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        grad = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    for p, q in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(p, q, **EXACT)


class TestPublishedLayers:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", LAYERS)
    def test_becomes_the_fused_layer(self, name, train):
        model = nn.Sequential(nn.Identity(), published(name)).train(train)
        expected, before, keys = copy.deepcopy(model), tensors(model), list(model.state_dict())
        report = aia_kernels.convert(model)
        assert report.model is model
        assert [(entry.names, entry.now) for entry in report.converted] == [(("1",), LAYERS[name][2])]
        assert type(model[1]).__name__ == LAYERS[name][2]
        assert type(model[1]).__module__.startswith("aia_kernels.")
        assert report.left_alone == []
        assert_same_objects(model, before)
        assert list(model.state_dict()) == keys
        assert_same_step(model, expected, make_input(name))

    @pytest.mark.parametrize("name", LAYERS)
    def test_computes_without_calling_submodules(self, name):
        """Else it is the published flow under another name."""
        module = published(name)
        aia_kernels.convert(module)
        assert not any(
            map(must_be_called, (m for m in module.modules() if next(m.parameters(False), None) is not None))
        )

    @pytest.mark.parametrize("name", LAYERS)
    def test_the_model_itself(self, name):
        module, expected = published(name), published(name)
        report = aia_kernels.convert(module)
        assert report.model is module
        assert report.converted[0].names == ("",)
        assert "(the model itself)" in str(report)
        assert_same_step(module, expected, make_input(name))

    @pytest.mark.parametrize("name", ["CinST", "EANet"])
    def test_an_optimizer_built_before(self, name):
        pair = [published(name), published(name)]
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in pair]
        for step in range(3):
            if step == 1:
                aia_kernels.convert(pair[0])
            for module, optimizer in zip(pair, optimizers, strict=True):
                optimizer.zero_grad()
                module(make_input(name)).sin().sum().backward()
                optimizer.step()
        for p, q in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, **EXACT)

    def test_memories_that_share_storage(self):
        """As published on a CPU: linear_1 is a view of linear_0 and is trained with it."""
        module = published("EANet")
        module.linear_1.weight.data = module.linear_0.weight.data.permute(1, 0, 2)
        aia_kernels.convert(module)
        with torch.no_grad():
            module.linear_0.weight.add_(1.0)
        assert torch.equal(module.linear_1.weight, module.linear_0.weight.permute(1, 0, 2))

    def test_parametrised_memories(self):
        module = published("two linear")
        parametrizations.spectral_norm(module.mk)
        parametrizations.weight_norm(module.mv)
        expected = copy.deepcopy(module)
        assert len(aia_kernels.convert(module).converted) == 1
        assert_same_step(module, expected, make_input("two linear"))

    def test_frozen_and_synchronised_batch_norms(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(published("CinST"))
        model.T_bn.eval()
        model.C_bn.momentum, model.C_bn.eps = None, 0.5
        model.H_conv.weight.requires_grad_(False)
        kept = {name: bn for name, bn in model.named_modules() if isinstance(bn, nn.SyncBatchNorm)}
        assert len(aia_kernels.convert(model).converted) == 1
        assert all(model.get_submodule(name) is bn for name, bn in kept.items())
        assert (model.training, model.T_bn.training, model.C_bn.momentum, model.C_bn.eps) == (True, False, None, 0.5)
        assert not model.H_conv.weight.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_dtype_dropout_and_segments(self, dtype):
        model = nn.ModuleList([units.ST(16), external.MultiHeadExternalAttention(6, 2, attn_drop=0.3, proj_drop=0.2)])
        model.to(dtype)
        aia_kernels.convert(model)
        assert model[0].num_segments == 16
        assert (model[1].attn_drop.p, model[1].proj_drop.p) == (0.3, 0.2)
        assert all(p.dtype == dtype for p in model.parameters())

    def test_settings_that_the_published_class_does_not_hold(self):
        module, expected = published("EAMLP"), published("EAMLP")
        del module.k
        report = aia_kernels.convert(module)
        assert_same_step(module, expected, make_input("EAMLP"))
        report.undo()
        assert "k" not in vars(module)

    def test_meta_device(self):
        model = nn.ModuleList([units.CinST(2), external.ExternalAttention2d(6)]).to("meta")
        assert len(aia_kernels.convert(model).converted) == 2
        assert all(p.is_meta for p in model.parameters())

    def test_deepcopy_and_pickle(self):
        module = published("CinST")
        aia_kernels.convert(module)
        y = module.eval()(make_input("CinST"))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is aia_kernels.CinST
            assert torch.equal(other(make_input("CinST")), y)


class TestWhereLayersStand:
    def test_nested_and_shared(self):
        unit = units.C(2)
        model = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(unit)), "b": unit, "c": units.C(2)})
        report = aia_kernels.convert(model)
        assert [entry.names for entry in report.converted] == [("a.0.0", "b"), ("c",)]
        assert model["b"] is model["a"][0][0]
        assert isinstance(model["b"], aia_kernels.C)
        assert "a.0.0 = b" in str(report)

    def test_data_parallel(self):
        model = nn.DataParallel(nn.Sequential(published("CinST")))
        assert aia_kernels.convert(model).converted[0].names == ("module.0",)

    @pytest.mark.filterwarnings("error:Grad strides")
    def test_distributed_data_parallel(self, tmp_path):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            expected = published("CinST")
            wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(published("CinST")))
            report = aia_kernels.convert(wrapped)
            assert report.converted[0].names == ("module.0",)
            assert_same_step(wrapped, expected, make_input("CinST"))
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("wrap", ["torch.compile", "Module.compile", "part of the model"])
    def test_compiled(self, wrap):
        """A graph that was compiled before is compiled again with the fused layer."""
        torch._dynamo.reset()
        model, expected = (nn.Sequential(published("EANet"), nn.ReLU()) for _ in range(2))
        called = model
        if wrap == "torch.compile":
            called = torch.compile(model, backend="aot_eager")
        elif wrap == "Module.compile":
            model.compile(backend="aot_eager")
        else:
            model[0] = torch.compile(model[0], backend="aot_eager")
        assert_same_step(called, expected, make_input("EANet"))
        report = aia_kernels.convert(called)
        assert [entry.now for entry in report.converted] == ["ExternalAttention2d"]
        seen = []
        original = aia_kernels.modules.external_attention.external_attention_block

        def spy(*arguments, **settings):
            seen.append(1)
            return original(*arguments, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aia_kernels.modules.external_attention, "external_attention_block", spy)
            assert_same_step(called, expected, make_input("EANet"))
        assert seen
        torch._dynamo.reset()

    def test_a_whole_network_compares_once_for_each_kind_of_layer(self, monkeypatch):
        """What makes the report of a ResNet-50 a matter of milliseconds."""
        model = models.aia_resnet50(num_classes=5, num_segments=4, unit="CinST2STinC")
        blocks = [block for block in model.modules() if hasattr(block, "eft1")]
        for block in blocks:
            block.eft1, block.eft2 = units.CinST(4), units.STinC(4)
        compared = []
        difference = behaviour.difference
        monkeypatch.setattr(behaviour, "difference", lambda *a: compared.append(a[1]) or difference(*a))
        report = aia_kernels.convert(model)
        assert len(blocks) == 16
        assert len(report.converted) == 32
        assert compared == [aia_kernels.CinST, aia_kernels.STinC]
        assert "16 x benchmarks.published.attention_in_attention.STinC -> STinC" in str(report)

    def test_none(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        report = aia_kernels.convert(model)
        assert report.model is model
        assert (report.converted, report.left_alone, report.already_fused) == ([], [], [])
        assert (
            str(report)
            == repr(report)
            == ("aia_kernels.convert: the model has none of the published layers and is unchanged")
        )

    def test_twice(self):
        model = nn.Sequential(published("CinST"))
        aia_kernels.convert(model)
        report = aia_kernels.convert(model)
        assert report.already_fused == ["0"]
        assert "unchanged" in str(report)

    def test_not_a_module(self):
        for call in (aia_kernels.convert, aia_kernels.to_reference):
            with pytest.raises(TypeError, match="model: got dict"):
                call({})


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
    "conv with bias": (changed(lambda: units.C(2), C_conv=nn.Conv3d(2, 1, 3, padding=1)), "C_conv.bias: got"),
    "circular padding": (
        with_attributes(lambda: units.C(2), C_conv__padding_mode="circular"),
        "padding_mode: got circular",
    ),
    "other norm": (changed(lambda: units.C(2), C_bn=nn.GroupNorm(1, 1)), "C_bn is a GroupNorm, expected a BatchNorm"),
    "two gates": (changed(lambda: units.C(2), T_conv=nn.Conv3d(2, 1, 3, padding=1)), "it has T_conv beside"),
    "no segments": (with_attributes(lambda: units.C(2), num_segments=None), "num_segments: got None"),
    "missing norm": (with_attributes(lambda: units.C(2, use_BN=False), use_BN=True), "C_bn is a NoneType"),
    "guide as output": (
        lambda: GuideAsOutput(2),
        "its y differs from that of CinST .*; STinC and STinC2 do not fit either",
    ),
    "added guide": (lambda: AddedGuide(2), "its y differs"),
    "other weights": (lambda: OtherWeights(2), "its y differs from that of ST "),
    "stopped gradient": (lambda: StoppedGradient(2), "its gradient of"),
    "own train": (lambda: OwnTrain(2), "its class overrides train"),
    "own keys": (lambda: OwnKeys(2), "its class overrides _save_to_state_dict"),
    "slots": (lambda: Slots(2), "Python cannot exchange its class"),
    "a missing attribute": (lambda: NeedsMore(2), "its forward fails .* no attribute 'scale'"),
    "hooks": (hooked, "C_conv has hooks"),
    "hooks on a part without parameters": (pooling_hooked, "sigmoid has hooks"),
    "patched instance": (patched, "its forward was replaced on the instance"),
    "more arguments": (lambda: Masked(6, 4), r"its forward takes \(x, mask=None\)"),
    "more results": (lambda: Pair(6, 4), "its forward returns a tuple"),
    "container": (Container, "it has no forward"),
    "memories of other sizes": (
        changed(lambda: external.ExternalAttention(6, 4), mv=nn.Linear(4, 5)),
        "mv.out_features: got 5",
    ),
    "no eps": (NoEps, "its y differs from that of TokenExternalAttention"),
    "other eps": (OtherEps, "its y differs"),
    "other norm over slots": (L2, "its y differs"),
    "dropout elsewhere": (LateDropout, "with a marked dropout"),
    "adapted linear": (changed(TokenPerformer, proj=LowRank(5, 5)), "proj is a LowRank with a forward of its own"),
    "token memories without bias": (
        changed(TokenPerformer, linear_1=nn.Linear(6, 5, bias=False)),
        "linear_1.bias: got None",
    ),
    "other heads": (
        with_attributes(lambda: external.MultiHeadExternalAttention(6, 2), num_heads=4),
        "num_heads: got 4",
    ),
    "no dropout": (
        changed(lambda: external.MultiHeadExternalAttention(6, 2), attn_drop=nn.Identity()),
        "attn_drop is a Identity, expected a Dropout",
    ),
    "strided": (
        changed(lambda: external.ExternalAttention2d(6, 5), conv1=nn.Conv2d(6, 6, 1, stride=2)),
        "conv1.stride: got",
    ),
    "more layers": (
        changed(lambda: external.ExternalAttention2d(6, 5), conv2=nn.Sequential(nn.Conv2d(6, 6, 1))),
        "conv2 has 1 submodules",
    ),
}


class TestLookAlikes:
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

    def test_the_same_class_with_another_setting(self):
        """What was found out about one layer holds for those alone that are built and set alike."""
        model = nn.ModuleList(NeedsMore(2) for _ in range(4))
        for module, scale in zip(model, (1.0, 2.0, 1.0, 2.0), strict=True):
            module.scale = scale
        report = aia_kernels.convert(model)
        assert [entry.names for entry in report.converted] == [("0",), ("2",)]
        assert [entry.names for entry in report.left_alone] == [("1",), ("3",)]


class TestNothingElseMoves:
    def test_random_numbers_modes_and_values(self):
        model = nn.ModuleList([LAYERS[name][0]() for name in LAYERS])
        model[3].eval()
        state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        aia_kernels.convert(model)
        assert torch.equal(torch.rand(3), expected)
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])

    def test_hooks_of_the_layer_stay_and_do_not_fire(self):
        module = published("CinST")
        fired = []
        handle = module.register_forward_hook(lambda *_: fired.append(1))
        module.register_full_backward_hook(lambda *_: fired.append(2))
        assert len(aia_kernels.convert(module).converted) == 1
        assert fired == []
        module(make_input("CinST")).sum().backward()
        assert fired == [1, 2]
        handle.remove()
        module(make_input("CinST"))
        assert fired == [1, 2]

    def test_what_a_forward_collects(self):
        class Collecting(units.C):
            def __init__(self):
                super().__init__(2)
                self.outputs = []

            def flow(self, x):
                self.outputs.append(super().flow(x))
                return self.outputs[-1]

        module = Collecting()
        aia_kernels.convert(module)
        assert module.outputs == []

    @pytest.mark.parametrize(
        "context",
        [
            torch.no_grad,
            torch.inference_mode,
            lambda: torch.autocast("cpu", torch.bfloat16),
            lambda: torch.device("meta"),
            lambda: aia_kernels.use_backend("reference"),
        ],
        ids=["no_grad", "inference_mode", "autocast", "default device", "backend"],
    )
    def test_inside_a_context(self, context):
        model = nn.ModuleList([LAYERS[name][0]() for name in LAYERS])
        with context():
            report = aia_kernels.convert(model)
        assert report.left_alone == []
        assert len(report.converted) == len(LAYERS)

    def test_undo(self):
        model = nn.ModuleList([published(name) for name in LAYERS])
        kinds, before = [type(m) for m in model.modules()], tensors(model)
        report = aia_kernels.convert(model)
        assert [type(m) for m in model.modules()] != kinds
        assert report.undo() is model
        assert [type(m) for m in model.modules()] == kinds
        assert_same_objects(model, before)
        report.undo()  # nothing is left to undo


class TestToReference:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", LAYERS)
    def test_and_back(self, name, train):
        model = nn.Sequential(published(name)).train(train)
        expected, before, keys = copy.deepcopy(model), tensors(model), list(model.state_dict())
        aia_kernels.convert(model)
        fused = type(model[0])
        assert aia_kernels.to_reference(model) is model
        assert type(model[0]) is not fused
        assert_same_objects(model, before)
        assert list(model.state_dict()) == keys
        assert_same_step(model, expected, make_input(name))
        assert aia_kernels.to_reference(model) is model  # plain already
        report = aia_kernels.convert(model)
        assert type(model[0]) is fused
        assert len(report.converted) == 1
        report.undo()
        assert type(model[0]) is not fused

    def test_temporal_shift(self):
        model = nn.Sequential(aia_kernels.TemporalShift(4))
        x = torch.randn(8, 16, 3, 2, dtype=torch.float64)
        expected = model(x)
        assert torch.equal(aia_kernels.to_reference(model)(x), expected)

    @pytest.mark.parametrize("name", [*LAYERS, "shift"])
    def test_no_operator_of_the_package_remains(self, name):
        """Under torch.export, where the fused layers record theirs."""
        if name == "shift":
            model, x = aia_kernels.TemporalShift(4), torch.randn(8, 16, 3, 2)
        else:
            model, x = published(name), make_input(name)
            aia_kernels.convert(model)
        program = torch.export.export(aia_kernels.to_reference(model), (x,))
        called = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        assert {operator.namespace for operator in called} == {"aten"}

    def test_hooks_of_the_layer_stay(self):
        module = published("EANet")
        aia_kernels.convert(module)
        fired = []
        module.register_forward_hook(lambda *_: fired.append(1))
        aia_kernels.to_reference(module)(make_input("EANet"))
        assert fired == [1]

    def test_deepcopy_and_pickle(self):
        module = aia_kernels.to_reference(aia_kernels.CinST(2).eval())
        y = module(x := torch.randn(4, 3, 5, 6))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), y)

    def test_a_derived_class(self):
        class Named(aia_kernels.C):
            """Adds nothing to the forward."""

        class Doubled(aia_kernels.C):
            def forward(self, x):
                return 2 * super().forward(x)

        module = aia_kernels.to_reference(Named(2))
        assert type(module) is not Named
        model = nn.Sequential(aia_kernels.C(2), Doubled(2))
        with pytest.raises(TypeError, match=r"1 \(.*Doubled\)"):
            aia_kernels.to_reference(model)
        assert type(model[0]) is aia_kernels.C
