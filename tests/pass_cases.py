"""Cases, inputs and error bounds for the tests of passes; plain_passes.py in float64 gives the right answers.

Error bounds. Every x-sized pass is linear in each of its inputs, so a sum of n products is off by at most (n + 8)
roundings of the accumulation type on the sum of the products' magnitudes (8 covers what makes one product: three maps
added, a division, the factors), and one rounding of the output type on the result. The sum of magnitudes is the same
pass on the magnitudes of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from pass_backends import BACKENDS, CPU, CPU_ON_THREADS, CUDA
from plain_passes import PlainPasses
from torch import Tensor

from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """A shape B, T, C, H, W in a storage order; elements of a Triton tile, where a small one makes kernels walk."""

    shape: tuple[int, int, int, int, int]
    order: str = "TCHW"
    dtype: torch.dtype = torch.float32
    elements: int = 0


CASES = {
    "prime": Case((2, 3, 5, 7, 11)),
    "prime THWC": Case((2, 3, 5, 7, 11), "THWC"),
    "prime CTHW": Case((2, 3, 5, 7, 11), "CTHW"),
    "one frame": Case((2, 1, 3, 4, 5)),
    "one row": Case((1, 2, 3, 1, 7), "CTHW"),
    "one column": Case((1, 2, 3, 5, 1), "THWC"),
    "one channel": Case((2, 3, 1, 3, 4)),
    "one pixel": Case((1, 2, 37, 1, 1)),
    "bf16": Case((1, 3, 4, 5, 6), "TCHW", torch.bfloat16),
    "bf16 THWC": Case((1, 3, 6, 2, 5), "THWC", torch.bfloat16),
    "fp16": Case((1, 2, 3, 5, 4), "CTHW", torch.float16),
    "fp64": Case((1, 3, 4, 5, 3), "TCHW", torch.float64),
    "fp64 THWC": Case((1, 3, 4, 5, 3), "THWC", torch.float64),
    "runs": Case((1, 2, 8, 6, 6), "TCHW", torch.float32),
    "runs CTHW bf16": Case((1, 4, 3, 6, 6), "CTHW", torch.bfloat16),
    "runs of several channels, ragged": Case((1, 2, 6, 6, 6), "TCHW", torch.float32, 512),
    "runs of several rows, ragged": Case((1, 2, 3, 6, 6), "TCHW", torch.float32, 64),
    "walking": Case((1, 3, 3, 7, 4), "TCHW", torch.float32, 64),
    "walking THWC": Case((1, 2, 37, 3, 4), "THWC", torch.float32, 128),
    "walking CTHW bf16": Case((1, 2, 3, 9, 3), "CTHW", torch.bfloat16, 64),
    "long T, axis by axis": Case((1, 19, 2, 2, 3), "TCHW", torch.float32, 64),
    "long W, axis by axis": Case((1, 2, 3, 2, 21), "THWC", torch.bfloat16, 64),
}


#: For the CPU: a tile that is several blocks of channels wide, or a plane that is written as a whole; units of several
#: tiles, and planes of several tiles and units; frames that are no multiple of those met together.
TILES = {
    "groups of blocks, ragged": Case((4, 3, 75, 3, 5), "THWC"),
    "more blocks than a tile holds": Case((1, 2, 90, 2, 65), "THWC"),
    "rows longer than a tile": Case((1, 2, 18, 2, 300), "THWC"),
    "several rows": Case((2, 2, 20, 9, 3), "THWC"),
    "bf16 tiles": Case((4, 2, 40, 3, 4), "THWC", torch.bfloat16),
    "fp64 tiles": Case((2, 2, 70, 3, 4), "THWC", torch.float64),
    "a whole plane, ragged": Case((1, 2, 37, 9, 9)),
    "a whole plane, bf16": Case((1, 3, 16, 7, 7), "CTHW", torch.bfloat16),
    "a plane of several tiles": Case((1, 2, 17, 20, 20)),
    "several tiles of short rows": Case((1, 5, 43, 7, 7)),
    "planes of several tiles": Case((1, 3, 5, 40, 33)),
    "planes of several units": Case((1, 1, 6, 70, 65)),
}

#: For CUDA: vectors that keep to rows, planes and frames or do not; tiles that do not hold a plane or a row; frames
#: that are one run.
VECTORS = {
    "vectors in rows": Case((2, 2, 8, 4, 8)),
    "vectors in rows CTHW": Case((2, 3, 2, 4, 8), "CTHW"),
    "vectors in rows bf16": Case((1, 2, 3, 3, 16), "TCHW", torch.bfloat16),
    "half vectors in planes bf16": Case((1, 2, 40, 6, 6), "TCHW", torch.bfloat16),
    "half vectors in rows bf16": Case((1, 2, 3, 4, 12), "TCHW", torch.bfloat16),
    "vectors in rows, ragged maps": Case((2, 1, 3, 3, 4)),
    "vectors THWC": Case((2, 2, 40, 3, 5), "THWC"),
    "half vectors THWC bf16": Case((1, 2, 12, 2, 5), "THWC", torch.bfloat16),
    "vectors in planes": Case((2, 2, 3, 6, 6), "CTHW"),
    "vectors across planes": Case((1, 2, 44, 7, 7)),
    "vectors across planes bf16": Case((2, 2, 16, 7, 7), "TCHW", torch.bfloat16),
    "vectors across planes fp64": Case((1, 2, 6, 3, 3), "TCHW", torch.float64),
    "planes as wide as a block": Case((1, 1, 8, 15, 17)),
    "plane beyond a tile": Case((1, 2, 2, 40, 53)),
    "plane beyond a tile, vectors": Case((1, 2, 1, 44, 56)),
    "plane beyond a tile THWC": Case((1, 2, 20, 12, 19), "THWC"),
    "row beyond a tile": Case((1, 2, 1, 2, 2051)),
    "row beyond a tile, vectors": Case((1, 1, 2, 2, 2300), "CTHW"),
}

#: For the walk of unpool over T in CUDA: vectors of four, two and one, of several channels or of one, with indices of
#: one byte and of two; fewer frames than are on their way, as many, and more; the planes of a ResNet's stages.
FRAMES = {
    "fours": Case((2, 3, 4, 3, 8)),
    "fours bf16, many frames": Case((1, 11, 4, 3, 8), "TCHW", torch.bfloat16),
    "fours CTHW fp16": Case((1, 3, 8, 2, 4), "CTHW", torch.float16),
    "fours, 16-bit indices": Case((1, 2, 300, 1, 4)),
    "fours CTHW bf16, 16-bit indices": Case((1, 5, 300, 1, 4), "CTHW", torch.bfloat16),
    "twos": Case((2, 9, 300, 1, 6)),
    "twos bf16": Case((1, 3, 300, 2, 2), "TCHW", torch.bfloat16),
    "twos CTHW bf16": Case((2, 2, 300, 2, 2), "CTHW", torch.bfloat16),
    "ones": Case((1, 10, 300, 1, 3)),
    "ones bf16": Case((2, 2, 300, 1, 3), "TCHW", torch.bfloat16),
    "ones CTHW": Case((2, 2, 300, 1, 3), "CTHW"),
    "ones CTHW bf16": Case((2, 9, 300, 1, 3), "CTHW", torch.bfloat16),
    "channels": Case((2, 9, 256, 1, 2), "THWC"),
    "channels bf16": Case((1, 5, 256, 2, 1), "THWC", torch.bfloat16),
    "channels, 16-bit indices": Case((1, 2, 512, 1, 2), "THWC"),
    "channels bf16, 16-bit indices": Case((1, 2, 512, 1, 2), "THWC", torch.bfloat16),
    "few channels": Case((2, 2, 12, 2, 3), "THWC"),
    "few channels bf16": Case((2, 2, 12, 2, 3), "THWC", torch.bfloat16),
    "fp64": Case((1, 9, 4, 3, 4), "TCHW", torch.float64),
    "an axis of 16-bit indices": Case((1, 2, 4, 1, 300)),
    "56x56 bf16": Case((1, 2, 4, 56, 56), "TCHW", torch.bfloat16),
    "28x28": Case((1, 2, 4, 28, 28)),
    "14x14 bf16": Case((1, 8, 4, 14, 14), "TCHW", torch.bfloat16),
    "7x7 bf16": Case((1, 8, 16, 7, 7), "TCHW", torch.bfloat16),
    # Vectors of four that leave planes: groups of channels in several blocks, the last of them not full.
    "across planes": Case((2, 3, 96, 7, 7)),
    "across planes bf16, 16-bit indices": Case((1, 9, 272, 1, 3), "TCHW", torch.bfloat16),
    "across rows fp16": Case((1, 5, 16, 4, 5), "TCHW", torch.float16),
    "across planes of one column": Case((2, 2, 32, 5, 1)),
    "across planes of three, several blocks": Case((2, 2, 48, 1, 3)),
}

#: For reductions over T, H and W in CUDA by strips of fours, twos and ones: planes that fill a block and that do not,
#: several blocks of planes, the last of them not full; more frames than are on their way, and fewer.
STRIPS = {
    "strips of fours": Case((2, 3, 5, 8, 12)),
    "strips of fours, blocks": Case((1, 6, 70, 8, 8), "TCHW", torch.bfloat16),
    "strips of fours, one of them": Case((1, 5, 3, 4, 4), "CTHW", torch.float16),
    "strips of twos": Case((1, 9, 3, 14, 6)),
    "strips of twos, blocks": Case((2, 3, 300, 7, 2), "CTHW", torch.bfloat16),
    "strips of ones": Case((1, 3, 70, 7, 7)),
    "strips of ones, fp16": Case((2, 6, 4, 14, 7), "CTHW", torch.float16),
    "strips of 56x56": Case((1, 2, 2, 56, 56)),
}

#: The same by patches of 7 x 7: the warps of a block with planes of their own, one of them with few or none, and with
#: frames of the same planes; more frames than are on their way, and than have their fields staged at a time.
PATCHES = {
    "patches": Case((1, 3, 72, 7, 7)),
    "patches bf16, many frames": Case((1, 9, 8, 7, 7), "TCHW", torch.bfloat16),
    "patches bf16, four shares": Case((1, 8, 40, 7, 7), "TCHW", torch.bfloat16),
    "patches of 14x14": Case((2, 4, 10, 14, 14), "TCHW", torch.float16),
    "patches of 28x28": Case((1, 5, 3, 28, 28)),
}

#: Axes whose maxima have an index of two bytes or four, and where the vectors of CUDA matter. Longer than they need be
#: for all else.
WIDE_INDICES = {
    "16-bit indices": Case((1, 1, 300, 2, 1)),
    "16-bit indices, vectors": Case((1, 1, 300, 2, 4)),
    "32-bit indices": Case((1, 1, 1, 1, 32770)),
}
BETWEEN_VECTORS = {
    "TCHW": Case((2, 2, 16, 4, 8)),
    "THWC bf16": Case((2, 2, 16, 4, 8), "THWC", torch.bfloat16),
    "CTHW fp64": Case((2, 2, 16, 4, 8), "CTHW", torch.float64),
}


def pick(cases: dict, *names: str) -> dict:
    """Some of the cases."""
    return {name: cases[name] for name in names}


SHORT = pick(CASES, "prime", "prime THWC", "bf16", "fp64", "runs CTHW bf16", "walking THWC")

_PARTICULAR = (CPU_ON_THREADS, TILES), (CUDA, VECTORS), (("emulator, between vectors",), BETWEEN_VECTORS)

#: Of the cases of a small tile, those that every run has Triton's interpreter take.
WALKED = pick(
    CASES,
    "runs of several channels, ragged",
    "runs of several rows, ragged",
    "walking CTHW bf16",
    "long W, axis by axis",
)


def without(cases: dict, *others: dict) -> dict:
    return {name: case for name, case in cases.items() if not any(name in other for other in others)}


#: Which cases run where: every one, but for what is interpreted slowly, and in sweeps there too; fewer, for what has
#: many contexts, and the others; those of wide indices; some, for special values.
INTERPRETED = "triton", "emulator"
EVERY = ((*CPU, "cuda"), CASES), (INTERPRETED, SHORT), (("triton",), WALKED), *_PARTICULAR
SWEPT = (("triton",), without(CASES, SHORT, WALKED)), (("emulator",), without(CASES, SHORT))
FEWER = (BACKENDS, SHORT), *_PARTICULAR
OTHERS = ((BACKENDS, without(CASES, SHORT)),)
WIDE = ((CUDA, WIDE_INDICES),)
SPECIAL = (
    (BACKENDS, pick(CASES, "prime", "bf16 THWC", "fp64", "fp16", "walking", "runs CTHW bf16")),
    (CPU_ON_THREADS, TILES),
    (CUDA, pick(VECTORS, "vectors in rows", "vectors across planes", "vectors across planes bf16")),
    (CUDA, pick(VECTORS, "plane beyond a tile THWC")),
    (CUDA, pick(STRIPS, "strips of fours, blocks", "strips of twos")),
    (CUDA, pick(PATCHES, "patches of 14x14")),
)


def activation(case: Case) -> Tensor:
    return stored(torch.randn(case.shape, dtype=torch.float64), case)


def in_order(x: Tensor, order: str) -> Tensor:
    """x [B, T, C, H, W] stored in an order."""
    axes = [0, *(1 + "TCHW".index(letter) for letter in order)]
    back = [axes.index(axis) for axis in range(5)]
    return x.permute(axes).contiguous().permute(back)


def stored(values: Tensor, case: Case) -> Tensor:
    """Values [B, T, C, H, W] in the type and the storage order of a case, on the device."""
    return in_order(values.to(case.dtype), case.order).to(DEVICE)


def gate_of(x: Tensor, context: int) -> Tensor | None:
    if context == maps.NONE:
        return None
    shape = (x.shape[0], maps.packed_size(x.shape, context))
    return torch.rand(shape, dtype=accumulate_dtype(x.dtype)).to(x.device)


def features_of(x: Tensor, context: int, plain: PlainPasses) -> tuple[Tensor, Tensor]:
    """A gradient of pooled features and an argmax that points anywhere."""
    shape = (x.shape[0], maps.packed_size(x.shape, context))
    grad = torch.randn(shape[0], 2, shape[1], dtype=accumulate_dtype(x.dtype)).to(x.device)
    noise = stored(torch.randn(x.shape, dtype=torch.float64), Case(tuple(x.shape), maps.storage_order(x)))
    _, argmax = plain.pool(noise.cpu(), context, None, maps.NONE)
    return grad, argmax.to(x.device)


def double(*inputs):
    """Inputs of a pass on the CPU with floating-point tensors in float64."""
    return _each_tensor(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu(), inputs)


def magnitude(*inputs):
    return _each_tensor(lambda t: t.abs() if t.is_floating_point() else t, double(*inputs))


def _each_tensor(function: Callable[[Tensor], Tensor], inputs: Iterable) -> list:
    """The inputs with a function of every tensor, those in lists among them."""
    changed = []
    for i in inputs:
        nested = isinstance(i, list)
        changed.append(_each_tensor(function, i) if nested else function(i) if isinstance(i, Tensor) else i)
    return changed


def epsilon(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def terms(x: Tensor, context: int) -> int:
    """The longest sum over an axis of a context."""
    return max(maps.lengths(x.shape)[axis] for axis in maps.POOLED_AXES[context])


def agrees(got: Tensor, want: Tensor, magnitudes: Tensor, n: int) -> None:
    """Assert the error bound of a sum of n products (see the head of this file)."""
    bound = (n + 8) * epsilon(accumulate_dtype(got.dtype)) * magnitudes + epsilon(got.dtype) * want.abs()
    error = (got.cpu().double() - want).abs()
    assert (error <= bound).all(), f"error up to {(error / bound).nan_to_num(math.inf).max():.3g} times its bound"


def special(case: Case, kind: str) -> Tensor:
    x = torch.randint(-2, 3, case.shape, dtype=torch.float64)
    if kind == "nan":
        x[torch.rand(case.shape) < 0.1] = math.nan
        x[torch.rand(case.shape) < 0.1] = math.inf
        x[torch.rand(case.shape) < 0.1] = -math.inf
    elif kind == "few nan":
        x[0, 0, 0, 0, 0] = x[-1, -1, -1, -1, -1] = math.nan
    elif kind == "nothing but -inf":
        x[:] = -math.inf
    elif kind == "zeros of both signs":
        x = torch.where(torch.rand(case.shape) < 0.5, -0.0, 0.0).double()
    return stored(x, case)


GATES = {
    "three maps": (2, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float32),
    "one map": (3, (2, 9, 5), torch.float32),
    "one element": (1, (1, 1, 1), torch.float32),
    "fp64": (1, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float64),
    "bf16 parameters": (1, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float32, torch.bfloat16),
    "fp16 parameters": (1, (4, 3, 5), torch.float32, torch.float16),
}

#: For CUDA, batch and lengths: rows and columns beyond a tile, several chunks of planes, chunks side by side (the
#: emulator has 12 blocks), more than one item for a block; rows that are copied in vectors of four and of two.
CHUNKS = {
    "tiles": (2, (5, 41, 37), torch.float32),
    "long column": (1, (2, 700, 1), torch.float32),
    "chunks": (1, (70, 3, 5, 2, 6, 40, 33, 1, 1), torch.float64),
    "chunks side by side": (9, (64, 2, 3), torch.float32),
    "pixels": (3, (50, 1, 1), torch.float32),
    "rows of fours": (2, (3, 41, 132, 4, 70, 8, 2, 5, 12), torch.float32),
    "rows of twos": (1, (4, 33, 74, 2, 40, 6, 3, 5, 10), torch.float32),
    "fours side by side": (2, (30, 7, 8, 9, 3, 4, 5, 3, 4), torch.float32),
    "twos side by side": (2, (24, 14, 12, 2, 16, 2, 6, 4, 6), torch.float32),
    "rows of seven": (3, (72, 7, 7, 3, 520, 7, 2, 36, 7), torch.float32),
    "odd rows of seven": (1, (4, 523, 7, 4, 3, 7), torch.float32),
    "rows of fourteen": (2, (24, 14, 14, 4, 260, 14, 2, 2, 14), torch.float32),
}
GATES_BETWEEN_VECTORS = {
    "fp32": (2, (4, 4, 8, 4, 4, 8, 2, 2, 4), torch.float32),
    "fp64": (2, (4, 4, 8, 4, 4, 8, 2, 2, 4), torch.float64),
}

#: For the CPU: units of some rows, of some slabs, and planes smaller than a vector.
BOXES = {
    "boxes of rows": (1, (11, 60, 41), torch.float32),
    "boxes of slabs": (2, (190, 7, 7, 3, 190, 7, 3, 190, 7), torch.float32),
    "boxes of pixels": (1, (50, 1, 1, 9, 2, 1, 9, 1, 2), torch.float64),
}

#: Which of them run where.
EVERY_GATE = (
    (BACKENDS, GATES),
    (CPU, BOXES),
    ((*CUDA, "emulator, 3 blocks"), CHUNKS),
    (("emulator, between vectors",), GATES_BETWEEN_VECTORS),
    (("triton, 3 programs",), pick(GATES, "three maps")),
)


class GateCase:
    """Inputs of the gate passes, with what they are normalized by of the order of one. The parameters may be of another
    type than the maps."""

    def __init__(self, batch: int, dims: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype | None = None):
        def random(*shape):
            return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)

        def parameter(*shape):
            return random(*shape).to(parameters or dtype)

        n, self.dims = len(dims) // 3, dims
        self.sizes = [math.prod(dims[3 * i : 3 * i + 3]) for i in range(n)]
        m = sum(self.sizes)
        self.pooled, self.grad_gate, self.z = random(batch, 2, m), random(batch, m), random(batch, m)
        # As a network has them: contiguous, in another order of axes, channels_last_3d.
        strided = (lambda w: w, lambda w: w.transpose(2, 4), lambda w: w.to(memory_format=torch.channels_last_3d))
        self.weight = [change(parameter(1, 2, 3, 3, 3)) for change in strided[:n]]
        self.scale, self.shift = ([1 + 0.3 * parameter(1) for _ in range(n)] for _ in range(2))
        self.mean, self.var = ([parameter(1).abs() + 0.5 for _ in range(n)] for _ in range(2))
        self.norm = 1 + 0.3 * random(n, 4)
        self.count = batch * max(self.sizes)
        self.statistics = random(n, 3)
        self.statistics[:, 2] = torch.tensor([1 / (batch * size) for size in self.sizes])
        self.sums = random(n, 2) / self.statistics[:, 2:]
        self.eps = epsilon(dtype)

    def per_map(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.split(self.sizes, -1)

    def spread(self, column: Tensor) -> Tensor:
        """One number per map, at every element [M]."""
        return torch.cat([value.expand(size) for value, size in zip(column, self.sizes, strict=True)])


#: Roundings of xhat and of the gate, as the derivative of neither exceeds a few with numbers of the order of one: a
#: difference, a product, an affine map, an exponential (2 units, its argument 2 roundings off), 1 / (1 + e).
GATE_ROUNDINGS = 32


def conv_backward(dz: Tensor, pooled: Tensor, weight: list[Tensor], dims) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the convolutions' z with respect to pooled and each weight, given that of z, by autograd."""
    leaves = [t.requires_grad_() for t in (pooled, *weight)]
    grad_pooled, *grad_weight = torch.autograd.grad(PlainPasses().conv(pooled, weight, dims), leaves, dz)
    return grad_pooled, grad_weight


def same_bits_with_any_threads(everything: Callable[[], Iterable[Tensor]]) -> None:
    """Assert that results do not depend on the number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
