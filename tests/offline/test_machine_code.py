"""What benchmarks.offline reads in machine code; test_cuda_offline.py has the rows of what is built."""

from __future__ import annotations

from sass_lines import code

from benchmarks.offline import sass
from benchmarks.offline.machine_code import occupancy, split_name


def hot(*lines: str) -> sass.HotPath:
    kernel = sass.Kernel("sm_90", "kernel", code(*lines), bank=0x210, parameters={0: (0, 8), 1: (8, 8)})
    return sass.hot_path(kernel, sass.Flow(kernel), [(0, 0, 8)])


LOADS = (
    "LDC.64 R2, c[0x0][0x210]",
    "LDC.64 R4, c[0x0][0x218]",
    "IMAD.WIDE R2, R0, 0x10, R2",
    "LDG.E.128 R8, desc[UR4][R2.64]",
)


def test_in_flight_until_the_first_use():
    two = (*LOADS, "LDG.E.128 R12, desc[UR4][R2.64+0x1000]", "FADD R16, R8, R12", "STG.E [R4.64], R16", "EXIT ")
    assert hot(*two).in_flight == 32 and hot(*two).loaded == 32 and hot(*two).stored == 4
    waited = (*LOADS, "FADD R16, R8, R8", "LDG.E.128 R12, desc[UR4][R2.64+0x1000]", "FADD R16, R16, R12", "EXIT ")
    assert hot(*waited).in_flight == 16 and hot(*waited).loaded == 32


def test_loads_that_are_not_of_x():
    found = hot(*LOADS, "LDG.E.128 R12, desc[UR4][R4.64]", "FADD R16, R8, R12", "EXIT ")
    assert found.loaded == 16 and found.in_flight == 16


def test_a_loop_that_asks_ahead():
    """Each round adds what the round before has asked for, and asks for its own."""
    loop = ("FADD R16, R16, R8", "LDG.E.128 R8, desc[UR4][R2.64]", "ISETP.NE P0, PT, R1, RZ, PT", "@P0 BRA 0x40")
    found = hot(*LOADS, *loop, "EXIT ")
    assert found.in_loop and len(found.instructions) == 4 and found.loaded == 16 and found.in_flight == 16
    # One that moves on from register to register has only the last load on its way.
    moved = ("FADD R16, R16, R8", "MOV R8, R12", "LDG.E.128 R12, desc[UR4][R2.64]", "@P0 BRA 0x40")
    assert hot(*LOADS, *moved, "EXIT ").in_flight == 16


def test_of_two_ways_the_one_with_vectors():
    way = (
        *("@P0 BRA 0x80", "LDG.E R12, desc[UR4][R4.64]", "LDG.E R13, desc[UR4][R4.64+0x4]", "BRA 0x90"),
        "LDG.E.128 R12, desc[UR4][R4.64]",
        *("FADD R16, R8, R12", "EXIT "),
    )
    assert [i.opcode for i in hot(*LOADS, *way).instructions[4:]] == ["BRA", "LDG.E.128", "FADD", "EXIT"]


def test_copies_to_shared_memory_are_outstanding_by_group():
    groups = ("LDGSTS.E.128 [R20], desc[UR4][R2.64]", "LDGDEPBAR ") * 3
    assert hot(*LOADS[:3], *groups, "DEPBAR.LE SB0, 0x2", "EXIT ").in_flight == 48
    loop = (*groups[:2], "DEPBAR.LE SB0, 0x1", "LDS R8, [R20]", "@P0 BRA 0x30", "EXIT ")
    assert hot(*LOADS[:3], *loop).in_flight == 32


def test_occupancy():
    """Against rows of the occupancy calculator of the CUDA toolkit."""
    assert occupancy("sm_90", 32, 0, 256) == (8, 64)
    assert occupancy("sm_90", 33, 0, 256) == (6, 48)
    assert occupancy("sm_80", 128, 0, 512) == (1, 16)
    assert occupancy("sm_80", 32, 48 * 1024, 128) == (3, 12)
    assert occupancy("sm_100", 255, 0, 32) == (8, 8)


def test_names():
    assert split_name("pool_kernel<Plain<float>, 4>") == ("pool_kernel", "Plain<float>, 4")
    assert split_name("_ZN3aia4cuda9_GLOBAL_11pool_kernelIfLi4EEEvv") == ("pool_kernel", "fLi4EEEvv")
