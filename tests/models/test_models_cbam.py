"""The ResNet with CBAM: published names and initialization, and the numbers of the published layers in it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import aia_kernels
from aia_kernels import models
from aia_kernels.testing import randomise
from benchmarks.published import cbam as published

#: Float64 sums in another order, through a few blocks whose activations are of the order of one.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def small() -> models.CBAMResNet:
    return models.CBAMResNet((1, 1), num_classes=5, reduction_ratio=4, width=8)


def with_published_layers(network: nn.Module) -> nn.Module:
    """The same network with the layers of the authors in the place of CBAM."""
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(getattr(block, "cbam", None), aia_kernels.CBAM):
            c = block.cbam.ChannelGate.gate_channels
            slow = published.CBAM(c, c // block.cbam.ChannelGate.mlp[1].out_features).to(block.conv1.weight.dtype)
            slow.load_state_dict(block.cbam.state_dict())
            block.cbam = slow.train(block.training)
    return network


def test_published_names_and_shapes():
    network = models.cbam_resnet50()
    keys = list(network.state_dict())
    block = [key.removeprefix("layer2.1.") for key in keys if key.startswith("layer2.1.")]
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [key for i in "123" for key in (f"conv{i}.weight", *(f"bn{i}.{name}" for name in bn))]
    expected += [f"cbam.ChannelGate.mlp.{i}.{name}" for i in "13" for name in ("weight", "bias")]
    expected += ["cbam.SpatialGate.spatial.conv.weight", *(f"cbam.SpatialGate.spatial.bn.{name}" for name in bn)]
    assert block == expected
    assert keys[0] == "conv1.weight" and keys[-2:] == ["fc.weight", "fc.bias"]
    assert network.layer4[2].cbam.ChannelGate.mlp[1].weight.shape == (128, 2048)
    assert sum(p.numel() for p in network.parameters()) == 28_089_624  # 25,557,032 of ResNet-50, and CBAM's


def test_published_initialization():
    network = small()
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == (0 if "SpatialGate" in name else 1)).all(), name
        else:
            assert p.std() > 0, name


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_numbers_of_the_published_layers(train):
    ours = randomise(small()).double().train(train)
    theirs = with_published_layers(ours)
    steps = []
    for network in (ours, theirs):
        x = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        logits = network(x)
        logits.sin().sum().backward()
        steps.append([logits, x.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    for got, want in zip(*steps, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_converted():
    """A published network with CBAM in it becomes the fused one, in place."""
    network = randomise(with_published_layers(small())).double().eval()
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    want = network(x)
    report = aia_kernels.convert(network)
    assert [entry.now for entry in report.converted] == ["CBAM"] * 2
    torch.testing.assert_close(network(x), want, **EXACT)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"layers": ()}, ValueError, r"layers: got \(\)"),
        ({"layers": (1,), "num_classes": 0}, ValueError, "num_classes: got 0"),
        ({"layers": (1,), "width": 2.0}, TypeError, "width: got 2.0, expected an integer"),
        ({"layers": (1,), "width": 2}, ValueError, "in_planes: got 8, expected at least reduction_ratio = 16"),
    ],
)
def test_bad_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        models.CBAMResNet(**arguments)
