"""Rows: their columns, writing them to a CSV and reading them back."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from . import watch

COLUMNS = [
    *("kind", "name", "stage", "clips", "dtype", "layout", "mode", "provider", "median_ms", "q25_ms", "q75_ms"),
    *("samples", "budget_mb", "gb_per_s", "copies", "clones", "speedup", "kept_mb", "kept_x", "max_error", "correct"),
    *("timed", "wall_ms", "launches", "moved_mb", "predicted_ms", "of_roof", "error"),
    *("device", "cpu", "threads", "torch", "triton", "commit", "date"),
]
KEY = ("kind", "name", "stage", "clips", "dtype", "layout", "mode", "provider", "device")
RESULTS = Path(__file__).resolve().parent / "results"

#: The device in the rows of a rehearsal of ``make gpu``, whose numbers mean nothing.
REHEARSAL = "rehearsal on the CPU"


def failure(error: BaseException) -> str:
    """What was raised on one line: its type and the first line of its message that says something."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


@contextlib.contextmanager
def noted(row: dict, stage: str) -> Iterator[None]:
    """What is raised inside goes into the column ``error`` of a row, with the stage at which it was, and no further."""
    try:
        with watch.running(row["provider"], stage):
            yield
    except Exception as error:
        row["error"] = f"{stage}: {failure(error)}"
        tqdm.write(f"{' '.join(str(row.get(c, '')) for c in KEY)}: {row['error']}", file=sys.stderr)


def rehearsing() -> bool:
    return os.environ.get("AIA_KERNELS_REHEARSAL") == "1"


def check_place(file: Path) -> None:
    """Refuse to mix the numbers of a rehearsal with measured ones."""
    if rehearsing() and file.resolve().is_relative_to(RESULTS):
        raise SystemExit(f"a rehearsal does not write to {RESULTS}; name another directory with --results")


def path(folder: Path, family: str, passes: bool = False) -> Path:
    """The CSV of a family's layers or raw passes."""
    return folder / family / ("passes.csv" if passes else "layers.csv")


def write(file: Path, rows: list[dict]) -> None:
    """Append rows; older rows in a file of other columns get those of today, empty where they have none."""
    check_place(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    older = []
    if file.exists():
        with file.open(newline="") as opened:
            reader = csv.DictReader(opened)
            older = None if reader.fieldnames == COLUMNS else list(reader)
    with file.open("a" if older is None else "w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, restval="", extrasaction="ignore")
        if older is not None:
            writer.writeheader()
            writer.writerows(older)
        writer.writerows(rows)


def read(file: Path) -> list[dict]:
    """The newest row of each key, with a time, of the device measured last."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    newest = {tuple(row[column] for column in KEY): row for row in rows}
    return [row for row in newest.values() if row["median_ms"] and row["device"] == rows[-1]["device"]]


def select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[column] == str(value) for column, value in wanted.items())]


def ordered(found, order) -> list:
    """The members of ``found`` in the order given, others last."""
    return sorted(set(found), key=lambda value: (list(order).index(value) if value in order else len(order), value))
