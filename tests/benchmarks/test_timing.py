"""Samples, the roof, and the table by which ``auto`` chooses."""

from __future__ import annotations

import contextlib
import csv
import time

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from aia_kernels import backends
from aia_kernels.backends import choices as table
from benchmarks import bandwidth, choices, providers, records, registry, run, timing
from benchmarks.registry.attention_in_attention import UnitCase

TINY = UnitCase("CinST", "5x6x4", 2, "fp32", "contiguous", (5, 6, 4), segments=3)


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.setenv("AIA_KERNELS_REHEARSAL", "1")


class TestInterleave:
    def test_every_input_set_is_called_in_turn(self):
        met = []
        runs = {"run": ([lambda i=i: met.append(i) for i in range(3)], contextlib.nullcontext)}
        found = timing.interleave(runs, rounds=2, seconds=60, device="cpu")["run"]
        assert len(found.seconds) == 2 and found.timed == "calls" and found.wall == []
        assert met[:6] == [0, 1, 2, 0, 1, 2]

    def test_a_rehearsal_rotates_inputs_and_samples_wall_times(self, rehearsal):
        inputs = run.rotating_inputs(TINY, "cpu")
        assert len(inputs) == 2
        assert torch.equal(inputs[0][0], inputs[1][0]) and inputs[0][0].data_ptr() != inputs[1][0].data_ptr()
        rows = list(run.measure_case(TINY, providers.of_family("cpu", TINY.family)[:1], "cpu", 1, 0, {}))
        assert {row["provider"] for row in rows} == {"copy", "clone", "published"}
        assert all(float(row["wall_ms"]) > 0 and row["timed"] == "calls" for row in rows)

    def test_outside_of_one_the_cpu_has_one_input(self):
        assert len(run.rotating_inputs(TINY, "cpu")) == 1

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a CUDA device")
    def test_a_graph_is_replayed_on_a_device(self):
        x = torch.zeros(1 << 20, device="cuda")
        runs = {"add": ([lambda: x.add_(1)] * 4, contextlib.nullcontext)}
        found = timing.interleave(runs, rounds=2, seconds=60, device="cuda")["add"]
        assert found.timed == "graph" and len(found.wall) == 2
        assert found.median > 0 and x[0] > 8

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a CUDA device")
    def test_what_cannot_be_captured_has_its_wall_time(self, capsys):
        x = torch.ones(4, device="cuda")
        found = timing.interleave({"item": (lambda: x.sum().item(), contextlib.nullcontext)}, 1, 60, "cuda")["item"]
        assert found.timed == "calls" and found.median > 0
        assert "cannot be captured" in capsys.readouterr().err


def test_compiled_competitors(rehearsal, monkeypatch):
    assert [provider.name for provider in providers.compiled("cuda")] == ["compile", "compile-max"]
    assert [provider.name for provider in providers.compiled("cpu")] == ["compile", "compile-max"]
    monkeypatch.delenv("AIA_KERNELS_REHEARSAL")
    assert [provider.name for provider in providers.compiled("cpu")] == ["compile"]


def test_rows_of_other_columns_are_kept(tmp_path):
    path = tmp_path / "layers.csv"
    path.write_text("kind,name,gone,device,median_ms\nunit,C,1,cpu,2\n")
    records.write(path, [run.row(TINY, "eval", "cpu", {"device": "cpu"}) | {"median_ms": "3"}])
    records.write(path, [run.row(TINY, "step", "cpu", {"device": "cpu"}) | {"median_ms": "4"}])
    with path.open(newline="") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    assert reader.fieldnames == records.COLUMNS
    assert [(row["name"], row["mode"], row["median_ms"]) for row in rows] == [
        ("C", "", "2"),
        ("CinST", "eval", "3"),
        ("CinST", "step", "4"),
    ]


