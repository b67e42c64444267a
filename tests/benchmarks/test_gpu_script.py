"""The script behind ``make gpu``: its steps name what exists and end in time, and a rehearsal cannot pass for a run."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "gpu"
PARTS = ("smoke", "check", "bench", "network", "compile")
#: Ten minutes, less what it takes to begin and end.
CALL = 590

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the script is not here, only the package")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIA_KERNELS")}
    return subprocess.run([SCRIPT, *arguments], env=kept | environment, capture_output=True, text=True, cwd=ROOT)


def steps(**environment: str) -> list[tuple[list[str], str, int, list[str]]]:
    """(parts, name, seconds, command) of each step."""
    found = []
    for line in script(LIST="1", **environment).stdout.splitlines():
        parts, rest = line.split(": ", 1)
        name, limit, *command = shlex.split(rest)
        found.append((parts.split(), name, int(limit), command))
    return found


@pytest.mark.parametrize("part", PARTS)
def test_a_part_ends_within_a_call(part):
    total = sum(limit for parts, _, limit, _ in steps(PART=part) if part in parts)
    assert total <= (160 if part == "smoke" else CALL)
    for _, name, limit, command in steps(PART=part):
        if "--seconds" in command and name != "network":
            assert int(command[command.index("--seconds") + 1]) < limit, name
        if "--minutes" in command:
            assert 60 * float(command[command.index("--minutes") + 1]) <= limit - 20, name


def test_the_roof_is_measured_and_the_cache_filled_before_the_first_row():
    names = [name for _, name, *_ in steps(PART="bench")]
    assert names[:4] == ["build", "roof", "warm", "layers"]


def test_every_part_builds_and_the_rehearsal_has_the_steps_of_the_run():
    real, rehearsed = steps(), steps(REHEARSE="1")
    assert [step[:3] for step in real] == [step[:3] for step in rehearsed]
    assert real[0][:2] == (list(PARTS), "build")
    assert all(set(parts) <= set(PARTS) for parts, *_ in real)
    assert [step[1] for step in steps(PART="check")] == [step[1] for step in real if "check" in step[0]]


@pytest.mark.parametrize("rehearse", ["", "1"], ids=["run", "rehearsal"])
def test_steps_name_modules_files_and_options_that_exist(rehearse, capsys):
    for _, name, _, command in steps(REHEARSE=rehearse):
        for word in command:
            assert not word.startswith("tests/") or (ROOT / word).exists(), (name, word)
        if "-m" not in command or not command[command.index("-m") + 1].startswith("benchmarks."):
            continue
        start = command.index("-m") + 1
        module = importlib.import_module(command[start])
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
        options = [word for word in command[start:] if word.startswith("--")]
        assert options and all(option in text for option in options), (name, options)


@pytest.fixture
def stub(tmp_path) -> Path:
    """A Python that runs nothing: it fails for benchmarks.bandwidth and succeeds for all else."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *benchmarks.bandwidth*) exit 3 ;; esac\n')
    path.chmod(0o755)
    return path


def test_a_rehearsal_says_so_everywhere_and_packs_few_files(stub, tmp_path):
    results, pack = tmp_path / "results", tmp_path / "pack"
    done = script(str(results), REHEARSE="1", PYTHON=str(stub), PACK=str(pack))
    assert done.returncode == 1  # the step that failed
    logs = sorted(results.glob("gpu-*.log"))
    assert {log.stem.removeprefix("gpu-") for log in logs} == {name for _, name, *_ in steps()}
    assert all(log.read_text().startswith("REHEARSAL on the CPU: ") for log in logs)
    summary = (results / "gpu-summary.txt").read_text()
    assert summary.startswith("REHEARSAL on the CPU: no number here is a GPU's\n")
    lines = [line for line in summary.splitlines() if " pass " in line or " FAIL " in line]
    assert "REHEARSAL on the CPU" in lines[0] and "ran -m benchmarks.summary" in summary
    assert len(lines) == len(logs) and all(line.startswith("REHEARSAL on the CPU: ") for line in lines)
    assert [line.split()[4] for line in lines if "FAIL (3)" in line] == ["roof"]
    assert sorted(path.name for path in pack.iterdir()) == ["gpu-results.tar.gz", "gpu-summary.txt"]
    with tarfile.open(pack / "gpu-results.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {log.name for log in logs} | {"gpu-summary.txt", "choices.csv"} <= names


def test_only_the_steps_of_a_part_run(stub, tmp_path):
    script(str(tmp_path / "results"), REHEARSE="1", PYTHON=str(stub), PART="compile")
    logs = {path.stem.removeprefix("gpu-") for path in (tmp_path / "results").glob("*.log")}
    assert logs == {name for parts, name, *_ in steps() if "compile" in parts}


@pytest.mark.parametrize("part", ["bench", "smoke"])
def test_without_matplotlib_no_picture_is_drawn_and_nothing_fails(part, tmp_path):
    (bare := tmp_path / "python").write_text('#!/bin/sh\ncase "$*" in *"import matplotlib"*) exit 1 ;; esac\n')
    bare.chmod(0o755)
    done = script(str(tmp_path / "results"), REHEARSE="1", PYTHON=str(bare), PART=part)
    summary = (tmp_path / "results" / "gpu-summary.txt").read_text()
    assert done.returncode == 0 and ("matplotlib is not here" in summary) == (part == "bench")
    assert not (tmp_path / "results" / "gpu-plot.log").exists()


def test_a_rehearsal_leaves_measured_results_alone(stub, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").rglob("*")}
    for place in ("benchmarks/results", "benchmarks/../benchmarks/results/"):
        done = script(place, REHEARSE="1", PYTHON=str(stub))
        assert done.returncode == 2 and "does not write to benchmarks/results" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").rglob("*")}
    command = [sys.executable, "-m", "benchmarks.choices"]
    done = subprocess.run(
        command, env=os.environ | {"AIA_KERNELS_REHEARSAL": "1"}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "decides nothing" in done.stderr


def test_an_unknown_part_is_refused():
    done = script(PART="everything")
    assert done.returncode == 2 and "PART is 'everything'" in done.stderr
