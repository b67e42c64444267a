"""Measure the units, and with --passes the raw passes, and append rows to a CSV.

Before anything is timed, its numbers are checked against the reference in float64; a provider whose numbers fail is
named and gets neither a time nor a speedup. All providers of a case are then sampled in turns, beside two plain copies
of x: ``copy`` into a buffer that exists, ``clone`` into a fresh one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import aia_kernels
from aia_kernels import maps

from . import measure, passes, published, registry
from .registry import Case

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = [
    *("kind", "name", "stage", "clips", "dtype", "layout", "mode", "provider", "median_ms", "q25_ms", "q75_ms"),
    *("samples", "budget_mb", "gb_per_s", "copies", "clones", "speedup", "kept_mb", "kept_x", "max_error", "correct"),
    *("device", "cpu", "threads", "torch", "triton", "commit", "date"),
]
BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}


@dataclass(frozen=True)
class Provider:
    """Something that runs the units: its name in the rows, how to build a unit, what to enter around its calls."""

    name: str
    build: Callable[[str, int], nn.Module]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def unit_of(module, name: str, segments: int) -> nn.Module:
    return getattr(module, name)(num_segments=segments)


def providers(device: str) -> list[Provider]:
    """The published flow, the reference and every fused backend that can run on the device."""
    found = [Provider("published", partial(unit_of, published))]
    for backend in BACKENDS[device]:
        if aia_kernels.available_backends()[backend] is None:
            context = partial(aia_kernels.use_backend, backend)
            found.append(Provider(backend, partial(unit_of, aia_kernels), context))
    return found


def compiled(name: str, segments: int) -> nn.Module:
    return torch.compile(unit_of(published, name, segments), dynamic=False)


def worth_compiling(case: Case, device: str) -> bool:
    """On the CPU a case takes up to a minute to compile, so only the two main units are, on their main input."""
    if device == "cuda":
        return True
    return case.unit in ("CinST", "STinC") and case == Case(case.unit, case.stage, 8, "fp32", "contiguous", case.sizes)


def build(provider: Provider, case: Case, device: str) -> nn.Module:
    """The provider's unit with the parameters that every provider gets for this case."""
    torch.manual_seed(0)
    state = unit_of(published, case.unit, case.segments).state_dict()
    unit = provider.build(case.unit, case.segments)
    getattr(unit, "_orig_mod", unit).load_state_dict(state)
    return unit.to(device, registry.DTYPES[case.dtype])


def grad_like(x: Tensor) -> Tensor:
    """A seeded gradient for an output that has the shape and layout of x."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))


class Expected:
    """What a case must give: the reference in float64, and what the reference in the case's own type misses of it."""

    def __init__(self, case: Case, x: Tensor, grad_y: Tensor, device: str):
        reference = Provider("reference", partial(unit_of, aia_kernels), partial(aia_kernels.use_backend, "reference"))
        unit = build(reference, case, device)
        with reference.context():
            rounded = measure.results(unit, x, grad_y)
            self.truth = measure.results(unit.double(), x.double(), grad_y.double())
        self.band = torch.finfo(x.dtype).eps + 8 * torch.finfo(maps.accumulate_dtype(x.dtype)).eps
        self.displaced = {"grad x, all": 0.1, "grad parameters": 1e-4} if measure.near_ties(x.numel()) else {}
        self.reference_errors = measure.errors(rounded, self.truth)

    def check(self, found: dict[str, Tensor]) -> tuple[float, str]:
        """The largest error and, if one is beyond its budget, a sentence that names it (else "").

        The budget is that of aia_kernels.testing: twice the error of the reference in the same type, one rounding of
        the largest value and eight of the accumulator's. In a large x a maximum or two may be displaced by near ties
        (measure.near_ties): by up to a tenth in the gradient of x itself, by 1e-4 in sums over all of it.
        """
        errors, complaint = measure.errors(found, self.truth), ""
        for group, error in errors.items():
            budget = 2 * self.reference_errors[group] + self.band + self.displaced.get(group, 0.0)
            if not error <= budget:
                complaint = f"error of {group} {error:.1e}, at most {budget:.1e} expected"
        del errors["grad x, all"]
        return max(errors.values()), complaint


def check_case(
    case: Case, candidates: Iterable[Provider], device: str, x: Tensor, grad_y: Tensor, where: dict
) -> tuple[dict[str, tuple], list[dict]]:
    """Every provider's (unit, context, error) by name if its numbers are right, and a row for each that is wrong."""
    expected = Expected(case, x, grad_y, device)
    right, wrong = {}, []
    for provider in candidates:
        unit = build(provider, case, device)
        with provider.context():
            error, complaint = expected.check(measure.results(unit, x, grad_y))
        if complaint:
            tqdm.write(f"{case}: {provider.name} is wrong and is not timed: {complaint}", file=sys.stderr)
            wrong.append(row(case, "", provider.name, where) | {"max_error": f"{error:.2e}", "correct": "no"})
        else:
            right[provider.name] = (unit, provider.context, error)
    return right, wrong


