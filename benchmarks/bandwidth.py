"""The roof: the speed of this device's memory, by the best of some plain kernels: python -m benchmarks.bandwidth

Reading alone and copying, in terabytes a second, each with every setting of a small grid. Every fraction of the roof
refers to the best of each (gpus.py). On the CPU torch's own sum and copy stand in for the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import measure, progress, records, timing
from .gpus import Machine, known

COLUMNS = [
    *("kernel", "block", "steps", "warps", "mb", "median_ms", "q25_ms", "q75_ms", "tb_per_s", "correct"),
    *("device", "cpu", "threads", "torch", "triton", "commit", "date"),
]
BLOCKS, STEPS, WARPS = (1024, 2048, 4096, 8192), (1, 4), (4, 8)
#: Bytes of x by device: many times every cache; and in a smoke run.
LARGE, SMALL = {"cuda": 2 << 30, "cpu": 1 << 30}, 16 << 20


class Candidate(NamedTuple):
    """A kernel with its settings: a call, the bytes that it moves, and whether it did what it says."""

    kernel: str
    block: int | str
    steps: int | str
    warps: int | str
    call: Callable[[], object]
    bytes_moved: int
    right: Callable[[], bool]


def candidates(device: str, nbytes: int) -> list[Candidate]:
    x = torch.randn(nbytes // 4, generator=torch.Generator(device).manual_seed(0), device=device)
    y = torch.full_like(x, torch.nan)
    total = x.double().sum().item()

    def near(value: float) -> bool:
        return abs(value - total) <= 1e-4 * x.numel() ** 0.5  # of sums of float32 that cancel

    def copied() -> bool:
        right = torch.equal(x, y)
        y.fill_(torch.nan)  # the next one must write it anew
        return right

    if device == "cpu":
        return [
            Candidate("read", "", "", "", x.sum, nbytes, lambda: near(x.sum().item())),
            Candidate("copy", "", "", "", lambda: y.copy_(x), 2 * nbytes, copied),
        ]
    from .bandwidth_kernels import copy_kernel, read_kernel

    found = []
    for block, steps, warps in itertools.product(BLOCKS, STEPS, WARPS):
        programs = -(-x.numel() // (block * steps))
        sums = x.new_empty(programs)
        constants = {"BLOCK": block, "STEPS": steps, "num_warps": warps}

        def read(sums=sums, constants=constants, grid=(programs,)) -> None:
            read_kernel[grid](x, sums, x.numel(), **constants)

        def copy(constants=constants, grid=(programs,)) -> None:
            copy_kernel[grid](x, y, x.numel(), **constants)

        found.append(
            Candidate("read", block, steps, warps, read, nbytes, lambda sums=sums: near(sums.double().sum().item()))
        )
        found.append(Candidate("copy", block, steps, warps, copy, 2 * nbytes, copied))
    return found


def measured(device: str, nbytes: int, rounds: int, seconds: float) -> list[dict]:
    """A row for each candidate whose result is right, and for each that is wrong without a time."""
    where, rows = measure.machine(device), []
    for one in progress.bar(candidates(device, nbytes), unit="kernel", leave=False):
        one.call()
        row = dict(zip(COLUMNS, one[:4], strict=False)) | {"mb": f"{one.bytes_moved / 1e6:.1f}"} | where
        if not one.right():
            rows.append(row | {"correct": "no"})
            continue
        times = timing.interleave({one.kernel: (one.call, contextlib.nullcontext)}, rounds, seconds, device)[one.kernel]
        low, high = times.quartiles
        row |= {"median_ms": f"{times.median * 1e3:.4f}", "q25_ms": f"{low * 1e3:.4f}", "q75_ms": f"{high * 1e3:.4f}"}
        rows.append(row | {"tb_per_s": f"{one.bytes_moved / times.median / 1e12:.4f}", "correct": "yes"})
    return rows


def best(rows: list[dict]) -> dict[str, dict]:
    """The fastest row of each kernel."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["correct"] == "yes":
            fastest = found.get(row["kernel"])
            if fastest is None or float(row["tb_per_s"]) > float(fastest["tb_per_s"]):
                found[row["kernel"]] = row
    return found


def machine(device_name: str, *folders: Path) -> Machine | None:
    """The machine of a device's name with the roof that was measured on it, from the first of the folders that has
    one; else with that of the paper; None for a device that is not known."""
    found = known(device_name)
    for folder in folders if found else ():
        path = folder / "roof.csv"
        if path.is_file():
            with path.open(newline="") as opened:
                top = best([row for row in csv.DictReader(opened) if row["device"] == device_name])
            if len(top) == 2:
                return found.with_roof(*(float(top[kernel]["tb_per_s"]) * 1e12 for kernel in ("read", "copy")))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bandwidth", description=__doc__.split(": python")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where roof.csv goes")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each setting (default 5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small tensor")
    options = parser.parse_args(arguments)
    path = options.results / "roof.csv"
    records.check_place(path)
    rows = measured(options.device, SMALL if options.quick else LARGE[options.device], options.rounds, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for kernel, row in best(rows).items():
        settings = ", ".join(f"{row[name]} {name}" for name in COLUMNS[1:4] if row[name])
        print(f"{kernel}: {row['tb_per_s']} TB/s{f' ({settings})' * bool(settings)} on {row['device']}")
    print(f"wrote {path}")
    return 0 if len(best(rows)) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
