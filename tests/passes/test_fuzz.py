"""A small portion of the fuzz of the raw CPU operators (tests/fuzz); make fuzz N=100000 runs a large one."""

from __future__ import annotations

import shutil

import pytest
from conftest import LEVELS, at_level, skip_unless_runnable
from fuzz import sanitized
from fuzz.sets import OPERATORS, Set, copied, same
from fuzz.wholes import TAKE_KEPT


@pytest.mark.parametrize("level", LEVELS)
def test_values_at_every_level(level):
    """As it is installed, compiled with optimization: each set is refused or gives the values of float64."""
    skip_unless_runnable("cpu", "cpu")
    with at_level(level):
        outcomes = {(one.operator, one.run() is None) for one in map(Set, range(800))}
    assert outcomes == {(name, taken) for name in OPERATORS for taken in (True, False)}


#: By sanitizer: the instruction levels and the operator, all without a name, that are compiled and run. Threads meet in
#: one function, which the temporal shift shows; that units share no result test_passes holds for every operator too.
SANITIZED = [
    pytest.param("address", ("base",), "", id="address"),
    pytest.param("thread", (), "temporal_shift", id="thread"),
    pytest.param("thread", ("base",), "", id="thread, every operator", marks=pytest.mark.sweep),
]


@pytest.mark.parametrize("kind, levels, operator", SANITIZED)
def test_the_sanitizers_find_nothing(kind, levels, operator):
    if (reason := sanitized.why_not(kind)) is not None:
        pytest.skip(reason)
    found = sanitized.run(kind, sanitized.build(kind, levels), range(500), operator=operator)
    assert found is None, found


#: Faults planted beside the temporal shift: by which sanitizer's build they must be found, in which file, what is
#: replaced, by what, and the words that tell of it.
FAULTS = {
    "one element too many": (
        "address",
        "cpu/shift.h",
        "std::memcpy(target, source, elements * itemsize)",
        "std::memcpy(target, source, (elements + 1) * itemsize)",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a race": (
        "thread",
        "cpu/shift.h",
        "    const bool side_by_side =",
        "    static int64_t done = 0;\n    ++done;\n    const bool side_by_side =",
        "ThreadSanitizer: data race",
    ),
    "a shift that has no result": (
        "address",
        "cpu/shift.h",
        "const int64_t positions = x.H * x.W,",
        "const int64_t positions = x.H * x.W + (int64_t{1} << (63 + x.T) == 1),",
        "runtime error: shift exponent",
    ),
    "strides that nobody checks": (
        "address",
        "register/checks.h",
        "dense = dense && !at.differs(axis, expected);",
        "dense = dense && (order == 2 || !at.differs(axis, expected));",
        "AssertionError",
    ),
}


def faults() -> list:
    """FAULTS; one for each sanitizer is enough in every run."""
    marks = {name: [] if name in ("one element too many", "a race") else [pytest.mark.sweep] for name in FAULTS}
    return [pytest.param(*fault, id=name, marks=marks[name]) for name, fault in FAULTS.items()]


@pytest.mark.parametrize("kind, file, before, after, words", faults())
def test_a_fault_is_found(kind, file, before, after, words, tmp_path):
    """And told with the set at which it was found."""
    if (reason := sanitized.why_not(kind)) is not None:
        pytest.skip(reason)
    csrc = shutil.copytree(sanitized.ROOT / "csrc", tmp_path / "csrc")
    source = csrc / file
    assert source.read_text().count(before) == 1
    source.write_text(source.read_text().replace(before, after))
    found = sanitized.run(kind, sanitized.build(kind, (), csrc, tmp_path), range(200), operator="temporal_shift")
    assert found is not None and words in found and "temporal_shift(" in found


def test_a_set_is_its_seed():
    """The same arguments, to the bit, however often and wherever they are drawn."""
    skip_unless_runnable("cpu", "cpu")  # some are made by operators
    for seed in range(60):
        one, other = Set(seed), Set(seed)
        assert str(one) == str(other)
        assert one.operator in TAKE_KEPT or same(copied(one.arguments), copied(other.arguments))