def test_a_rehearsals_rows_stay_out_of_the_results(rehearsal, tmp_path):
    with pytest.raises(SystemExit, match="does not write to"):
        records.write(records.RESULTS / "network" / "layers.csv", [])
    records.write(tmp_path / "layers.csv", [])
    assert run.measure.device_name("cpu") == records.REHEARSAL


class TestRoof:
    def test_the_best_of_each_kernel_becomes_the_roof_of_its_device(self, tmp_path, capsys):
        assert bandwidth.main(["--device", "cpu", "--quick", "--rounds", "1", "--results", str(tmp_path)]) == 0
        assert "read: " in (text := capsys.readouterr().out) and "copy: " in text
        with (tmp_path / "roof.csv").open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        assert list(rows[0]) == bandwidth.COLUMNS and [row["kernel"] for row in rows] == ["read", "copy"]
        faster = rows[0] | {"device": "NVIDIA H200", "tb_per_s": "4.4"}
        wrong = faster | {"tb_per_s": "9", "correct": "no"}
        copy = rows[1] | {"device": "NVIDIA H200", "tb_per_s": "4.2"}
        with (tmp_path / "roof.csv").open("a", newline="") as opened:
            csv.DictWriter(opened, bandwidth.COLUMNS).writerows([faster | {"tb_per_s": "4.0"}, faster, wrong, copy])
        machine = bandwidth.machine("NVIDIA H200", tmp_path / "none", tmp_path)
        assert machine.measured and (machine.read, machine.copy) == (4.4e12, 4.2e12)
        assert not bandwidth.machine("NVIDIA A100-SXM4-80GB", tmp_path).measured
        assert bandwidth.machine("cpu", tmp_path) is None

    def test_the_kernels_move_what_they_say(self):
        pytest.importorskip("triton", reason="they are Triton's")
        from benchmarks.bandwidth_kernels import copy_kernel, read_kernel

        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.randn(5000, device=device)
        y, sums = torch.full_like(x, torch.nan), torch.full((3,), torch.nan, device=device)
        copy_kernel[(3,)](x, y, x.numel(), BLOCK=1024, STEPS=2)
        read_kernel[(3,)](x, sums, x.numel(), BLOCK=1024, STEPS=2)
        assert torch.equal(x, y)
        torch.testing.assert_close(sums.sum(), x.sum(), rtol=1e-4, atol=1e-4)


def rows_of(times: dict[str, dict[str, float]], dtype: str = "bf16") -> list[dict]:
    """Rows of layers on a GPU: provider -> stage -> milliseconds."""
    made = []
    for provider, by_stage in times.items():
        for stage, ms in by_stage.items():
            case = UnitCase("CinST", stage, 8, dtype, "contiguous", (5, 6, 4))
            made.append(run.row(case, "eval", provider, {"device": "NVIDIA H200", "commit": "c", "date": "d"}))
            made[-1] |= {"median_ms": str(ms), "correct": "yes"}
    return made


