"""Bytes, launches and predicted times of layers, counted on the real algorithm: python -m benchmarks.offline.roofline

Nothing runs on a GPU: the layers run on tensors without data (counting.py), so the counts follow the code. Providers:
``cuda`` and ``cpu``, one launch for each pass (external attention's two column reductions take one or two more on a
GPU, and the framework's products stand around them); ``triton``, whose helper launches are counted; ``published``,
the authors' eager flow. Of a call, three times:

    roof     the sum over launches of max(bytes / bandwidth, operations / rate): no cache, no cost of a launch
    graph    launches x what a launch costs at least in a CUDA graph
    eager    the same for a launch from Python

A call in a CUDA graph should take about the larger of the first two. Where x fits in L2, a pass may beat its roof.
Machines, and what of theirs is assumed: gpus.py.
"""

from __future__ import annotations

import argparse
import csv
import operator
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import aia_kernels

from .. import measure, passes, progress, records, registry, table
from ..gpus import EAGER_US, GRAPH_US, SHOWN, Machine
from ..registry import Case
from . import counting
from .counting import Launch

PROVIDERS = ("cuda", "triton", "published")
#: Providers of measured rows that can be counted; a compiler's kernels are its own business.
COUNTED = ("published", "reference", "cpu", "triton", "cuda")
TIMES = ("roof", "graph", "eager")
COLUMNS = [
    *("kind", "family", "name", "stage", "clips", "dtype", "layout", "mode", "provider", "part"),
    *("launches", "x_reads", "x_writes", "read_x", "written_x", "moved_mb", "gflop"),
    *(f"{machine} {time} us" for machine in SHOWN for time in TIMES),
]
#: The families that can be counted: what PyTorch's attention launches is chosen by the device that it runs on.
FAMILIES = tuple(family for family in registry.FAMILIES if family in aia_kernels.backends.FAMILIES)
#: Where launches that belong to no pass are gathered.
FRAMEWORK = "framework"


class Prediction(NamedTuple):
    """Seconds of a call: see the head of this file."""

    roof: float
    graph: float
    eager: float

    @property
    def expected(self) -> float:
        """In a CUDA graph."""
        return max(self.roof, self.graph)


def predict(launches: Iterable[Launch], machine: Machine) -> Prediction:
    launches = list(launches)
    roof = sum(
        max(machine.memory_seconds(one.read, one.written), machine.product_seconds(one.flops, one.dtype))
        for one in launches
    )
    return Prediction(roof, len(launches) * GRAPH_US / 1e6, len(launches) * EAGER_US / 1e6)


def counted_layer(case: Case, provider: str) -> nn.Module:
    with torch.device("meta"):
        layer = case.published() if provider == "published" else case.fused()
    return layer.to(registry.DTYPES[case.dtype])


@cache
def count(case: Case, provider: str, mode: str) -> tuple[Launch, ...]:
    """The launches of one call of a case's layer in mode eval or step."""
    x, layer = case.without_data(), counted_layer(case, provider)
    call = measure.evaluation(layer, x) if mode == "eval" else measure.training_step(layer, x, case.empty_result(x))
    backend = "reference" if provider == "published" else provider
    with counting.counting(backend) as counter:
        call()
    return tuple(counter.launches)


def count_passes(case: Case, backend: str) -> dict[str, tuple[Launch, ...]]:
    """The launches of each raw pass on the input of a case, by the names of passes.calls."""
    x, found = case.without_data(), {}
    with counting.counting(backend) as counter:
        for name, one in passes.calls(backend, case, x, torch.empty_like(x)).items():
            before = len(counter.launches)
            one.call()
            found[name] = tuple(counter.launches[before:])
    return found


def columns(launches: Iterable[Launch], machine: Machine | None, seconds: float) -> dict[str, str | int]:
    """The columns of a measured row: what was counted and, on a known machine, what was predicted of it and which
    share of the roof the measured time is."""
    launches = list(launches)
    moved = sum(one.read + one.written for one in launches)
    found = {"launches": len(launches), "moved_mb": f"{moved / 1e6:.3f}"}
    if machine is not None:
        predicted = predict(launches, machine)
        found |= {"predicted_ms": f"{predicted.expected * 1e3:.4f}", "of_roof": f"{predicted.roof / seconds:.3f}"}
    return found


def met(launches: Iterable[Launch], elements: int) -> tuple[int, int]:
    """How often tensors of so many elements, those of x, are read and written."""
    launches = list(launches)
    return sum(one.reads.count(elements) for one in launches), sum(one.writes.count(elements) for one in launches)


