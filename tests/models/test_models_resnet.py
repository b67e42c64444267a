"""The published video networks: their logits, keys and structure, the wrapper for clips, and their checkpoints."""

from __future__ import annotations

import argparse
import ast
import copy
import csv
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import some_of
from stored_networks import BOUND, error, stored, stored_input
from stored_networks import value as stored_value
from torch import nn

import aia_kernels
from aia_kernels import functional, modules
from aia_kernels.models import (
    AIAResNet,
    CheckpointError,
    VideoNet,
    aia_resnet50,
    aia_resnet101,
    load_checkpoint,
    load_imagenet,
)
from aia_kernels.models.resnet import TEMPORAL, UNITS, Bottleneck
from aia_kernels.testing import randomise
from benchmarks.published import attention_in_attention as published
from benchmarks.published import temporal_shift as published_shift

ROOT = Path(__file__).parents[2]
GOLDEN = stored("resnet50.json")
#: Most tensors are the same in all networks.
filled = functools.cache(stored_value)
frames = functools.cache(lambda: stored_input(4, 3, 224, 224))


def stored_network(name: str) -> AIAResNet:
    """A network of resnet50.json, its state dict held to what is stored there."""
    kind, unit = name.split("_")[0], (*name.split("_")[1:], None)[0]
    with torch.device("meta"):
        network = aia_resnet50(5, GOLDEN[name]["num_segments"], unit, {"C2D": "tsn", "TSM": "tsm"}[kind]).double()
    state = network.state_dict()
    assert len(state) == GOLDEN[name]["n_state"]
    for key, shape in GOLDEN[name]["state"].items():
        assert list(state[key].shape) == shape, key
    assert sum(p.numel() for p in network.parameters()) == GOLDEN[name]["params"]
    values = {
        key: filled(key, tuple(value.shape)) if value.is_floating_point() else torch.zeros((), dtype=value.dtype)
        for key, value in state.items()
    }
    network.load_state_dict(values, assign=True)
    return network.eval()


@torch.no_grad()
@some_of("name", GOLDEN, "C2D_STinCplusCinST_BN", "TSM_CinST2STinC_BN", "C2D_C_BN")
def test_published_logits(name):
    assert error(stored_network(name)(frames()), GOLDEN[name]["logits"]) < BOUND


def small(unit: str | None = None, temporal: str = "tsn", **settings) -> AIAResNet:
    return AIAResNet((1, 2), num_classes=4, num_segments=3, unit=unit, temporal=temporal, width=8, **settings)


def test_every_second_block_of_a_stage_of_23():
    with torch.device("meta"):
        networks = {(u, t): aia_resnet101(5, 4, u, t) for u in (None, "CinST") for t in TEMPORAL}
    for (unit, temporal), network in networks.items():
        for stage, blocks in (("layer2", 4), ("layer3", 23)):
            made = list(getattr(network, stage))
            chosen = [blocks < 23 or i % 2 == 0 for i in range(blocks)]
            assert [hasattr(block, "eft") for block in made] == [unit is not None and c for c in chosen]
            assert [block.shift is not None for block in made] == [temporal == "tsm" and c for c in chosen]


@pytest.mark.parametrize("unit", UNITS)
def test_the_composition_of_units(unit):
    block = randomise(Bottleneck(8, 4, num_segments=3, unit=unit)).double()
    x = torch.randn(6, 4, 5, 3, dtype=torch.float64)
    before = copy.deepcopy(block)
    found = block.attend(x)
    if unit is None:
        assert not any("eft" in key for key in block.state_dict()) and found is x
        return
    joint = next((word for word in ("2", "plus") if word in unit), None)
    parts = unit.split(joint) if joint else [unit]
    attributes = ["eft"] if len(parts) == 1 else ["eft1", "eft2"]
    units = [getattr(before, attribute) for attribute in attributes]
    assert [type(u) for u in units] == [getattr(modules, part) for part in parts]
    assert all(u.num_segments == 3 and u.use_BN for u in units)
    one_after_the_other = functools.reduce(lambda y, u: u(y), units, x)
    expected = (units[0](x) + units[1](x)) / 2 if joint == "plus" else one_after_the_other
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_place_of_units_and_shift():
    """One bottleneck by hand: the shift on the residual branch alone, the unit between bn2 and the ReLU."""
    block = randomise(Bottleneck(16, 4, num_segments=3, unit="ST", temporal="tsm")).double().eval()
    x = torch.randn(6, 16, 5, 3, dtype=torch.float64)
    y = block.bn1(block.conv1(functional.temporal_shift(x, 3, 8))).relu()
    y = block.eft(block.bn2(block.conv2(y))).relu()
    torch.testing.assert_close(block(x), (block.bn3(block.conv3(y)) + x).relu(), rtol=1e-12, atol=1e-12)


