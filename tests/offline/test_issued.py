"""What the passes of csrc/cuda issue on the shapes of a ResNet's stages (benchmarks/offline/issued.py), held to bounds.

The committed rows are held in every run, what the sources give now in sweeps, where nvcc is.
"""

from __future__ import annotations

import csv

import pytest
from conftest import nvcc

from benchmarks.offline import issued, machine_code

KIB_IN_FLIGHT = 48


def most(layout: str, dtype: str, stage: int) -> float:
    """Issue over memory of unpool, at most: what was reached, and a twentieth for another compiler. Wanted are 0.8 in
    fp32 and 1.0 in bf16. Rows that no vector of four divides meet their maps in twos, at 14, or one by one, at 7."""
    reached = {"fp32": 0.54, "bf16": 1.1}[dtype]
    if layout == "TCHW":
        by_stage = {"fp32": (0.59, 0.74, 1.11), "bf16": (1.22, 1.62, 2.43)}[dtype]
        reached = by_stage[{56: 0, 28: 0, 14: 1, 7: 2}[stage]]
    return 1.05 * reached


def hold(row: dict) -> None:
    """A row of unpool, to its bounds."""
    key = row["layout"], row["dtype"], int(row["stage"])
    assert int(row["local_bytes"]) == 0, row
    assert float(row["issue_per_memory"]) <= most(*key), row
    # Elements of 16 bits that lie alone: eight frames of four channels are 64 bytes a thread.
    assert int(row["in_flight_kib_per_sm"]) >= (32 if key == ("TCHW", "bf16", 7) else KIB_IN_FLIGHT), row


def test_the_committed_rows():
    with issued.FILE.open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["pass"] == "unpool"]
    assert len(rows) == len(issued.UNITS) * len(issued.STAGES) * 4
    for row in rows:
        hold(row)
    lines = issued.markdown(rows)
    assert len(lines) == 2 + 2 * len(issued.UNITS) and len({line.count("|") for line in lines}) == 1


@pytest.mark.sweep  # which compiles for minutes
def test_what_the_sources_give(tmp_path_factory):
    if (tool := machine_code.cuobjdump()) is None:
        pytest.skip(machine_code.NO_DISASSEMBLER)
    library = issued.Library(issued.build(nvcc(), tmp_path_factory.mktemp("issued")), tool)
    for row in issued.rows(library, ["unpool"], [56, 14, 7]):
        hold(row)
    moved = library.count(*library.recorder.launches("recalibrate", (1, 2, 8, 8, 8), "TCHW", "fp32", 3))
    assert moved.read == moved.written == 2 * 8 * 8 * 8 * 4  # all blocks of a small shape: exact
