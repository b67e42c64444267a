"""Runs the machine code of a kernel for one warp, to count what it issues: which way it goes depends on the shape.

What instructions compute is in instructions.py; here are control flow, memory and the count. Every load returns zeros,
so data decide nothing but ties. Lanes part at a branch and meet at the convergence barrier (BSSY, BSYNC) that the
compiler set for them; while they are apart, each side is issued on its own. The warps of a block run one by one: at a
barrier none waits, as no value that is loaded matters.
"""

from __future__ import annotations

import bisect
import collections
import re
import struct
from dataclasses import dataclass, field

import numpy as np

from .instructions import execute
from .lanes import LANES, Lanes, Step, row_of
from .sass import Kernel

#: Buffers of a launch lie so far apart that an address tells which of them it is in.
BUFFER_BITS = 40

_ADDRESS = re.compile(r"\[([^\[\]]*)\]$")
_MEMORY = {"LDG", "STG", "LDS", "STS", "LD", "ST", "LDGSTS", "RED", "LDL", "STL"}


@dataclass
class Issued:
    """What a warp issued. By buffer, the bytes that its lanes loaded and stored; wavefronts: the lines of 128 bytes
    that each access to memory met, one at least, and the turns of the banks of shared memory; in_flight: the most bytes
    of watched buffers outstanding at a time."""

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
        # A branch may lead to an instruction that does nothing, which the kernel is read without.
        addresses = [i.address for i in kernel.instructions]
        self.place = {at: bisect.bisect_left(addresses, at) for at in range(0, addresses[-1] + 1, 16)}
        self.steps = [Step(i) for i in kernel.instructions]

    def bank(self, parameters: bytes, grid: int, threads: int) -> bytes:
        bank = bytearray(max(self.kernel.bank, 0x400) + len(parameters) + 16)
        for at, value in ((0, threads), (4, 1), (8, 1), (12, grid), (16, 1), (20, 1)):
            bank[at : at + 4] = struct.pack("<I", value)
        bank[self.kernel.bank : self.kernel.bank + len(parameters)] = parameters
        return bytes(bank)


class Warp(Lanes):
    """One warp of a launch."""

    def __init__(self, program: Program, bank: bytes, block: int, warp: int, threads: int, watched: frozenset[int]):
        super().__init__(bank, block, warp, threads)
        self.program, self.watched = program, watched
        self.joined: dict[str, np.ndarray] = {}
        self.waiting: dict[str, tuple[int, np.ndarray]] = {}
        self.alive = self.mask.copy()
        self.gathered: dict[int, np.ndarray] = {}  # by the place of a WARPSYNC
        self.issued = Issued()
        self._words: set[int] = set()
        self._pending: list[tuple[frozenset[str], int]] = []
        self._groups: collections.deque[int] = collections.deque([0])

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
        if step.name in ("STS", "LDS"):
            self.issued.wavefronts += _banks(at, size)
            return 0
        self.issued.wavefronts += max(1, len(np.unique(at // 128))) * (1 if size <= 16 else 2)
        if step.name in ("STL", "LDL"):
            return 0
        if step.name == "LDGSTS" and size == 4:  # the least copy: elements that share a word find it in L1
            at = np.array(sorted(set(at.tolist()) - self._words), np.uint64)
            self._words.update(at.tolist())
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
        execute(self, step)


def _banks(at: np.ndarray, size: int) -> int:
    """Turns of an access to shared memory: it has 32 banks, each of which gives one word a turn to all that ask for it.
    Lanes go together as far as they ask for 128 bytes."""
    lanes, turns = min(len(at), max(1, 128 // max(size, 4))), 0
    for first in range(0, len(at), lanes):
        words = np.unique((at[first : first + lanes, None] + np.arange(0, max(size, 4), 4, dtype=np.uint64)) // 4)
        turns += int(np.bincount((words % 32).astype(np.int64)).max())
    return turns


def _memory_operand(step: Step) -> int:
    return max(k for k, o in enumerate(step.operands) if "[" in o)


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
    to = int(warp.registers[row_of(step.operands[0].split()[0])][int(np.argmax(lanes))])
    return warp.program.place[to], lanes


def _exit(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    rest = lanes & ~warp.mask
    warp.alive = warp.alive & ~warp.mask
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


def _gather(warp: Warp, step: Step, at: int, lanes: np.ndarray, parts: list) -> tuple[int, np.ndarray | None]:
    """WARPSYNC of all lanes: those that come early wait for the others, as long as there are any."""
    if "ALL" not in step.parts:
        return at + 1, lanes
    here = lanes | warp.gathered.pop(at, np.zeros(LANES, bool))
    if parts and (warp.alive & ~here).any():
        warp.gathered[at] = here
        return 0, None
    return at + 1, here


_CONTROL = {
    "BRA": _branch,
    "CALL": _call,
    "RET": _return,
    "EXIT": _exit,
    "BSSY": _join,
    "BREAK": _leave,
    "BSYNC": _meet,
    "WARPSYNC": _gather,
}
