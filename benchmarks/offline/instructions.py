"""Instructions that compute, by their names: what each does to the lanes of a warp.

Integers, addresses, predicates and the floating-point numbers of index arithmetic are computed as the hardware does.
An instruction that is not known here is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .lanes import LANES, Lanes, Step, is_number, row_of

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
    *("DADD", "DMUL", "DFMA", "DMNMX", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "FADD2", "FMUL2", "FFMA2"),
    *("F2F", "F2FP", "I2FP", "FCHK", "SHFL", "LDS", "LDL", "LDG", "LD", "ATOM", "ATOMG"),
}
_NOTHING = {
    *("BAR", "DEPBAR", "LDGDEPBAR", "LDGSTS", "STG", "STS", "STL", "ST", "MEMBAR", "ERRBAR", "CCTL"),
    *("YIELD", "NOP", "FENCE", "UCGABAR_ARV", "UCGABAR_WAIT", "BMOV", "RED", "CGAERRBAR"),
    "BPT",  # where a grid has no place to meet, which the driver gives it
}


def _split(step: Step) -> tuple[list[str], list[str]]:
    """The predicates that an instruction writes beside its register, and its sources."""
    rest, decided = step.operands[1:], []
    while rest and re.fullmatch(r"U?P[0-9T]", rest[0]) and len(rest) > 2:
        decided.append(rest.pop(0))
    return decided, rest


def _iadd3(lanes: Lanes, step: Step) -> None:
    decided, sources = _split(step)
    conditions = [s for s in sources if re.fullmatch(r"!?U?P[0-9T]", s)]
    total = np.zeros(LANES, np.uint64)
    for source in (s for s in sources if s not in conditions):
        negated = source.startswith("-") and not is_number(source)
        value = lanes.value(source.removeprefix("-") if negated else source).astype(np.uint64)
        total = total + (np.uint64(1 << 32) - value if negated else value)
    if "X" in step.parts:
        for condition in conditions:
            total = total + lanes.condition(condition).astype(np.uint64)
    lanes.put(step.operands[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    for k, name in enumerate(decided):
        lanes.decide(name, total >> np.uint64(32) > np.uint64(k))


def _signed(value: np.ndarray) -> np.ndarray:
    return value.view(np.int32).astype(np.int64)


def _imad(lanes: Lanes, step: Step) -> None:
    decided, sources = _split(step)
    a, b = lanes.value(sources[0]), lanes.value(sources[1])
    plain = "U32" in step.parts
    if "WIDE" in step.parts or "HI" in step.parts:
        product = a.astype(np.uint64) * b.astype(np.uint64) if plain else (_signed(a) * _signed(b)).view(np.uint64)
        total = product + lanes.wide(sources[2])
        for name in decided:
            lanes.decide(name, total < product)
        if "X" in step.parts:
            total = total + lanes.condition(sources[3]).astype(np.uint64)
        if "WIDE" in step.parts:
            lanes.put_wide(step.operands[0], total)
        else:
            lanes.put(step.operands[0], (total >> np.uint64(32)).astype(np.uint32))
        return
    total = a * b + lanes.value(sources[2])
    if "X" in step.parts:
        total = total + lanes.condition(sources[3]).astype(np.uint32)
    lanes.put(step.operands[0], total)


def _isetp(lanes: Lanes, step: Step) -> None:
    first, second, a, b, *conditions = step.operands
    left, right = lanes.value(a), lanes.value(b)
    if "U32" not in step.parts:
        left, right = left.view(np.int32), right.view(np.int32)
    compare = step.parts[0]
    if "EX" in step.parts:  # the upper halves; what the lower ones say counts where these are equal
        below, equal = lanes.condition(conditions[1]), left == right
        if compare == "NE":
            found = ~equal | below
        else:
            found = equal & below if compare == "EQ" else _COMPARE[compare[0] + "T"](left, right) | (equal & below)
    else:
        found = _COMPARE[compare](left, right)
    _combine(lanes, step, found, first, second, conditions[0])


def _combine(lanes: Lanes, step: Step, found: np.ndarray, first: str, second: str, other: str) -> None:
    with_ = lanes.condition(other)
    how = next(p for p in step.parts if p in ("AND", "OR", "XOR"))
    join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[how]
    lanes.decide(first, join(found, with_))
    lanes.decide(second, join(~found, with_))


def _fsetp(lanes: Lanes, step: Step) -> None:
    first, second, a, b, other = step.operands[:5]
    left, right = lanes.floats(a), lanes.floats(b)
    compare = step.parts[0]
    apart = np.isnan(left) | np.isnan(right)
    if compare in ("NAN", "NUM"):
        found = apart if compare == "NAN" else ~apart
    else:
        found = _COMPARE[compare.removesuffix("U")](left, right)
        found = found | apart if compare.endswith("U") and compare != "U" else found & ~apart
    _combine(lanes, step, found, first, second, other)


def _dsetp(lanes: Lanes, step: Step) -> None:
    compare = step.parts[0].removesuffix("U")
    found = np.full(LANES, compare in ("LE", "GE", "EQ", "NUM"))  # of zeros
    _combine(lanes, step, found, *step.operands[:2], step.operands[4])


def _lookup(table: int, values: list[np.ndarray]) -> np.ndarray:
    a, b, c = values
    found = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            found |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return found


def _lop3(lanes: Lanes, step: Step) -> None:
    operands = list(step.operands)
    decided = operands.pop(0) if re.match(r"U?P", operands[0]) else None
    found = _lookup(int(operands[4], 16), [lanes.value(o) for o in operands[1:4]])
    lanes.put(operands[0], found)
    if decided:
        lanes.decide(decided, found != 0)


def _plop3(lanes: Lanes, step: Step) -> None:
    first, second, *sources = step.operands
    values = [lanes.condition(s) for s in sources[:3]]
    lanes.decide(first, _lookup(int(sources[3], 16), values))
    lanes.decide(second, _lookup(int(sources[4], 16), values))


def _shf(lanes: Lanes, step: Step) -> None:
    low, shift, high = (lanes.value(o) for o in step.operands[1:4])
    wide = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    by = (shift & np.uint32(63 if "U64" in step.parts or "S64" in step.parts else 31)).astype(np.uint64)
    if "L" in step.parts:
        found = wide << by
        result = found >> np.uint64(32) if "HI" in step.parts else found
        lanes.put(step.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        return
    arithmetic = any(p in ("S32", "S64") for p in step.parts)
    found = (wide.view(np.int64) >> by.astype(np.int64)).view(np.uint64) if arithmetic else wide >> by
    result = found >> np.uint64(32) if "HI" in step.parts else found
    lanes.put(step.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32))


def _lea(lanes: Lanes, step: Step) -> None:
    decided, sources = _split(step)
    conditions = [s for s in sources if re.fullmatch(r"!?U?P[0-9T]", s)]
    plain = [s for s in sources if s not in conditions]
    a, b = lanes.value(plain[0]), lanes.value(plain[1]).astype(np.uint64)
    if plain[1].startswith("-"):
        b = np.uint64(1 << 32) - lanes.value(plain[1].removeprefix("-")).astype(np.uint64)
    shift = np.uint64(int(plain[-1], 16))
    if "HI" in step.parts:
        wide = _signed(a).view(np.uint64) if "SX32" in step.parts else a.astype(np.uint64)
        if len(plain) == 4:
            wide = wide | lanes.value(plain[2]).astype(np.uint64) << np.uint64(32)
        total = ((wide << shift) >> np.uint64(32) & np.uint64(0xFFFFFFFF)) + b
        if "X" in step.parts and conditions:
            total = total + lanes.condition(conditions[0]).astype(np.uint64)
    else:
        total = (a.astype(np.uint64) << shift & np.uint64(0xFFFFFFFF)) + b
    lanes.put(step.operands[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
    for name in decided:
        lanes.decide(name, total >> np.uint64(32) > 0)


def _select(lanes: Lanes, step: Step) -> None:
    a, b, condition = step.operands[1:4]
    chosen = np.where(lanes.condition(condition), lanes.value(a), lanes.value(b))
    lanes.put(step.operands[0], chosen)


def _move(lanes: Lanes, step: Step) -> None:
    if "64" in step.parts:
        lanes.put_wide(step.operands[0], lanes.wide(step.operands[1]))
    else:
        lanes.put(step.operands[0], lanes.value(step.operands[1]))


def _prmt(lanes: Lanes, step: Step) -> None:
    a, selector, b = (lanes.value(o) for o in step.operands[1:4])
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros(LANES, np.uint32)
    for k in range(4):
        nibble = selector >> np.uint32(4 * k) & np.uint32(15)
        byte = (wide >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        found |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * k)
    lanes.put(step.operands[0], found)


def _constant(lanes: Lanes, step: Step) -> None:
    """LDC: at a place of the bank that a register may move."""
    place = re.search(r"\[0x0\]\[([^\]]*)\]", step.instruction.text)[1]
    size = step.instruction.bits // 8
    at = np.zeros(LANES, np.int64)
    for term in place.split("+"):
        at = at + (_signed(lanes.value(term)) if re.match(r"U?R", term) else int(term, 16))
    words = []
    for offset in range(0, max(size, 4), 4):
        take = min(size, 4)
        read = [int.from_bytes(lanes.bank[int(p) + offset : int(p) + offset + take], "little") for p in at]
        words.append(np.array(read, np.uint32))
    if any(p in ("S8", "S16") for p in step.parts):
        raise NotImplementedError(step.instruction.opcode)
    row, kind = row_of(step.operands[0]), "UR" if step.operands[0].startswith("U") else "R"
    if row % 256 != 255:
        for k, word in enumerate(words):
            lanes.put(f"{kind}{row % 256 + k}", word)


def _special(lanes: Lanes, step: Step) -> None:
    known = {"SR_TID.X": lanes.thread, "SR_CTAID.X": np.full(LANES, lanes.block, np.uint32)}
    known["SR_LANEID"] = lane = np.arange(LANES, dtype=np.uint32)
    known["SR_LTMASK"] = (np.uint32(1) << lane) - np.uint32(1)
    zero = np.zeros(LANES, np.uint32)
    source = step.operands[1]
    zeros = ("SRZ", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId", "SR_SWINHI")
    if source not in known and source not in zeros:
        raise NotImplementedError(source)
    lanes.put(step.operands[0], known.get(source, zero))
    if step.kind == "CS2R" and "32" not in step.parts:
        lanes.put(f"R{row_of(step.operands[0]) + 1}", zero)


def _of_integer(lanes: Lanes, step: Step) -> None:
    value = lanes.value(step.operands[1])
    exact = value.astype(np.float64) if "U32" in step.parts else _signed(value).astype(np.float64)
    found = exact.astype(np.float32)
    if "RP" in step.parts:
        found = np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found)
    lanes.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _to_integer(lanes: Lanes, step: Step) -> None:
    value = np.nan_to_num(np.trunc(lanes.floats(step.operands[1]).astype(np.float64)), posinf=2**32 - 1, neginf=0)
    lanes.put(step.operands[0], np.clip(value, 0, 2**32 - 1).astype(np.uint64).astype(np.uint32))


def _mufu(lanes: Lanes, step: Step) -> None:
    value = lanes.floats(step.operands[1])
    found = 1 / value if "RCP" in step.parts else np.zeros(LANES, np.float32)
    lanes.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _float(lanes: Lanes, step: Step) -> None:
    a, b = lanes.floats(step.operands[1]), lanes.floats(step.operands[2])
    if step.kind == "FADD":
        found = a + b
    elif step.kind == "FMUL":
        found = a * b
    elif step.kind == "FFMA":
        found = a * b + lanes.floats(step.operands[3])
    else:
        found = np.where(lanes.condition(step.operands[3]), np.minimum(a, b), np.maximum(a, b))
    lanes.put(step.operands[0], found.astype(np.float32).view(np.uint32))


def _half_constant(lanes: Lanes, step: Step) -> None:
    """HFMA2 of zeros: how the compiler makes a constant of two halves."""
    found = np.zeros(LANES, np.uint32)
    if step.operands[1].lstrip("-") == "RZ" and step.operands[2].lstrip("-") == "RZ" and len(step.operands) == 5:
        high, low = (int(np.float16(float(o)).view(np.uint16)) for o in step.operands[3:])
        found = np.full(LANES, high << 16 | low, np.uint32)
    for register in step.written:
        lanes.put(register, found)


def _extreme(lanes: Lanes, step: Step) -> None:
    a, b = lanes.value(step.operands[1]), lanes.value(step.operands[2])
    if "U32" not in step.parts:
        a, b = a.view(np.int32), b.view(np.int32)
    found = np.where(lanes.condition(step.operands[3]), np.minimum(a, b), np.maximum(a, b))
    lanes.put(step.operands[0], found.view(np.uint32))


def _sum_extreme(lanes: Lanes, step: Step) -> None:
    a, b, c = (lanes.value(o) for o in step.operands[1:4])
    total = a + b
    if "U32" not in step.parts:
        total, c = total.view(np.int32), c.view(np.int32)
    found = np.where(lanes.condition(step.operands[4]), np.minimum(total, c), np.maximum(total, c))
    lanes.put(step.operands[0], found.view(np.uint32))


def _absolute(lanes: Lanes, step: Step) -> None:
    lanes.put(step.operands[0], np.abs(lanes.value(step.operands[1]).view(np.int32)).view(np.uint32))


def _add(lanes: Lanes, step: Step) -> None:
    if "64" in step.parts:
        lanes.put_wide(step.operands[0], lanes.wide(step.operands[1]) + lanes.wide(step.operands[2]))
    else:
        lanes.put(step.operands[0], lanes.value(step.operands[1]) + lanes.value(step.operands[2]))


def _packed_predicates(lanes: Lanes, step: Step) -> None:
    """P2R: predicates as bits of a register, beside what it held."""
    mask = lanes.value(step.operands[-1])
    bits = sum((lanes.predicates[k].astype(np.uint32) << np.uint32(k) for k in range(7)), np.zeros(LANES, np.uint32))
    kept = lanes.value(step.operands[2]) & ~mask
    lanes.put(step.operands[0], kept | (bits & mask))


def _unpacked_predicates(lanes: Lanes, step: Step) -> None:
    """R2P."""
    value, mask = lanes.value(step.operands[1]), lanes.value(step.operands[2])
    if step.parts:
        value = value >> np.uint32(8 * int(step.parts[0][1:]))
    for k in range(7):
        if int(mask[0]) >> k & 1:
            lanes.decide(f"P{k}", (value >> np.uint32(k) & np.uint32(1)).astype(bool))


def _vote(lanes: Lanes, step: Step) -> None:
    *_, condition = step.operands
    voting = lanes.condition(condition) & lanes.mask
    bits = sum(1 << k for k in range(LANES) if voting[k])
    if "ANY" in step.parts or "ALL" in step.parts:
        for name in (o for o in step.operands[:-1] if re.fullmatch(r"U?P\d", o)):
            found = voting.any() if "ANY" in step.parts else not (lanes.mask & ~voting).any()
            lanes.decide(name, np.full(LANES, found))
    for name in (o for o in step.operands[:-1] if re.fullmatch(r"U?R\d+", o)):
        lanes.put(name, np.full(LANES, bits, np.uint32))


def _highest_bit(lanes: Lanes, step: Step) -> None:
    found = np.array([int(value).bit_length() - 1 for value in lanes.value(step.operands[1])], np.int32)
    lanes.put(step.operands[0], found.view(np.uint32))


def _bits(lanes: Lanes, step: Step) -> None:
    lanes.put(step.operands[0], np.bitwise_count(lanes.value(step.operands[1])).astype(np.uint32))


_ARITHMETIC: dict[str, Callable[[Lanes, Step], None]] = {
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
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    "FLO": _highest_bit,
    "POPC": _bits,
}
_DATA -= set(_ARITHMETIC)


def execute(lanes: Lanes, step: Step) -> None:
    """What an instruction that moves no control does, in the lanes of the mask."""
    if step.kind in _NOTHING or not lanes.mask.any():
        return
    if step.kind in _DATA:
        # Who waits for the other blocks of a grid reads until a bit changes: it finds it changed.
        awaited = step.kind == "LD" and "STRONG" in step.parts and "GPU" in step.parts
        for register in step.written:
            lanes.put(register, np.full(LANES, 0xFFFFFFFF if awaited else 0, np.uint32))
        return
    handler = _ARITHMETIC.get(step.kind)
    if handler is None:
        raise NotImplementedError(f"{step.instruction.opcode} {step.instruction.text}")
    handler(lanes, step)
