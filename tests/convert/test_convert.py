"""convert: published layers of any origin, wherever they stand, become fused ones, and nothing else moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from convert_cases import EXACT, LAYERS, assert_same_objects, assert_same_step, make_input, published, tensors
from torch import nn
from torch.nn.utils import parametrizations

import aia_kernels
from aia_kernels import models
from aia_kernels.convert import behaviour
from aia_kernels.modules.submodules import must_be_called
from benchmarks.published import attention_in_attention as units
from benchmarks.published import external_attention as external


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
        children = (m for m in module.modules() if m is not module)
        assert not any(map(must_be_called, (m for m in children if next(m.parameters(False), None) is not None)))

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

    def test_parametrized_memories(self):
        module = published("two linear")
        parametrizations.spectral_norm(module.mk)
        parametrizations.weight_norm(module.mv)
        expected = copy.deepcopy(module)
        assert len(aia_kernels.convert(module).converted) == 1
        assert_same_step(module, expected, make_input("two linear"))

    def test_frozen_and_synchronized_batch_norms(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(published("CinST"))
        model.T_bn.eval()
        model.C_bn.momentum, model.C_bn.eps = None, 0.5
        model.H_conv.weight.requires_grad_(False)
        kept = {name: bn for name, bn in model.named_modules() if isinstance(bn, nn.SyncBatchNorm)}
        assert len(aia_kernels.convert(model).converted) == 1
        assert all(model.get_submodule(name) is bn for name, bn in kept.items())
        assert (model.training, model.T_bn.training, model.C_bn.momentum, model.C_bn.eps) == (True, False, None, 0.5)
        assert not model.H_conv.weight.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
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

    def test_parameters_and_submodules_in_two_layers(self):
        """What two layers share they go on sharing, in one step of training too."""
        model = nn.Sequential(*(published("C") for _ in range(3)))
        model[1].C_conv.weight, model[2].C_bn = model[0].C_conv.weight, model[0].C_bn
        expected, before = copy.deepcopy(model), tensors(model)
        assert len(aia_kernels.convert(model).converted) == 3
        assert_same_objects(model, before)
        assert_same_step(model, expected, make_input("C"))

    def test_one_memory_for_keys_and_values(self):
        module = external.ExternalAttention(6, 6).double()
        module.mv = module.mk
        expected = copy.deepcopy(module)
        assert len(aia_kernels.convert(module).converted) == 1
        assert module.mv is module.mk
        assert_same_step(module, expected, make_input("two linear"))

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
        """So the report of a ResNet-50 takes two comparisons, not thirty-two."""
        model = models.aia_resnet50(num_classes=5, num_segments=4, unit="CinST2STinC")
        blocks = [block for block in model.modules() if hasattr(block, "eft1")]
        for block in blocks:
            block.eft1, block.eft2 = units.CinST(4), units.STinC(4)
        compared = []
        difference = behaviour.difference
        monkeypatch.setattr(behaviour, "difference", lambda *a, **s: compared.append(a[1]) or difference(*a, **s))
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
            == (
                "aia_kernels.convert: the model is unchanged; no forward in it divides a softmax by its sum over "
                "another axis or recalibrates a tensor by gates, and no layer has the submodules of a published one"
            )
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
