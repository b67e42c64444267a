"""What ``auto`` takes on a GPU, decided by measured rows: python -m benchmarks.choices

Reads the rows of layers that benchmarks.run wrote and, for each device, family and type, writes the fused backends in
the order of their time to the table that the package reads (aia_kernels/backends/choices.csv). The time of a backend is
the geometric mean over cases and modes of its time by the best one's in the same case; a case in which one of them is
missing or wrong decides nothing. ``worst`` says what the order costs where another one would be best: the largest such
ratio of the chosen backend. As long as it stays near 1 there is nothing to gain from choosing by size.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

from aia_kernels.backends import choices

from . import providers, records, registry

#: The types of rows as torch calls them.
TYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in registry.DTYPES.items()}
CASE = ("name", "stage", "clips", "layout", "mode")


def decide(family: str, rows: list[dict]) -> list[dict]:
    """The rows of the table for the rows of one family's layers, which are of one device."""
    found = []
    for dtype, called in TYPES.items():
        cases: dict[tuple, dict[str, float]] = {}
        for row in records.select(rows, dtype=dtype, kind="unit") + records.select(rows, dtype=dtype, kind="layer"):
            if row["provider"] in providers.FUSED and row["provider"] != "cpu" and row["correct"] == "yes":
                cases.setdefault(tuple(row[c] for c in CASE), {})[row["provider"]] = float(row["median_ms"])
        backends = {name for times in cases.values() for name in times}
        whole = [times for times in cases.values() if set(times) == backends]
        if len(backends) < 2 or not whole:
            continue
        by_best = {name: [times[name] / min(times.values()) for times in whole] for name in backends}
        means = {name: statistics.geometric_mean(ratios) for name, ratios in by_best.items()}
        order = sorted(means, key=lambda name: (means[name], name))
        found.append(
            {
                "device": rows[-1]["device"],
                "family": family,
                "dtype": called,
                "order": " ".join(order),
                "times": " ".join(f"{means[name]:.3f}" for name in order),
                "worst": f"{max(by_best[order[0]]):.3f}",
                "cases": len(whole),
                "commit": rows[-1]["commit"],
                "date": rows[-1]["date"],
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.split(": python")[0])
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, metavar="DIR", help="the rows of benchmarks.run"
    )
    parser.add_argument("--output", type=Path, default=choices.TABLE, metavar="PATH", help="the table to write")
    options = parser.parse_args(arguments)
    if records.rehearsing() and options.output.resolve() == choices.TABLE:
        print("a rehearsal decides nothing: name another table with --output", file=sys.stderr)
        return 2
    decided = []
    for family in registry.FAMILIES:
        path = records.path(options.results, family)
        if path.is_file():
            decided += decide(family, records.read(path))
    known = choices.read(options.output) if options.output.is_file() else []
    key = ("device", "family", "dtype")
    newer = {tuple(row[c] for c in key): row for row in [*known, *decided]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, choices.COLUMNS)
        writer.writeheader()
        writer.writerows(newer.values())
    for row in decided:
        print(
            f"{row['device']}, {row['family']}, {row['dtype']}: {row['order']} ({row['times']}; worst {row['worst']})"
        )
    if not decided:
        print("no case has rows of two fused GPU backends: the order stays what it was")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