class TestChoices:
    def test_the_backend_with_the_least_mean_time_comes_first(self):
        rows = rows_of({"triton": {"a": 1.0, "b": 1.0}, "cuda": {"a": 0.5, "b": 1.5}, "published": {"a": 9, "b": 9}})
        (decided,) = choices.decide("attention_in_attention", rows)
        assert (decided["order"], decided["dtype"], decided["cases"]) == ("cuda triton", "bfloat16", 2)
        # cuda: 1 and 1.5 of the best, triton 2 and 1; what the order costs is cuda's half more in case b.
        assert decided["times"] == "1.225 1.414" and decided["worst"] == "1.500"

    def test_a_case_that_one_of_them_lacks_decides_nothing(self):
        rows = rows_of({"triton": {"a": 1.0, "b": 0.1}, "cuda": {"a": 0.5}})
        (decided,) = choices.decide("attention_in_attention", rows)
        assert decided["order"] == "cuda triton" and decided["cases"] == 1
        assert choices.decide("attention_in_attention", rows_of({"triton": {"a": 1.0}})) == []

    def test_the_table_is_written_and_newer_rows_take_the_place_of_older(self, tmp_path, capsys):
        path = tmp_path / "choices.csv"
        for cuda, order in ((0.5, "cuda triton"), (2.0, "triton cuda")):
            layers = records.path(tmp_path, "attention_in_attention")
            records.write(layers, rows_of({"triton": {"a": 1.0}, "cuda": {"a": cuda}}))
            assert choices.main(["--results", str(tmp_path), "--output", str(path)]) == 0
            (row,) = table.read(path)
            assert list(row) == table.COLUMNS and row["order"] == order
        assert "triton cuda" in capsys.readouterr().out

    def test_auto_takes_what_was_measured_on_this_device(self, tmp_path, monkeypatch):
        path = tmp_path / "choices.csv"
        with path.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, table.COLUMNS)
            writer.writeheader()
            row = {"device": "NVIDIA H200", "family": "attention_in_attention", "dtype": "bfloat16"}
            writer.writerow(row | {"order": "cuda triton"})
        monkeypatch.setattr(table, "TABLE", path)
        monkeypatch.setattr(table, "read", lambda read=table.read: read(path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
        monkeypatch.setattr(backends, "why_not", lambda *_: None)
        monkeypatch.setattr(backends, "_interpreted", lambda: False)
        for cached in (table.measured_order, backends._resolve):
            cached.cache_clear()
        try:
            family, device = "attention_in_attention", torch.device("cuda", 0)
            assert backends._resolve("auto", device, torch.bfloat16, family) == "cuda"
            assert backends._resolve("auto", device, torch.float32, family) == backends.AUTO["cuda"][0]
            assert backends._resolve("auto", device, torch.bfloat16, "external_attention") == backends.AUTO["cuda"][0]
        finally:
            for cached in (table.measured_order, backends._resolve):
                cached.cache_clear()

    def test_the_table_that_is_installed_names_what_there_is(self):
        assert table.TABLE.is_file()
        for row in table.read():
            assert list(row) == table.COLUMNS and row["family"] in backends.FAMILIES
            assert set(row["order"].split()) <= set(backends.NAMES) and row["dtype"] in choices.TYPES.values()


def test_what_is_printed_beside_a_time():
    rows = [run.row(TINY, "eval", "copy", {}), run.row(TINY, "eval", "cpu", {}) | {"median_ms": "1.0", "launches": 24}]
    header, _, line = run.table.beside(rows)
    assert header.endswith("| provider | ms | launches |") and line.endswith("| cpu | 1.0 | 24 |")
    assert run.table.beside(rows[:1]) == []


def test_large_batches_are_for_a_gpu():
    for device, most in (("cpu", 8), ("cuda", 32)):
        options = run.parse(["--device", device])
        assert max(case.clips for case in run.chosen_cases(options)) == most
    assert set(registry.main_clips("attention_in_attention").values()) == {8}


def test_processor_time_leaves_out_what_others_take(monkeypatch, tmp_path):
    """Here the sleep of a call."""
    for name in ("timed", "clock"):
        monkeypatch.setattr(timing.Processor, name, timing.Processor.__dict__[name])
    sleeping = {"sleeping": (lambda: time.sleep(0.01), contextlib.nullcontext)}
    assert timing.interleave(sleeping, 1, 0, "cpu")["sleeping"].median >= 0.01
    arguments = ["--quick", "--device", "cpu", "--compile", "off", "--family", "cbam", "--processor-time"]
    assert run.main([*arguments, "--results", str(tmp_path)]) == 0
    found = timing.interleave(sleeping, 1, 0, "cpu")["sleeping"]
    assert found.median < 0.01 and found.timed == "processor"
    rows = records.read(records.path(tmp_path, "cbam"))
    assert {row["timed"] for row in rows} == {"processor"}
