"""The smoke screen of ``make gpu``: a cell that is wrong, dies or hangs is told, and those behind it run."""

from __future__ import annotations

import sys
import time

import pytest
import torch

import aia_kernels
from aia_kernels import backends

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import smoke

SHIFT = smoke.Subject("cpu", "temporal_shift", "TemporalShift")


@pytest.fixture
def path(tmp_path):
    """A file of rows with nothing in it."""
    (tmp_path / "smoke.csv").write_text(",".join(smoke.COLUMNS) + "\n")
    return tmp_path / "smoke.csv"


@pytest.fixture
def cpu_backend():
    """In a process of its own a subject chooses the backend for good."""
    if (reason := aia_kernels.available_backends()["cpu"]) is not None:
        pytest.skip(reason)
    yield
    aia_kernels.set_backend("auto")


def test_every_layer_and_every_familys_passes_are_subjects():
    found = {(subject.family, subject.name) for subject in smoke.subjects("cuda") if subject.backend == "triton"}
    public = {name: getattr(aia_kernels, name) for name in aia_kernels.__all__}
    layers = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, torch.nn.Module)}
    of_the_framework = {"CausalAttention", "ComplementAttention", "HaloAttention", "HaloAttn"}  # on every backend
    parts = {"ChannelGate", "SpatialGate"}  # of CBAM; all must be seen on one screen
    assert {name for _, name in found} - {"passes"} == layers - of_the_framework - parts
    assert {subject.backend for subject in smoke.subjects("cuda")} == {"triton", "cuda"}
    assert {family for family, name in found if name == "passes"} == {"attention_in_attention", "external_attention"}


def test_every_backend_is_asked_for_every_family():
    for backend in ("triton", "cuda"):
        assert {s.family for s in smoke.subjects("cuda") if s.backend == backend} == set(backends.FAMILIES)


@pytest.mark.parametrize("family", smoke.PASS_CASES)
def test_raw_passes_are_right(family, path, cpu_backend):
    assert smoke.run(smoke.Subject("cpu", family, "passes"), "cpu", "", path) == 0
    rows = smoke.noted(path)
    assert len(rows) > 8 and set(rows.values()) == {smoke.PASS}


def test_wrong_numbers_fail(path, cpu_backend, monkeypatch):
    calls = smoke.passes.calls

    def wrong(backend, case, x, grad_y):
        found = calls(backend, case, x, grad_y)
        logits, *others = found["logits"].call()
        moved = found["logits"]._replace(call=lambda: (logits + 1e-3 * logits.abs().max(), *others))
        return found if x.dtype == torch.float64 else found | {"logits": moved}

    monkeypatch.setattr(smoke.passes, "calls", wrong)
    smoke.run(smoke.Subject("cpu", "external_attention", "passes"), "cpu", "", path)
    failed = smoke.failures(smoke.noted(path))
    assert [cell for *_, cell in failed] == ["logits"]

    x = torch.randn(3)
    smoke.same({"y": x}, {"y": x.clone()})
    with pytest.raises(AssertionError, match="y differs from the eager one by"):
        smoke.same({"y": x}, {"y": x * (1 + 1e-6)})


def test_a_subject_that_cannot_run_says_why(path):
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    smoke.run(SHIFT._replace(backend="cuda"), "cuda", "", path)
    ((cell, result),) = smoke.noted(path).items()
    assert cell[-1] == "start" and result.startswith("cannot run: ")


STUB = """
import os, sys, time
path, behind = sys.argv[sys.argv.index("--results") + 1] + "/smoke.csv", sys.argv[-1]
subject = sys.argv[sys.argv.index("--run") + 1 :][:3]
def note(cell, result=""):
    with open(path, "a") as opened:
        opened.write(",".join([*subject, cell, result, "0.0"]) + "\\n")
note("start"), note("start", "pass")
for cell in "abcde"["abcde".find(behind) + 1 if behind else 0 :]:
    note(cell)
    if cell == "b":
        os.kill(os.getpid(), 9)
    if cell == "c":
        time.sleep(60)
    note(cell, "RuntimeError: illegal" if cell == "d" else "pass")
    if cell == "d":
        sys.exit(1)
"""


def test_a_cell_that_dies_hangs_or_loses_the_device_is_told_and_the_next_ones_run(path, tmp_path, monkeypatch):
    stub, script = tmp_path / "python", tmp_path / "stub.py"
    script.write_text(STUB)
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')  # its path may hold a space
    stub.chmod(0o755)
    monkeypatch.setattr(smoke.sys, "executable", str(stub))
    smoke.supervise(SHIFT, "cpu", path, smoke.Limits(1.0, 1.0, time.time() + 50))
    assert {cell: result for (*_, cell), result in smoke.noted(path, SHIFT).items()} == {
        "start": "pass",
        "a": "pass",
        "b": "ended its process (-9)",
        "c": "did not end in 1 s",
        "d": "RuntimeError: illegal",
        "e": "pass",
    }


def test_all_ends_in_time(path, tmp_path, monkeypatch):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nexec sleep 60\n")
    stub.chmod(0o755)
    monkeypatch.setattr(smoke.sys, "executable", str(stub))
    smoke.supervise(SHIFT, "cpu", path, smoke.Limits(50, 50, time.time() + 0.3))
    assert list(smoke.noted(path).values()) == ["out of time"]


def test_one_screen(tmp_path, monkeypatch, capsys, cpu_backend):
    everything = smoke.subjects("cuda")
    monkeypatch.setattr(smoke, "subjects", lambda device: [SHIFT])
    assert smoke.main(["--device", "cpu", "--results", str(tmp_path), "--seconds", "100"]) == 0
    text = capsys.readouterr().out
    assert "no CUDA graph and no side stream" in text and text.endswith("0 failed, 1 cells were tried\n")
    rows = {(*subject, cell): "pass" for subject in everything for cell in ("eager", "graph", "stream")}
    rows |= {
        (b, family, name, cell): f"RuntimeError: {cell} of {name} " + "x" * 200
        for b in ("triton", "cuda")
        for family, layers in smoke.LAYERS.items()
        for name in layers
        for cell in ("graph", "stream")
    }
    rows["cuda", "attention_in_attention", "CinST", "start"] = ""
    lines = smoke.table(rows)
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "pass    FAIL" in next(line for line in lines if line.startswith("CinST"))
    lines = smoke.told_once(dict.fromkeys(rows, "cannot run: no device"))
    assert [line.split()[0] for line in lines] == ["triton", "cuda"]
    assert all("others: cannot run: no device" in line for line in lines)
