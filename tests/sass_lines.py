"""Machine code for tests of what reads it, written line by line."""

from __future__ import annotations

from benchmarks.offline import sass


def code(*lines: str) -> list[sass.Instruction]:
    """Instructions 16 bytes apart; a line is "@P0 NAME operands" or "NAME operands"."""
    found = []
    for k, line in enumerate(lines):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else (None, "", line)
        opcode, _, text = rest.partition(" ")
        found.append(sass.Instruction(16 * k, predicate.removeprefix("@") if predicate else None, opcode, text))
    return found
