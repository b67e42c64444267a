"""What the parts of ``make gpu`` found, on one page: python -m benchmarks.summary --results DIR

It is made of the files that they write as they go, so that a part that was cut short is told too: the smoke screen; the
tests that failed or were running; of every row its time beside the prediction (roofline.py), what was wrong or raised
first.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from . import bandwidth, checks, providers, records, registry, smoke, told
from .records import KEY

PARTS = ("smoke", "check", "bench", "network", "compile")
#: Titles and widths of the columns of a row.
HEADER = f"{'ms':>9} {'predicted':>9} {'times':>6} {'roof':>5} {'eager, ms':>9} {'publ./it':>8}  row"


def newest(path: Path) -> list[dict]:
    """The newest row of each key of the device that was measured last; an error only if nothing newer has a time."""
    with path.open(newline="") as opened:
        rows = [dict.fromkeys(records.COLUMNS, "") | row for row in csv.DictReader(opened)]  # older files have fewer
    found: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[column] for column in KEY)
        found.pop(key, None)
        if row["median_ms"]:  # what went wrong before it had a mode
            found.pop(tuple("" if column == "mode" else row[column] for column in KEY), None)
        found[key] = row
    return [row for row in found.values() if row["device"] == rows[-1]["device"]]


def named(row: dict) -> str:
    return " ".join(row[column] for column in ("name", "stage", "clips", "dtype", "layout", "mode", "provider"))


def line(row: dict) -> str:
    """A measured row: its time, in a graph, beside the prediction; its share of the roof; its time in eager."""
    ms, predicted = float(row["median_ms"]), float(row["predicted_ms"] or "nan")
    times = f"{ms / predicted:6.2f}" if predicted == predicted else f"{'':6}"
    cells = f"{ms:9.4f} {row['predicted_ms']:>9} {times} {row['of_roof']:>5} {row['wall_ms']:>9} {row['speedup']:>8}"
    return f"{cells}  {named(row)}{' (no graph)' if row['timed'] == 'calls' and row['predicted_ms'] else ''}"


def of_rows(title: str, path: Path) -> list[str]:
    """The rows of this package's backends, and whatever went wrong."""
    rows = newest(path)
    wrong = [f"  {row['error'] or 'wrong, error ' + row['max_error']}: {named(row)}" for row in rows if is_wrong(row)]
    measured = [row for row in rows if row["median_ms"] and row["provider"] in providers.FUSED]
    others = len(rows) - len(wrong) - len(measured)
    head = f"{title}: {len(measured)} rows, {len(wrong)} went wrong, {others} of others; on {rows[-1]['device']}"
    return ["", head, *wrong, *([HEADER, *map(line, measured)] if measured else [])]


def is_wrong(row: dict) -> bool:
    return bool(row["error"]) or row["correct"] == "no"


def of_smoke(results: Path) -> list[str]:
    path = results / "smoke.csv"
    return ["", *smoke.table(smoke.noted(path))] if path.is_file() else []


def of_checks(results: Path) -> list[str]:
    lines = []
    for name in ("tests", *checks.TOOLS):
        if (path := results / f"{name}.txt").is_file():
            *wrong, counts = checks.report(*told.read(path))
            lines += ["", f"{name}: {counts}", *(f"  {one}" for one in wrong)]
    return lines


def of_bench(results: Path) -> list[str]:
    lines = []
    if (path := results / "roof.csv").is_file():
        with path.open(newline="") as opened:
            best = bandwidth.best(list(csv.DictReader(opened)))
        lines = ["", *(f"roof, {name}: {row['tb_per_s']} TB/s on {row['device']}" for name, row in best.items())]
    for family in registry.FAMILIES:
        for passes, title in ((False, "layers"), (True, "passes")):
            if (path := records.path(results, family, passes)).is_file():
                lines += of_rows(f"{family}, {title}", path)
    return lines


def of_network(results: Path) -> list[str]:
    path = records.path(results, "network")
    return of_rows("network", path) if path.is_file() else []


PAGES = {"smoke": of_smoke, "check": of_checks, "bench": of_bench, "network": of_network, "compile": of_bench}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.split(": python")[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="what the parts wrote")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="of one part only (default all)")
    options = parser.parse_args(arguments)
    mark = "REHEARSAL on the CPU: " if records.rehearsing() else ""
    parts = PARTS[:-1] if options.part == "all" else (options.part,)
    lines = [one for part in parts for one in PAGES[part](options.results)]
    lines = lines or [f"nothing of {options.part} in {options.results}"]
    print(*(mark + one if one else one for one in lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
