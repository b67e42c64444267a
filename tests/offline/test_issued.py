"""What the passes of csrc/cuda issue on the shapes of a ResNet's stages (benchmarks/offline/issued.py), held to bounds.

The committed rows are held in every run; where nvcc is, what a small source gives now, and what all give in sweeps.
"""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
from conftest import nvcc

from benchmarks.offline import issued, issued_gates, launches, machine_code, modelled, roofline

KIB_IN_FLIGHT = 48


#: By pass, layout and type: what was reached of issue over memory at 56, 28, 14 and 7. Wanted are 0.8 in fp32 and 1.0
#: in bf16. Rows of 14 meet their maps in twos; those of 7 one by one, but of unpool and recalibrate
#: from shared memory.
REACHED = {
    ("unpool", "TCHW", "fp32"): (0.59, 0.59, 0.74, 0.66),
    ("unpool", "TCHW", "bf16"): (1.16, 1.20, 1.60, 1.37),
    ("unpool", "THWC", "fp32"): (0.54, 0.54, 0.54, 0.54),
    ("unpool", "THWC", "bf16"): (1.06, 1.07, 1.07, 1.09),
    ("inner pool", "TCHW", "fp32"): (0.39, 0.38, 0.40, 0.36),
    ("inner pool", "TCHW", "bf16"): (0.71, 0.77, 0.9, 0.69),
    ("recalibrate", "TCHW", "fp32"): (0.21, 0.21, 0.28, 0.30),
    ("recalibrate", "TCHW", "bf16"): (0.41, 0.41, 0.66, 0.66),
    ("unpool_reduce by bricks", "TCHW", "fp32"): (0.59, 0.60, 0.75, 1.85),
    ("unpool_reduce by bricks", "TCHW", "bf16"): (1.24, 1.27, 1.59, 4.35),
    ("pool by strips", "TCHW", "fp32"): (1.1, 0.83, 0.79, 0.76),
    ("pool by strips", "TCHW", "bf16"): (2.3, 1.74, 1.66, 1.62),
    ("unpool_reduce by strips", "TCHW", "fp32"): (0.78, 0.50, 0.43, 0.40),
    ("unpool_reduce by strips", "TCHW", "bf16"): (1.68, 1.06, 0.92, 0.88),
    ("recalibrate_reduce by strips", "TCHW", "fp32"): (0.30, 0.18, 0.18, 0.18),
    ("recalibrate_reduce by strips", "TCHW", "bf16"): (0.74, 0.43, 0.43, 0.43),
}


#: KiB in flight, where fewer were reached: pool of x over C has a block or two for a frame where rows are short.
FEWER_IN_FLIGHT = {"inner pool": 8}

#: By gate pass and layout, what was reached of instructions for each multiply-add over T, H and W, at 56, 28, 14 and 7,
#: and a hundredth. Wanted are 1.5.
GATES = {
    ("gate", "TCHW"): (1.56, 1.73, 1.61, 1.79),
    ("gate", "THWC"): (1.60, 1.61, 1.63, 1.72),
    ("gate_again", "TCHW"): (1.44, 1.57, 1.38, 1.55),
    ("gate_again", "THWC"): (1.48, 1.46, 1.46, 1.51),
    ("gate_backward", "TCHW"): (1.54, 1.59, 1.49, 1.81),
    ("gate_backward", "THWC"): (1.67, 1.59, 1.52, 1.88),
}
#: Microseconds that a gate's pass over C takes of the model at most, in a step at any stage.
GATES_OVER_C = 3.4


#: Microseconds that were reached of a modelled step, by stage. Wanted are 150, 87, 59 and 51.
STEP = {56: 114, 28: 67, 14: 44, 7: 41}


def hold(row: dict) -> None:
    """A row, to its bounds: what was reached, and a twentieth for another compiler."""
    of = row["pass"], row["layout"], row["dtype"]
    stage = int(row["stage"])
    assert int(row["local_bytes"]) == 0, row
    assert float(row["issue_per_memory"]) <= 1.05 * REACHED[of][(56, 28, 14, 7).index(stage)], row
    # Of elements of 16 bits that lie alone, half of each word that is copied counts.
    alone = (*of[1:], stage) == ("TCHW", "bf16", 7)
    halves = {"unpool_reduce by bricks": 32}
    least = halves.get(row["pass"], KIB_IN_FLIGHT) if alone else KIB_IN_FLIGHT
    least = FEWER_IN_FLIGHT.get(row["pass"], least)
    assert int(row["in_flight_kib_per_sm"]) >= least, row


