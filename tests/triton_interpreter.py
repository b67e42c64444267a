"""Makes bfloat16 right in the Triton interpreter.

Stores truncate float32 there where a GPU rounds to nearest even, and tl.dot multiplies the bits of bfloat16 numbers as
integers.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's float conversion and product; all that is not bfloat16 still goes to the originals."""
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

    original_dot = interpreter.InterpreterBuilder.create_dot

    def dot(builder, a, b, *arguments):
        return original_dot(builder, _without_bfloat16(a), _without_bfloat16(b), *arguments)

    interpreter.InterpreterBuilder.create_dot = dot


def _without_bfloat16(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """The same numbers as float32."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def float32_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest, ties to even, as uint16; NaN stays NaN."""
    bits = data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
