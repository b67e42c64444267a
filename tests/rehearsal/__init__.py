"""A rehearsal of the CUDA backend without a GPU: CUDA tensors of a CUDA build of torch, in host memory.

Libraries of this folder stand in for NVIDIA's runtime and driver (device.h says how). The kernels of csrc/cuda run on
the host emulator, after the host's side of their launches; torch's own operators are done by the CPU on the same memory
(framework.py). `make rehearse-cuda` builds all of it and runs the tests that need a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .build import DRIVER, LIBRARY, OUT, RUNTIME

#: The library that is rehearsed: what was built, or one with a fault in it.
LIBRARY_FILE = Path(os.environ.get("AIA_REHEARSAL_LIBRARY", OUT / LIBRARY))


class Launch(NamedTuple):
    """A launch as the runtime took it. ran: on the host; else it is one of torch's kernels, which nothing ran."""

    ran: bool
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic: int
    cluster: int
    cooperative: bool
    device: int
    stream: int
    kernel: str


_runtime: ctypes.CDLL | None = None


def install() -> None:
    """Stand in for NVIDIA's libraries in this process, which must not have imported torch yet; Triton, which would ask
    the driver for more, is not found."""
    global _runtime
    assert "torch" not in sys.modules
    sys.modules["triton"] = None
    for name in (DRIVER, RUNTIME):  # a library of the same name that torch wants is then not looked for
        _runtime = ctypes.CDLL(str(OUT / name), ctypes.RTLD_GLOBAL)
    for name, result in (
        ("launches", ctypes.c_char_p),
        ("complaints", ctypes.c_char_p),
        ("used_bytes", ctypes.c_size_t),
        ("waiting", ctypes.c_size_t),
    ):
        getattr(_runtime, f"rehearsal_{name}").restype = result
    _runtime.rehearsal_stream_number.argtypes = [ctypes.c_void_p]


@functools.cache
def _kernels() -> dict[str, str]:
    """Names of the library's functions without their arguments, by @offset."""
    text = subprocess.run(["nm", "-C", LIBRARY_FILE], capture_output=True, text=True, check=True).stdout
    lines = [line.split(" ", 2) for line in text.splitlines() if not line.startswith(" ")]
    names = {f"@{int(address, 16):x}": name for address, kind, name in lines if kind in "tTwW"}
    names = {at: name.replace("(anonymous namespace)::", "") for at, name in names.items()}
    return {at: name.split("(")[0].split("<")[0].split("::")[-1] for at, name in names.items()}


def _parsed(line: str) -> Launch:
    fields, name = line.split(" kernel ", 1)
    ran, *rest = fields.split(" ")
    values = dict(zip(rest[::2], rest[1::2], strict=True))
    grid, block = (tuple(map(int, values.pop(key).split(","))) for key in ("grid", "block"))
    dynamic, cluster, cooperative, device, stream = map(int, values.values())
    kernel = _kernels().get(name, name)
    return Launch(ran == "run", grid, block, dynamic, cluster, bool(cooperative), device, stream, kernel)


def launches() -> list[Launch]:
    """The launches since the last call."""
    return [_parsed(line) for line in _runtime.rehearsal_launches().decode().splitlines()]


def complaints() -> list[str]:
    """What a GPU would have refused or run into since the last call; the bytes around all memory are looked at."""
    return _runtime.rehearsal_complaints().decode().splitlines()


def used_bytes() -> int:
    """Device memory that is allocated, of all devices."""
    return _runtime.rehearsal_used_bytes()


def waiting() -> int:
    """Pieces of work that wait, in all streams."""
    return _runtime.rehearsal_waiting()


def stream_number(stream) -> int:
    """The number by which launches call a stream of torch."""
    return _runtime.rehearsal_stream_number(stream.cuda_stream)


_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
#: What streams may still call.
_queued: list = []


def queue(stream, work: Callable[[], None]) -> None:
    """Have a stream of torch do some work of the host's, or the graph that it captures."""
    _queued.append(_WORK(lambda _: work()))
    error = _runtime.cudaLaunchHostFunc(ctypes.c_void_p(stream.cuda_stream), _queued[-1], None)
    assert error == 0, f"the runtime refuses work with error {error}"
