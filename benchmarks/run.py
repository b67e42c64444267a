"""Measure the layers, or with --passes the raw passes, and append rows to a CSV for each family, each as it comes.

Before anything is timed, its numbers are checked against the reference in float64; a provider whose numbers fail is
named and gets neither a time nor a speedup. One that raises, in building, checking, timing or counting, gets a row with
its error, and the next one goes on. All providers of a case are then sampled in turns, beside two plain copies of x:
``copy`` into a buffer that exists, ``clone`` into a fresh one. Self-attention, which competes with external attention
on the same tokens, computes something else: it gets a time, and no speedup.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from . import bandwidth, measure, passes, progress, providers, records, registry, table, timing, watch
from .gpus import Machine
from .offline import roofline
from .providers import Checked, Provider
from .registry import Case
from .timing import Samples

#: Larger batches are for a GPU: on a few cores they take minutes and say nothing new.
CPU_CLIPS = 8


def check_layers(
    case: Case, candidates: Iterable[Provider], device: str, x: Tensor, grad_y: Tensor, where: dict, right: dict
) -> Iterator[dict]:
    """Put every layer that may be timed into ``right`` by its provider; the rows of the others, as they come."""
    expected = providers.Expected(case, x, grad_y, device)
    for provider in candidates:
        found = row(case, "", provider.name, where)
        checked = None
        with records.noted(found, "build"):
            layer = providers.build(provider, case, device)
            with records.noted(found, "check"):
                checked = providers.check(provider, layer, expected, x, grad_y)
        if checked and not checked.complaint:
            right[provider.name] = checked
            continue
        if checked:
            tqdm.write(f"{case}: {provider.name} is wrong and is not timed: {checked.complaint}", file=sys.stderr)
            found |= {"max_error": f"{checked.error:.2e}", "correct": "no"}
        yield found


def measure_case(
    case: Case,
    candidates: Iterable[Provider],
    device: str,
    rounds: int,
    seconds: float,
    where: dict,
    machine: Machine | None = None,
) -> Iterator[dict]:
    """Rows of one case, as they come: every provider's numbers checked first, then those that are right timed in
    turns. A provider that raises gets a row with its error, and the others go on."""
    inputs, layers = rotating_inputs(case, device), {}
    x, grad_y = inputs[0]
    yield from check_layers(case, candidates, device, x, grad_y, where, layers)
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
        for name, times in sampled(samples):
            budget = 2 * case.x_bytes if name in copies else case.budget_bytes(mode)
            found = row(case, mode, name, where) | time_columns(times, samples, budget)
            if name in layers and not times.error:
                compared_columns(found, case, layers[name], samples, machine)
                if mode == "step":
                    with records.noted(found, "kept bytes"), layers[name].context():
                        kept = measure.kept_bytes(layers[name].layer, x)
                        timing.on(device).wait()  # what went wrong shows here, not in the next provider
                        found |= {"kept_mb": f"{kept / 1e6:.3f}", "kept_x": f"{kept / case.x_bytes:.3f}"}
            yield found


def compared_columns(
    found: dict, case: Case, checked: Checked, samples: dict[str, Samples], machine: Machine | None
) -> None:
    """Add what a timed row of a layer has beside its time: counts and predictions, its error, its speedup."""
    name, mode = found["provider"], found["mode"]
    median = samples[name].median
    if name in roofline.COUNTED and case.family in roofline.FAMILIES:
        with records.noted(found, "count"):
            found |= roofline.columns(roofline.count(case, name, mode), machine, median)
    if checked.error is not None:
        found |= {"max_error": f"{checked.error:.2e}", "correct": "yes"}
        if "published" in samples and samples["published"].seconds:
            found["speedup"] = f"{samples['published'].median / median:.2f}"


def measure_passes(
    case: Case,
    candidates: Iterable[Provider],
    device: str,
    rounds: int,
    seconds: float,
    where: dict,
    machine: Machine | None = None,
) -> Iterator[dict]:
    """Rows of the raw passes of every fused backend on the input of a case, as they come, if the case's layer comes out
    right. A backend or a pass that raises gets a row with its error."""
    inputs, layers = rotating_inputs(case, device), {}
    x, grad_y = inputs[0]
    fused = [provider for provider in candidates if provider.name in providers.FUSED]
    yield from check_layers(case, fused, device, x, grad_y, where, layers)
    for backend in layers:
        failed = row(case, "pass", backend, where) | {"kind": "pass"}
        with records.noted(failed, "passes"):
            sets = [passes.calls(backend, case, x, grad_y) for x, grad_y in inputs]
        if failed["error"]:
            yield failed
            continue
        counts: dict[str, tuple] = {}
        with records.noted(failed, "count"):
            counts = roofline.count_passes(case, backend)
        raw = sets[0]
        runs = copy_calls(inputs) | {name: [one[name].call for one in sets] for name in raw}
        contexts = {name: (calls, contextlib.nullcontext) for name, calls in runs.items()}
        with watch.running(backend, "time"):
            samples = timing.interleave(contexts, rounds, seconds, device)
        for name, times in sampled(samples):
            budget = raw[name].bytes_moved if name in raw else 2 * case.x_bytes
            found = row(case, "pass", backend, where) | {"kind": "pass", "name": name}
            found |= time_columns(times, samples, budget)
            if not times.error:
                found |= {"correct": "yes", "error": failed["error"] if name in raw else ""}
                if name in counts:
                    found |= roofline.columns(counts[name], machine, times.median)
            yield found


def sampled(samples: dict[str, Samples]) -> list[tuple[str, Samples]]:
    """Those with samples or an error: where one ended the sampling, others have neither."""
    return [(name, one) for name, one in samples.items() if one.seconds or one.error]


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


def time_columns(times: Samples, samples: dict[str, Samples], budget: int) -> dict:
    """The columns of a time: spread, bandwidth against the budget, in plain copies into a reused and a fresh buffer; or
    the error instead of one."""
    if times.error:
        return {"timed": times.timed, "error": f"time: {times.error}"}
    in_copies = {
        column: f"{times.median / samples[name].median:.2f}"
        for column, name in (("copies", "copy"), ("clones", "clone"))
        if samples[name].seconds
    }
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
        **in_copies,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--family", choices=tuple(registry.FAMILIES), help="one family only (default: all)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny inputs, few samples")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds every word of TEXT")
    parser.add_argument("--minutes", type=float, default=20, help="begin no case after (default 20)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each provider (default 9)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where the CSV files go")
    parser.add_argument("--passes", action="store_true", help="measure the raw passes instead of the layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch has it)")
    parser.add_argument(
        "--processor-time", action="store_true", help="on the CPU take processor time, where others use the machine too"
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile of the published flow: in every case, in none, or (auto) on the GPU in every case and on "
        "the CPU in the main ones (Case.compiled_on_cpu)",
    )
    parser.add_argument(
        "--patience", type=float, default=60, metavar="S", help="on a GPU leave what takes longer (default 60)"
    )
    parser.add_argument("--begin", default="", metavar="CASE", help="leave out the cases before this one")
    parser.add_argument(
        "--without", action="append", default=[], metavar="CASE:PROVIDER", help="leave a provider out of a case"
    )
    return parser.parse_args(arguments)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that are asked for, what matters most on the device first."""
    found: list[Case] = []
    for name, family in registry.FAMILIES.items():
        if options.family in (None, name):
            cases = family.quick_cases() if options.quick else family.cases()
            cases = [case for case in cases if all(word in str(case) for word in options.filter.split())]
            found += family.pass_cases(cases) if options.passes else cases
    if options.device == "cpu":
        found = [case for case in found if case.clips <= CPU_CLIPS]
    return registry.by_worth(found, options.device)


