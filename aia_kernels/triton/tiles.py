"""What the kernels share: tiles of x, the maps seen from a tile, and the launch.

A kernel sees one tile of one clip as a block [BT, BC, BH, BW] of x [T, C, H, W], whatever the storage order: the axes
of the tile are always T, C, H, W, and the strides tell the compiler which of them is contiguous. Sizes are
compile-time constants: a network has a handful of shapes, and the constants let the compiler prove the alignment
that 16-byte accesses need.

Rows of 7, 14 or (in 16 bits) 28 elements are not multiples of 16 bytes, but runs of several rows or planes are. There
the tile is read as *runs*, [rows, N] contiguous elements with 16-byte accesses, and spread over the padded block by a
gather through shared memory; stores take the same way back.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import maps

#: Elements of a tile, 16 to a thread: the widest kernel (pool) keeps five values for each. Kernels that walk along an
#: axis have the next two tiles in flight in shared memory, so two programs on an SM ask for over 48 KiB at a time.
#: The interpreter's cost is per program: there, few large ones.
ELEMENTS = 1 << 20 if triton.knobs.runtime.interpret else 4096

#: Bytes of a contiguous run when C is innermost: shorter ones waste memory transactions, longer ones starve T, H, W.
CHANNEL_RUN = 64


class Tile(NamedTuple):
    """Compile-time geometry. Lengths, block lengths (powers of two) and numbers of blocks are by letter T, C, H, W."""

    sizes: tuple[int, int, int, int]
    block: tuple[int, int, int, int]
    count: tuple[int, int, int, int]
    order: str
    run: bool  # read and stored as contiguous runs
    wide: bool  # a clip passes 2^31 elements


def tile(x: Tensor, whole: str = "", looped: str = "") -> Tile | None:
    """The tile of a pass over x [B, T, C, H, W]: it holds all of the axes in whole, and as much as fits of the others.

    The axis that a kernel loops over has one block and gets its share first, for bytes in flight. None where the axes
    in whole fill more than a quarter of the tile: accumulators of their size would spill.
    """
    order = maps.storage_order(x)
    elements = ELEMENTS * 4 // max(x.element_size(), 4)
    size = maps.lengths(x.shape)
    full = {letter: triton.next_power_of_2(size[letter]) for letter in "TCHW"}
    block = {letter: full[letter] if letter in whole else 1 for letter in "TCHW"}
    held = math.prod(block.values())
    if held > elements // 4:
        return None
    if order[-1] == "C" and elements // held < min(CHANNEL_RUN // x.element_size(), full["C"]):
        elements *= 2

    def grow(letter: str, limit: int) -> None:
        most = elements // math.prod(block.values()) * block[letter]
        block[letter] = max(block[letter], min(full[letter], limit, most))

    if order[-1] == "C":
        grow("C", CHANNEL_RUN // x.element_size())
    if looped:
        grow(looped, 16)
    for letter in reversed(order):
        if letter not in whole + looped + "T" and (letter, order) != ("C", "THWC"):
            grow(letter, elements)
    if looped:
        grow(looped, elements)
    count = {letter: 1 if letter == looped else triton.cdiv(size[letter], block[letter]) for letter in "TCHW"}
    by_letter = [tuple(d[letter] for letter in "TCHW") for d in (size, block, count)]
    return Tile(*by_letter, order, _in_runs(order, size, block, x.element_size()), math.prod(by_letter[0]) >= 2**31)


def _in_runs(order: str, size: dict[str, int], block: dict[str, int], itemsize: int) -> bool:
    """Whether rows of W are not aligned to 16 bytes, but contiguous runs that make up the tile are."""
    if order[-1] != "W" or block["W"] < size["W"] or size["W"] * itemsize % 16 == 0:
        return False
    outer, plane = order[1], size["H"] * size["W"]
    if block["H"] >= size["H"]:
        run = min(block[outer], size[outer]) * plane
        strides = [size[outer] * plane]
    elif block[outer] == 1:
        run = block["H"] * size["W"]
        strides = [plane]
    else:
        return False
    return all(length * itemsize % 16 == 0 for length in (run, *strides))


def elementwise(x: Tensor) -> Tile:
    """The tile of a pass that writes as it reads: all of T, so that maps without T are read once, unless T is long."""
    return tile(x, whole="T") or tile(x)


#: Of a function that is launched. Counts are not looked at when it is compiled: a kernel for one is that for all, for 1
#: and for multiples of 16 too, and a network with batches of several sizes compiles once. The number of tokens n is no
#: count: that it is a multiple of 16 lets the compiler read 16 bytes at once where tokens are contiguous.
launched = triton.jit(do_not_specialize=("batch", "programs", "blocks"))


def launch_tiles(kernel, x: Tensor, tile: Tile, *args, most_warps: int = 8, registers: int = 128, **constants) -> None:
    """Run one program for each tile of x.

    A full tile gets the most warps. Without a limit on the registers of a thread, the assembler spills a few to fit one
    more program on an SM; with the limit it does not.
    """
    warps = min(max(math.prod(tile.block) * most_warps // 4096, 1), most_warps)
    launch(
        kernel,
        x,
        (x.shape[0] * math.prod(tile.count),),
        *args,
        TILE=tile,
        **constants,
        num_warps=warps,
        maxnreg=min(registers, 65536 // (32 * warps)),
    )


def launch(kernel, x: Tensor, grid: tuple[int, ...], *args, **constants) -> None:
    """Launch on the device of x and its current stream; nothing if the grid is empty."""
    if 0 in grid:
        return
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[grid](*args, **constants)


@triton.jit
def quotient(a, b):
    """a / b, rounded once, b a tensor: the division of float32 that Triton takes on a GPU is off by two roundings."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def root(a):
    """The square root, rounded once, for the same reason."""
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


