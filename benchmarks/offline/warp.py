"""Runs the machine code of a kernel for one warp, to count what it issues: which way it goes depends on the shape.

Integers, addresses, predicates and the floating-point numbers of index arithmetic are computed as the hardware does.
Every load returns zeros, so data decide nothing but ties. Lanes part at a branch and meet at the convergence barrier
(BSSY, BSYNC) that the compiler set for them; while they are apart, each side is issued on its own. The warps of a block
run one by one: at a barrier none waits, as no value that is loaded matters. An instruction that is not known here is an
error.
"""

from __future__ import annotations

import collections
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .sass import Instruction, Kernel

LANES = 32
#: Buffers of a launch lie so far apart that an address tells which of them it is in.
BUFFER_BITS = 40

_PLAIN = re.compile(r"^([-~!|]*)(U?R\d+|U?RZ|U?P\d|U?PT)\|?(?:\.(\w+))?(?:\.\w+)*$")
_BANK = re.compile(r"^(-?)c\[0x0\]\[([^\]]*)\]$")
_ADDRESS = re.compile(r"\[([^\[\]]*)\]$")
_COMPARE: dict[str, Callable] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
#: Arithmetic whose results are data. Its instructions count, its results are zero.
_DATA = {
    *(
        "DADD",
        "DMUL",
        "DFMA",
        "DMNMX",
        "HADD2",
        "HMUL2",
        "HFMA2",
        "HMNMX2",
        "F2F",
        "F2FP",
        "FCHK",
        "SHFL",
        "LDS",
        "LDL",
    ),
    *("LDG", "LD", "FADD2", "FMUL2", "FFMA2", "I2FP"),
}
_NOTHING = {
    *("BAR", "DEPBAR", "LDGDEPBAR", "LDGSTS", "STG", "STS", "STL", "ST", "MEMBAR", "ERRBAR", "CCTL", "WARPSYNC"),
    *("YIELD", "NOP", "FENCE", "UCGABAR_ARV", "UCGABAR_WAIT", "BMOV", "RED"),
}


@dataclass
class Issued:
    """What a warp issued. By buffer, the bytes that its lanes loaded and stored; wavefronts: the lines of 128 bytes
    that each access to memory met, one at least; in_flight: the most bytes of watched buffers outstanding at a time."""

    instructions: int = 0
    loaded: collections.Counter = field(default_factory=collections.Counter)
    stored: collections.Counter = field(default_factory=collections.Counter)
    wavefronts: int = 0
    in_flight: int = 0
    barriers: int = 0
    names: collections.Counter = field(default_factory=collections.Counter)


