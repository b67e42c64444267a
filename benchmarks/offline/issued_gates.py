"""What the gate passes of csrc/cuda issue on the maps of a ResNet, as issued.py counts it for the x-sized ones:
python -m benchmarks.offline.issued_gates

An element meets 54 multiply-adds forward, 27 taps of two features, and 108 backward. The maps are those over T, over H
and over W, in fp32; then the one over C, which is alike in every layout and has a fortieth of their elements, or less:
there what a block does once counts for more than an element. Their bytes are those that a pass reads and writes once.
Blocks of one launch work on different maps: the first block of each map is run, and counted for the items that the map
has. The slowest block is told over the mean.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from aia_kernels.common import maps

from .. import records
from . import launches, machine_code, warp
from .issued import BANDWIDTH, BUILD, CLOCK, MULTIPROCESSORS, STAGES, Library, build, into_page
from .lanes import LANES

FILE = records.RESULTS / "issued_gates.csv"
SOURCES = ("gate", "gate_backward")
FOLDER = BUILD.with_name("issued_gates")
CLIPS, FRAMES = 8, 8
#: By pass, the multiply-adds of an element, and how many maps are read and written.
PASSES = {"gate": (54, 5), "gate_again": (54, 4), "gate_backward": (108, 8)}
#: By pass, the threads of a strip.
STRIP_THREADS = {"gate": 1, "gate_again": 1, "gate_backward": 2}
#: Maps and layouts that are counted.
MAPS = {maps.SPACETIME: ("TCHW", "THWC"), maps.CHANNEL: ("TCHW",)}
NAMES = {maps.SPACETIME: "T, H, W", maps.CHANNEL: "C"}
COLUMNS = [
    *("pass", "maps", "stage", "layout", "registers", "local_bytes", "blocks", "blocks_per_sm", "per_element"),
    *("per_multiply_add", "slowest_block", "issue_us", "memory_us", "l1_us", "issue_per_memory"),
]


#: Of the first parameter of a launch, Maps in csrc/cuda/shares.h: the bytes before its maps, the numbers of each, and
#: the divisors behind them, of three numbers each.
HEAD, DIVISORS = 16, 7
FIELDS = (
    *("d0", "d1", "d2", "start", "length", "chunks", "strip", "across", "wide", "strips", "columns", "slabs"),
    *("tiles_down", "tiles_across", "pitch", "slab_step", "first_place", "slab_places", "beside", "together"),
    *("first_block", "blocks"),
)


def _shares(launch: launches.Launch, n: int) -> list[dict[str, int]]:
    """How the maps were cut and shared out."""
    layout = struct.Struct(f"<{len(FIELDS)}i{DIVISORS * 12}x")
    numbers = layout.iter_unpack(launch.parameters[HEAD : HEAD + n * layout.size])
    return [dict(zip(FIELDS, of_map, strict=True)) for of_map in numbers]


def _of_block(program: warp.Program, bank: bytes, block: int, threads: int, working: int) -> tuple[float, float]:
    """Instructions and lines of L1, where so many threads have strips, the first ones: of a warp that has strips in all
    lanes, one in some lanes and one without stand for all."""

    def of_warps(first: int, count: int) -> tuple[float, float]:
        if count <= 0:
            return 0.0, 0.0
        found = warp.Warp(program, bank, block, first, threads, frozenset()).run()
        return count * found.instructions, count * found.wavefronts

    full, rest = divmod(working, LANES)
    edge = full + (rest > 0)
    kinds = of_warps(0, full), of_warps(full, edge - full), of_warps(edge, threads // LANES - edge)
    return tuple(map(sum, zip(*kinds, strict=True)))


def row(library: Library, name: str, context: int, side: int, layout: str, channels: int = 0) -> dict:
    """Of eight clips of eight frames, with the channels of STAGES unless others are given."""
    shape = (CLIPS, FRAMES, channels or STAGES[side], side, side)
    of_maps = maps.map_dims(shape, context, layout)
    (launch,) = library.recorder.gate_launches(name, CLIPS, [length for of_map in of_maps for length in of_map])
    kernel = library.kernels[launch.kernel]
    program = library.program(launch.kernel)
    bank = program.bank(launch.parameters, launch.blocks, launch.threads)
    totals, slowest = [], 0.0
    for share in _shares(launch, len(of_maps)):
        groups = -(-share["chunks"] // share["slabs"])
        items = CLIPS * groups * share["tiles_down"] * share["tiles_across"] / share["blocks"]
        # The first block of a map has as many items as any.
        strips = share["slabs"] * share["strips"] * (share["columns"] // share["across"]) * STRIP_THREADS[name]
        found = _of_block(program, bank, share["first_block"], launch.threads, strips)
        slowest = max(slowest, found[0])
        totals.append([share["blocks"] * number * items / math.ceil(items) for number in found])
    instructions, lines = (sum(numbers) for numbers in zip(*totals, strict=True))
    elements = CLIPS * maps.packed_size(shape, context)
    multiply_adds, moved = PASSES[name]
    issue = instructions / (MULTIPROCESSORS * 4 * CLOCK)
    memory = 4 * moved * elements / BANDWIDTH
    fitting, _ = machine_code.occupancy("sm_90", kernel.registers, kernel.shared + launch.shared, launch.threads)
    per_element = instructions * LANES / elements
    return {
        "pass": name,
        "maps": NAMES[context],
        "stage": side,
        "layout": layout,
        "registers": kernel.registers,
        "local_bytes": kernel.local,
        "blocks": launch.blocks,
        "blocks_per_sm": fitting,
        "per_element": f"{per_element:.1f}",
        "per_multiply_add": f"{per_element / multiply_adds:.2f}",
        "slowest_block": f"{slowest * launch.blocks / instructions:.2f}",
        "issue_us": f"{issue * 1e6:.1f}",
        "memory_us": f"{memory * 1e6:.1f}",
        "l1_us": f"{lines / (MULTIPROCESSORS * CLOCK) * 1e6:.1f}",
        "issue_per_memory": f"{issue / memory:.2f}",
    }


def rows(library: Library, sides: list[int]) -> Iterator[dict]:
    for name, (context, layouts), side in itertools.product(PASSES, MAPS.items(), sides):
        for layout in layouts:
            yield row(library, name, context, side, layout)


def markdown(found: list[dict]) -> list[str]:
    """A line for each pass, maps and layout, by stage."""
    sides = sorted({int(one["stage"]) for one in found}, reverse=True)
    columns = {
        "instructions per element": "per_element",
        "per multiply-add": "per_multiply_add",
        "issue / memory": "issue_per_memory",
        "slowest block": "slowest_block",
    }
    made = [["pass", "maps over", "layout", *columns], ["---"] * (3 + len(columns))]
    for key in dict.fromkeys((one["pass"], one["maps"], one["layout"]) for one in found):
        of = {int(one["stage"]): one for one in found if (one["pass"], one["maps"], one["layout"]) == key}
        made.append([*key, *("; ".join(of[side][column] for side in sides) for column in columns.values())])
    return [f"| {' | '.join(line)} |" for line in made]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline.issued_gates", description=__doc__.split(", as")[0]
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--output", type=Path, default=FILE, metavar="CSV")
    parser.add_argument("--markdown", action="store_true", help="count nothing: put the rows of the CSV into the page")
    options = parser.parse_args(arguments)
    if options.markdown:
        return into_page(options.output, "issued_gates", markdown)
    nvcc, tool = shutil.which("nvcc"), machine_code.cuobjdump()
    if nvcc is None or tool is None:
        print(machine_code.NO_DISASSEMBLER if nvcc else "nvcc is not here", file=sys.stderr)
        return 2
    library = Library(build(nvcc, FOLDER, sources=SOURCES), tool)
    with options.output.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for one in rows(library, options.stages):
            writer.writerow(one)
            print(*one.values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
