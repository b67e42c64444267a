"""The demo: its pieces do what they say, and its pictures are drawn."""

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
pytest.importorskip("matplotlib", reason="the benchmarks draw their rows with matplotlib")

from benchmarks import clip
from benchmarks.demo import __main__ as demo
from benchmarks.demo import attention_in_attention as gates
from benchmarks.demo import cbam as maps
from benchmarks.demo import external_attention as slots
from benchmarks.demo import neighbours
from benchmarks.demo import table as demo_table
from benchmarks.published import attention_in_attention as published
from benchmarks.registry.attention_in_attention import STAGES, UnitCase

FAMILIES = "attention_in_attention", "external_attention", "cbam"


class TestDemo:
    def test_the_clip_gives_feature_maps_of_every_stage(self):
        pytest.importorskip("av", reason="decoding needs PyAV")
        frames = clip.decode(clip.CLIP)
        assert frames.dtype == torch.uint8 and frames.shape == (66, 3, 256, 341)
        images = clip.sample_clips(frames, clips=1, segments=2)
        assert images.shape == (2, 3, 224, 224)
        maps = clip.features(images)
        assert {stage: tuple(x.shape[1:]) for stage, x in maps.items()} == STAGES
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

    @pytest.mark.parametrize("right", [True, False])
    def test_the_network_runs_on_the_first_clip(self, tmp_path, monkeypatch, capsys, right):
        """Its numbers are a part of what the demo answers for."""
        pytest.importorskip("av", reason="decoding needs PyAV")
        pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
        seen = []
        monkeypatch.setattr(demo.network, "report", lambda images, **settings: seen.append(images) or right)
        for family in demo.FAMILIES:
            monkeypatch.setattr(family, "rows", lambda stages: [])
        status = demo.main(["--output", str(tmp_path / "demo.png"), "--clips", "2"])
        assert status == (0 if right else 1)
        first = clip.sample_clips(clip.decode(clip.CLIP), clips=2)[:8]
        assert torch.equal(seen[0].cpu(), torch.nn.functional.avg_pool2d(first, 2))
        told = capsys.readouterr()
        assert "demo-slots.png" in told.out
        assert told.err == "", "progress is for terminals"

    def test_a_row_of_each_neighbour(self):
        """At its size in the demo, for its errors; the times are the machine's."""
        stages = {
            name: torch.randn(8, *sizes, generator=torch.Generator().manual_seed(0)) for name, sizes in STAGES.items()
        }
        rows = neighbours.rows(stages)
        assert [row.name for row in rows] == ["linear", "efficient", "CATT", "CaaM", "halo"]
        for row in rows:
            layers = row.pair("cpu")
            published, fused = (layer.double()(row.x.double()) for layer in layers.values())
            torch.testing.assert_close(fused, published, rtol=1e-9, atol=1e-9)  # float64 sums in another order
            assert row.grad_y.shape == fused.shape

    def test_short_videos_are_refused(self):
        pytest.importorskip("av", reason="decoding needs PyAV")
        with pytest.raises(clip.VideoError, match="has 66 frames; at least 67 are needed"):
            clip.decode(clip.CLIP, least=67)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_row_of_the_table(self, family):
        stages = {
            name: torch.randn(8, *sizes, generator=torch.Generator().manual_seed(0)) for name, sizes in STAGES.items()
        }
        if family == "external_attention":
            row = slots.rows(stages)[1]
        elif family == "cbam":
            row = maps.rows({"32x6x4": torch.randn(8, 32, 6, 4, generator=torch.Generator().manual_seed(0))})[0]
        else:
            x = UnitCase("ST", "5x6x4", 1, "fp32", "contiguous", (5, 6, 4)).make_input()
            row = gates.rows({"5x6x4": x})[list(published.UNITS).index("ST")]
        found = demo_table.compare(row, rounds=1, seconds=0)
        assert found["kept fused"] > 0 and found["kept published"] > row.x.nbytes
        assert found["y fused"] < 1e-5 and found["grads fused"] < 1e-4  # float32 on sums of some hundred terms
        found |= {"step published": 0.25, "step fused": 0.0125, "kept fused": 1.25e6}
        line = demo_table.line(found)
        assert "  250.0   12.50  20.0x" in line and line.endswith("1.2")
        assert len(line) == len(demo_table.HEADER.splitlines()[1])
        assert demo_table.right(found) and not demo_table.right(found | {"y fused": 0.1})
        assert demo_table.line(found | {"grads fused": float("inf")}).count("wrong") == 2

    def test_a_layer_in_other_words_is_converted(self):
        layers = slots.converted(6, "cpu")
        own, fast = layers["published"], layers["fused"]
        assert type(own) is slots.InOtherWords and type(fast)._recipe.kind is slots.InOtherWords
        assert list(own.state_dict()) == list(fast.state_dict())
        x = torch.randn(2, 6, 5, 4)
        torch.testing.assert_close(fast(x), own(x), rtol=0, atol=1e-5)  # values of order one, through four products

    def test_the_gate_map_of_a_channel_gate_is_the_gate(self):
        unit = published.C()
        x = UnitCase("C", "5x6x4", 2, "fp32", "contiguous", (5, 6, 4)).make_input()
        clips = x.view(2, 8, 5, 6, 4)
        with torch.no_grad():
            gate = unit.gate("C", published.pool(clips, 2).permute(0, 2, 1, 3, 4))[0, 0]
        # Two divisions and a sum of five products in float64, of values rounded to float32.
        torch.testing.assert_close(gates.gate_map(unit, x).float(), gate, rtol=1e-5, atol=1e-5)

    def test_the_attention_map_is_that_of_the_block(self):
        """Of the block with prototypes: each slot is highest where the pixels are nearest to its prototype."""
        frame = torch.zeros(3, 32, 40)
        frame[0, :, :20], frame[2, :, 20:] = 0.9, 0.9
        x = slots.pixel_features(frame)
        centres = slots.prototypes(x, 2)
        block = slots.with_memories(centres)
        attention = slots.attention_map(block, x)
        # Every pixel divides one between the slots, up to eps and rounding.
        torch.testing.assert_close(attention.sum(0), torch.ones(32, 40), rtol=0, atol=1e-4)
        left, right = (attention[:, :, half].mean((1, 2)) for half in (slice(0, 16), slice(24, 40)))
        assert sorted((left > 0.9).tolist()) == [False, True] and torch.equal(left > 0.9, right < 0.1)
        assert not block.linear_1._forward_pre_hooks
        folded = block(x)
        z = torch.einsum("khw,kc->chw", attention, centres)
        torch.testing.assert_close(folded[0], (z / (1 + 1e-5) ** 0.5 + x[0]).relu(), rtol=1e-4, atol=1e-5)

    def test_the_pictures_are_drawn(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
        gates.draw_maps(torch.rand(2, 3, 32, 32), {"gate": torch.rand(2, 8, 8)}, tmp_path / "gates.png")
        slots.draw(torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8), "cpu", tmp_path / "slots.png")
        for name in ("gates.png", "slots.png"):
            assert (tmp_path / name).stat().st_size > 0
