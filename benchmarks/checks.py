"""The tests of passes and layers on the device, in parallel and in a given time: python -m benchmarks.checks

What was found stands in RESULTS/tests.txt as it comes (told.py), so that the end of the time loses nothing. With
--sanitize TOOL ten tests, one of each function, under compute-sanitizer. On the CPU a few tests that run there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import records, told

TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = Path(__file__).resolve().parent.parent / "tests"

#: The passes of both backends, then whole layers, captured steps and repeated runs.
FILES = [
    *("passes", "external_passes", "cuda_passes", "cuda_evaluate", "cuda_runtime"),
    *("shift", "triton_passes", "triton_double_norm", "attention_in_attention"),
    *("external_attention", "external_attention_modules", "promises_cuda_graphs", "promises_determinism"),
]
WORDS = "(cuda or triton) and not emulator and not offline and not reference-cuda"
#: The files of the small cases that are marked for the sanitizer: whole steps, which are all passes, first.
SANITIZED = [
    *("attention_in_attention", "external_attention_modules", "passes", "external_passes", "cuda_passes"),
    *("shift", "cuda_evaluate"),
]
#: What stands for them in a rehearsal.
REHEARSED = "recalibrate and prime and not emulator"


def command(options: argparse.Namespace, path: Path) -> list[str]:
    """pytest's, with as many processes as there are cores."""
    names = SANITIZED if options.sanitize else FILES
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.told",
        "--told",
        str(path),
    ]
    pytest += [str(path) for name in names for path in TESTS.glob(f"*/test_{name}.py")]
    if options.sanitize:
        pytest += ["-m", "sanitizer", "--first-of-each", "10"]
        pytest += ["-k", WORDS] if options.device == "cuda" else []
        tool = ["compute-sanitizer", "--tool", options.sanitize, "--error-exitcode", "1"]
        return [*tool, *pytest] if options.device == "cuda" else pytest
    pytest += ["-k", WORDS if options.device == "cuda" else REHEARSED]
    if importlib.util.find_spec("xdist") is None:
        print(
            "pytest-xdist is not installed: one process, which ends with the first test that hangs or loses the device"
        )
        return pytest
    return [*pytest, "-n", str(len(os.sched_getaffinity(0)))]


def within(seconds: float, arguments: list[str]) -> int | None:
    """The exit status of a run, or None if it had to be ended. The processes of xdist end with the one they serve."""
    process = subprocess.Popen(arguments, cwd=TESTS.parent)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def report(found: dict[str, tuple[str, str]], left: int) -> list[str]:
    """What failed and what was running, a line each; then the counts."""
    names = {"passed": "passed", "failed": "failed", "skipped": "skipped", told.BEGUN: "was running"}
    lines = [
        f"{names[outcome]}: {node.removeprefix('tests/')}: {why}"[:160].removesuffix(": ")
        for node, (outcome, why) in found.items()
        if outcome in ("failed", told.BEGUN)
    ]
    outcomes = [outcome for outcome, _ in found.values()]
    counts = [f"{outcomes.count(outcome)} {name}" for outcome, name in names.items()]
    more = [f"and {len(lines) - 40} others"] if len(lines) > 40 else []
    return [*lines[:40], *more, ", ".join([*counts, f"{left} never began"])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__.split(": python")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where the lines go")
    parser.add_argument("--seconds", type=float, default=600, help="all of it (default 600)")
    parser.add_argument("--sanitize", choices=TOOLS, help="ten tests under this tool of compute-sanitizer")
    options = parser.parse_args(arguments)
    path = options.results / f"{options.sanitize or 'tests'}.txt"
    records.check_place(path)
    if options.sanitize and options.device == "cuda" and shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH: it is part of the CUDA toolkit")
        return 2
    if options.sanitize:
        # A tool runs blocks many times slower, and those of a gate wait for one another.
        os.environ.setdefault("AIA_KERNELS_GATE_BLOCKS", "8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    status = within(options.seconds, command(options, path))
    found, left = told.read(path)
    ended = "" if status is not None else f"; ended after {options.seconds:g} s"
    *lines, counts = report(found, left)
    print(*lines, counts + ended, sep="\n")
    return 1 if status is None or status or not found else 0


if __name__ == "__main__":
    sys.exit(main())
