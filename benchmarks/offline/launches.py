"""The launches of a pass on a shape, as its own host code makes them: kernels, grids and parameters, without a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from . import sass

ORDERS = ("TCHW", "THWC", "CTHW")
SCALARS = ("fp32", "fp64", "bf16", "fp16")
SIZES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
NONE, CHANNEL, SPACETIME = 0, 1, 3
#: Numbers of the buffers of launches.cpp that are x-sized.
INPUTS, OUTPUT = (1, 2), 3

_TOLD = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


@dataclass(frozen=True)
class Launch:
    """parameters: the bytes that the kernel finds in its constant bank; shared: bytes asked for at the launch."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    parameters: bytes


class Recorder:
    """A library of the passes that is linked with launches.cpp in the place of the CUDA runtime."""

    def __init__(self, library: Path, kernels: dict[str, sass.Kernel]):
        self._library, self._kernels = ctypes.CDLL(str(library)), kernels

    def launches(
        self, name: str, shape: tuple[int, ...], order: str, dtype: str, context: int, gate_context: int = NONE
    ) -> list[Launch]:
        """Of a pass on x [B, T, C, H, W] with fields of these contexts."""
        found: list[Launch] = []
        sizes = (ctypes.c_int64 * 5)(*shape)
        callback = self._noting(found)
        width = {c: index_bytes(shape, c) for c in (NONE, CHANNEL, SPACETIME)}
        error = self._library.launches_of(
            *(name.encode(), sizes, ORDERS.index(order), SCALARS.index(dtype), context, gate_context),
            *(width[context], width[gate_context], callback),
        )
        if error:
            raise ValueError(f"{name} gave the error {error}; -1: the library has no such pass")
        return found

    def gate_launches(self, name: str, batch: int, dims: list[int]) -> list[Launch]:
        """Of a gate pass on maps of these sizes, three for each."""
        found: list[Launch] = []
        sizes = (ctypes.c_int64 * len(dims))(*dims)
        callback = self._noting(found)
        error = self._library.launches_of_gate(name.encode(), ctypes.c_int64(batch), len(dims) // 3, sizes, callback)
        if error:
            raise ValueError(f"{name} gave the error {error}; -1: the library has no such pass")
        return found

    def _noting(self, found: list[Launch]):
        """What the library calls for each launch."""

        def told(kernel, blocks, threads, shared, arguments):
            of = self._kernels[kernel.decode()]
            packed = bytearray(max(at + size for at, size in of.parameters.values()))
            for ordinal, (at, size) in of.parameters.items():
                packed[at : at + size] = ctypes.string_at(arguments[ordinal], size)
            found.append(Launch(kernel.decode(), blocks, threads, shared, bytes(packed)))

        return _TOLD(told)


def index_bytes(shape: tuple[int, ...], context: int) -> int:
    """Of an index along the axes that a context pools (maps.index_dtype)."""
    _, t, c, h, w = shape
    longest = c if context == CHANNEL else max(t, h, w)
    return 1 if longest <= 256 else 2 if longest <= 32767 else 4
