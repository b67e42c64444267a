"""The measured table by which ``auto`` chooses a GPU backend: choices.csv, which benchmarks/choices.py writes.

A row says for a device (by the name torch gives it), a family and a type in which order the backends are to be tried,
with the times that decided it, relative to the best one's in the same case. A device without a row gets the order of
backends.AUTO.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path

TABLE = Path(__file__).resolve().with_name("choices.csv")
COLUMNS = ["device", "family", "dtype", "order", "times", "worst", "cases", "commit", "date"]


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


@functools.cache
def measured_order(device_name: str, family: str, dtype: str) -> tuple[str, ...] | None:
    """The backends in the order of their measured times, the fastest first, or None where nothing was measured."""
    wanted = {"device": device_name, "family": family, "dtype": dtype}
    rows = [row for row in read() if all(row[column] == value for column, value in wanted.items())]
    return tuple(rows[-1]["order"].split()) if rows else None