class Program:
    """A kernel, its instructions taken apart once for all warps. The constant bank holds the parameters of a launch."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.place = {i.address: k for k, i in enumerate(kernel.instructions)}
        self.steps = [Step(i) for i in kernel.instructions]

    def bank(self, parameters: bytes, grid: int, threads: int) -> bytes:
        bank = bytearray(max(self.kernel.bank, 0x400) + len(parameters) + 16)
        for at, value in ((0, threads), (4, 1), (8, 1), (12, grid), (16, 1), (20, 1)):
            bank[at : at + 4] = struct.pack("<I", value)
        bank[self.kernel.bank : self.kernel.bank + len(parameters)] = parameters
        return bytes(bank)


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


def _row(name: str) -> int:
    """Rows of the file of registers: those of a lane, then the uniform ones."""
    uniform = name.startswith("U")
    number = name[2:] if uniform else name[1:]
    return (256 if uniform else 0) + (255 if number == "Z" else int(number))


def _predicate_row(name: str) -> int:
    uniform = name.startswith("U")
    number = name[2:] if uniform else name[1:]
    return (8 if uniform else 0) + (7 if number == "T" else int(number))


class Warp:
    """One warp of a launch."""

    def __init__(self, program: Program, bank: bytes, block: int, warp: int, threads: int, watched: frozenset[int]):
        self.program, self.bank, self.watched = program, bank, watched
        self.registers = np.zeros((512, LANES), np.uint32)
        self.predicates = np.zeros((16, LANES), bool)
        self.predicates[7] = self.predicates[15] = True
        self.thread = np.arange(LANES, dtype=np.uint32) + warp * LANES
        self.block, self.mask = block, self.thread < threads
        self.joined: dict[str, np.ndarray] = {}
        self.waiting: dict[str, tuple[int, np.ndarray]] = {}
        self.issued = Issued()
        self._pending: list[tuple[frozenset[str], int]] = []
        self._groups: collections.deque[int] = collections.deque([0])

    # ---- operands ----

    def value(self, operand: str) -> np.ndarray:
        """The 32 bits of an operand in every lane."""
        if match := _PLAIN.match(operand):
            sign, name, part = match.groups()
            found = self.registers[_row(name)]
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
        sign = "-" if operand.startswith("-") and not _is_number(operand) else ""
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
        if _is_number(operand):
            return np.full(LANES, int(_immediate(operand)), np.uint64)
        name = operand.lstrip("-").removesuffix(".64")
        row = _row(name)
        high = self.registers[row if row % 256 == 255 else row + 1]
        found = self.registers[row].astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return np.uint64(0) - found if operand.startswith("-") else found

    # ---- results ----

    def put(self, name: str, value: np.ndarray) -> None:
        row = _row(name)
        if row % 256 != 255:
            if row >= 256:  # of the first lane that is here
                self.registers[row] = np.asarray(value, np.uint32)[int(np.argmax(self.mask))]
            else:
                np.copyto(self.registers[row], np.asarray(value).astype(np.uint32, copy=False), where=self.mask)

    def put_wide(self, name: str, value: np.ndarray) -> None:
        row, kind = _row(name), "UR" if name.startswith("U") else "R"
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

    # ---- memory ----

    def addresses(self, step: Step) -> np.ndarray:
        """Of each lane, what lies between the last brackets."""
        inside = _ADDRESS.search(step.operands[_memory_operand(step)])[1]
        found = np.zeros(LANES, np.uint64)
        for term in re.split(r"\+(?=[-\w])", inside):
            if term.endswith(".64"):
                found = found + self.wide(term.removesuffix(".64"))
            elif term.startswith("UR") and "desc" in step.instruction.text and step.name in ("LDG", "STG"):
                found = found + self.wide(term)
            elif re.match(r"U?R", term):
                found = found + self.value(term.split(".")[0]).astype(np.uint64)
            elif term:
                found = found + np.uint64(int(term, 16) & 0xFFFFFFFFFFFFFFFF)
        return found

    def _access(self, step: Step) -> int:
        """Counts an access; the bytes that a warp asks of the watched buffers by it."""
        size = step.instruction.bits // 8
        if not self.mask.any():
            return 0
        at = self.addresses(step)[self.mask]
        self.issued.wavefronts += max(1, len(np.unique(at // 128))) * (1 if size <= 16 else 2)
        if step.name in ("STS", "LDS", "STL", "LDL"):
            return 0
        if step.name == "LDGSTS":  # the least copy is a word, which two lanes may share
            at = np.unique(at)
        buffers = at >> np.uint64(BUFFER_BITS)
        side = self.issued.stored if step.name in ("STG", "ST", "RED") else self.issued.loaded
        for buffer, count in zip(*np.unique(buffers, return_counts=True), strict=True):
            side[int(buffer)] += size * int(count)
        return size * sum(int(np.sum(buffers == w)) for w in self.watched)

    def _follow(self, step: Step, of_x: int) -> None:
        """Which loads are outstanding (sass.py)."""
        if self._pending:
            last = max((k for k, (r, _) in enumerate(self._pending) if r & step.registers), default=-1)
            del self._pending[: last + 1]
        if step.name == "LDG":
            self._pending.append((step.written, of_x))
        elif step.name == "LDGSTS":
            self._groups[-1] += of_x
        elif step.name == "LDGDEPBAR":
            self._groups.append(0)
        elif step.name == "DEPBAR" and (allowed := re.search(r"SB0, 0x([0-9a-f]+)", step.instruction.text)):
            while len(self._groups) > int(allowed[1], 16) + 1:
                self._groups.popleft()
        else:
            return
        here = sum(size for _, size in self._pending) + sum(self._groups)
        self.issued.in_flight = max(self.issued.in_flight, here)

    # ---- control ----

    def run(self, most: int = 2_000_000) -> Issued:
        steps, issued = self.program.steps, self.issued
        parts: list[tuple[int, np.ndarray]] = [(0, self.mask.copy())]
        with np.errstate(all="ignore"):
            while parts:
                at, lanes = parts.pop()
                while lanes is not None:
                    step = steps[at]
                    issued.instructions += 1
                    issued.names[step.name] += 1
                    if issued.instructions > most:
                        raise RuntimeError(f"{self.program.kernel.name} does not come to an end")
                    predicate = step.instruction.predicate
                    self.mask = lanes & self.condition(predicate) if predicate else lanes
                    handler = _CONTROL.get(step.kind)
                    if handler is None:
                        self.step(step)
                        at += 1
                    else:
                        at, lanes = handler(self, step, at, lanes, parts)
        return issued

    def step(self, step: Step) -> None:
        of_x = 0
        if step.name in _MEMORY:
            of_x = self._access(step)
        self._follow(step, of_x)
        if step.name == "BAR":
            self.issued.barriers += 1
        if step.kind in _NOTHING or not self.mask.any():
            return
        if step.kind in _DATA:
            for register in step.written:
                self.put(register, np.zeros(LANES, np.uint32))
            return
        handler = _ARITHMETIC.get(step.kind)
        if handler is None:
            raise NotImplementedError(f"{step.instruction.opcode} {step.instruction.text}")
        handler(self, step)


_MEMORY = {"LDG", "STG", "LDS", "STS", "LD", "ST", "LDGSTS", "RED", "LDL", "STL"}


def _memory_operand(step: Step) -> int:
    return max(k for k, o in enumerate(step.operands) if "[" in o)


def _is_number(operand: str) -> bool:
    return not re.match(r"^[-~!|]*(?:U?R|U?P|c\[|SR)", operand)


def _immediate(operand: str) -> int:
    if "0x" in operand:
        return int(operand, 16) & 0xFFFFFFFF
    number = {"+INF": float("inf"), "-INF": float("-inf"), "+QNAN": float("nan"), "-QNAN": float("nan")}.get(operand)
    return struct.unpack("<I", struct.pack("<f", float(operand) if number is None else number))[0]


# ---- control flow: (place of the next step, lanes there or None), parts: those that wait for their turn ----


def _branch(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    target = step.instruction.target
    if target is None:  # BRA.DIV: only where lanes are missing that the others wait for
        return at + 1, lanes
    taken = warp.mask
    for operand in step.operands[:-1]:
        taken = taken & warp.condition(operand)
    rest = lanes & ~taken
    to = warp.program.place[target]
    if not taken.any():
        return at + 1, lanes
    if rest.any():
        parts.append((at + 1, rest))
    return to, taken


def _call(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    return warp.program.place[int(step.operands[-1], 16)], lanes


def _return(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    to = int(warp.registers[_row(step.operands[0].split()[0])][int(np.argmax(lanes))])
    return warp.program.place[to], lanes


def _exit(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    rest = lanes & ~warp.mask
    for name in warp.joined:
        warp.joined[name] = warp.joined[name] & ~warp.mask
    if rest.any():
        return at + 1, rest
    return _release(warp, parts)


def _release(warp: Warp, parts: list) -> tuple[int, np.ndarray | None]:
    """After lanes have ended: those that waited for nobody else go on."""
    for name, (to, here) in list(warp.waiting.items()):
        if not (warp.joined[name] & ~here).any():
            del warp.waiting[name]
            if here.any():
                parts.append((to, here))
    return 0, None


def _join(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    warp.joined[step.operands[0]] = lanes.copy()
    return at + 1, lanes


def _leave(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    name = step.operands[-1]
    warp.joined[name] = warp.joined[name] & ~warp.mask
    return at + 1, lanes


def _meet(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    name = step.operands[0]
    arrived, rest = warp.mask, lanes & ~warp.mask
    _, here = warp.waiting.get(name, (at + 1, np.zeros(LANES, bool)))
    here = here | arrived
    if rest.any():
        parts.append((at + 1, rest))
    if (warp.joined[name] & ~here).any():
        warp.waiting[name] = at + 1, here
        return 0, None
    warp.waiting.pop(name, None)
    return at + 1, here


_CONTROL = {
    "BRA": _branch,
    "CALL": _call,
    "RET": _return,
    "EXIT": _exit,
    "BSSY": _join,
    "BREAK": _leave,
    "BSYNC": _meet,
}


# ---- arithmetic ----


def _split(step: Step) -> tuple[list[str], list[str]]:
    """The predicates that an instruction writes beside its register, and its sources."""
    rest, decided = step.operands[1:], []
    while rest and re.fullmatch(r"U?P[0-9T]", rest[0]) and len(rest) > 2:
        decided.append(rest.pop(0))
    return decided, rest


def _iadd3(warp: Warp, step: Step) -> None:
    decided, sources = _split(step)
    conditions = [s for s in sources if re.fullmatch(r"!?U?P[0-9T]", s)]
    total = np.zeros(LANES, np.uint64)
    for source in (s for s in sources if s not in conditions):
        negated = source.startswith("-") and not _is_number(source)
        value = warp.value(source.removeprefix("-") if negated else source).astype(np.uint64)
        total = total + (np.uint64(1 << 32) - value if negated else value)
    if "X" in step.parts:
        for condition in conditions:
            total = total + warp.condition(condition).astype(np.uint64)
    warp.put(step.operands[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    for k, name in enumerate(decided):
        warp.decide(name, total >> np.uint64(32) > np.uint64(k))


def _signed(value: np.ndarray) -> np.ndarray:
    return value.view(np.int32).astype(np.int64)


def _imad(warp: Warp, step: Step) -> None:
    decided, sources = _split(step)
    a, b = warp.value(sources[0]), warp.value(sources[1])
    plain = "U32" in step.parts
    if "WIDE" in step.parts or "HI" in step.parts:
        product = a.astype(np.uint64) * b.astype(np.uint64) if plain else (_signed(a) * _signed(b)).view(np.uint64)
        total = product + warp.wide(sources[2])
        for name in decided:
            warp.decide(name, total < product)
        if "X" in step.parts:
            total = total + warp.condition(sources[3]).astype(np.uint64)
        if "WIDE" in step.parts:
            warp.put_wide(step.operands[0], total)
        else:
            warp.put(step.operands[0], (total >> np.uint64(32)).astype(np.uint32))
        return
    total = a * b + warp.value(sources[2])
    if "X" in step.parts:
        total = total + warp.condition(sources[3]).astype(np.uint32)
    warp.put(step.operands[0], total)


def _isetp(warp: Warp, step: Step) -> None:
    first, second, a, b, *conditions = step.operands
    left, right = warp.value(a), warp.value(b)
    if "U32" not in step.parts:
        left, right = left.view(np.int32), right.view(np.int32)
    compare = step.parts[0]
    if "EX" in step.parts:  # the upper halves; what the lower ones say counts where these are equal
        below, equal = warp.condition(conditions[1]), left == right
        if compare == "NE":
            found = ~equal | below
        else:
            found = equal & below if compare == "EQ" else _COMPARE[compare[0] + "T"](left, right) | (equal & below)
    else:
        found = _COMPARE[compare](left, right)
    _combine(warp, step, found, first, second, conditions[0])


def _combine(warp: Warp, step: Step, found: np.ndarray, first: str, second: str, other: str) -> None:
    with_ = warp.condition(other)
    how = next(p for p in step.parts if p in ("AND", "OR", "XOR"))
    join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[how]
    warp.decide(first, join(found, with_))
    warp.decide(second, join(~found, with_))


def _fsetp(warp: Warp, step: Step) -> None:
    first, second, a, b, other = step.operands[:5]
    left, right = warp.floats(a), warp.floats(b)
    compare = step.parts[0]
    apart = np.isnan(left) | np.isnan(right)
    if compare in ("NAN", "NUM"):
        found = apart if compare == "NAN" else ~apart
    else:
        found = _COMPARE[compare.removesuffix("U")](left, right)
        found = found | apart if compare.endswith("U") and compare != "U" else found & ~apart
    _combine(warp, step, found, first, second, other)


def _dsetp(warp: Warp, step: Step) -> None:
    compare = step.parts[0].removesuffix("U")
    found = np.full(LANES, compare in ("LE", "GE", "EQ", "NUM"))  # of zeros
    _combine(warp, step, found, *step.operands[:2], step.operands[4])


def _lookup(table: int, values: list[np.ndarray]) -> np.ndarray:
    a, b, c = values
    found = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            found |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return found


def _lop3(warp: Warp, step: Step) -> None:
    operands = list(step.operands)
    decided = operands.pop(0) if re.match(r"U?P", operands[0]) else None
    found = _lookup(int(operands[4], 16), [warp.value(o) for o in operands[1:4]])
    warp.put(operands[0], found)
    if decided:
        warp.decide(decided, found != 0)


def _plop3(warp: Warp, step: Step) -> None:
    first, second, *sources = step.operands
    values = [warp.condition(s) for s in sources[:3]]
    warp.decide(first, _lookup(int(sources[3], 16), values))
    warp.decide(second, _lookup(int(sources[4], 16), values))


def _shf(warp: Warp, step: Step) -> None:
    low, shift, high = (warp.value(o) for o in step.operands[1:4])
    wide = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    by = (shift & np.uint32(63 if "U64" in step.parts or "S64" in step.parts else 31)).astype(np.uint64)
    if "L" in step.parts:
        found = wide << by
        result = found >> np.uint64(32) if "HI" in step.parts else found
        warp.put(step.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        return
    arithmetic = any(p in ("S32", "S64") for p in step.parts)
    found = (wide.view(np.int64) >> by.astype(np.int64)).view(np.uint64) if arithmetic else wide >> by
    result = found >> np.uint64(32) if "HI" in step.parts else found
    warp.put(step.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32))


def _lea(warp: Warp, step: Step) -> None:
    decided, sources = _split(step)
    conditions = [s for s in sources if re.fullmatch(r"!?U?P[0-9T]", s)]
    plain = [s for s in sources if s not in conditions]
    a, b = warp.value(plain[0]), warp.value(plain[1]).astype(np.uint64)
    if plain[1].startswith("-"):
        b = np.uint64(1 << 32) - warp.value(plain[1].removeprefix("-")).astype(np.uint64)
    shift = np.uint64(int(plain[-1], 16))
    if "HI" in step.parts:
        wide = _signed(a).view(np.uint64) if "SX32" in step.parts else a.astype(np.uint64)
        if len(plain) == 4:
            wide = wide | warp.value(plain[2]).astype(np.uint64) << np.uint64(32)
        total = ((wide << shift) >> np.uint64(32) & np.uint64(0xFFFFFFFF)) + b
        if "X" in step.parts and conditions:
            total = total + warp.condition(conditions[0]).astype(np.uint64)
    else:
        total = (a.astype(np.uint64) << shift & np.uint64(0xFFFFFFFF)) + b
    warp.put(step.operands[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    for name in decided:
        warp.decide(name, total >> np.uint64(32) > 0)


def _select(warp: Warp, step: Step) -> None:
    a, b, condition = step.operands[1:4]
    chosen = np.where(warp.condition(condition), warp.value(a), warp.value(b))
    warp.put(step.operands[0], chosen)


def _move(warp: Warp, step: Step) -> None:
    if "64" in step.parts:
        warp.put_wide(step.operands[0], warp.wide(step.operands[1]))
    else:
        warp.put(step.operands[0], warp.value(step.operands[1]))


def _prmt(warp: Warp, step: Step) -> None:
    a, selector, b = (warp.value(o) for o in step.operands[1:4])
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros(LANES, np.uint32)
    for k in range(4):
        nibble = selector >> np.uint32(4 * k) & np.uint32(15)
        byte = (wide >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        found |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * k)
    warp.put(step.operands[0], found)


def _constant(warp: Warp, step: Step) -> None:
    """LDC: at a place of the bank that a register may move."""
    place = re.search(r"\[0x0\]\[([^\]]*)\]", step.instruction.text)[1]
    size = step.instruction.bits // 8
    at = np.zeros(LANES, np.int64)
    for term in place.split("+"):
        at = at + (_signed(warp.value(term)) if re.match(r"U?R", term) else int(term, 16))
    words = []
    for offset in range(0, max(size, 4), 4):
        take = min(size, 4)
        read = [int.from_bytes(warp.bank[int(p) + offset : int(p) + offset + take], "little") for p in at]
        words.append(np.array(read, np.uint32))
    if any(p in ("S8", "S16") for p in step.parts):
        raise NotImplementedError(step.instruction.opcode)
    row, kind = _row(step.operands[0]), "UR" if step.operands[0].startswith("U") else "R"
    if row % 256 != 255:
        for k, word in enumerate(words):
            warp.put(f"{kind}{row % 256 + k}", word)


def _special(warp: Warp, step: Step) -> None:
    known = {"SR_TID.X": warp.thread, "SR_CTAID.X": np.full(LANES, warp.block, np.uint32)}
    known["SR_LANEID"] = np.arange(LANES, dtype=np.uint32)
    zero = np.zeros(LANES, np.uint32)
    source = step.operands[1]
    if source not in known and source not in ("SRZ", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"):
        raise NotImplementedError(source)
    warp.put(step.operands[0], known.get(source, zero))
    if step.kind == "CS2R" and "32" not in step.parts:
        warp.put(f"R{_row(step.operands[0]) + 1}", zero)


def _of_integer(warp: Warp, step: Step) -> None:
    value = warp.value(step.operands[1])
    exact = value.astype(np.float64) if "U32" in step.parts else _signed(value).astype(np.float64)
    found = exact.astype(np.float32)
    if "RP" in step.parts:
        found = np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found)
    warp.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _to_integer(warp: Warp, step: Step) -> None:
    value = np.nan_to_num(np.trunc(warp.floats(step.operands[1]).astype(np.float64)), posinf=2**32 - 1, neginf=0)
    warp.put(step.operands[0], np.clip(value, 0, 2**32 - 1).astype(np.uint64).astype(np.uint32))


def _mufu(warp: Warp, step: Step) -> None:
    value = warp.floats(step.operands[1])
    found = 1 / value if "RCP" in step.parts else np.zeros(LANES, np.float32)
    warp.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _float(warp: Warp, step: Step) -> None:
    a, b = warp.floats(step.operands[1]), warp.floats(step.operands[2])
    if step.kind == "FADD":
        found = a + b
    elif step.kind == "FMUL":
        found = a * b
    elif step.kind == "FFMA":
        found = a * b + warp.floats(step.operands[3])
    else:
        found = np.where(warp.condition(step.operands[3]), np.minimum(a, b), np.maximum(a, b))
    warp.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _half_constant(warp: Warp, step: Step) -> None:
    """HFMA2 of zeros: how the compiler makes a constant of two halves."""
    found = np.zeros(LANES, np.uint32)
    if step.operands[1].lstrip("-") == "RZ" and step.operands[2].lstrip("-") == "RZ" and len(step.operands) == 5:
        high, low = (int(np.float16(float(o)).view(np.uint16)) for o in step.operands[3:])
        found = np.full(LANES, high << 16 | low, np.uint32)
    for register in step.written:
        warp.put(register, found)


def _extreme(warp: Warp, step: Step) -> None:
    a, b = warp.value(step.operands[1]), warp.value(step.operands[2])
    if "U32" not in step.parts:
        a, b = a.view(np.int32), b.view(np.int32)
    found = np.where(warp.condition(step.operands[3]), np.minimum(a, b), np.maximum(a, b))
    warp.put(step.operands[0], found.view(np.uint32))


def _sum_extreme(warp: Warp, step: Step) -> None:
    a, b, c = (warp.value(o) for o in step.operands[1:4])
    total = a + b
    if "U32" not in step.parts:
        total, c = total.view(np.int32), c.view(np.int32)
    found = np.where(warp.condition(step.operands[4]), np.minimum(total, c), np.maximum(total, c))
    warp.put(step.operands[0], found.view(np.uint32))


def _absolute(warp: Warp, step: Step) -> None:
    warp.put(step.operands[0], np.abs(warp.value(step.operands[1]).view(np.int32)).view(np.uint32))


def _add(warp: Warp, step: Step) -> None:
    if "64" in step.parts:
        warp.put_wide(step.operands[0], warp.wide(step.operands[1]) + warp.wide(step.operands[2]))
    else:
        warp.put(step.operands[0], warp.value(step.operands[1]) + warp.value(step.operands[2]))


def _packed_predicates(warp: Warp, step: Step) -> None:
    """P2R: predicates as bits of a register, beside what it held."""
    mask = warp.value(step.operands[-1])
    bits = sum((warp.predicates[k].astype(np.uint32) << np.uint32(k) for k in range(7)), np.zeros(LANES, np.uint32))
    kept = warp.value(step.operands[2]) & ~mask
    warp.put(step.operands[0], kept | (bits & mask))


def _unpacked_predicates(warp: Warp, step: Step) -> None:
    """R2P."""
    value, mask = warp.value(step.operands[1]), warp.value(step.operands[2])
    if step.parts:
        value = value >> np.uint32(8 * int(step.parts[0][1:]))
    for k in range(7):
        if int(mask[0]) >> k & 1:
            warp.decide(f"P{k}", (value >> np.uint32(k) & np.uint32(1)).astype(bool))


def _vote(warp: Warp, step: Step) -> None:
    *_, condition = step.operands
    lanes = warp.condition(condition) & warp.mask
    bits = sum(1 << k for k in range(LANES) if lanes[k])
    if "ANY" in step.parts or "ALL" in step.parts:
        for name in (o for o in step.operands[:-1] if re.fullmatch(r"U?P\d", o)):
            found = lanes.any() if "ANY" in step.parts else not (warp.mask & ~lanes).any()
            warp.decide(name, np.full(LANES, found))
    for name in (o for o in step.operands[:-1] if re.fullmatch(r"U?R\d+", o)):
        warp.put(name, np.full(LANES, bits, np.uint32))


_ARITHMETIC: dict[str, Callable[[Warp, Step], None]] = {
    "IADD3": _iadd3,
    "IMAD": _imad,
    "ISETP": _isetp,
    "FSETP": _fsetp,
    "DSETP": _dsetp,
    "LOP3": _lop3,
    "PLOP3": _plop3,
    "SHF": _shf,
    "LEA": _lea,
    **dict.fromkeys(("SEL", "FSEL"), _select),
    **dict.fromkeys(("MOV", "R2UR"), _move),
    "PRMT": _prmt,
    "LDC": _constant,
    "LDCU": _constant,
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    "I2F": _of_integer,
    "F2I": _to_integer,
    "MUFU": _mufu,
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "FMNMX"), _float),
    "HFMA2": _half_constant,
    **dict.fromkeys(("IMNMX", "VIMNMX"), _extreme),
    "VIADDMNMX": _sum_extreme,
    "IABS": _absolute,
    **dict.fromkeys(("VIADD", "IADD"), _add),
    "P2R": _packed_predicates,
    "R2P": _unpacked_predicates,
    "VOTE": _vote,
}
_DATA -= set(_ARITHMETIC)