def row(case: Case, mode: str, provider: str, part: str, launches: list[Launch]) -> dict:
    read, written = (sum(getattr(one, side) for one in launches) for side in ("read", "written"))
    reads, writes = met(launches, case.x_bytes // registry.DTYPES[case.dtype].itemsize)
    found = case.columns | {"kind": "pass" if part else "layer", "family": case.family}
    found |= {"mode": mode, "provider": provider, "part": part, "launches": len(launches)}
    found |= {"x_reads": reads, "x_writes": writes}
    found |= {"read_x": f"{read / case.x_bytes:.2f}", "written_x": f"{written / case.x_bytes:.2f}"}
    found |= {"moved_mb": f"{(read + written) / 1e6:.3f}", "gflop": f"{sum(one.flops for one in launches) / 1e9:.3f}"}
    for name, machine in SHOWN.items():
        for time, seconds in predict(launches, machine)._asdict().items():
            found[f"{name} {time} us"] = f"{seconds * 1e6:.1f}"
    return found


def rows(case: Case, provider: str, parts: bool) -> list[dict]:
    """The rows of a case: of each mode the whole call and, if wanted, each of its passes."""
    found = []
    for mode in registry.MODES:
        launches = count(case, provider, mode)
        found.append(row(case, mode, provider, "", list(launches)))
        by_part: dict[str, list[Launch]] = {}
        for one in launches if parts else ():
            by_part.setdefault(one.part or FRAMEWORK, []).append(one)
        found += [row(case, mode, provider, part, of_part) for part, of_part in by_part.items()]
    return found


def cases(family: str) -> list[Case]:
    """The main inputs of a family in both types; of the units and of CBAM, at each number of clips or maps."""
    known = registry.FAMILIES[family].cases()
    main = [case for case in known if case.dtype == "fp32" and case.layout == "contiguous" and case.kind != "sweep"]
    if family in ("attention_in_attention", "cbam"):
        main.sort(key=lambda case: case.clips)
    return [replace(case, dtype=dtype) for dtype in registry.DTYPES for case in main]


def is_shown(case: Case) -> bool:
    """Whether a case stands in the table and its passes get rows: bf16 and, of the units, eight clips. The others
    scale with it."""
    return case.dtype == "bf16" and case.clips == registry.main_clips(case.family)[case.name, case.stage]


def all_rows(families: Iterable[str], words: str = "") -> list[dict]:
    chosen = [case for family in families for case in cases(family) if all(word in str(case) for word in words.split())]
    found = []
    for case in progress.bar(chosen, unit="case", leave=False):
        for provider in PROVIDERS:
            found += rows(case, provider, parts=provider != "published" and is_shown(case))
    return found


def lines(family: str, found: list[dict], parts: bool = False) -> list[str]:
    """The table of a family in Markdown, what is shown of it: a line for each layer and input or, with ``parts``, for
    each pass of each provider too."""
    shown = {(case.name, case.stage, str(case.clips), case.dtype): case for case in cases(family) if is_shown(case)}
    key = operator.itemgetter("name", "stage", "clips", "dtype")
    chosen = [one | {"clips": str(one["clips"])} for one in found if one["family"] == family]
    chosen = [one for one in chosen if key(one) in shown]
    header = [*table.header_of(family), *(["pass"] if parts else [])]
    for mode in registry.MODES:
        header += [f"{mode}: bytes, X, published → fused", "launches, published → cuda, triton"]
        header += [f"{machine}, us" for machine in SHOWN]
    made = [header, ["---"] * len(header)]
    for name, stage, part in dict.fromkeys((one["name"], one["stage"], one["part"]) for one in chosen):
        if part and not parts:
            continue
        line = [name, next(case.where for (n, s, *_), case in shown.items() if (n, s) == (name, stage))]
        line += [part] if parts else []
        for mode in registry.MODES:
            of = records.select(chosen, name=name, stage=stage, part=part, mode=mode)
            line += cells({one["provider"]: one for one in of})
        made.append(line)
    return [f"| {' | '.join(line)} |" for line in made]


def cells(by_provider: dict[str, dict]) -> list[str]:
    """Of one call: bytes in |X|, launches, and for each machine the time at the roof and that of the launches."""

    def moved(provider: str) -> str:
        one = by_provider.get(provider)
        return f"{float(one['read_x']) + float(one['written_x']):.1f}" if one else ""

    def launches(provider: str) -> str:
        return str(by_provider[provider]["launches"]) if provider in by_provider else ""

    published = "published" in by_provider
    found = [f"{moved('published')} → {moved('cuda')}" if published else moved("cuda")]
    fused = ", ".join(filter(None, map(launches, ("cuda", "triton"))))
    found.append(f"{launches('published')} → {fused}" if published else fused)
    one = by_provider.get("cuda")
    for name in SHOWN:
        times = [float(one[f"{name} {time} us"]) for time in ("roof", "graph")] if one else []
        found.append(" / ".join(f"{time:.0f}" if time >= 10 else f"{time:.1f}" for time in times))
    return found


def write(path: Path, found: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(found)


def main(arguments: list[str] | None = None) -> int:
    name = "python -m benchmarks.offline.roofline"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split(": python")[0])
    parser.add_argument("--family", choices=FAMILIES, help="one family only")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name holds every word of TEXT")
    parser.add_argument("--passes", action="store_true", help="show each pass too")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write every row to DIR/roofline.csv")
    parser.add_argument("--page", type=Path, metavar="PATH", help="write the tables there, between their marks")
    options = parser.parse_args(arguments)
    families = [options.family] if options.family else FAMILIES
    found = all_rows(families, options.filter)
    if not found:
        print(f"no case matches --filter {options.filter!r}", file=sys.stderr)
        return 2
    for family in dict.fromkeys(one["family"] for one in found):
        text = "\n".join(lines(family, found, options.passes))
        if options.page is None:
            print(f"\n{family}: eight clips or as named, bf16; at the roof / launches in a CUDA graph\n\n{text}")
        elif not table.write_into(options.page, f"roofline, {family}", text):
            return 2
    if options.results:
        write(options.results / "roofline.csv", found)
        print(f"wrote {options.results / 'roofline.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
