"""What a step of CinST takes, by a model of its CUDA kernels' machine code: python -m benchmarks.offline.modelled

A training step of eight clips of eight frames on an H200, in bf16 and TCHW, at the stages of the paper's units. Its
launches run one after the other, and each takes the longest of

    issue     instructions / (4 a cycle x 1.7 GHz) of the multiprocessors that have blocks, by a gate's slowest block
    L1        lines and turns of banks of the same multiprocessors, one a cycle
    memory    bytes of x-sized tensors, or of a gate's maps, / 4.3 TB/s
    launch    2 us, in a CUDA graph

The counts are those of issued.py and issued_gates.py. Left out: waits, of the blocks of a gate for one another too, and
maps that come from L2. So a step takes longer than this; the model tells which pass to mend.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields

from aia_kernels.common.maps import CHANNEL, SPACETIME

from .. import records, table
from ..gpus import GRAPH_US
from . import issued, issued_gates, machine_code
from .issued import MULTIPROCESSORS, PAGE, build

FILE = records.RESULTS / "modelled.csv"
TABLE = "modelled step"
#: Channels of a unit by the side of its planes.
STAGES = {56: 64, 28: 128, 14: 256, 7: 512}
#: The launches of a step in their order (algorithms/attention_in_attention.py): a pass, and of a gate its context.
STEP = (
    ("inner pool", 0),
    ("gate", CHANNEL),
    ("pool", 0),
    ("gate", SPACETIME),
    ("recalibrate", 0),
    ("move_statistics_", 0),
    ("gate_again", SPACETIME),
    ("recalibrate_reduce", 0),
    ("gate_backward", SPACETIME),
    ("gate_again", CHANNEL),
    ("unpool_reduce", 0),
    ("gate_backward", CHANNEL),
    ("unpool", 0),
)


REASONS = ("issue", "L1", "memory", "launch")


@dataclass(frozen=True)
class Part:
    """One launch of a step; times in microseconds."""

    launch: str
    stage: int
    blocks: int
    issue: float
    l1: float
    memory: float

    @property
    def us(self) -> float:
        return max(self._times)

    @property
    def reason(self) -> str:
        return REASONS[self._times.index(self.us)]

    @property
    def _times(self) -> tuple[float, ...]:
        return self.issue, self.l1, self.memory, GRAPH_US


def part(launch: str, stage: int, row: dict) -> Part:
    """The launch that a row of either table of what is issued describes."""
    blocks = int(row["blocks"])
    # Multiprocessors without a block issue nothing.
    longer = max(1.0, MULTIPROCESSORS / blocks) * float(row.get("slowest_block", 1))
    issue, l1 = (round(float(row[column]) * longer, 2) for column in ("issue_us", "l1_us"))
    return Part(launch, stage, blocks, issue, l1, float(row["memory_us"]))


def count(x: issued.Library, gates: issued.Library, stage: int) -> Iterator[Part]:
    """The launches of a step at planes of this side."""
    channels = STAGES[stage]
    for name, context in STEP:
        if context:
            of_gate = issued_gates.row(gates, name, context, stage, "TCHW", channels)
            yield part(f"{name} over {issued_gates.NAMES[context]}", stage, of_gate)
        elif name in issued.TRAFFIC:
            yield part(name, stage, issued.row(x, name, "CinST", stage, "TCHW", "bf16", channels))
        else:  # of a few numbers
            yield Part(name, stage, 1, 0.0, 0.0, 0.0)


def read() -> dict[int, list[Part]]:
    """The committed steps, by stage."""
    with FILE.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    kinds = {"launch": str, "stage": int, "blocks": int}
    parts = [Part(**{name: kinds.get(name, float)(value) for name, value in row.items()}) for row in rows]
    return {stage: [one for one in parts if one.stage == stage] for stage in STAGES}


def markdown(steps: dict[int, list[Part]]) -> list[str]:
    """A line for each launch, by stage its time and what decides it, and one for the whole."""
    made = [["launch", *(f"{c}x{side}x{side}" for side, c in STAGES.items())], ["---"] * (1 + len(STAGES))]
    for parts in zip(*steps.values(), strict=True):
        made.append([parts[0].launch, *(f"{one.us:.1f} {one.reason}" for one in parts)])
    made.append(["all", *(f"{sum(one.us for one in parts):.0f}" for parts in steps.values())])
    return [f"| {' | '.join(line)} |" for line in made]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline.modelled", description=__doc__.split(": python")[0]
    )
    parser.add_argument("--markdown", action="store_true", help="count nothing: put the rows of the CSV into the page")
    options = parser.parse_args(arguments)
    if not options.markdown:
        nvcc, tool = shutil.which("nvcc"), machine_code.cuobjdump()
        if nvcc is None or tool is None:
            print(machine_code.NO_DISASSEMBLER if nvcc else "nvcc is not here", file=sys.stderr)
            return 2
        x = issued.Library(build(nvcc), tool)
        gates = issued.Library(build(nvcc, issued_gates.FOLDER, sources=issued_gates.SOURCES), tool)
        with FILE.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, [field.name for field in fields(Part)])
            writer.writeheader()
            for stage in STAGES:
                writer.writerows(vars(one) for one in count(x, gates, stage))
    lines = markdown(read())
    print("\n".join(lines))
    return 0 if not options.markdown or table.write_into(PAGE, TABLE, "\n".join(lines)) else 2


if __name__ == "__main__":
    sys.exit(main())
