"""The plainest kernels that move memory: what no pass can beat. Contiguous, 16 bytes a thread at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """y = x of n elements: STEPS blocks a program, next to each other. Reads 1 |X|, writes 1 |X|."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    for step in tl.static_range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """The sum of the elements of each program, without which the compiler would not read them. Reads 1 |X|."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))
