"""The page that says what the parts of ``make gpu`` found: what went wrong, and every time beside its prediction."""

from __future__ import annotations

import pytest

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import records, run, smoke, summary, told
from benchmarks.registry.attention_in_attention import UnitCase

CASE = UnitCase("CinST", "64x56x56", 8, "bf16", "contiguous", (64, 56, 56))
TIMED = {"median_ms": "0.1500", "predicted_ms": "0.1000", "of_roof": "0.640", "wall_ms": "0.31", "timed": "graph"}


def row(provider: str, mode: str = "step", device: str = "NVIDIA H200", **columns) -> dict:
    return run.row(CASE, mode, provider, {"device": device}) | columns


@pytest.fixture
def page(tmp_path, capsys):
    """The lines of the page of rows."""

    def lines(*rows: dict, part: str = "bench") -> list[str]:
        if rows:
            records.write(records.path(tmp_path, CASE.family), list(rows))
        assert summary.main(["--results", str(tmp_path), "--part", part]) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def test_a_time_stands_beside_its_prediction_and_what_went_wrong_comes_first(page):
    found = page(
        row("published", median_ms="1.2"),
        row("cuda", **TIMED, speedup="8.00", correct="yes"),
        row("triton", mode="", error="check: RuntimeError: boom"),
        row("reference", mode="", correct="no", max_error="1e-1"),
    )
    assert found[1] == "attention_in_attention, layers: 1 rows, 2 went wrong, 1 of others; on NVIDIA H200"
    case = "CinST 64x56x56 8 bf16 contiguous"
    assert found[2:4] == [f"  check: RuntimeError: boom: {case}  triton", f"  wrong, error 1e-1: {case}  reference"]
    assert found[5].split() == ["0.1500", "0.1000", "1.50", "0.640", "0.31", "8.00", *case.split(), "step", "cuda"]
    assert "no graph" in page(row("cuda", **TIMED | {"timed": "calls"}))[-1]


def test_an_error_goes_when_a_later_run_has_a_time_and_stays_when_it_comes_after(page):
    error = row("cuda", mode="", error="build: KeyError: 1")
    assert not any("KeyError" in line for line in page(error, row("cuda", **TIMED)))
    assert any("KeyError" in line for line in page(error))
    assert "1 rows, 0 went wrong, 0 of others; on another" in page(row("cuda", device="another", **TIMED))[1]


def test_every_part_has_its_page(page, tmp_path):
    assert page(part="smoke") == [f"nothing of smoke in {tmp_path}"]
    (tmp_path / "smoke.csv").write_text(",".join(smoke.COLUMNS) + "\n")
    smoke.note(tmp_path / "smoke.csv", smoke.Subject("cuda", "attention_in_attention", "CinST"), "graph")
    assert any("CinST, graph: was running" in line for line in page(part="smoke"))
    teller = told.Teller(tmp_path / "memcheck.txt", 1)
    teller.tell("tests/test_a.py::test_b", told.BEGUN)
    assert page(part="check")[1:] == [
        "memcheck: 0 passed, 0 failed, 0 skipped, 1 was running, 0 never began",
        "  was running: test_a.py::test_b",
    ]
    (tmp_path / "roof.csv").write_text(",".join(summary.bandwidth.COLUMNS) + "\nread,,,,,,,,4.3,yes,NVIDIA H200\n")
    assert page()[1] == "roof, read: 4.3 TB/s on NVIDIA H200"
    assert set(summary.PAGES) == set(summary.PARTS) and len(page(part="all")) > 10


def test_a_rehearsal_says_so_on_every_line(page, monkeypatch):
    monkeypatch.setenv("AIA_KERNELS_REHEARSAL", "1")
    assert all(line.startswith("REHEARSAL on the CPU: ") for line in page(row("cuda", **TIMED)) if line)
