"""Machine code as cuobjdump prints it: instructions, control flow, the hot path of a kernel and its loads.

The *hot path* of a kernel is one way through its innermost loop that loads x or, where no loop does, through the whole
kernel; of several such loops (one may be the unrolled part of another) the one that loads the most of x. Of the ways
the one is taken that loads the most bytes of x, then that stores the most, then with the most loads of 16 bytes, the
most loads, and the fewest instructions. So a field is counted with maps over T, H and W that are met in vectors: the
most that is asked of an aligned input, and more than of fields over channels. A loop inside that loads nothing of x is
passed once.

What is *in flight* is found by walking the hot path in order, a loop several times: a load is outstanding from its
issue until an instruction names one of its registers, which ends the wait for all loads before it too. Asynchronous
copies to shared memory (LDGSTS) are outstanding until DEPBAR waits for their group. Loads under a predicate count: of
the three by which Triton's shift asks for an element one is made.

Loads of x are those whose address is made from a pointer to x: registers are followed from the constant bank of the
parameters, through everything but loads.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bU?R\d+")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_PARAMETERS = re.compile(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    opcode: str
    text: str

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def bits(self) -> int:
        """What a memory instruction moves for a thread."""
        return next((_BITS[part] for part in self.opcode.split(".") if part in _BITS), 32)

    @cached_property
    def registers(self) -> list[str]:
        return _REGISTER.findall(self.text)

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The registers of the result."""
        operands = self.text.split(", ")
        if self.name in ("SHFL", "R2UR", "ATOM", "ATOMG") and operands[0].startswith("P"):
            operands = operands[1:]
        if self.name in ("STG", "STS", "STL", "ST", "RED", "LDGSTS") or not _REGISTER.fullmatch(
            operands[0].removesuffix(".reuse").strip()
        ):
            return ()
        kind, first = re.match(r"(U?R)(\d+)", operands[0].strip()).groups()
        memory = self.name in ("LDG", "LDS", "LDL", "LD", "LDC", "LDCU", "ULDC")
        pair = ".WIDE" in self.opcode or self.opcode.endswith(".64") or self.opcode in ("CS2R", "IADD.64", "MOV.64")
        count = max(1, self.bits // 32) if memory else 2 if pair or self.name.startswith("D") else 1
        return tuple(f"{kind}{int(first) + k}" for k in range(count))

    @cached_property
    def read(self) -> list[str]:
        return self.registers[1:] if self.written else self.registers

    @cached_property
    def constants(self) -> list[int]:
        return [int(offset, 16) for offset in _CONSTANT.findall(self.text)]

    @property
    def target(self) -> int | None:
        """Where a branch leads; none where the divergent rest of a warp goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.text) if self.name == "BRA" and ".DIV" not in self.opcode else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.name in ("EXIT", "RET", "BRX", "JMX"):
            return self.predicate is not None
        return self.name != "BRA" or self.predicate is not None or "," in self.text or ".DIV" in self.opcode


@dataclass
class Kernel:
    """A kernel for one architecture.

    bank: the address of its parameters in the constant bank; parameters: from there, first byte and size, by ordinal.
    """

    architecture: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = 0
    local: int = 0
    shared: int = 0
    threads: int = 0
    bank: int = 0
    parameters: dict[int, tuple[int, int]] = field(default_factory=dict)

    def widest(self, *names: str) -> int:
        """Bits of the widest of these memory instructions, 0 without any."""
        return max((i.bits for i in self.instructions if i.name in names), default=0)


def names(cuobjdump: str, path: str, architecture: str) -> set[str]:
    """The kernels in a library by what cuobjdump says of their resources."""
    command = [cuobjdump, "-res-usage", "-arch", architecture, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"Function (\S+):", done.stdout))


def read(cuobjdump: str, path: str, architecture: str | None = None) -> list[Kernel]:
    """The kernels in a library or a cubin, of one architecture or of all."""

    def lines(option: str) -> Iterator[str]:
        command = [cuobjdump, option, *(["-arch", architecture] if architecture else []), path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
            yield from process.stdout
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed")

    found: dict[tuple[str, str], Kernel] = {}
    here, kernel = architecture or "", None
    for line in lines("-sass"):
        if match := re.search(r"(?:code for|\.target)\s+(sm_\w+)", line):
            here = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = found.setdefault((here, match[1]), Kernel(here, match[1]))
        elif (match := _LINE.match(line)) and match[3] != "NOP":
            kernel.instructions.append(Instruction(int(match[1], 16), match[2], match[3], match[4].strip()))
    only = next(iter(found))[0] if len({key[0] for key in found}) == 1 else None  # a cubin does not repeat it
    here, name = only, ""
    for line in lines("-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            here = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            kernel = found[here, name]
            kernel.registers, kernel.shared = used["REG"], used["SHARED"]
            kernel.local = used["STACK"] + used["LOCAL"]
    here, kernel, attribute = only, None, ""
    for line in lines("-elf"):
        if match := re.match(r"arch = (\w+)", line):
            here = match[1]
        elif line.startswith(".nv.info."):
            kernel = found.get((here, line.strip().removeprefix(".nv.info.")))
        elif line.startswith("."):
            kernel = None
        elif kernel and (match := re.match(r"\s+Attribute:\s+(\w+)", line)):
            attribute = match[1]
        elif kernel and "Value:" in line:
            values = line.split("Value:")[1].split()
            if attribute == "EIATTR_KPARAM_INFO":
                ordinal, offset, size = (int(value, 16) for value in _PARAMETERS.search(line).groups())
                kernel.parameters[ordinal] = (offset, size)
            elif attribute in ("EIATTR_MAX_THREADS", "EIATTR_REQNTID"):
                kernel.threads = int(values[0], 16) * int(values[1], 16) * int(values[2], 16)
            elif attribute == "EIATTR_PARAM_CBANK":
                kernel.bank = int(values[1], 16) & 0xFFFF
    return list(found.values())


class Flow:
    """The control flow of a kernel: blocks by number, and what each may be followed by."""

    def __init__(self, kernel: Kernel):
        code = kernel.instructions
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        starts |= {b.address for a, b in itertools.pairwise(code) if a.target is not None or not a.falls_through}
        self.blocks: list[list[Instruction]] = []
        for instruction in code:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        number = {block[0].address: k for k, block in enumerate(self.blocks)}
        self.after: list[list[int]] = []
        for k, block in enumerate(self.blocks):
            last, after = block[-1], []
            if last.falls_through and k + 1 < len(self.blocks):
                after.append(k + 1)
            if last.target in number:
                after.append(number[last.target])
            self.after.append(after)
        self.before: list[list[int]] = [[] for _ in self.blocks]
        for k, after in enumerate(self.after):
            for following in after:
                self.before[following].append(k)

    def loads_of(self, addresses: Collection[int]) -> set[int]:
        """Addresses of the loads from global memory through a pointer that lies at these constant addresses."""
        before: list[set[str]] = [set() for _ in self.blocks]
        found: set[int] = set()
        order = {k: place for place, k in enumerate(reversed(_finished([0], dict(enumerate(self.after)))))}
        waiting, seen = [(0, 0)], {0}
        while waiting:
            _, k = heapq.heappop(waiting)
            state = set(before[k])
            for i in self.blocks[k]:
                if i.name in ("LDG", "LDGSTS"):
                    pointer = _BRACKETS.findall(i.text)[-1]
                    if state & set(_REGISTER.findall(pointer)):
                        found.add(i.address)
                    state -= set(i.written)
                    continue
                taken = set(i.written) if state & set(i.read) else set()
                for constant in i.constants:
                    if i.name in ("LDC", "LDCU", "ULDC"):
                        taken |= {r for j, r in enumerate(i.written) if constant + 4 * j in addresses}
                    elif constant in addresses:
                        taken |= set(i.written)
                if i.predicate is None:
                    state -= set(i.written)
                state |= taken
            for after in self.after[k]:
                if not state <= before[after] or after not in seen:
                    before[after] |= state
                    seen.add(after)
                    if (order[after], after) not in waiting:
                        heapq.heappush(waiting, (order[after], after))
        return found

    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """(head, blocks) of every loop."""
        found = []
        waiting = [(set(range(len(self.blocks))), -1)]
        while waiting:
            nodes, without = waiting.pop()  # inside a loop, without the way back to its head
            forward = {a: [b for b in self.after[a] if b in nodes and b != without] for a in nodes}
            for part in _components(forward):
                if len(part) == 1 and not part & set(forward[next(iter(part))]):
                    continue
                entered = {b for b in part for a in self.before[b] if a not in part and a != b}
                head = min(entered or part)
                found.append((head, frozenset(part)))
                waiting.append((part, head))
        return found

    def best_path(self, head: int, nodes: Collection[int], ends: Collection[int], loads: set[int]) -> list[Instruction]:
        """From head to one of ends inside nodes, without going back (see the top)."""
        forward = {a: [b for b in self.after[a] if b in nodes and b != head] for a in nodes}
        order = _finished([head], forward)
        place = {a: k for k, a in enumerate(order)}
        best: dict[int, tuple[tuple[int, ...], int | None]] = {}
        for a in order:  # the last blocks first
            ways = [(*best[b][:1], b) for b in forward[a] if place[b] < place[a] and b in best]
            if a in ends:
                ways.append(((0,) * 5, None))
            if ways:
                score, b = max(ways, key=lambda way: way[0])
                best[a] = (tuple(map(sum, zip(score, self._score(a, loads), strict=True))), b)
        path, at = [], head if head in best else None
        while at is not None:
            path += self.blocks[at]
            at = best[at][1]
        return path

    def _score(self, block: int, loads: set[int]) -> tuple[int, ...]:
        code = self.blocks[block]
        found = [i for i in code if i.name in ("LDG", "LDGSTS")]
        of_x = sum(i.bits for i in found if i.address in loads)
        stored = sum(i.bits for i in code if i.name == "STG")
        return of_x, stored, sum(i.bits >= 128 for i in found), len(found), -len(code)


def _components(forward: dict[int, list[int]]) -> list[set[int]]:
    """Sets of blocks of which each reaches each."""
    backward: dict[int, list[int]] = {a: [] for a in forward}
    for a, after in forward.items():
        for b in after:
            backward[b].append(a)
    found: list[set[int]] = []
    seen: set[int] = set()
    for root in reversed(_finished(forward, forward)):
        if root not in seen:
            found.append(set(_finished([root], backward, seen)))
    return found


def _finished(roots: Collection[int], forward: dict[int, list[int]], seen: set[int] | None = None) -> list[int]:
    """Blocks in the order in which a walk in depth leaves them; of those seen before, none."""
    order: list[int] = []
    seen = set() if seen is None else seen
    for root in sorted(roots):
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(forward[root]))]
        while stack:
            block, after = stack[-1]
            following = next((b for b in after if b not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(forward[following])))
    return order


@dataclass
class HotPath:
    """The instructions of a hot path, whether it is a loop, and the addresses of its loads of x."""

    instructions: list[Instruction]
    in_loop: bool
    loads: set[int]

    @property
    def loaded(self) -> int:
        """Bytes of x that a thread loads."""
        return sum(i.bits // 8 for i in self.instructions if i.address in self.loads)

    @property
    def stored(self) -> int:
        """Bytes that it stores to global memory."""
        return sum(i.bits // 8 for i in self.instructions if i.name == "STG")

    @property
    def in_flight(self) -> int:
        """The most bytes of x that are outstanding at a time, for a thread."""
        return max(_outstanding(self.instructions * (4 if self.in_loop else 1), self.loads), default=0)


def _outstanding(code: list[Instruction], loads: set[int]) -> Iterator[int]:
    pending: list[tuple[set[str], int]] = []
    groups: collections.deque[int] = collections.deque([0])  # asynchronous copies, the last group still open
    for i in code:
        named = set(i.registers)
        last = max((k for k, (registers, _) in enumerate(pending) if registers & named), default=-1)
        del pending[: last + 1]
        of_x = i.bits // 8 if i.address in loads else 0
        if i.name == "LDG":
            pending.append((set(i.written), of_x))
        elif i.name == "LDGSTS":
            groups[-1] += of_x
        elif i.name == "LDGDEPBAR":
            groups.append(0)
        elif i.name == "DEPBAR" and (allowed := re.search(r"SB0, 0x([0-9a-f]+)", i.text)):
            while len(groups) > int(allowed[1], 16) + 1:
                groups.popleft()
        yield sum(size for _, size in pending) + sum(groups)


def hot_path(kernel: Kernel, flow: Flow, pointers: list[tuple[int, int, int]] | None) -> HotPath:
    """Of the kernel whose pointers to x lie in these bytes (parameter, first, last); None: every load counts."""
    if pointers is None:
        loads = {i.address for i in kernel.instructions if i.name in ("LDG", "LDGSTS")}
    else:
        addresses: set[int] = set()
        for ordinal, first, last in pointers:
            at, size = kernel.parameters[ordinal]
            addresses.update(kernel.bank + at + byte for byte in range(first, min(last, size)))
        through = flow.loads_of(addresses)
        found = [i for i in kernel.instructions if i.address in through]
        loads = {i.address for i in found if i.bits == max(other.bits for other in found)}
    everything = range(len(flow.blocks))
    with_loads = {k for k in everything if any(i.address in loads for i in flow.blocks[k])}
    loops = [(head, blocks) for head, blocks in flow.loops() if blocks & with_loads]
    paths = []
    for head, blocks in loops:
        if not any(inner < blocks and inner & with_loads for _, inner in loops):
            path = flow.best_path(head, blocks, [k for k in blocks if head in flow.after[k]], loads)
            paths.append(HotPath(path, True, loads))
    if not paths:
        ends = [k for k in everything if flow.blocks[k][-1].name == "EXIT"]
        paths = [HotPath(flow.best_path(0, everything, ends, loads), False, loads)]
    return max(paths, key=lambda path: path.loaded)


def shared_loop(flow: Flow, hot: HotPath, size: int) -> float:
    """Instructions per element of this size in the dearest innermost loop that reads shared memory and nothing of x."""
    loops = flow.loops()
    dearest = 0.0
    for head, blocks in loops:
        code = [i for k in blocks for i in flow.blocks[k]]
        if any(inner < blocks for _, inner in loops) or any(i.address in hot.loads for i in code):
            continue
        path = flow.best_path(head, blocks, [k for k in blocks if head in flow.after[k]], hot.loads)
        if read := sum(i.bits // 8 for i in path if i.name == "LDS"):
            dearest = max(dearest, len(path) * size / read)
    return dearest
