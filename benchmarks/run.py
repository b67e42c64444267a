"""Measure the layers, or with --passes the raw passes, and append rows to a CSV for each family.

Before anything is timed, its numbers are checked against the reference in float64; a provider whose numbers fail is
named and gets neither a time nor a speedup. All providers of a case are then sampled in turns, beside two plain copies
of x: ``copy`` into a buffer that exists, ``clone`` into a fresh one. Self-attention, which competes with external
attention on the same tokens, computes something else: it gets a time, and no speedup.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import check, measure, passes, records, registry, roof, roofline, table, timing
from .check import Provider
from .machines import Machine
from .registry import Case
from .timing import Samples

#: Larger batches are for a GPU: on a few cores they take minutes and say nothing new.
CPU_CLIPS = 8


def measure_case(
    case: Case,
    candidates: Iterable[Provider],
    device: str,
    rounds: int,
    seconds: float,
    where: dict,
    machine: Machine | None = None,
) -> list[dict]:
    """Rows of one case: every provider's numbers checked first, then those that are right timed in turns."""
    inputs = rotating_inputs(case, device)
    x, grad_y = inputs[0]
    layers, wrong = check.check_case(case, candidates, device, x, grad_y)
    rows = [wrong_row(case, name, error, where) for name, error in wrong.items()]
    copies = copy_calls(inputs)
    for mode in registry.MODES:
        runs = {name: (run, contextlib.nullcontext) for name, run in copies.items()}
        for name, checked in layers.items():
            layer = checked.layer
            if mode == "eval":
                calls = [measure.evaluation(layer, x) for x, _ in inputs]
            else:
                calls = [measure.training_step(layer, x, grad_y) for x, grad_y in inputs]
            runs[name] = (calls, checked.context)
        samples = timing.interleave(runs, rounds, seconds, device)
        for name, times in samples.items():
            budget = 2 * case.x_bytes if name in copies else case.budget_bytes(mode)
            found = row(case, mode, name, where) | time_columns(times, samples, budget)
            if name in layers:
                checked = layers[name]
                if name in roofline.COUNTED:
                    found |= roofline.columns(roofline.count(case, name, mode), machine, times.median)
                if checked.error is not None:
                    found |= {"max_error": f"{checked.error:.2e}", "correct": "yes"}
                    if "published" in samples:
                        found["speedup"] = f"{samples['published'].median / times.median:.2f}"
                if mode == "step":
                    with checked.context():
                        kept = measure.kept_bytes(checked.layer, x)
                    found |= {"kept_mb": f"{kept / 1e6:.3f}", "kept_x": f"{kept / case.x_bytes:.3f}"}
            rows.append(found)
    return rows


def measure_passes(
    case: Case,
    candidates: Iterable[Provider],
    device: str,
    rounds: int,
    seconds: float,
    where: dict,
    machine: Machine | None = None,
) -> list[dict]:
    """Rows of the raw passes of every fused backend on the input of a case, if the case's layer comes out right."""
    inputs = rotating_inputs(case, device)
    x, grad_y = inputs[0]
    fused = [provider for provider in candidates if provider.name in check.FUSED]
    right, wrong = check.check_case(case, fused, device, x, grad_y)
    rows = [wrong_row(case, name, error, where) for name, error in wrong.items()]
    for backend in right:
        sets = [passes.calls(backend, case, x, grad_y) for x, grad_y in inputs]
        raw, counts = sets[0], roofline.count_passes(case, backend)
        runs = copy_calls(inputs) | {name: [one[name].call for one in sets] for name in raw}
        contexts = {name: (calls, contextlib.nullcontext) for name, calls in runs.items()}
        samples = timing.interleave(contexts, rounds, seconds, device)
        for name, times in samples.items():
            budget = raw[name].bytes_moved if name in raw else 2 * case.x_bytes
            found = row(case, "pass", backend, where) | {"kind": "pass", "name": name, "correct": "yes"}
            if name in counts:
                found |= roofline.columns(counts[name], machine, times.median)
            rows.append(found | time_columns(times, samples, budget))
    return rows


def rotating_inputs(case: Case, device: str) -> list[tuple[Tensor, Tensor]]:
    """x and a gradient of y, as often as it takes for the device not to find them in its cache."""
    x = case.make_input(device)
    grad_y = case.gradient(x)
    others = range(1, timing.on(device).input_sets(2 * x.nbytes))
    return [(x, grad_y), *((x.clone(), grad_y.clone()) for _ in others)]


