"""The map of ratios: its space, a row for each cell and mode, and the picture."""

import csv

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
pytest.importorskip("matplotlib", reason="the benchmarks draw their rows with matplotlib")

from benchmarks import ratios


def test_the_space_has_every_layer_and_the_sizes_at_its_ends():
    found = list(ratios.cells())
    assert {cell.layer for cell in found} >= {"ExternalAttention", "ExternalAttention2d", "MultiHeadExternalAttention"}
    assert {cell.layer for cell in found} >= {"C", "ST", "CinST", "STinC", "STinC2", "CBAM"}
    of_maps = {"PositionLinearAttention", "ChannelLinearAttention", "EfficientAttention"}
    assert {(cell.layer, cell.sizes) for cell in found} >= {
        (name, s) for name in of_maps for s in ("1 x 4x4", "1 x 128x128")
    }
    plain = {(cell.settings, cell.sizes) for cell in found if cell.layer == "ExternalAttention"}
    assert {("16, 1", "1 x 1"), ("16, 1", "1 x 1000000"), ("1024, 512", "64 x 49")} <= plain
    assert all(cell.case.x_bytes <= ratios.MOST_BYTES for cell in found)


def test_rows_and_picture(tmp_path, monkeypatch):
    names = "ExternalAttention", "CinST", "CBAM", "EfficientAttention"
    small = [next(c for c in ratios.cells() if c.layer == layer) for layer in names]
    monkeypatch.setattr(ratios, "cells", lambda: iter(small))
    monkeypatch.setattr(ratios, "ROUNDS", 2)
    assert ratios.main(["--results", str(tmp_path)]) == 0
    with (tmp_path / "ratios.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["layer"], row["mode"]) for row in rows] == [(c.layer, m) for c in small for m in ("eval", "step")]
    for row in rows:
        published, fused = float(row["published_ms"]), float(row["fused_ms"])
        ratio, half_a_digit = published / fused, 5e-5  # times have four places, and ratios two
        rounding = 0.005 + ratio * half_a_digit * (1 / published + 1 / (fused - half_a_digit))
        assert abs(ratio - float(row["ratio"])) <= rounding and float(row["low"]) <= float(row["high"])
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_other_rows_stand_in_files_of_their_own(tmp_path, monkeypatch):
    one = next(c for c in ratios.cells() if c.layer == "ExternalAttention2d")
    monkeypatch.setattr(ratios, "cells", lambda: iter([one]))
    monkeypatch.setattr(ratios, "ROUNDS", 2)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: layer)  # takes half a minute
    options = ["--compiled", "--dtype", "bf16", "--layout", "channels_last"]
    assert ratios.main([*options, "--results", str(tmp_path)]) == 0
    with (tmp_path / "ratios_compiled_bf16_channels_last.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert {(row["flow"], row["dtype"], row["layout"]) for row in rows} == {("compiled", "bf16", "channels_last")}
    assert (tmp_path / "ratios_compiled_bf16_channels_last.png").stat().st_size > 1000
