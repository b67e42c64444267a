"""The lanes of a warp: their registers and predicates, and the operands of machine code as values of these."""

from __future__ import annotations

import re
import struct

import numpy as np

from .sass import Instruction

LANES = 32

_PLAIN = re.compile(r"^([-~!|]*)(U?R\d+|U?RZ|U?P\d|U?PT)\|?(?:\.(\w+))?(?:\.\w+)*$")
_BANK = re.compile(r"^(-?)c\[0x0\]\[([^\]]*)\]$")


class Step:
    """An instruction with its operands."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.name = instruction.name
        self.parts = instruction.opcode.split(".")[1:]
        text = instruction.text.replace(".reuse", "")
        self.operands = [o.strip() for o in text.split(", ")] if text else []
        self.registers = frozenset(instruction.registers)
        self.written = frozenset(instruction.written)
        # U-forms do to uniform registers what the others do to those of a lane.
        base = self.name[1:] if self.name.startswith("U") and self.name not in ("UCGABAR_ARV", "UCGABAR_WAIT") else ""
        self.kind = base or self.name


def row_of(name: str) -> int:
    """Rows of the file of registers: those of a lane, then the uniform ones."""
    uniform = name.startswith("U")
    number = name[2:] if uniform else name[1:]
    return (256 if uniform else 0) + (255 if number == "Z" else int(number))


def _predicate_row(name: str) -> int:
    uniform = name.startswith("U")
    number = name[2:] if uniform else name[1:]
    return (8 if uniform else 0) + (7 if number == "T" else int(number))


class Lanes:
    """The state of a warp. mask: the lanes that an instruction is for."""

    def __init__(self, bank: bytes, block: int, warp: int, threads: int):
        self.bank, self.block = bank, block
        self.registers = np.zeros((512, LANES), np.uint32)
        self.predicates = np.zeros((16, LANES), bool)
        self.predicates[7] = self.predicates[15] = True
        self.thread = np.arange(LANES, dtype=np.uint32) + warp * LANES
        self.mask = self.thread < threads

    # ---- operands ----

    def value(self, operand: str) -> np.ndarray:
        """The 32 bits of an operand in every lane."""
        if match := _PLAIN.match(operand):
            sign, name, part = match.groups()
            found = self.registers[row_of(name)]
            if part == "H1_H1" or part == "H1":
                found = found >> np.uint32(16)
            elif part == "H0_H0" or part == "H0":
                found = found & np.uint32(0xFFFF)
            elif part and part[0] == "B" and part[1:].isdigit():
                found = found >> np.uint32(8 * int(part[1:])) & np.uint32(0xFF)
            if "~" in sign:
                found = ~found
            if "-" in sign:
                found = np.uint32(0) - found
            return found
        if match := _BANK.match(operand):
            word = self._of_bank(match[2], 4)
            return np.full(LANES, -word & 0xFFFFFFFF if match[1] else word, np.uint32)
        return np.full(LANES, _immediate(operand), np.uint32)

    def floats(self, operand: str) -> np.ndarray:
        sign = "-" if operand.startswith("-") and not is_number(operand) else ""
        plain = operand.removeprefix("-") if sign else operand
        absolute = plain.startswith("|")
        found = self.value(plain.strip("|")).view(np.float32)
        found = np.abs(found) if absolute else found
        return -found if sign else found

    def condition(self, operand: str) -> np.ndarray:
        row = self.predicates[_predicate_row(operand.lstrip("!"))]
        return ~row if operand.startswith("!") else row

    def _of_bank(self, place: str, size: int) -> int:
        at = int(place, 16)
        return int.from_bytes(self.bank[at : at + size], "little")

    def wide(self, operand: str) -> np.ndarray:
        """The 64 bits of a pair of registers."""
        if match := _BANK.match(operand):
            return np.full(LANES, self._of_bank(match[2], 8), np.uint64)
        if is_number(operand):
            return np.full(LANES, int(_immediate(operand)), np.uint64)
        name = operand.lstrip("-").removesuffix(".64")
        row = row_of(name)
        high = self.registers[row if row % 256 == 255 else row + 1]
        found = self.registers[row].astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return np.uint64(0) - found if operand.startswith("-") else found

    # ---- results ----

    def put(self, name: str, value: np.ndarray) -> None:
        row = row_of(name)
        if row % 256 != 255:
            if row >= 256:  # of the first lane that is here
                self.registers[row] = np.asarray(value, np.uint32)[int(np.argmax(self.mask))]
            else:
                np.copyto(self.registers[row], np.asarray(value).astype(np.uint32, copy=False), where=self.mask)

    def put_wide(self, name: str, value: np.ndarray) -> None:
        row, kind = row_of(name), "UR" if name.startswith("U") else "R"
        self.put(name, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        if row % 256 != 255:
            self.put(f"{kind}{row % 256 + 1}", (value >> np.uint64(32)).astype(np.uint32))

    def decide(self, name: str, value: np.ndarray) -> None:
        row = _predicate_row(name)
        if row % 8 != 7:
            if row >= 8:
                self.predicates[row] = value[int(np.argmax(self.mask))]
            else:
                np.copyto(self.predicates[row], value, where=self.mask)


def is_number(operand: str) -> bool:
    return not re.match(r"^[-~!|]*(?:U?R|U?P|c\[|SR)", operand)


def _immediate(operand: str) -> int:
    if "0x" in operand:
        return int(operand, 16) & 0xFFFFFFFF
    number = {"+INF": float("inf"), "-INF": float("-inf"), "+QNAN": float("nan"), "-QNAN": float("nan")}.get(operand)
    return struct.unpack("<I", struct.pack("<f", float(operand) if number is None else number))[0]