def measure_case(
    case: Case, candidates: Iterable[Provider], device: str, rounds: int, seconds: float, where: dict
) -> list[dict]:
    """Rows of one case: every provider's numbers checked first, then those that are right timed in turns."""
    x = case.make_input(device)
    grad_y, buffer = grad_like(x), torch.empty_like(x)
    units, rows = check_case(case, candidates, device, x, grad_y, where)
    copies = {"copy": lambda: buffer.copy_(x), "clone": x.clone}
    for mode in registry.MODES:
        runs = {name: (run, contextlib.nullcontext) for name, run in copies.items()}
        for name, (unit, context, _) in units.items():
            call = measure.evaluation(unit, x) if mode == "eval" else measure.training_step(unit, x, grad_y)
            runs[name] = (call, context)
        samples = measure.interleave(runs, rounds, seconds, device)
        for name, times in samples.items():
            budget = 2 * case.x_bytes if name in copies else case.budget_bytes(mode)
            found = row(case, mode, name, where) | timing(times, samples, budget)
            if name in units:
                unit, context, error = units[name]
                found |= {"max_error": f"{error:.2e}", "correct": "yes"}
                if "published" in samples:
                    found["speedup"] = f"{samples['published'].median / times.median:.2f}"
                if mode == "step":
                    with context():
                        kept = measure.kept_bytes(unit, x)
                    found |= {"kept_mb": f"{kept / 1e6:.3f}", "kept_x": f"{kept / case.x_bytes:.3f}"}
            rows.append(found)
    return rows


def measure_passes(
    case: Case, candidates: Iterable[Provider], device: str, rounds: int, seconds: float, where: dict
) -> list[dict]:
    """Rows of the raw passes of every fused backend on the input of a case, if the case's unit comes out right."""
    x = case.make_input(device)
    grad_y, buffer = grad_like(x), torch.empty_like(x)
    fused = [provider for provider in candidates if provider.name not in ("published", "reference", "compile")]
    right, rows = check_case(case, fused, device, x, grad_y, where)
    for backend in right:
        runs = {"copy": lambda: buffer.copy_(x), "clone": x.clone}
        runs |= passes.calls(backend, x, grad_y, case.segments)
        contexts = {name: (run, contextlib.nullcontext) for name, run in runs.items()}
        samples = measure.interleave(contexts, rounds, seconds, device)
        for name, times in samples.items():
            budget = sum(registry.PASS_TRAFFIC.get(name.split()[0], (1, 1))) * case.x_bytes
            found = row(case, "pass", backend, where) | {"kind": "pass", "name": name, "correct": "yes"}
            rows.append(found | timing(times, samples, budget))
    return rows


def row(case: Case, mode: str, provider: str, where: dict) -> dict:
    key = {"kind": "unit", "name": case.unit, "stage": case.stage, "clips": case.clips, "dtype": case.dtype}
    return dict.fromkeys(COLUMNS, "") | key | {"layout": case.layout, "mode": mode, "provider": provider} | where


def timing(times: measure.Samples, samples: dict[str, measure.Samples], budget: int) -> dict:
    """The columns of a time: spread, bandwidth against the budget, in plain copies into a reused and a fresh buffer."""
    low, high = times.quartiles
    return {
        "median_ms": f"{times.median * 1e3:.4f}",
        "q25_ms": f"{low * 1e3:.4f}",
        "q75_ms": f"{high * 1e3:.4f}",
        "samples": len(times.seconds),
        "budget_mb": f"{budget / 1e6:.3f}",
        "gb_per_s": f"{budget / times.median / 1e9:.2f}",
        "copies": f"{times.median / samples['copy'].median:.2f}",
        "clones": f"{times.median / samples['clone'].median:.2f}",
    }


def write(path: Path, rows: list[dict]) -> None:
    """Append rows, with the header first in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny inputs, few samples")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds every word of TEXT")
    parser.add_argument("--minutes", type=float, default=20, help="begin no case after this long (default 20)")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each provider (default 9)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV files go")
    parser.add_argument("--passes", action="store_true", help="measure the raw passes instead of the units")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch has it)")
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile of the published flow: in every case, in none, or (auto) on the GPU in every case and on "
        "the CPU for CinST and STinC, 8 clips, fp32, contiguous",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = registry.quick_cases() if options.quick else registry.cases()
    chosen = [case for case in chosen if all(word in str(case) for word in options.filter.split())]
    if not chosen:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    if options.passes:  # they do not depend on the unit, which only checks them
        chosen = [case for case in chosen if case.unit == registry.UNITS[0]]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / ("passes.csv" if options.passes else "units.csv")
    where, start = measure.machine(options.device), time.perf_counter()
    found, measured = providers(options.device), measure_passes if options.passes else measure_case
    rounds, seconds = (2, 0.5) if options.quick else (options.rounds, 15)
    bar = tqdm(chosen, unit="case", dynamic_ncols=True)
    for i, case in enumerate(bar):
        if time.perf_counter() - start > options.minutes * 60:
            left = len(chosen) - i
            tqdm.write(f"time is up after {options.minutes:g} minutes: {left} cases left out", file=sys.stderr)
            break
        bar.set_description(str(case))
        candidates = list(found)
        if options.compile == "on" or (options.compile == "auto" and worth_compiling(case, options.device)):
            candidates.append(Provider("compile", compiled))
        write(path, measured(case, candidates, options.device, rounds, seconds, where))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