def providers_of(case: Case, options: argparse.Namespace) -> list[Provider]:
    candidates = providers.of_family(options.device, case.family)
    auto = options.device == "cuda" or case.compiled_on_cpu
    if options.compile == "on" or (options.compile == "auto" and auto):
        candidates += providers.compiled(options.device)
    candidates += providers.alternatives(case, options.device)
    return [one for one in candidates if f"{case}:{one.name}" not in options.without]


def rows_of(case: Case, options: argparse.Namespace, where: dict, machine: Machine | None) -> Iterator[dict]:
    """The rows of a case as they come; one with the error, if it is none of a provider's."""
    rounds, seconds = (2, 0.5) if options.quick else (options.rounds, 15)
    measured = measure_passes if options.passes else measure_case
    failed = row(case, "", "", where)
    with records.noted(failed, "case"):
        yield from measured(case, providers_of(case, options), options.device, rounds, seconds, where, machine)
    if failed["error"]:
        yield failed


def again_without(case: Case, provider: str, minutes: float, arguments: list[str]) -> NoReturn:
    """Go on in a new process, for nothing can run on the device in this one: with the same case, without a provider."""
    further = ["--begin", str(case), "--without", f"{case}:{provider}", "--minutes", f"{minutes:.3f}"]
    print(f"{provider} lost the device in {case}: going on in a new process", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *arguments, *further])


def main(arguments: list[str] | None = None) -> int:
    arguments, start = sys.argv[1:] if arguments is None else arguments, time.perf_counter()
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.processor_time:
        timing.by_processor_time()
    cases = chosen_cases(options)
    cases = cases[[str(case) for case in cases].index(options.begin) if options.begin else 0 :]
    if not cases:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    where = measure.machine(options.device)
    machine = bandwidth.machine(where["device"], options.results, records.RESULTS)
    bar, made = progress.bar(cases, unit="case"), []

    def note(case: Case, found: dict, is_lost: Callable[[], bool]) -> None:
        """Write a row; if the device is lost with it, go on in a new process."""
        records.write(records.path(options.results, case.family, options.passes), [found])
        made.append(found)
        if found["error"] and is_lost():
            left = options.minutes - (time.perf_counter() - start) / 60
            again_without(case, found["provider"], left, arguments)

    for i, case in enumerate(bar):
        if time.perf_counter() - start > options.minutes * 60:
            print(f"time is up after {options.minutes:g} minutes: {len(cases) - i} cases left out", file=sys.stderr)
            break
        bar.set_description(str(case))

        def late(provider: str, stage: str, case: Case = case) -> None:
            error = f"{stage}: did not end in {options.patience:g} s"
            note(case, row(case, "", provider, where) | {"error": error}, lambda: True)

        watched = watch.start(options.patience, late) if options.device == "cuda" else threading.Event()
        for found in rows_of(case, options, where, machine):
            note(case, found, timing.on(options.device).is_lost)
        watched.set()
    failed, wrong = sum(bool(found["error"]) for found in made), len(records.select(made, correct="no"))
    told = f"wrote {len(made)} rows to {options.results}: {failed} with an error, {wrong} with wrong numbers"
    print(*table.beside(made), told, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
