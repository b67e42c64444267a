"""Where the tests run passes: the table of backends, what each may be set to, and marks that run a test by it.

triton runs in the interpreter or on a GPU, cpu at every instruction level of the processor, cuda on a GPU, and the
kernels of cuda on the host emulator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import LEVELS, at_level

from aia_kernels import backends

CPU = tuple(f"cpu, {level}" for level in LEVELS)
CUDA = ("emulator", "cuda")
BACKENDS = ("triton", *CPU, *CUDA)
#: On one thread a reduction over space and time takes several blocks of channels at once, on many one
#: (csrc/register/cpu.h).
CPU_ON_THREADS = tuple(f"{cpu}, {threads}" for cpu in CPU for threads in ("1 thread", "16 threads"))

Table = tuple[tuple[str, ...], dict[str, Any]]


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test that takes `passes` on these backends."""
    return pytest.mark.parametrize("passes", [_row(name) for name in names], indirect=True)


def each(*table: Table, sweep: tuple[Table, ...] = (), argument: str = "case") -> pytest.MarkDecorator:
    """Run a test that takes `passes` and a case by rows of a table: some backends, and the cases that run on them.

    sweep: rows that run in sweeps alone.
    """
    rows = [
        _row(backend, case, id=f"{backend}-{name}", swept=swept)
        for rows, swept in ((table, False), (sweep, True))
        for names, cases in rows
        for backend in names
        for name, case in cases.items()
    ]
    return pytest.mark.parametrize(("passes", argument), rows, indirect=True)


def _row(backend: str, *case, swept: bool = False, **named):
    marks = [pytest.mark.sanitizer] if backend == "cuda" else []
    return pytest.param(backend, *case, marks=[*marks, *([pytest.mark.sweep] if swept else [])], **named)


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def few_programs() -> Iterator[None]:
    """More tasks than programs for Triton's gates: lanes carry moments and weight gradients along."""
    from aia_kernels.triton import packed_maps

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TAPPED": 16, "FLAT": 16, "PROGRAMS": 3}.items():
            patch.setattr(packed_maps, name, value)
        yield


#: What a backend may be set to, by what stands after its name.
SETTINGS = {level: functools.partial(at_level, level) for level in LEVELS} | {
    "1 thread": functools.partial(on_threads, 1),
    "16 threads": functools.partial(on_threads, 16),
    "3 programs": few_programs,
}
#: Of the emulator: tensors that begin between vectors, as a slice of a batch may; as few blocks as a launch of a gate
#: pass may be told to have, one for each map.
EMULATED = {"between vectors": ("misaligned", True), "3 blocks": ("blocks", 3)}


@contextlib.contextmanager
def passes_of(family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The passes of a family on the backend that is the parameter of a fixture, for tensors on pass_cases.DEVICE."""
    backend, *settings = request.param.split(", ")
    if backend in ("cpu", "emulator"):
        monkeypatch.setattr("pass_cases.DEVICE", "cpu")
    if backend == "emulator":
        emulator = request.getfixturevalue("emulator")
        for setting in settings:
            monkeypatch.setattr(emulator, *EMULATED[setting])
        yield emulator
        return
    if (reason := backends.available_backends(family)[backend]) is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(SETTINGS[setting]())
        yield backends.passes(backend, family)


def passes_fixture(family: str) -> Any:
    """The fixture ``passes`` of a file of tests: passes_of a family."""

    @pytest.fixture
    def passes(request, monkeypatch):
        with passes_of(family, request, monkeypatch) as found:
            yield found

    return passes
