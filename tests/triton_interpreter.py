"""Makes bfloat16 stores right in the Triton interpreter, which truncates float32 where a GPU rounds to nearest even."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's float conversion; anything but float32 to bfloat16 still goes to the original."""
    original = interpreter._convert_float
    if getattr(original, "rounds_to_nearest", False):
        return

    def convert(data, source, target, rounding):
        toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if source != tl.float32 or target != tl.bfloat16 or toward_zero:
            return original(data, source, target, rounding)
        return float32_to_bfloat16(data)

    convert.rounds_to_nearest = True
    interpreter._convert_float = convert


def float32_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest, ties to even, as uint16; NaN stays NaN."""
    bits = data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
