"""The networks of external attention: stored logits, the published layers in their place, shapes, errors, examples."""

from __future__ import annotations

import contextlib
import itertools
import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import some_of
from stored_networks import BOUND, error, fill, keys_digest, stored, stored_input
from torch import Tensor, nn

from aia_kernels import models
from aia_kernels.models import detection, eamlp, eanet, generation, point_cloud
from aia_kernels.testing import randomise
from benchmarks.published import external_attention as published

ROOT = Path(__file__).parents[2]
EAMLPS = {"T2t_vit_7": eamlp.eamlp_7, "T2t_vit_14": eamlp.eamlp_14, "T2t_vit_19": eamlp.eamlp_19}


class PublishedTokenAttention(eamlp.TokenExternalAttention):
    """The attention of a T2T stage as published: no product of parameters, softmax and division as two passes."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_linear(x)
        attention = self.linear_0(q).softmax(dim=1)
        attention = attention / (1e-9 + attention.sum(dim=2, keepdim=True))
        return q + self.proj_drop(self.proj(self.linear_1(self.attn_drop(attention))))


PUBLISHED = (
    (eamlp, "TokenExternalAttention", PublishedTokenAttention),
    (eamlp, "MultiHeadExternalAttention", published.MultiHeadExternalAttention),
    (eanet, "ExternalAttention2d", published.ExternalAttention2d),
    (detection, "ExternalAttention2d", published.ExternalAttention2d),
    (generation, "ExternalAttention", published.ExternalAttention),
    (point_cloud, "ExternalAttention", published.ExternalAttention),
)


def twins(make) -> tuple[nn.Module, nn.Module]:
    """A network in float64 and the same made of published layers, with equal parameters that no default hides behind.

    Spectral norm's vectors are in the state dict too, so both take the same steps of its power iteration.
    """
    ours = make().double()
    with contextlib.ExitStack() as stack:
        for module, name, layer in PUBLISHED:
            stack.enter_context(mock.patch.object(module, name, layer))
        theirs = make().double()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith(("mk.weight", "gamma")) or p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def small_backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())


def small_eamlp(**settings) -> eamlp.EAMLP:
    return eamlp.EAMLP(**{"img_size": 32, "num_classes": 3, "embed_dim": 16, "depth": 2, "token_dim": 8, **settings})


def small_fpn() -> nn.Module:
    trunk = models.DilatedResNet(50, stride=32, deep_stem=False, width=4)
    return models.ExternalAttentionFPN(trunk, attention=(3, 4), out_channels=8, k=5)


NETWORKS = {
    "EAMLP": (small_eamlp, (3, 3, 32, 32)),
    "EANet": (lambda: models.EANet(4, small_backbone(), channels=12, width=10, k=6), (2, 3, 14, 10)),
    "pyramid": (small_fpn, (3, 3, 40, 40)),
    "classifier": (lambda: models.PointCloudClassifier(5, samples=(12, 9), neighbours=4, k=7), (3, 3, 20)),
    "segmenter": (lambda: models.PointCloudSegmenter(6, 2, channels=9, k=7), (3, 3, 20)),
    "generator": (lambda: models.Generator(6, channels=2, image_size=16, attention_at=8, k=5), (4, 6)),
    "discriminator": (lambda: models.Discriminator(channels=4, image_size=16, attention_at=8, k=5), (4, 3, 16, 16)),
}


def call(network: nn.Module, x: Tensor) -> Tensor:
    """The outputs of a network in one row."""
    if isinstance(network, models.PointCloudSegmenter):
        y = network(x, torch.arange(len(x)) % network.n_categories)
    else:
        y = network(x)
    return torch.cat([a.flatten() for a in y.values()]) if isinstance(y, dict) else y.flatten()


def assert_no_gradient_differs(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """tolerance: relative to the largest gradient of all, as gradients that cancel have no scale of their own."""
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    atol = tolerance * max(g.abs().max() for g in expected.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", EAMLPS)
def test_eamlp_matches_stored_logits(name, external_on):
    expected = stored("eamlp_64.json")[name]
    network = fill(EAMLPS[name](num_classes=5, img_size=64).double())
    assert sum(p.numel() for p in network.parameters()) == expected["params"]
    assert keys_digest(network) == expected["keys"]
    assert_logits(network.to(external_on[1]), stored_input(2, 3, 64, 64), expected["logits"])


def test_eamlp_at_224_matches_stored_logits(external_on):
    expected = stored("eamlp.json")["T2t_vit_7"]
    network = fill(eamlp.eamlp_7(num_classes=5).double())
    state = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(state) == expected["n_state"]
    assert {name: state[name] for name in expected["state"]} == expected["state"]
    assert sum(p.numel() for p in network.parameters()) == expected["params"]
    assert_logits(network.to(external_on[1]), stored_input(2, 3, 224, 224), expected["logits"])


@some_of("depth, stride", itertools.product((50, 101), (8, 16)), (50, 8), (101, 16))
def test_eanet_matches_stored_scores(depth, stride, external_on):
    expected = stored("eanet.json")[f"EANet_{depth}_stride{stride}"]
    network = fill(models.EANet(5, depth, stride=stride).double())
    assert sum(p.numel() for p in network.parameters()) == expected["params"]
    assert keys_digest(network) == expected["keys"]
    device = external_on[1]
    assert_logits(network.to(device), stored_input(2, 3, 65, 49), expected["scores"], size=(3, 4))


def assert_logits(network: nn.Module, x: Tensor, expected: list, **settings) -> None:
    with torch.no_grad():
        found = network(x.to(next(network.parameters()).device), **settings)
    assert error(found, expected) < BOUND


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_equals_that_with_published_layers(name, external_on):
    device = external_on[1]
    make, shape = NETWORKS[name]
    ours, theirs = (network.to(device) for network in twins(make))
    x = torch.randn(shape, dtype=torch.float64, device=device)
    for mine, other in ((ours, theirs), (ours.eval(), theirs.eval())):
        mine.zero_grad()
        other.zero_grad()
        outputs = []
        for network in (mine, other):
            torch.manual_seed(
                1
            )  # dropout: the masks of attention maps differ in their layout, so none is applied there
            without_dropout(network)
            y = call(network, x)
            y.backward(torch.cos(torch.arange(len(y), dtype=torch.float64, device=device)))
            outputs.append(y.detach())
        # Rounding of other sums, in float64, grown by the divisions of the batch norms.
        torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
        assert_no_gradient_differs(mine, other, 1e-8)
    for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def without_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0


def test_gradient_penalty_has_the_gradient_of_the_published_layers(external_on):
    device = external_on[1]
    ours, theirs = (network.to(device) for network in twins(NETWORKS["discriminator"][0]))
    real, fake = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64, device=device)
    penalties = []
    for network in (ours, theirs):
        torch.manual_seed(2)
        penalties.append(models.gradient_penalty(network, real, fake))
        penalties[-1].backward()
    torch.testing.assert_close(*penalties, rtol=1e-8, atol=0)  # rounding, twice through ten layers
    assert_no_gradient_differs(ours, theirs, 1e-8)
    slopes = {name: p.grad.abs().max() for name, p in ours.named_parameters() if "attention" in name}
    assert len(slopes) == 2 and min(slopes.values()) > 0


def test_gradient_penalty_of_a_known_slope():
    real, fake = torch.randn(2, 5, 3, 4, 4)
    # d score / d image is 2 in each of 48 elements: a norm of 2 sqrt(48).
    penalty = models.gradient_penalty(lambda images: 2 * images.sum((1, 2, 3)), real, fake)
    torch.testing.assert_close(penalty, torch.tensor((2 * 48**0.5 - 1) ** 2))


def test_spectral_norm_bounds_both_memories():
    block = models.SpectralExternalAttention(20, k=7)
    x = torch.randn(2, 20, 4, 3)
    for _ in range(30):  # each call in training is a step of the power iteration
        y = block(x)
    torch.testing.assert_close(y, x)  # gamma is 0
    for linear in (block.attention.mk, block.attention.mv):
        # Thirty steps bring the estimate within a few per cent for a matrix whose singular values are close together.
        assert abs(torch.linalg.matrix_norm(linear.weight.detach(), 2) - 1) < 0.05


def test_token_attention_calls_submodules_that_are_watched():
    layer = eamlp.TokenExternalAttention(5, 6, k=4).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    folded = layer(x)
    seen = []
    layer.linear_1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), folded)
    assert len(seen) == 1


def test_token_attention_draws_the_same_mask_for_a_seed():
    layer = eamlp.TokenExternalAttention(5, 6, attn_drop=0.4, proj_drop=0.2)
    x = torch.randn(2, 7, 5)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.allclose(draws[0], draws[2])


def test_memories_of_token_stages_start_equal_and_apart():
    for module in small_eamlp().modules():
        if isinstance(module, eamlp.TokenExternalAttention):
            key, value = module.linear_0.weight, module.linear_1.weight
            assert torch.equal(key, value.T) and key.data_ptr() != value.data_ptr()


def test_eamlp_takes_rectangles_and_new_heads():
    network = small_eamlp(img_size=(32, 48))
    images = torch.randn(2, 3, 32, 48)
    assert network(images).shape == (2, 3)
    network.reset_classifier(7)
    assert network(images).shape == (2, 7) and network.get_classifier().out_features == 7
    network.reset_classifier(0)
    torch.testing.assert_close(network.eval()(images), network.forward_features(images))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_eamlp_pools_over_tokens(pool):
    network = small_eamlp(global_pool=pool, num_classes=0).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = network(images)
    torch.testing.assert_close(features, seen[0].mean(1) if pool == "avg" else seen[0].max(1).values)


def test_tokens_of_a_rectangle_are_in_the_order_of_rows():
    """A picture on its side gives the tokens of the picture in transposed order, with kernels of one symmetry."""
    stem = eamlp.TokensToToken(embed_dim=6, token_dim=4).double().eval()
    transpose_patches(stem)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    tokens = stem(images).unflatten(1, (2, 4))
    torch.testing.assert_close(stem(images.mT).unflatten(1, (4, 2)), tokens.transpose(1, 2))


@torch.no_grad()
def transpose_patches(stem: eamlp.TokensToToken) -> None:
    """Make every layer that sees the pixels of patches blind to their transposition."""
    for layer in (stem.attention1.attn.q_linear, stem.attention2.attn.q_linear, stem.project):
        side = 7 if layer is stem.attention1.attn.q_linear else 3
        patches = layer.weight.unflatten(1, (-1, side, side))
        layer.weight.copy_(((patches + patches.mT) / 2).flatten(1))


def test_drop_path_keeps_the_mean():
    drop = eamlp.DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y[:, 0, 0], y[:, 1, 2])
    assert abs(y.mean() - 1) < 0.04  # five deviations of the mean of 4000 draws
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: [x * 0, x], lambda x: OrderedDict(low=x * 0, out=x)])
def test_eanet_takes_any_backbone(kind):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, stride=4, padding=1)

        def forward(self, x):
            return kind(self.conv(x))

    network = models.EANet(3, Backbone(), channels=5, width=8).eval()
    plain = models.EANet(3, nn.Sequential(OrderedDict(conv=Backbone().conv)), channels=5, width=8).eval()
    plain.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(2, 3, 17, 12)
    assert network(images).shape == (2, 3, 17, 12)
    torch.testing.assert_close(network(images), plain(images))
    assert network(images, size=(5, 6)).shape == (2, 3, 5, 6)


def test_eanet_returns_the_loss_of_each_image_in_training():
    network = NETWORKS["EANet"][0]()
    without_dropout(network)
    images, labels = torch.randn(2, 3, 14, 10), torch.randint(0, 4, (2, 14, 10))
    labels[1, :7] = 255
    loss = network(images, labels)
    scores = network(images)
    first = F.cross_entropy(scores[:1], labels[:1])
    # The published loss averages over all pixels, the 255s counting as 0.
    second = F.cross_entropy(scores[1:, :, 7:], labels[1:, 7:]) / 2
    torch.testing.assert_close(loss, torch.stack((first, second)))
    assert network.eval()(images, labels).shape == (2, 4, 14, 10)


def test_a_dilated_resnet_keeps_its_weights_in_eanet():
    backbone = models.DilatedResNet(50, stride=16, width=4)
    network = models.EANet(3, backbone)
    assert network.extractor[4] is backbone.layer1 and network.extractor[0] is backbone.conv1
    assert {m.momentum for m in models.EANet(3, 50, momentum=3e-4).modules() if isinstance(m, nn.BatchNorm2d)} == {3e-4}


@pytest.mark.parametrize(("stride", "sides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))])
def test_strides_of_the_trunk(stride, sides):
    network = models.DilatedResNet(50, stride, deep_stem=False, width=8).eval()
    maps = network(torch.zeros(1, 3, 64, 64))
    assert [64 // x.shape[3] for x in maps] == list(sides)
    assert [x.shape[1] for x in maps] == list(network.channels) == [32, 64, 128, 256]


def test_imagenet_weights_reach_the_trunks(tmp_path):
    weights = randomise(models.DilatedResNet(50, 32, deep_stem=False, width=4)).state_dict()
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "resnet.pth")
    trunk = models.DilatedResNet(50, 32, deep_stem=False, width=4)
    models.load_imagenet(trunk, tmp_path / "resnet.pth")
    pyramid, segmenter = models.ExternalAttentionFPN(trunk, (1,), out_channels=4), models.EANet(3, trunk, width=8)
    assert torch.equal(pyramid.state_dict()["body.layer3.2.conv2.weight"], weights["layer3.2.conv2.weight"])
    assert torch.equal(segmenter.state_dict()["extractor.6.2.conv2.weight"], weights["layer3.2.conv2.weight"])


def test_the_pyramid_is_what_torchvision_expects_of_a_backbone():
    network = models.ExternalAttentionFPN(50, attention=(2, 3), out_channels=16)
    maps = network(torch.zeros(2, 3, 64, 96))
    sides = {"0": (16, 24), "1": (8, 12), "2": (4, 6), "3": (2, 3), "pool": (1, 2)}
    assert {name: tuple(x.shape) for name, x in maps.items()} == {name: (2, 16, *s) for name, s in sides.items()}
    assert network.out_channels == 16
    names = set(network.state_dict())
    assert {
        "body.conv1.weight",
        "body.layer1.0.downsample.1.running_var",
        "body.layer4.2.bn3.num_batches_tracked",
    } <= names
    assert {"fpn.inner_blocks.0.0.weight", "fpn.layer_blocks.3.0.bias"} <= names
    assert {name.split(".")[1] for name in names if name.startswith("attention")} == {"2", "3"}
    assert network.body.conv1.weight.shape == (64, 3, 7, 7)


def test_a_pyramid_adds_the_coarser_map_to_the_finer():
    pyramid = models.FeaturePyramid((1, 1), out_channels=1)
    with torch.no_grad():
        for block in (*pyramid.inner_blocks, *pyramid.layer_blocks):
            nn.init.dirac_(block[0].weight)
    fine, coarse = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 3, 2)
    found = pyramid([fine, coarse])
    torch.testing.assert_close(found[0], fine + F.interpolate(coarse, size=(5, 4), mode="nearest"))
    torch.testing.assert_close(found[1], coarse)
    torch.testing.assert_close(found[2], coarse[:, :, ::2, ::2])


def test_farthest_points():
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 0, 0], [4, 0, 0], [9, 0, 0]])[None]
    assert point_cloud.farthest_points(xyz, 4).tolist() == [[0, 2, 3, 1]]


def test_groups_are_the_nearest_points():
    xyz, features = torch.rand(2, 30, 3), torch.randn(2, 30, 5)
    positions, groups = point_cloud.sample_and_group(xyz, features, samples=6, neighbours=4)
    assert positions.shape == (2, 6, 3) and groups.shape == (2, 6, 4, 10)
    for b in range(2):
        for s in range(6):
            order = (xyz[b] - positions[b, s]).norm(dim=1).argsort()
            nearest = features[b, order[:4]] - features[b, order[0]]
            assert torch.equal(groups[b, s, :, 5:], features[b, order[:1]].expand(4, 5))
            torch.testing.assert_close(groups[b, s, :, :5].sort(dim=0).values, nearest.sort(dim=0).values)


def test_the_segmenter_follows_the_order_of_the_points(external_on):
    network = models.PointCloudSegmenter(6, 2, channels=16).double().to(external_on[1]).eval()
    x = torch.randn(2, 3, 40, dtype=torch.float64, device=external_on[1])
    category = torch.tensor([1, 0], device=x.device)
    order = torch.randperm(40, device=x.device)
    with torch.no_grad():
        y = network(x, category)
        assert y.shape == (2, 6, 40)
        torch.testing.assert_close(network(x[:, :, order], category), y[:, :, order])
        torch.testing.assert_close(network(x, F.one_hot(category, 2)), y)


def test_the_classifier_does_not_see_the_order_of_the_points():
    network = models.PointCloudClassifier(5, samples=(20, 10), neighbours=6).double().eval()
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    # The first point stays: sampling starts there.
    order = torch.cat((torch.tensor([0]), 1 + torch.randperm(39)))
    with torch.no_grad():
        torch.testing.assert_close(network(x[:, :, order]), network(x))


def test_the_segmenter_calls_a_head_that_is_watched():
    network = models.PointCloudSegmenter(6, 2, channels=16).double().eval()
    x, category = torch.randn(2, 3, 40, dtype=torch.float64), torch.tensor([1, 0])
    expected, seen = network(x, category), []
    network.convs1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    torch.testing.assert_close(network(x, category), expected)
    assert seen == [(2, 3136, 40)]


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast(name):
    make, shape = NETWORKS[name]
    network = make()
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(network, x)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["EAMLP", "EANet"])
def test_export(name):
    make, shape = NETWORKS[name]
    network, x = make().eval(), torch.randn(shape)
    program = torch.export.export(network, (x,))
    # One program, two orders of sums: a few roundings of float32 in logits of order one.
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-5)


BAD = {
    "img_size: got 40": lambda: eamlp.EAMLP(img_size=40),
    "global_pool: got 'sum'": lambda: small_eamlp(global_pool="sum"),
    "images: got shape": lambda: small_eamlp()(torch.zeros(1, 3, 32, 48)),
    "p: got 1.0": lambda: eamlp.DropPath(1.0),
    "n_classes: got 0": lambda: models.EANet(0),
    "depth: got 34": lambda: models.EANet(3, 34),
    "width: got 0": lambda: models.DilatedResNet(width=0),
    "stride: got 4": lambda: models.DilatedResNet(50, stride=4),
    "channels: got None": lambda: models.EANet(3, small_backbone()),
    "attention: got": lambda: models.ExternalAttentionFPN(attention=(5,)),
    "maps: got 1": lambda: models.FeaturePyramid((3, 4))([torch.zeros(1, 3, 2, 2)]),
    "samples: got 5": lambda: point_cloud.farthest_points(torch.zeros(1, 4, 3), 5),
    "neighbours: got 9": lambda: models.PointCloudClassifier(samples=(8, 4), neighbours=9),
    "x: got shape": lambda: models.PointCloudClassifier()(torch.zeros(1, 3, 100)),
    "n_parts: got 0": lambda: models.PointCloudSegmenter(0),
    "category: got shape": lambda: models.PointCloudSegmenter(4, 2)(torch.zeros(3, 3, 9), torch.zeros(3, 5)),
    "image_size: got 20": lambda: models.Generator(image_size=20),
    "attention_at: got 32": lambda: models.Discriminator(image_size=32, attention_at=32),
    "fake: got shape": lambda: models.gradient_penalty(None, torch.zeros(2, 3), torch.zeros(3, 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


EXAMPLES = {
    "image_segmentation": "mean intersection over union",
    "image_classification": "unseen digits right",
    "point_cloud": "of their points right",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_quick_example(name, tmp_path, monkeypatch, capsys):
    for package in ("matplotlib", "tqdm", *(["sklearn"] if name.startswith("image") else [])):
        pytest.importorskip(package, reason="pip install 'aia_kernels[examples]'")
    picture = tmp_path / "picture.png"
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--device", "cpu", "--output", str(picture)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    assert EXAMPLES[name] in said.out and "100%|" not in said.err  # no terminal is there
    # A few steps of float32 in two orders of summation; Adam divides by what may be small.
    assert all(float(apart) < 1e-2 for apart in re.findall(r"losses apart: at most (\S+)", said.out))
    assert picture.stat().st_size > 20_000