def test_the_committed_rows():
    with issued.FILE.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == len(issued.STAGES) * (4 * len(issued.UNITS) + 2 * len(issued.ONLY))
    for row in rows:
        hold(row)
    lines = issued.markdown(rows)
    assert len(lines) == 2 + 2 * len(issued.UNITS) + len(issued.ONLY) and len({line.count("|") for line in lines}) == 1


def test_the_committed_rows_of_gates():
    with issued_gates.FILE.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    kinds = sum(map(len, issued_gates.MAPS.values()))
    assert len(rows) == kinds * len(issued_gates.PASSES) * len(issued.STAGES)
    for row in rows:
        assert int(row["local_bytes"]) == 0, row
        # Over C a block has a few planes, and what it does once counts for more.
        if row["maps"] != "C":
            most = GATES[row["pass"], row["layout"]][(56, 28, 14, 7).index(int(row["stage"]))]
            assert float(row["per_multiply_add"]) <= most, row
        assert float(row["slowest_block"]) <= 1.25, row
    lines = issued_gates.markdown(rows)
    assert len(lines) == 2 + kinds * len(issued_gates.PASSES) and len({line.count("|") for line in lines}) == 1


def test_the_modelled_step():
    """Its launches are those of the algorithm, their bytes those of the design, and each takes what decides it."""
    case = next(case for case in roofline.cases("attention_in_attention") if str(case).startswith("CinST-64x56x56-8"))
    passes = [one.part for one in roofline.count(replace(case, dtype="bf16"), "cuda", "step")]
    assert [name.removeprefix("inner ") for name, _ in modelled.STEP] == passes
    for stage, parts in modelled.read().items():
        assert [one.launch.removeprefix("inner ").split(" over")[0] for one in parts] == passes
        x_bytes = 64 * modelled.STAGES[stage] * stage**2 * 2
        of_x = sum(one.memory for one in parts if not one.launch.startswith("gate"))
        assert of_x == pytest.approx((7 + 2) * x_bytes / issued.BANDWIDTH * 1e6, abs=0.3)
        for one in parts:
            assert one.us <= GATES_OVER_C or not one.launch.endswith("over C"), one
            assert one.us == max(one.issue, one.l1, one.memory, 2.0) and one.reason in modelled.REASONS
        assert sum(one.us for one in parts) <= STEP[stage], stage
    lines = modelled.markdown(modelled.read())
    assert len(lines) == 2 + len(modelled.STEP) + 1 and len({line.count("|") for line in lines}) == 1


def test_a_launch_of_few_blocks_takes_longer():
    """Half of the multiprocessors have twice the work."""
    row = {"blocks": "66", "issue_us": "3.0", "l1_us": "1.0", "memory_us": "5.0", "slowest_block": "1.10"}
    found = modelled.part("gate over C", 7, row)
    assert (found.issue, found.l1, found.memory) == (6.6, 2.2, 5.0)
    assert (found.us, found.reason) == (6.6, "issue")


def library_of(folder, *sources: str) -> issued.Library:
    if (tool := machine_code.cuobjdump()) is None:
        pytest.skip(machine_code.NO_DISASSEMBLER)
    return issued.Library(issued.build(nvcc(), folder, sources=sources), tool)


def test_what_a_small_source_gives(tmp_path):
    """Those of the reductions by strips, of patches and by bricks compile in seconds."""
    library = library_of(tmp_path, "bricks", "patches", "strips")
    for row in issued.rows(library, [name for name in issued.ONLY if " by " in name], [28, 14, 7]):
        hold(row)
    with pytest.raises(ValueError, match="unpool gave the error -1; -1: the library has no such pass"):
        library.recorder.launches("unpool", (1, 2, 8, 8, 8), "TCHW", "fp32", launches.SPACETIME)


@pytest.mark.sweep  # which compiles for minutes
def test_what_the_sources_give(tmp_path):
    library = library_of(tmp_path, *issued.SOURCES)
    for row in issued.rows(library, ["unpool", *issued.ONLY], [56, 14, 7]):
        hold(row)
    moved = library.count(*library.recorder.launches("recalibrate", (1, 2, 8, 8, 8), "TCHW", "fp32", 3))
    assert moved.read == moved.written == 2 * 8 * 8 * 8 * 4  # all blocks of a small shape: exact
