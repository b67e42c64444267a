"""to_reference: fused layers become plain PyTorch modules, from which convert leads back, and nothing else moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from convert_cases import LAYERS, assert_same_objects, assert_same_step, make_input, published, tensors
from torch import nn

import aia_kernels
from aia_kernels import modules
from aia_kernels.reference import UNITS
from aia_kernels.testing import randomise

CLIPS, TOKENS = ((8, 6, 5, 3), (2, 6, 4, 5, 3)), ((2, 9, 6),)
#: Every layer, with and without what it may lack, and the sizes that it takes.
EVERY = {
    **{name: (lambda name=name: getattr(aia_kernels, name)(4), CLIPS) for name in UNITS},
    **{f"{name}, no BN": (lambda name=name: getattr(aia_kernels, name)(4, use_BN=False), CLIPS) for name in UNITS},
    "TemporalShift": (lambda: aia_kernels.TemporalShift(4, fold_div=3), CLIPS),
    "CBAM": (lambda: aia_kernels.CBAM(6, 2), ((2, 6, 3, 4),)),
    "CBAM, other pools, no spatial gate": (
        lambda: aia_kernels.CBAM(6, 2, pool_types=["lse", "lp", "avg"], no_spatial=True),
        ((2, 6, 3, 4),),
    ),
    "ChannelGate": (lambda: aia_kernels.ChannelGate(6, 2), ((2, 6, 3, 4),)),
    "SpatialGate": (lambda: aia_kernels.SpatialGate(3), ((2, 6, 3, 4),)),
    "ExternalAttention": (lambda: aia_kernels.ExternalAttention(6, S=5), (*TOKENS, (2, 3, 4, 6))),
    "ExternalAttention2d": (lambda: aia_kernels.ExternalAttention2d(6, k=5), ((2, 6, 3, 4),)),
    "ExternalAttention2d, other forms": (
        lambda: aia_kernels.ExternalAttention2d(6, 5, norm=None, activation="gelu", residual=False, projection=False),
        ((2, 6, 3, 4), (2, 6, 7), (2, 6, 2, 3, 2)),
    ),
    "PositionLinearAttention": (
        lambda: aia_kernels.PositionLinearAttention(6, 2),
        ((2, 6, 3, 4), (2, 6, 7), (2, 6, 2, 3, 2)),
    ),
    "PositionLinearAttention, softplus": (
        lambda: aia_kernels.PositionLinearAttention(6, 2, feature="softplus"),
        ((2, 6, 3, 4),),
    ),
    "KernelLinearAttention": (lambda: modules.KernelLinearAttention(6, 2), ((2, 6, 3, 4), (2, 6, 7))),
    "ChannelLinearAttention": (aia_kernels.ChannelLinearAttention, ((2, 6, 3, 4), (2, 6, 7), (2, 6, 2, 3, 2))),
    "EfficientAttention": (
        lambda: aia_kernels.EfficientAttention(6, 4, 2, 8),
        ((2, 6, 3, 4), (2, 6, 7), (2, 6, 2, 3, 2)),
    ),
    "MultiHead": (lambda: aia_kernels.MultiHeadExternalAttention(6, num_heads=2), TOKENS),
    "Token": (lambda: aia_kernels.TokenExternalAttention(6, 5, k=7), TOKENS),
    "TransformerToken": (lambda: modules.TransformerTokenExternalAttention(6, 5, k=7), TOKENS),
}


def as_it_is(module):
    return module


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
        with pytest.raises(TypeError, match=r"1 \(.*Doubled: forward\)"):
            aia_kernels.to_reference(model)
        assert type(model[0]) is aia_kernels.C

    def test_a_class_that_keeps_its_parameters_elsewhere(self):
        """As FSDP's do, which it derives from the class of each module that it shards."""

        class Sharded(aia_kernels.C):
            def _apply(self, function, recurse=True):
                return self

        with pytest.raises(TypeError, match=r"the model itself \(.*Sharded: _apply\)"):
            aia_kernels.to_reference(Sharded(2))

    @pytest.mark.parametrize("compile", [as_it_is, torch.fx.symbolic_trace, torch.jit.script])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", EVERY)
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_symbolic_trace_and_script(self, name, train, compile):
        """What FX and TorchScript make of the plain layer is the specification, value and gradient."""
        make, sizes = EVERY[name]
        for size in sizes:
            module = randomise(make()).double().train(train)
            plain = compile(aia_kernels.to_reference(copy.deepcopy(module)))
            x = torch.randn(size, dtype=torch.float64, requires_grad=True)
            with aia_kernels.use_backend("reference"):
                assert_same_step(plain, module, x)

    def test_quantized_by_fx(self):
        """Linear layers inside are quantized; what stands between them stays as it is."""
        quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig

        layer = randomise(aia_kernels.MultiHeadExternalAttention(8, num_heads=2)).eval()
        model, x = nn.Sequential(nn.Linear(8, 8), aia_kernels.to_reference(layer)).eval(), torch.randn(2, 9, 8)
        mapping = QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
        quantized = quantize_fx.convert_fx(quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,)))
        kinds = [type(module).__module__ for module in quantized.modules() if type(module).__name__ == "Linear"]
        assert len(kinds) == 5 and all("quantized" in kind for kind in kinds)
        # Weights and activations in eight bits: a few hundredths of the largest value after three products.
        expected = model(x)
        assert (quantized(x) - expected).abs().max() < 0.1 * expected.abs().max()