def test_the_order_of_parameters():
    """That of the published networks: an optimizer's checkpoint counts parameters."""
    for temporal, first in (("tsn", "eft"), ("tsm", "downsample")):
        keys = [
            key.split(".")[0]
            for key, _ in Bottleneck(8, 4, 1, nn.Conv2d(8, 16, 1), 3, "C", temporal).named_parameters()
        ]
        assert min(("eft", "downsample"), key=keys.index) == first


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_a_network_fused_and_by_the_reference(temporal):
    network = VideoNet(randomise(small("CinST", temporal)), 4, dropout=0, partial_bn=False).double()
    x = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    found = {}
    for backend in ("auto", "reference"):
        trained = copy.deepcopy(network)
        with aia_kernels.use_backend(backend):
            loss = trained(x).square().sum()
            loss.backward()
        found[backend] = {"loss": loss.detach()} | {name: p.grad for name, p in trained.named_parameters()}
    for name, value in found["reference"].items():
        torch.testing.assert_close(found["auto"][name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_network_in_one_graph():
    network = VideoNet(small("CinST2STinC", "tsm"), 4).eval()
    x = torch.randn(2, 3, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: small("CinTS"), ["unit: got 'CinTS'", "'CinST'", "'STinCplusCinST'", "None"]),
        (lambda: small(temporal="TSM"), ["temporal: got 'TSM'", "'tsn', 'tsm'"]),
        (lambda: AIAResNet(()), [r"layers: got \(\)"]),
        (lambda: small(["C", "ST"]), [r"unit: got \['C', 'ST'\]", "'CplusST'"]),
        (lambda: aia_resnet50(num_segments=0), ["num_segments: got 0, expected a whole number, at least 1"]),
        (lambda: aia_resnet101(temporal="tsm", fold_div=0), ["fold_div: got 0"]),
        (lambda: VideoNet(small(), 0), ["num_classes: got 0"]),
        (lambda: VideoNet(small(), 4, dropout=1), ["dropout: got 1"]),
        (lambda: VideoNet(VideoNet(small(), 4).base_model, 4), ["base_model: its classifier fc was replaced"]),
        (lambda: VideoNet(small(), 4)(torch.randn(2, 4, 3, 32, 32)), [r"x: got shape \(2, 4, 3, 32, 32\)", "T = 3"]),
        (lambda: VideoNet(small(), 4)(torch.randn(2, 6, 32, 32)), [r"x: got shape \(2, 6, 32, 32\)", "T = 3"]),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    for word in words:
        caught.match(word)


def test_scores_of_clips():
    """Both forms of input; the mean over segments; as many clips a sample as there are."""
    for dropout in (0, 0.5):
        network = VideoNet(small("C", "tsm"), 4, dropout=dropout).eval()
        x = torch.randn(2, 3, 3, 40, 32)
        frames = network.base_model(x.flatten(0, 1))
        expected = (frames if dropout == 0 else network.new_fc(frames)).view(2, 3, 4).mean(1)
        torch.testing.assert_close(network(x), expected)
        assert torch.equal(network(x.flatten(1, 2)), network(x))
        assert torch.equal(network(x.reshape(1, 18, 40, 32)), network(x))


def test_published_start():
    network = VideoNet(aia_resnet50(num_segments=3, unit="C"), 5)
    assert isinstance(network.base_model.fc, nn.Dropout) and network.base_model.fc.p == 0.5
    assert network.new_fc.weight.std() < 0.0015 and not network.new_fc.bias.any()
    assert "new_fc.weight" in network.state_dict() and "base_model.layer1.0.eft.C_conv.weight" in network.state_dict()
    weight = network.base_model.layer1[0].conv2.weight
    # kaiming_normal_ by fan_out: a variance of 2 / (64 * 9); 36,864 numbers give it to 1 %.
    assert abs(weight.var() * 64 * 9 / 2 - 1) < 0.05


def test_partial_bn():
    network = VideoNet(small("C", "tsm"), 4)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert [bn.training for bn in norms] == [bn.weight.requires_grad for bn in norms] == [True, False, False]
    assert all(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    network.eval().train()
    assert [bn.training for bn in norms] == [True, False, False]
    network.partial_bn(False)
    assert all(bn.training and bn.weight.requires_grad for bn in norms)
    network.eval()
    network.partial_bn()
    assert not any(bn.training for bn in norms)


def test_parameter_groups():
    network = VideoNet(small("CinST"), 4, partial_bn=False)
    groups = {group["name"]: group for group in network.parameter_groups(lr=0.5, weight_decay=0.1)}
    assert [len(group["params"]) for group in groups.values()] == [1, 0, 11 + 12 + 1, 1, 2 * (12 + 12), 0, 0, 0, 0, 0]
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters())
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings["normal_weight"] == (0.5, 0.1) and settings["normal_bias"] == (1.0, 0.0)
    assert settings["BN scale/shift"] == (0.5, 0.0) and settings["ef_weight"] == (1.0, 0.1)
    torch.optim.SGD(network.parameter_groups(), 0.1)
    assert "lr" not in network.parameter_groups()[0]


def test_other_parameter_groups():
    network = VideoNet(small("CinST"), 4, partial_bn=True, ef_lr5=True, fc_lr5=True)
    groups = {group["name"]: group for group in network.parameter_groups()}
    sizes = {name: len(group["params"]) for name, group in groups.items()}
    # With partial BN the norms are those of the stem and of the units.
    assert sizes == dict.fromkeys(sizes, 0) | {
        "first_conv_weight": 1,
        "normal_weight": 11,
        "BN scale/shift": 2 * (1 + 12),
        "ef_weight": 12,
        "lr5_weight": 1,
        "lr10_bias": 1,
    }
    assert [groups[name]["lr_mult"] for name in ("ef_weight", "lr5_weight", "lr10_bias")] == [2, 5, 10]


@pytest.mark.parametrize("held_as", ["state_dict", "model", "net"])
def test_checkpoint_of_data_parallel(tmp_path, held_as):
    trained, network = (randomise(VideoNet(small("STinC", "tsm"), 4), seed) for seed in (1, 2))
    path, parameters = tmp_path / "checkpoint.pth.tar", list(network.parameters())
    torch.save({"epoch": 3, "arch": "resnet50", held_as: nn.DataParallel(trained).state_dict()}, path)
    for target in (network, nn.DataParallel(randomise(network))):
        load_checkpoint(target, path)
        assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
        for key, value in trained.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)


def test_checkpoint_that_does_not_fit():
    network = VideoNet(small("C"), 4)
    before = copy.deepcopy(network.state_dict())
    state = {f"module.{key}": value + 1 for key, value in network.state_dict().items()}
    del state["module.base_model.layer1.0.eft.C_conv.weight"], state["module.new_fc.bias"]
    state |= {"module.new_fc.weight": torch.zeros(7, 64), "module.base_model.layer9.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(network, state)
    for word in (
        r"2 missing:\n  base_model\.layer1\.0\.eft\.C_conv\.weight\n  new_fc\.bias",
        r"1 extra:\n  base_model\.layer9\.weight",
        r"1 mis-shaped:\n  new_fc\.weight: got \(7, 64\), expected \(4, 64\)",
    ):
        caught.match(word)
    assert caught.value.extra == ["base_model.layer9.weight"] and caught.value.misshaped == ["new_fc.weight"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with pytest.raises(TypeError, match="holds no state dict; expected one, or one under 'state_dict', 'model', 'net'"):
        load_checkpoint(network, {"epoch": 3})
    with pytest.raises(TypeError, match="holds no state dict"):
        load_checkpoint(network, {0: torch.zeros(1)})
    with pytest.raises(TypeError, match="source: got NoneType, expected the path of a checkpoint or a dictionary"):
        load_checkpoint(network, None)


def test_imagenet_weights(tmp_path):
    path = tmp_path / "resnet.pth"
    imagenet = randomise(small())
    torch.save({k: v for k, v in imagenet.state_dict().items() if "num_batches" not in k}, path)
    network = small("CinST", "tsm")
    rest = load_imagenet(network, path)
    assert rest and all("eft" in key or key.endswith("num_batches_tracked") for key in rest)
    for key, value in imagenet.state_dict().items():
        assert key in rest or torch.equal(network.state_dict()[key], value)
    video = VideoNet(small("CinST"), 7)
    assert {"new_fc.weight", "new_fc.bias"} <= set(load_imagenet(video, path))
    assert torch.equal(video.base_model.layer2[1].conv2.weight, imagenet.layer2[1].conv2.weight)
    other = AIAResNet((1, 2), num_classes=9, width=8)
    assert {"fc.weight", "fc.bias"} <= set(load_imagenet(other, path))
    with pytest.raises(CheckpointError, match=r"layer2\.1\.conv1\.weight"):
        load_imagenet(AIAResNet((1, 1), width=8), path)


def test_imports():
    """The package imports no network before one is used, and a network needs torch alone."""
    code = """
import sys
import aia_kernels
models = aia_kernels.models
assert not [m for m in sys.modules if m.startswith("aia_kernels.models.")]
assert models.eanet.EANet is models.EANet
assert "aia_kernels.models.resnet" not in sys.modules
models.VideoNet(models.AIAResNet((1,), width=8), 2)
assert "VideoNet" in dir(models) and not {"torchvision", "matplotlib", "triton"} & set(sys.modules)
try:
    models.aia_resnet5
except AttributeError as error:
    assert "aia_resnet50" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_benchmark(tmp_path, capsys):
    """Wrong numbers would be an exit status; both modes, all forms and all parts come out."""
    pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
    from benchmarks import network, records

    for more in ([], ["--whole", "--temporal", "tsm", "--unit", "CplusST"]):
        assert network.main(["--quick", "--device", "cpu", "--results", str(tmp_path), *more]) == 0
        assert capsys.readouterr().err == "", "progress is for terminals"
    rows = records.read(records.path(tmp_path, "network"))
    parts = ["network", "stem", "layer1", "layer2", "head"]
    assert len(rows) == 2 * 3 * (len(parts) + 1)
    assert [row["stage"] for row in records.select(rows, mode="step", provider="published")] == [*parts, "network"]
    fused = [row for row in rows if row["provider"] not in ("plain", "published")]
    assert all(row["correct"] == "yes" and float(row["speedup"]) > 0 for row in fused)


def test_a_form_that_cannot_be_timed_is_told_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
    from benchmarks import network, records

    made = network.training_step

    def broken(module, x, grad_y):
        def raises():
            raise RuntimeError("out of memory")

        is_published = any(isinstance(part, published.CinST) for part in module.modules())
        return raises if is_published else made(module, x, grad_y)

    monkeypatch.setattr(network, "training_step", broken)
    assert network.main(["--quick", "--whole", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "published cannot be timed: RuntimeError: out of memory" in capsys.readouterr().err
    with records.path(tmp_path, "network").open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["mode"] == "step"]
    assert [(row["provider"], bool(row["median_ms"]), bool(row["error"])) for row in rows] == [
        ("plain", True, False),
        ("published", False, True),
        (aia_kernels.backends.select("cpu", torch.float32, "attention_in_attention"), True, False),
    ]


def test_the_published_form():
    """The baseline of the benchmark computes the same, by the published flow."""
    from benchmarks import network

    slow, fast = (network.build(form, "CinST", "tsm", 3, (1, 1)).double().eval() for form in ("published", "fused"))
    assert isinstance(slow.layer1[0].shift, published_shift.TemporalShift)
    assert isinstance(slow.layer2[0].eft, published.CinST)
    x = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(slow(x), fast(x), rtol=1e-10, atol=1e-10)


def test_the_example(tmp_path):
    pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
    picture = tmp_path / "video.png"
    command = [sys.executable, ROOT / "examples" / "video_classification.py", "--quick", "--output", picture]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 10_000
    assert done.stdout.count("unseen clips right") == 8 and "TSM + CinST" in done.stdout
    # Two classes with the same frames: without a unit or a shift every pair gets one right answer.
    assert "fused: 50.0% of 8" in done.stdout.split("TSN + CinST")[0]


class Runs:
    """Unpickled, it writes a file: what a malicious checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


#: The module in which this numpy has what makes its numbers anew.
OF_NUMPY = np.float64(0).__reduce__()[0].__module__
BESIDE = {
    "arguments": ({"args": argparse.Namespace(lr=0.1)}, ["argparse.Namespace"]),
    "a number of numpy": ({"best": np.float64(71.5)}, [f"{OF_NUMPY}.scalar", "numpy.dtype"]),
    "an array of numpy": (
        {"curve": np.arange(3, dtype=np.float32)},
        [f"{OF_NUMPY}._reconstruct", "numpy.dtype", "numpy.ndarray"],
    ),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("name", BESIDE)
def test_checkpoint_with_more_than_weights(name, zipped, tmp_path):
    """What trainers write beside the weights is refused by name, and loaded where it is allowed by name."""
    beside, refused = BESIDE[name]
    network, path = nn.Linear(2, 3), tmp_path / "checkpoint.pt"
    torch.save({"state_dict": network.state_dict()} | beside, path, _use_new_zipfile_serialization=zipped)
    target, allowed = nn.Linear(2, 3), []
    while len(allowed) < len(refused):  # an old file tells one after the other
        with pytest.raises(pickle.UnpicklingError, match=r"holds, beside tensors, .* pass allowed=\[") as raised:
            load_checkpoint(target, path, allowed)
        told = ast.literal_eval(str(raised.value).partition("allowed=")[2])
        assert set(told) <= set(refused) - set(allowed) and (told == refused or not zipped)
        allowed += told
    load_checkpoint(target, path, allowed)
    assert torch.equal(target.weight, network.weight)


def test_checkpoint_that_would_run_something(tmp_path):
    path, written = tmp_path / "checkpoint.pt", tmp_path / "written"
    torch.save({"state_dict": {}, "more": Runs(written)}, path)
    with pytest.raises(pickle.UnpicklingError, match=r"beside tensors, .*Path"):
        load_checkpoint(nn.Identity(), path)
    assert not written.exists()


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda path: path.write_text("no checkpoint"), pickle.UnpicklingError),
        (lambda path: path.mkdir(), IsADirectoryError),
        (lambda path: None, FileNotFoundError),
    ],
    ids=["text", "a directory", "nothing"],
)
def test_no_checkpoint(make, error, tmp_path):
    path = tmp_path / "checkpoint.pt"
    make(path)
    with pytest.raises(error, match=r"checkpoint\.pt"):
        load_checkpoint(nn.Identity(), path)


def test_what_is_allowed_has_a_name(tmp_path):
    torch.save({}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"allowed: got 'argparse\.Nothing', expected the name of a class"):
        load_checkpoint(nn.Identity(), tmp_path / "checkpoint.pt", ["argparse.Nothing"])
