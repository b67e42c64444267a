"""What the x-sized passes of csrc/cuda issue on real shapes, without a GPU: python -m benchmarks.offline.issued

The passes are compiled for sm_90 and linked with a CUDA runtime that runs nothing (launches.py), so that their own host
code chooses kernels, grids and parameters. The machine code of three blocks of each launch, the first, the middle and
the last, or where a pass goes frame by frame that of the first frame's blocks, is then run warp by warp, of long ones
four warps (warp.py): every loop takes the turns that it takes on that shape. The model:

    issue     instructions that all warps issue / (132 multiprocessors x 4 a cycle x 1.7 GHz)
    memory    bytes of x-sized tensors / 4.3 TB/s
    L1        lines of 128 bytes that each access meets, and turns of shared memory's banks / (132 a cycle x 1.7 GHz)

A pass takes the largest of the three at least. What the model leaves out: waits, pipes that take an instruction every
second cycle only, maps in L2, launches. In flight are the bytes of x-sized inputs that a thread has asked for and not
yet met, at most, times the threads that a multiprocessor holds of that launch.

Two things hold the count to the truth: the blocks that are run load and store every element of x exactly as often as
the pass says, and instructions that are not known are errors.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import records, table
from . import ROOT, launches, machine_code, sass, warp
from .lanes import LANES

FILE = records.RESULTS / "issued.csv"
PAGE = ROOT / "docs" / "gpu.md"
BUILD = ROOT / "build" / "issued"
SOURCES = ("bricks", "patches", "pool", "recalibrate", "staged", "strips", "unpool")
FLAGS = ("-std=c++20", "-O3", "-cudart", "none", "-Xcompiler", "-fPIC", "-arch=sm_90")

MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.7e9, 4.3e12
#: Channels of a ResNet-50's stage by the side of its planes.
STAGES = {56: 256, 28: 512, 14: 1024, 7: 2048}
#: By unit, the contexts of the outer and of the inner gate.
UNITS = {"CinST": (launches.SPACETIME, launches.CHANNEL), "STinC": (launches.CHANNEL, launches.SPACETIME)}
#: By pass, how often it reads and writes x-sized tensors. "inner pool" is pool of x itself, for the inner gate.
TRAFFIC = {
    "inner pool": (1, 0),
    "pool": (1, 0),
    "pool by strips": (1, 0),
    "unpool_reduce by strips": (1, 0),
    "recalibrate_reduce by strips": (2, 0),
    "recalibrate": (1, 1),
    "recalibrate_reduce": (2, 0),
    "unpool_reduce": (1, 0),
    "unpool_reduce by bricks": (1, 0),
    "unpool": (1, 1),
}
#: Passes that serve some units and layouts alone.
ONLY = {
    "inner pool": (("CinST",), ("TCHW",)),
    "recalibrate": (("CinST",), ("TCHW",)),
    "unpool_reduce by bricks": (("CinST",), ("TCHW",)),
    "pool by strips": (("CinST",), ("TCHW",)),
    "unpool_reduce by strips": (("STinC",), ("TCHW",)),
    "recalibrate_reduce by strips": (("CinST",), ("TCHW",)),
}
#: In the layouts of ONLY.
BY_FRAME = ("inner pool",)
#: Instructions of a warp.
LONG = 20_000
COLUMNS = [
    *("pass", "unit", "stage", "layout", "dtype", "registers", "local_bytes", "blocks", "blocks_per_sm"),
    *("per_element", "in_flight_kib_per_sm", "issue_us", "memory_us", "l1_us", "issue_per_memory"),
]


@dataclass(frozen=True)
class Count:
    """Of a launch: warp instructions, x-sized bytes that were read and written, lines of L1, bytes in flight."""

    instructions: float
    read: float
    written: float
    lines: float
    in_flight: float


class Library:
    """Passes that were built for counting."""

    def __init__(self, path: Path, tool: str):
        self.kernels = {kernel.name: kernel for kernel in sass.read(tool, str(path))}
        self.recorder = launches.Recorder(path, self.kernels)
        self._programs: dict[str, warp.Program] = {}

    def program(self, name: str) -> warp.Program:
        return self._programs.setdefault(name, warp.Program(self.kernels[name]))

    def count(self, launch: launches.Launch, frames: int = 1) -> Count:
        """Of a launch whose blocks are as many for each of some frames, or else alike but for the last."""
        program = self.program(launch.kernel)
        bank = program.bank(launch.parameters, launch.blocks, launch.threads)
        by_frame = range(launch.blocks // frames) if frames > 1 else None
        totals = {b: _of_block(program, bank, b, launch.threads) for b in by_frame or _sample(launch.blocks)}
        if by_frame:
            sums = [frames * sum(total[k] for total in totals.values()) for k in range(4)]
            return Count(*sums, in_flight=max(total[4] for total in totals.values()))
        last = launch.blocks - 1
        others = [total for block, total in totals.items() if block != last or last == 0]
        sums = [
            totals[last][k] * (last > 0) + sum(total[k] for total in others) / len(others) * max(last, 1)
            for k in range(4)
        ]
        return Count(*sums, in_flight=max(total[4] for total in totals.values()))


def _sample(blocks: int) -> list[int]:
    return sorted({0, blocks // 2, blocks - 1})


def _of_block(program: warp.Program, bank: bytes, block: int, threads: int) -> tuple[float, ...]:
    """The numbers of a Count; bytes in flight are those of a thread. Of warps that run for long, four stand for all."""
    inputs, output = frozenset(launches.INPUTS), launches.OUTPUT
    warps = -(-threads // LANES)

    def one(number: int) -> tuple[float, ...]:
        found = warp.Warp(program, bank, block, number, threads, inputs).run()
        read = sum(found.loaded[buffer] for buffer in inputs)
        written = found.stored[output]
        return found.instructions, read, written, found.wavefronts, found.in_flight / LANES

    first = one(0)
    chosen = range(warps) if first[0] < LONG else sorted({0, warps // 3, 2 * warps // 3, warps - 1})
    found = [first, *(one(number) for number in chosen if number)]
    sums = [sum(numbers) * warps / len(found) for numbers in zip(*found, strict=True)]
    return *sums[:4], max(numbers[4] for numbers in found)


def row(library: Library, name: str, unit: str, side: int, layout: str, dtype: str, channels: int = 0) -> dict:
    """Of eight clips of eight frames, with the channels of STAGES unless others are given."""
    shape = (8, 8, channels or STAGES[side], side, side)
    outer, inner = UNITS[unit]
    if name == "inner pool":
        found = library.recorder.launches("pool", shape, layout, dtype, inner)
    else:
        found = library.recorder.launches(name, shape, layout, dtype, outer, inner)
    frames = shape[0] * shape[1] if name in BY_FRAME else 1
    counts = [library.count(launch, frames) for launch in found]
    elements, size = math.prod(shape), launches.SIZES[dtype]
    moved = sum(count.read + count.written for count in counts)
    expected = sum(TRAFFIC[name]) * elements * size
    # Elements of 16 bits are copied in words; warps share those at their ends, two elements of 32 where they lie alone.
    if abs(moved / expected - 1) > 0.07:
        raise AssertionError(f"{name} moves {moved / expected:.3f} of what it should: {shape}, {layout}, {dtype}")
    instructions = sum(count.instructions for count in counts)
    issue = instructions / (MULTIPROCESSORS * 4 * CLOCK)
    memory = expected / BANDWIDTH
    kernel, launch, count = library.kernels[found[0].kernel], found[0], counts[0]
    shared = kernel.shared + launch.shared
    fitting, _ = machine_code.occupancy("sm_90", kernel.registers, shared, launch.threads)
    resident = min(fitting, launch.blocks / MULTIPROCESSORS)
    return {
        "pass": name,
        "unit": unit,
        "stage": side,
        "layout": layout,
        "dtype": dtype,
        "registers": kernel.registers,
        "local_bytes": kernel.local,
        "blocks": launch.blocks,
        "blocks_per_sm": fitting,
        "per_element": f"{instructions * LANES / elements:.1f}",
        "in_flight_kib_per_sm": f"{count.in_flight * launch.threads * resident / 1024:.0f}",
        "issue_us": f"{issue * 1e6:.1f}",
        "memory_us": f"{memory * 1e6:.1f}",
        "l1_us": f"{sum(count.lines for count in counts) / (MULTIPROCESSORS * CLOCK) * 1e6:.1f}",
        "issue_per_memory": f"{issue / memory:.2f}",
    }


def rows(library: Library, passes: list[str], sides: list[int]) -> Iterator[dict]:
    for name in passes:
        units, layouts = ONLY.get(name, (tuple(UNITS), ("TCHW", "THWC")))
        for unit, side, layout, dtype in itertools.product(units, sides, layouts, ("fp32", "bf16")):
            yield row(library, name, unit, side, layout, dtype)


def build(nvcc: str, folder: Path = BUILD, csrc: Path = ROOT / "csrc", sources: tuple[str, ...] = SOURCES) -> Path:
    """The passes of some sources and the runtime that runs nothing, in one library. Compiled again where a source has
    changed."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in csrc.glob("c*/*") if path.parent.name in ("cuda", "common"))
    recorder = Path(__file__).with_name("launches.cpp")
    objects = []
    passes = [path for name in sources if (path := csrc / "cuda" / f"{name}.cu").exists()]
    for source in (*passes, recorder):
        objects.append(folder / f"{source.stem}.o")
        if not objects[-1].exists() or objects[-1].stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([nvcc, *FLAGS, "-c", source, "-o", objects[-1]], check=True)
    library = folder / "passes.so"
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", library], check=True)
    return library


def markdown(found: list[dict]) -> list[str]:
    """A line for each pass, unit and layout: by stage, fp32 and after a stroke bf16."""
    sides = sorted({int(one["stage"]) for one in found}, reverse=True)
    made = [["pass", "unit", "layout", *(f"{s}x{s}" for s in sides), "KiB in flight", "instructions per element"]]
    made.append(["---"] * len(made[0]))
    for key in dict.fromkeys((one["pass"], one["unit"], one["layout"]) for one in found):
        of = [one for one in found if (one["pass"], one["unit"], one["layout"]) == key]

        def both(column: str, side: int, of: list[dict] = of) -> str:
            return " / ".join(one[column] for one in of if int(one["stage"]) == side)

        ratios = [both("issue_per_memory", side) for side in sides]
        least = min(int(one["in_flight_kib_per_sm"]) for one in of)
        made.append([*key, *ratios, f"{least} or more", "; ".join(both("per_element", side) for side in sides)])
    return [f"| {' | '.join(line)} |" for line in made]


def into_page(file: Path, name: str, lines_of: Callable[[list[dict]], list[str]]) -> int:
    """Put the rows of a CSV into the page, as the table of this name; an exit status."""
    with file.open(newline="") as opened:
        text = "\n".join(lines_of(list(csv.DictReader(opened))))
    return 0 if table.write_into(PAGE, name, text) else 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline.issued", description=__doc__.split(": python")[0]
    )
    parser.add_argument("--passes", nargs="+", choices=tuple(TRAFFIC), default=list(TRAFFIC))
    parser.add_argument("--stages", nargs="+", type=int, choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="other sources, to compare with")
    parser.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="where objects are kept")
    parser.add_argument("--output", type=Path, default=FILE, metavar="CSV")
    parser.add_argument("--markdown", action="store_true", help="count nothing: put the rows of the CSV into the page")
    options = parser.parse_args(arguments)
    if options.markdown:
        return into_page(options.output, "issued", markdown)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    tool = machine_code.cuobjdump()
    if nvcc is None or tool is None:
        print(machine_code.NO_DISASSEMBLER if nvcc else "nvcc is not here", file=sys.stderr)
        return 2
    library = Library(build(nvcc, options.build, options.csrc), tool)
    with options.output.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for one in rows(library, options.passes, options.stages):
            writer.writerow(one)
            print(*one.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