# Compile-time functions must not call ordinary ones: Triton hashes what they refer to. Axes are 0 to 3 in T, C, H, W,
# and X stands for no pooled axis: x itself.

X = tl.constexpr(-1)


@triton.constexpr_function
def clip_size(tile):
    return math.prod(tile.sizes)


@triton.constexpr_function
def packed_size(tile, context):
    """M of a context, as maps.packed_size."""
    return sum(math.prod(tile.sizes) // tile.sizes[axis] for axis in ((1,) if context == 1 else (0, 2, 3)))


@triton.constexpr_function
def segment(tile, context, pooled):
    """Where the map pooled over an axis starts in the packed tensor of its context: after those of T, H."""
    before = [axis for axis in (0, 2) if axis < pooled and context == 3]
    return sum(math.prod(tile.sizes) // tile.sizes[axis] for axis in before)


@triton.constexpr_function
def strides(tile, pooled):
    """Strides by axis of x or of the map pooled over an axis, which gets stride 0."""
    stride, total = [0, 0, 0, 0], 1
    for axis in ("TCHW".index(letter) for letter in reversed(tile.order)):
        if axis != pooled:
            stride[axis] = total
            total *= tile.sizes[axis]
    return tuple(stride)


@triton.constexpr_function
def block_of(tile, pooled):
    """The block of x or of the map pooled over an axis."""
    return [1 if axis == pooled else tile.block[axis] for axis in range(4)]


@triton.constexpr_function
def checked(tile, pooled):
    """By axis: whether coordinates can lie outside, because the last block sticks out."""
    return tuple(axis != pooled and tile.sizes[axis] % tile.block[axis] != 0 for axis in range(4))


@triton.constexpr_function
def stored_block(tile):
    """Block lengths in storage order."""
    return [tile.block["TCHW".index(letter)] for letter in tile.order]


@triton.constexpr_function
def run_length(tile):
    """Elements of a run that exist, if the block lies inside."""
    return math.prod(min(tile.block["TCHW".index(a)], tile.sizes["TCHW".index(a)]) for a in tile.order[1:])


@triton.jit
def locate(TILE: tl.constexpr):
    """Clip (int64) and first coordinates (t, c, h, w) of the tile of this program; 0 along the axis it loops over."""
    COUNT: tl.constexpr = TILE.count
    BLOCK: tl.constexpr = TILE.block
    pid = tl.program_id(0)
    w = pid % COUNT[3]
    pid = pid // COUNT[3]
    h = pid % COUNT[2]
    pid = pid // COUNT[2]
    c = pid % COUNT[1]
    pid = pid // COUNT[1]
    t = pid % COUNT[0]
    b = (pid // COUNT[0]).to(tl.int64)
    return b, (t * BLOCK[0], c * BLOCK[1], h * BLOCK[2], w * BLOCK[3])


@triton.jit
def moved(origin, i, AXIS: tl.constexpr):
    """The origin with coordinate i along an axis."""
    return (
        i if AXIS == 0 else origin[0],
        i if AXIS == 1 else origin[1],
        i if AXIS == 2 else origin[2],
        i if AXIS == 3 else origin[3],
    )


@triton.jit
def coordinates(origin, TILE: tl.constexpr):
    """t [BT,1,1,1], c [1,BC,1,1], h [1,1,BH,1], w [1,1,1,BW] of the tile that begins at origin."""
    BLOCK: tl.constexpr = TILE.block
    INDEX: tl.constexpr = tl.int64 if TILE.wide else tl.int32
    t = (origin[0] + tl.arange(0, BLOCK[0])).to(INDEX)[:, None, None, None]
    c = (origin[1] + tl.arange(0, BLOCK[1])).to(INDEX)[None, :, None, None]
    h = (origin[2] + tl.arange(0, BLOCK[2])).to(INDEX)[None, None, :, None]
    w = (origin[3] + tl.arange(0, BLOCK[3])).to(INDEX)[None, None, None, :]
    return t, c, h, w


@triton.jit
def offsets(at, TILE: tl.constexpr, POOLED: tl.constexpr):
    """Offsets inside a clip of x (POOLED X), or inside the map pooled over an axis, which then has length one."""
    STRIDES: tl.constexpr = strides(TILE, POOLED)
    result = tl.zeros([1, 1, 1, 1], at[0].dtype)
    for i in tl.static_range(4):
        if STRIDES[i] > 0:
            result += at[i] * STRIDES[i]
    return result


@triton.jit
def inside(at, TILE: tl.constexpr, POOLED: tl.constexpr):
    """Which elements of a tile of x (POOLED X), or of the map pooled over an axis, exist."""
    SIZES: tl.constexpr = TILE.sizes
    CHECKED: tl.constexpr = checked(TILE, POOLED)
    valid = tl.full(block_of(TILE, POOLED), True, tl.int1)
    for i in tl.static_range(4):
        if CHECKED[i]:
            valid &= at[i] < SIZES[i]
    return valid


@triton.jit
def runs(origin, TILE: tl.constexpr):
    """Offsets [rows * N] of the runs of a tile inside a clip, and which of their elements exist.

    The axes inside a run are (C, H, W) or (T, H, W); the tile holds all of H, or a single index of the axis before it.
    """
    SIZES: tl.constexpr = TILE.sizes
    BLOCK: tl.constexpr = stored_block(TILE)
    N: tl.constexpr = BLOCK[1] * BLOCK[2] * BLOCK[3]
    ROW: tl.constexpr = 0 if TILE.order == "TCHW" else 1
    INNER: tl.constexpr = 1 - ROW
    PLANE: tl.constexpr = SIZES[2] * SIZES[3]
    i = tl.arange(0, BLOCK[0] * N)
    row, i = origin[ROW] + i // N, i % N
    valid = (row < SIZES[ROW]) & (i < run_length(TILE))
    if BLOCK[2] >= SIZES[2]:
        valid &= origin[INNER] * PLANE + i < SIZES[INNER] * PLANE
    else:
        valid &= origin[2] * SIZES[3] + i < PLANE
    if TILE.wide:
        row = row.to(tl.int64)
    return row * (SIZES[INNER] * PLANE) + (origin[INNER] * PLANE + origin[2] * SIZES[3]) + i, valid


@triton.jit
def load(x_ptr, b, origin, at, TILE: tl.constexpr):
    """The tile [BT, BC, BH, BW] of x [B, T, C, H, W] that begins at origin, zero where nothing exists.

    The gathers of load and store are one-dimensional, which Triton takes through shared memory; others it makes of
    shuffles, whose number is quadratic in the length of the axis.
    """
    x_ptr += b * clip_size(TILE)
    valid = inside(at, TILE, X)
    if TILE.run:
        BLOCK: tl.constexpr = stored_block(TILE)
        H: tl.constexpr = TILE.sizes[2]
        W: tl.constexpr = TILE.sizes[3]
        run_offsets, run_valid = runs(origin, TILE)
        run = tl.load(x_ptr + run_offsets, mask=run_valid, other=0)
        i = tl.arange(0, BLOCK[0] * BLOCK[1] * BLOCK[2] * BLOCK[3])
        plane, h, w = i // (BLOCK[2] * BLOCK[3]), i // BLOCK[3] % BLOCK[2], i % BLOCK[3]
        row, plane = plane // BLOCK[1], plane % BLOCK[1]
        spread = tl.gather(run, row * (BLOCK[1] * BLOCK[2] * BLOCK[3]) + (plane * H + h) * W + w, 0)
        spread = tl.reshape(spread, BLOCK)
        x = tl.where(valid, spread if TILE.order == "TCHW" else tl.permute(spread, (1, 0, 2, 3)), 0)
    else:
        x = tl.load(x_ptr + offsets(at, TILE, X), mask=valid, other=0)
    return x


@triton.jit
def store(y_ptr, b, origin, at, y, TILE: tl.constexpr):
    """Store a tile of y [B, T, C, H, W], the inverse of load."""
    y_ptr += b * clip_size(TILE)
    y = y.to(y_ptr.dtype.element_ty)
    if TILE.run:
        BLOCK: tl.constexpr = stored_block(TILE)
        N: tl.constexpr = BLOCK[1] * BLOCK[2] * BLOCK[3]
        H: tl.constexpr = TILE.sizes[2]
        W: tl.constexpr = TILE.sizes[3]
        run_offsets, run_valid = runs(origin, TILE)
        i = tl.arange(0, BLOCK[0] * N)
        row, i = i // N, i % N
        spread = (i // (H * W) * BLOCK[2] + i // W % H) * BLOCK[3] + i % W
        stored = tl.reshape(y if TILE.order == "TCHW" else tl.permute(y, (1, 0, 2, 3)), [BLOCK[0] * N])
        run = tl.gather(stored, row * N + tl.minimum(spread, N - 1), 0)
        tl.store(y_ptr + run_offsets, run, mask=run_valid)
    else:
        tl.store(y_ptr + offsets(at, TILE, X), y, mask=inside(at, TILE, X))


@triton.jit
def load_gate(gate_ptr, b, at, TILE: tl.constexpr, CONTEXT: tl.constexpr):
    """The gate field G at a tile, from packed gates [B, M]: [BT, 1, BH, BW] for CHANNEL, a full tile for SPACETIME."""
    gate_ptr += b * packed_size(TILE, CONTEXT)
    if CONTEXT == 1:
        gate = tl.load(gate_ptr + offsets(at, TILE, 1), mask=inside(at, TILE, 1), other=0)
    else:
        t = tl.load(gate_ptr + offsets(at, TILE, 0), mask=inside(at, TILE, 0), other=0)
        gate_ptr += segment(TILE, CONTEXT, 2)
        h = tl.load(gate_ptr + offsets(at, TILE, 2), mask=inside(at, TILE, 2), other=0)
        gate_ptr += segment(TILE, CONTEXT, 3) - segment(TILE, CONTEXT, 2)
        w = tl.load(gate_ptr + offsets(at, TILE, 3), mask=inside(at, TILE, 3), other=0)
        gate = (t + h + w) * (1 / 3)
    return gate


@triton.jit
def unpooled_over(grad_ptr, argmax_ptr, b, at, TILE: tl.constexpr, CONTEXT: tl.constexpr, AXIS: tl.constexpr):
    """One term of U: grad_mean / size + grad_max where this element was the maximum along AXIS."""
    M: tl.constexpr = packed_size(TILE, CONTEXT)
    at_map = segment(TILE, CONTEXT, AXIS) + offsets(at, TILE, AXIS)
    valid = inside(at, TILE, AXIS)
    grad_max = tl.load(grad_ptr + b * (2 * M) + at_map, mask=valid, other=0)
    grad_mean = tl.load(grad_ptr + b * (2 * M) + M + at_map, mask=valid, other=0)
    argmax = tl.load(argmax_ptr + b * M + at_map, mask=valid, other=0)
    return grad_mean * (1 / TILE.sizes[AXIS]) + tl.where(argmax == at[AXIS], grad_max, 0)


@triton.jit
def load_unpooled(grad_ptr, argmax_ptr, b, at, TILE: tl.constexpr, CONTEXT: tl.constexpr):
    """The unpooled field U at a tile, from grad_pooled [B, 2, M] and argmax [B, M]."""
    if CONTEXT == 1:
        field = unpooled_over(grad_ptr, argmax_ptr, b, at, TILE, CONTEXT, 1)
    else:
        field = unpooled_over(grad_ptr, argmax_ptr, b, at, TILE, CONTEXT, 0)
        field += unpooled_over(grad_ptr, argmax_ptr, b, at, TILE, CONTEXT, 2)
        field += unpooled_over(grad_ptr, argmax_ptr, b, at, TILE, CONTEXT, 3)
    return field