def copy_calls(inputs: list[tuple[Tensor, Tensor]]) -> dict[str, list[Callable]]:
    """Two plain copies of x: into a buffer that exists, and into a fresh one."""
    pairs = [(torch.empty_like(x), x) for x, _ in inputs]
    return {"copy": [lambda y=y, x=x: y.copy_(x) for y, x in pairs], "clone": [x.clone for x, _ in inputs]}


def row(case: Case, mode: str, provider: str, where: dict) -> dict:
    return dict.fromkeys(records.COLUMNS, "") | case.columns | {"mode": mode, "provider": provider} | where


def wrong_row(case: Case, provider: str, error: float, where: dict) -> dict:
    return row(case, "", provider, where) | {"max_error": f"{error:.2e}", "correct": "no"}


def time_columns(times: Samples, samples: dict[str, Samples], budget: int) -> dict:
    """The columns of a time: spread, bandwidth against the budget, in plain copies into a reused and a fresh buffer."""
    low, high = times.quartiles
    return {
        "median_ms": f"{times.median * 1e3:.4f}",
        "q25_ms": f"{low * 1e3:.4f}",
        "q75_ms": f"{high * 1e3:.4f}",
        "samples": len(times.seconds),
        "timed": times.timed,
        "wall_ms": f"{statistics.median(times.wall) * 1e3:.4f}" if times.wall else "",
        "budget_mb": f"{budget / 1e6:.3f}",
        "gb_per_s": f"{budget / times.median / 1e9:.2f}",
        "copies": f"{times.median / samples['copy'].median:.2f}",
        "clones": f"{times.median / samples['clone'].median:.2f}",
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--family", choices=tuple(registry.FAMILIES), help="one family only (default: one after the other)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny inputs, few samples")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds every word of TEXT")
    parser.add_argument("--minutes", type=float, default=20, help="begin no case after, families share it (default 20)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each provider (default 9)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where the CSV files go")
    parser.add_argument("--passes", action="store_true", help="measure the raw passes instead of the layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch has it)")
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile of the published flow: in every case, in none, or (auto) on the GPU in every case and on "
        "the CPU in the main ones (Case.compiled_on_cpu)",
    )
    return parser.parse_args(arguments)


def chosen_cases(family: str, options: argparse.Namespace) -> list[Case]:
    known = registry.FAMILIES[family]
    found = known.quick_cases() if options.quick else known.cases()
    if options.device == "cpu":
        found = [case for case in found if case.clips <= CPU_CLIPS]
    found = [case for case in found if all(word in str(case) for word in options.filter.split())]
    return known.pass_cases(found) if options.passes else found


def run_family(family: str, cases: list[Case], minutes: float, options: argparse.Namespace) -> None:
    """Measure cases of one family and write their rows, until time is up."""
    path = records.path(options.results, family, options.passes)
    where, start = measure.machine(options.device), time.perf_counter()
    machine = roof.machine(where["device"], options.results, records.RESULTS)
    found, measured = check.providers(options.device, family), measure_passes if options.passes else measure_case
    rounds, seconds = (2, 0.5) if options.quick else (options.rounds, 15)
    bar, made = tqdm(cases, unit="case", dynamic_ncols=True), []
    for i, case in enumerate(bar):
        if time.perf_counter() - start > minutes * 60:
            left = len(cases) - i
            tqdm.write(f"time is up after {minutes:g} minutes: {left} cases left out", file=sys.stderr)
            break
        bar.set_description(str(case))
        candidates = list(found)
        auto = options.device == "cuda" or case.compiled_on_cpu
        if options.compile == "on" or (options.compile == "auto" and auto):
            candidates += check.compiled(options.device)
        candidates += check.alternatives(case, options.device)
        rows = measured(case, candidates, options.device, rounds, seconds, where, machine)
        records.write(path, rows)
        made += rows
    print(*table.beside(made), f"wrote {path}", sep="\n")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    families = [options.family] if options.family else list(registry.FAMILIES)
    chosen = {family: cases for family in families if (cases := chosen_cases(family, options))}
    if not chosen:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    for family, cases in chosen.items():
        run_family(family, cases, options.minutes / len(chosen), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
