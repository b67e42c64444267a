"""Fill Triton's cache on every core before anything is timed: python -m benchmarks.warm

Every case that benchmarks.run would measure, in the order of its worth, is evaluated and does a training step and its
raw passes once, shared out over processes: what Triton compiles there, the benchmarks find (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import measure, passes, providers, records, registry, run, timing
from .registry import Case

WHAT = ("step", "eval", "passes")


def tasks(options: argparse.Namespace) -> list[tuple[Case, str]]:
    cases = run.chosen_cases(options)
    of_passes = {
        str(case)
        for name, family in registry.FAMILIES.items()
        for case in family.pass_cases([case for case in cases if case.family == name])
    }
    return [(case, what) for case in cases for what in WHAT if what != "passes" or str(case) in of_passes]


def do(case: Case, what: str, device: str) -> None:
    """Have Triton compile what a case needs for it."""
    triton = providers.on_backend("triton")
    x = case.make_input(device)
    grad_y = case.gradient(x)
    if what == "passes":
        for one in passes.calls("triton", case, x, grad_y).values():
            one.call()
    else:
        layer = providers.build(triton, case, device)
        call = measure.evaluation(layer, x) if what == "eval" else measure.training_step(layer, x, grad_y)
        with triton.context():
            call()
    timing.on(device).wait()


def share(options: argparse.Namespace, path: Path) -> int:
    """This process's tasks, a line for each; it ends where the device is lost."""
    torch.set_num_threads(1)
    for case, what in tasks(options)[options.share :: options.processes]:
        start, told = time.perf_counter(), "done"
        try:
            do(case, what, options.device)
        except Exception as error:
            told = records.failure(error)
        with path.open("a") as opened:
            opened.write(f"{told}\t{case}\t{what}\t{time.perf_counter() - start:.1f}\n")
        if told != "done" and timing.on(options.device).is_lost():
            return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=__doc__.split(": python")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--family", choices=tuple(registry.FAMILIES), help="one family only (default: all)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds every word of TEXT")
    parser.add_argument("--quick", action="store_true", help="tiny inputs")
    parser.add_argument("--seconds", type=float, default=60, help="end all processes then (default 60)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where warm.txt goes")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--share", type=int, metavar="I", help="in this process: tasks I, I + PROCESSES, ...")
    parser.set_defaults(passes=False)
    options = parser.parse_args(arguments)
    path = options.results / "warm.txt"
    records.check_place(path)
    if options.share is not None:
        return share(options, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    wanted, end = tasks(options), time.time() + options.seconds
    command = [sys.executable, "-m", "benchmarks.warm", *arguments, "--processes", str(options.processes), "--share"]
    children = [subprocess.Popen([*command, str(i)]) for i in range(options.processes)]
    for child in children:
        try:
            child.wait(max(end - time.time(), 0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    done = [line.split("\t") for line in path.read_text().splitlines()]
    failed = [line for line in done if line[0] != "done"]
    print(*(f"{case}, {what}: {told}" for told, case, what, _ in failed[:20]), sep="\n")
    print(f"{len(done) - len(failed)} of {len(wanted)} calls made on {options.processes} cores, {len(failed)} failed")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
