"""The tests that ``make gpu`` runs on a device: what was found is there whatever ends the run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import checks, told

ROOT = Path(__file__).parents[2]

TESTS = """
import time
import pytest
from benchmarks import told

def test_right(): pass

@pytest.mark.parametrize("of", ["triton", "cuda"])
def test_wrong(of): raise ValueError("first\\nsecond")

@pytest.mark.skip("why not")
def test_skipped(): pass

def test_hangs(): time.sleep({seconds})

def test_loses_the_device():
    told.lost = lambda: True
    raise RuntimeError("illegal address")

def test_after(): pass
"""


@pytest.fixture
def tests(tmp_path):
    """The command of a run of TESTS in two processes, and its file of lines."""
    pytest.importorskip("xdist", reason="it puts new processes in the place of those that end")

    def command(seconds: float, *arguments: str) -> tuple[list[str], Path]:
        (tmp_path / "test_them.py").write_text(TESTS.replace("{seconds}", str(seconds)))
        (tmp_path / "told.txt").write_text("")
        pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "-n", "2"]
        plugin = ["-p", "benchmarks.told", "--told", str(tmp_path / "told.txt")]
        return [*pytest_run, *plugin, str(tmp_path / "test_them.py"), *arguments], tmp_path / "told.txt"

    return command


def names(found: dict) -> dict[str, tuple[str, str]]:
    return {node.split("::")[1]: told_of for node, told_of in found.items()}


def test_every_test_is_told_of_and_one_that_hangs_or_loses_the_device_ends_its_process_alone(tests):
    command, path = tests(60, "--seconds-each", "1")
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100)
    found, left = told.read(path)
    assert left == 0 and names(found) == {
        "test_right": ("passed", ""),
        "test_wrong[triton]": ("failed", "ValueError: first"),
        "test_wrong[cuda]": ("failed", "ValueError: first"),
        "test_skipped": ("skipped", "Skipped: why not"),
        "test_hangs": ("failed", "did not end in 1 s"),
        "test_loses_the_device": ("failed", "RuntimeError: illegal address (the device is lost)"),
        "test_after": ("passed", ""),
    }


def test_the_end_of_the_time_loses_nothing_and_leaves_no_process(tests):
    start = time.time()
    subprocess.run(tests(0, "-k", "test_hangs")[0], cwd=ROOT, capture_output=True, timeout=100)
    enough = 3 * (time.time() - start)  # to begin all of them, at what this machine has to do beside it
    command, path = tests(1000, "--seconds-each", "900", "-k", "not test_loses")
    start = time.time()
    assert checks.within(enough, command) is None and time.time() - start < enough + 60
    found, left = told.read(path)
    outcomes = {name: outcome for name, (outcome, _) in names(found).items()}
    assert outcomes["test_hangs"] == told.BEGUN and outcomes["test_right"] == "passed"
    assert left + len(found) == 6
    *lines, counts = checks.report(found, left)
    assert any(line.startswith("was running: ") and line.endswith("test_hangs") for line in lines)
    assert "1 was running" in counts and f"{left} never began" in counts
    for pid in {int(line.split("\t")[0]) for line in path.read_text().splitlines()}:
        # A worker of xdist interrupts its test after 5 s, and leaves it after another 10 if that ignores it.
        deadline = time.time() + 60
        while running(pid) and time.time() < deadline:
            time.sleep(0.1)
        assert not running(pid)


def running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_the_first_of_each_function_of_every_file_in_turns():
    nodes = ["a.py::f[1]", "a.py::f[2]", "a.py::g", "b.py::C::f[1]", "b.py::C::f[2]"]
    assert told.first_of_each(nodes) == ["a.py::f[1]", "b.py::C::f[1]", "a.py::g"]


def test_what_may_compile_comes_last():
    items = [
        SimpleNamespace(nodeid=f"test_a.py::test[{name}]") for name in ("triton-1", "cuda-1", "triton-2", "cuda-2")
    ]
    dropped = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    config = SimpleNamespace(hook=hook, option=SimpleNamespace(first_of_each=None))
    told.pytest_collection_modifyitems(config, items)
    assert [item.nodeid[16:-1] for item in items] == ["cuda-1", "cuda-2", "triton-1", "triton-2"]
    config.option.first_of_each = 10
    told.pytest_collection_modifyitems(config, items)
    assert [item.nodeid[16:-1] for item in items] == ["cuda-1"] and len(dropped) == 3


@pytest.mark.parametrize("sanitize", [None, "memcheck"])
def test_what_runs_on_a_device(sanitize, tmp_path):
    options = checks.argparse.Namespace(device="cuda", sanitize=sanitize)
    command = checks.command(options, tmp_path / "told.txt")
    files = [word for word in command if word.endswith(".py")]
    assert files and all(Path(file).is_file() for file in files)
    assert (command[:3] == ["compute-sanitizer", "--tool", "memcheck"]) == (sanitize is not None)
    if sanitize is None:
        assert command[-1] == str(len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else True
        return
    for file in files:  # pass_backends.py marks what runs on the cuda backend
        assert re.search(r"mark\.sanitizer|from pass_backends import", Path(file).read_text()), file
