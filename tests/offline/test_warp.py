"""Machine code that is run for one warp (benchmarks/offline/warp.py), and the launches that are recorded for it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from sass_lines import code

from benchmarks.offline import sass, warp

BANK = 0x210


def run(*lines: str, parameters: bytes = b"", threads: int = 32) -> warp.Warp:
    kernel = sass.Kernel("sm_90", "kernel", code(*lines), bank=BANK)
    program = warp.Program(kernel)
    one = warp.Warp(program, program.bank(parameters, 7, threads), 5, 0, threads, frozenset([1]))
    one.issued = one.run(10_000)
    return one


def test_a_loop_takes_the_turns_that_its_parameter_says():
    loop = ("VIADD R0, R0, 0x1", "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT", "@!P0 BRA 0x0", "EXIT ")
    for turns in (1, 6):
        assert run(*loop, parameters=struct.pack("<i", turns)).issued.instructions == 3 * turns + 1


def test_lanes_that_part_are_issued_apart_and_meet():
    """Of 32 lanes the first 8 take one way, the others the other one; both go on together."""
    ways = (
        *("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x8, PT", "BSSY B0, 0x70", "@P0 BRA 0x60", "MOV R1, 0x1"),
        *("BRA 0x70", "MOV R1, 0x2", "BSYNC B0", "VIADD R1, R1, 0x1", "EXIT "),
    )
    found = run(*ways)
    assert list(found.registers[1]) == [2] * 8 + [3] * 24
    assert found.issued.instructions == 4 + 3 + 2 + 2


def test_lanes_that_do_not_exist_issue_nothing_of_their_own():
    found = run("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x3, PT", "@P0 EXIT ", "EXIT ", threads=3)
    assert found.issued.instructions == 4


def test_sums_of_64_bits_carry():
    found = run(
        *("IADD3 R4, P0, R2, c[0x0][0x210], RZ", "IADD3.X R5, RZ, c[0x0][0x214], RZ, P0, !PT"),
        *("IADD3 R6, P1, R4, -R4, RZ", "IMAD.WIDE R8, R7, 0x4, R4", "EXIT "),
        parameters=struct.pack("<Q", 0x1FFFFFFFF),
    )
    assert found.registers[4][0] == 0xFFFFFFFF and found.registers[5][0] == 1
    assert found.registers[6][0] == 0 and found.predicates[1].all()  # a number less itself carries
    assert found.registers[8][0] == 0xFFFFFFFF and found.registers[9][0] == 1


@pytest.mark.parametrize("n, d", [(25087, 3136), (7, 8), (2**31 - 1, 3), (12, 12)])
def test_a_division_by_a_number_that_the_compiler_does_not_know(n, d):
    """As nvcc 13 makes it: by the reciprocal in floating point, corrected twice."""
    found = run(
        *("LDC R0, c[0x0][0x214]", "LDC R9, c[0x0][0x210]", "I2F.U32.RP R4, R0", "IMAD.MOV R5, RZ, RZ, -R0"),
        *("MUFU.RCP R4, R4", "VIADD R2, R4, 0xffffffe", "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "IMAD.MOV.U32 R2, RZ, RZ, RZ"),
        *("IMAD R5, R5, R3, RZ", "IMAD.HI.U32 R3, R3, R5, R2", "IMAD.HI.U32 R19, R3, R9, RZ"),
        *("IMAD.MOV R3, RZ, RZ, -R19", "IMAD R3, R0, R3, R9", "ISETP.GE.U32.AND P0, PT, R3, R0, PT"),
        *("@P0 IMAD.IADD R3, R3, 0x1, -R0", "@P0 VIADD R19, R19, 0x1", "ISETP.GE.U32.AND P1, PT, R3, R0, PT"),
        *("@P1 IADD3 R19, R19, 0x1, RZ", "EXIT "),
        parameters=struct.pack("<II", n, d),
    )
    assert found.registers[19][0] == n // d


def test_what_is_loaded_and_how_much_of_it_is_in_flight():
    """Lanes side by side: 16 bytes of each from buffer 1, twice before the first is used."""
    found = run(
        *("S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE R2, R0, 0x10, R2"),
        *("LDG.E.128 R8, desc[UR4][R2.64]", "LDG.E.128 R12, desc[UR4][R2.64+0x200]", "FADD R16, R8, R12"),
        *("STG.E desc[UR4][R2.64], R16", "EXIT "),
        parameters=struct.pack("<Q", 1 << warp.BUFFER_BITS),
    )
    assert found.issued.loaded[1] == 2 * 32 * 16 and found.issued.in_flight == 2 * 32 * 16
    assert found.issued.stored[1] == 32 * 4
    assert found.issued.wavefronts == 4 + 4 + 4  # 512 bytes are four lines, and words 16 bytes apart meet as many


@pytest.mark.parametrize(
    "opcode, distance, turns",
    [
        ("LDS", 4, 1),
        ("LDS", 8, 2),
        ("LDS", 128, 32),
        ("LDS", 0, 1),
        ("LDS.64", 8, 2),
        ("STS.64", 56, 2),
        ("STS.64", 112, 4),
        ("STS.128", 32, 8),
    ],
)
def test_turns_of_the_banks_of_shared_memory(opcode, distance, turns):
    """Two words apart, two lanes meet in a bank; one word is given to all. 28 words apart, of the 16
    lanes that go together with two words each, the first and the ninth do."""
    access = f"{opcode} R8, [R2]" if opcode.startswith("LDS") else f"{opcode} [R2], R8"
    found = run("S2R R0, SR_TID.X", f"IMAD R2, R0, {distance:#x}, RZ", access, "EXIT ")
    assert found.issued.wavefronts == turns


def test_a_word_that_two_elements_share_is_brought_once():
    copy = "LDGSTS.E [R20], desc[UR4][R2.64]"
    found = run(
        *("S2R R0, SR_TID.X", "LOP3.LUT R0, R0, 0x1e, RZ, 0xc0, !PT", "LDC.64 R2, c[0x0][0x210]"),
        *("IMAD.WIDE R2, R0, 0x2, R2", copy, copy, "EXIT "),
        parameters=struct.pack("<Q", 1 << warp.BUFFER_BITS),
    )
    assert found.issued.loaded[1] == 16 * 4


def test_predicates_tables_and_bytes():
    found = run(
        *("MOV R0, 0x00ff1200", "LOP3.LUT P0, RZ, R0, 0xff00, RZ, 0xc0, !PT", "LOP3.LUT R1, R0, 0xff, RZ, 0x3c, !PT"),
        *("PRMT R2, R0, 0x7632, RZ", "SEL R3, R0, RZ, !P0", "SHF.R.U32.HI R4, RZ, 0x8, R0", "LEA R5, R4, R4, 0x2"),
        *("HFMA2.MMA R6, -RZ, RZ, 0, 2.384185791015625e-07", "EXIT "),
    )
    registers = {k: int(found.registers[k][0]) for k in range(7)}
    assert found.predicates[0].all() and registers[1] == 0x00FF12FF and registers[2] == 0x000000FF
    assert registers[3] == 0 and registers[4] == 0x00FF12 and registers[5] == 5 * 0x00FF12 and registers[6] == 4


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(NotImplementedError, match="TEX"):
        run("TEX R0, R1", "EXIT ")
    with pytest.raises(RuntimeError, match="does not come to an end"):
        run("BRA 0x0")


def test_a_zero_register_stays_zero():
    found = run("MOV RZ, 0x5", "MOV R0, RZ", "EXIT ")
    assert not np.any(found.registers[0])
