"""The benchmarks: the baseline is the published flow, wrong numbers get no time, the demo's pieces do what they say."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import clip, demo, measure, passes, plot, published, registry, run

GOLDEN = Path(__file__).parent / "golden"
AIA = sorted(path.stem for path in GOLDEN.glob("aia_*.npz"))
TINY = registry.Case("CinST", "5x6x4", 2, "fp32", "contiguous", (5, 6, 4), segments=3)


def test_the_stored_vectors_are_there():
    assert AIA


@pytest.mark.parametrize("name", AIA)
def test_published_equals_the_stored_vectors(name):
    _, kind, segments, *_ = name.split("_")
    stored = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    unit = published.UNITS[kind](int(segments[1:]), use_BN="nobn" not in name).double().train("train" in name)
    unit.load_state_dict({key[6:]: value for key, value in stored.items() if key.startswith("state.")})
    x = stored["x"].requires_grad_()
    y = unit(x)
    y.backward(stored["grad_y"])
    found = {"y": y.detach(), "grad_x": x.grad}
    found |= {f"grad.{key}": p.grad for key, p in unit.named_parameters()}
    found |= {f"after.{key}": buffer for key, buffer in unit.named_buffers()}
    for key, value in found.items():
        # Both sides are float64: 1e-9 leaves room for sums of some thousand terms in another order.
        torch.testing.assert_close(value, stored[key], rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("unit", registry.UNITS)
def test_published_takes_every_layout(unit):
    case = registry.Case(unit, "5x6x4", 2, "fp32", "contiguous", (5, 6, 4), segments=3)
    module = published.UNITS[unit](num_segments=3).eval()
    plain = module(case.make_input()).detach()
    for layout in ("channels_last", "5d"):
        y = module(registry.Case(unit, "5x6x4", 2, "fp32", layout, (5, 6, 4), segments=3).make_input()).detach()
        y = y.transpose(1, 2).flatten(0, 1) if layout == "5d" else y
        # The same operations on other strides: only the order of a mean's sum may differ.
        torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)


def test_registry_bytes():
    case = registry.Case("CinST", "64x56x56", 8, "fp32", "contiguous", registry.STAGES["64x56x56"])
    assert case.x_bytes == 64 * 64 * 56 * 56 * 4 == case.make_input().nbytes
    assert case.budget_bytes("eval") == 4 * case.x_bytes
    assert case.budget_bytes("step") == 9 * case.x_bytes
    assert (registry.traffic("C", "eval"), registry.traffic("ST", "step")) == (3, 7)
    # A unit's budget is the sum of its passes': CinST pools twice, recalibrates, and so on.
    steps = ("pool", "pool", "recalibrate", "recalibrate_reduce", "unpool_reduce", "unpool")
    assert sum(sum(registry.PASS_TRAFFIC[step]) for step in steps) == registry.traffic("CinST", "step")


def test_registry_holds_every_combination_and_begins_with_the_main_input():
    cases = registry.cases()
    assert len(cases) == len(set(cases)) == 5 * 4 * 2 * 2 * 3
    assert all((c.clips, c.dtype, c.layout) == (8, "fp32", "contiguous") for c in cases[:20])


def test_a_run_writes_rows_and_the_plots_read_them(tmp_path):
    assert run.main(["--quick", "--filter", "STinC-", "--results", str(tmp_path)]) == 0
    with (tmp_path / "units.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == run.COLUMNS
    assert {"copy", "clone", "published", "reference"} <= {row["provider"] for row in rows}
    assert {row["mode"] for row in rows} == {"eval", "step"}
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert row["provider"] in ("copy", "clone") or (row["correct"] == "yes" and float(row["speedup"]) > 0)
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    assert plot.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "speedup.png").stat().st_size > 0


def test_the_newest_row_of_a_key_is_drawn(tmp_path):
    case = run.row(TINY, "eval", "cpu", {"device": "cpu"})
    run.write(tmp_path / "units.csv", [case | {"median_ms": "2"}])
    run.write(tmp_path / "units.csv", [case | {"median_ms": "1"}])
    assert [row["median_ms"] for row in plot.read(tmp_path / "units.csv")] == ["1"]


class Wrong(published.CinST):
    """Right in the forward; its gradient misses the path through the gates."""

    def flow(self, x):
        c = self.gate("C", published.pool(x.detach(), 2).permute(0, 2, 1, 3, 4).contiguous())
        c = c.permute(0, 2, 1, 3, 4)
        t, h, w = self.spacetime(lambda: x.detach() * c)
        return x * (t + h + w) / 3


class NotFinite(published.CinST):
    def flow(self, x):
        return super().flow(x) + float("nan")


@pytest.mark.parametrize("unit", [Wrong, NotFinite])
def test_wrong_numbers_get_neither_time_nor_speedup(unit, capsys):
    provider = run.Provider("wrong", lambda name, segments: unit(segments))
    candidates = [*run.providers("cpu"), provider]
    rows = run.measure_case(TINY, candidates, "cpu", rounds=1, seconds=0, where={})
    (row,) = (row for row in rows if row["provider"] == "wrong")
    assert row["correct"] == "no" and row["median_ms"] == "" and row["speedup"] == ""
    assert "wrong is wrong and is not timed" in capsys.readouterr().err
    assert {"published", "reference"} <= {row["provider"] for row in rows if row["correct"] == "yes"}


def test_kept_bytes_counts_storages_once():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    assert measure.kept_bytes(Square(), torch.ones(10)) == 40


def test_errors_take_near_ties_out_of_large_gradients_only():
    truth = {"y": torch.ones(4), "grad x": torch.ones(1_000_000)}
    found = {"y": truth["y"], "grad x": truth["grad x"].clone()}
    found["grad x"][:2000] = 1.5
    assert measure.errors(found, truth)["grad x"] == 0
    assert measure.errors(found, truth)["grad x, all"] == 0.5
    found["grad x"][2000] = 1.5
    assert measure.errors(found, truth)["grad x"] == 0.5
    assert measure.near_ties(999_999) == 0


@pytest.mark.skipif(run.aia_kernels.available_backends()["cpu"] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("layout", registry.LAYOUTS)
def test_every_pass_is_called_with_arguments_that_it_takes(layout):
    case = registry.Case("CinST", "5x6x4", 2, "fp32", layout, (5, 6, 4), segments=3)
    x = case.make_input()
    calls = passes.calls("cpu", x, run.grad_like(x), case.segments)
    assert {name.split()[0] for name in calls} == set(registry.PASS_TRAFFIC)
    for name, call in calls.items():
        result = call()
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.double().isfinite().all(), name


class TestDemo:
    def test_the_clip_gives_feature_maps_of_every_stage(self):
        pytest.importorskip("av", reason="decoding needs PyAV")
        frames = clip.decode(clip.CLIP)
        assert frames.dtype == torch.uint8 and frames.shape == (66, 3, 256, 341)
        images = clip.sample_clips(frames, clips=1, segments=2)
        assert images.shape == (2, 3, 224, 224)
        maps = clip.features(images)
        assert {stage: tuple(x.shape[1:]) for stage, x in maps.items()} == registry.STAGES
        assert all(x.isfinite().all() for x in maps.values())

    def test_clips_differ_and_are_repeatable(self):
        frames = torch.randint(0, 256, (9, 3, 256, 300), dtype=torch.uint8)
        images = clip.sample_clips(frames, clips=2, segments=3)
        assert torch.equal(images, clip.sample_clips(frames, clips=2, segments=3))
        assert (images[:3] - images[3:]).abs().mean() > 0.1

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [("missing.mp4", None, "no such file"), ("text.mp4", b"not a video at all", "cannot be decoded as video")],
    )
    def test_unusable_videos_are_named(self, tmp_path, capsys, name, content, message):
        pytest.importorskip("av", reason="decoding needs PyAV")
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert demo.main(["--video", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error and message in error

    def test_short_videos_are_refused(self):
        pytest.importorskip("av", reason="decoding needs PyAV")
        with pytest.raises(clip.VideoError, match="has 66 frames; at least 67 are needed"):
            clip.decode(clip.CLIP, least=67)

    def test_a_row_of_the_table(self):
        x = registry.Case("ST", "5x6x4", 1, "fp32", "contiguous", (5, 6, 4)).make_input()
        found = demo.compare("ST", "5x6x4", x, rounds=1, seconds=0)
        assert found["kept fused"] > 0 and found["kept published"] > x.nbytes
        assert found["y fused"] < 1e-5 and found["grads fused"] < 1e-4  # float32 on sums of some hundred terms
        found |= {"step published": 0.25, "step fused": 0.0125, "kept fused": 1.25e6}
        line = demo.line(found)
        assert "  250.0   12.50  20.0x" in line and line.endswith("1.2")
        assert len(line) == len(demo.HEADER.splitlines()[1])
        assert demo.right(found) and not demo.right(found | {"y fused": 0.1})
        assert demo.line(found | {"grads fused": float("inf")}).count("wrong") == 2

    def test_the_gate_map_of_a_channel_gate_is_the_gate(self):
        unit = published.C()
        x = registry.Case("C", "5x6x4", 2, "fp32", "contiguous", (5, 6, 4)).make_input()
        clips = x.view(2, 8, 5, 6, 4)
        with torch.no_grad():
            gate = unit.gate("C", published.pool(clips, 2).permute(0, 2, 1, 3, 4))[0, 0]
        # Two divisions and a sum of five products in float64, of values rounded to float32.
        torch.testing.assert_close(demo.gate_map(unit, x).float(), gate, rtol=1e-5, atol=1e-5)

    def test_the_picture_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
        demo.draw(torch.rand(2, 3, 32, 32), {"gate": torch.rand(2, 8, 8)}, tmp_path / "demo.png")
        assert (tmp_path / "demo.png").stat().st_size > 0
