"""The passes of the Triton backend against the plain ones in float64, in the interpreter or on a GPU.

Error bounds. Every x-sized pass is linear in each of its inputs, so a sum of n products is off by at most (n + 8)
roundings of the accumulation type on the sum of the products' magnitudes (8 covers what makes one product: three maps
added, a division, the factors), and one rounding of the output type on the result. The sum of magnitudes is the same
pass on the magnitudes of its inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from plain_passes import PlainPasses
from torch import Tensor

from aia_kernels import maps

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import triton as passes
from aia_kernels.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
plain = PlainPasses()


class Case(NamedTuple):
    """A shape B, T, C, H, W in a storage order; elements of a tile, where a small one makes kernels walk."""

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

SHORT = ("prime", "prime THWC", "bf16", "fp64", "runs CTHW bf16", "walking THWC")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty and its kin return NaN and largest integers: an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def case(request, monkeypatch) -> Case:
    found = CASES[request.param]
    if found.elements:
        monkeypatch.setattr(tiles, "ELEMENTS", found.elements)
    return found


def each(*names: str):
    return pytest.mark.parametrize("case", names or CASES, indirect=True)


def activation(case: Case) -> Tensor:
    return stored(torch.randn(case.shape, dtype=torch.float64), case)


def stored(values: Tensor, case: Case) -> Tensor:
    """Values [B, T, C, H, W] in the type and the storage order of a case."""
    axes = [0, *(1 + "TCHW".index(letter) for letter in case.order)]
    back = [axes.index(axis) for axis in range(5)]
    return values.to(case.dtype).permute(axes).contiguous().permute(back).to(DEVICE)


def gate_of(x: Tensor, context: int) -> Tensor | None:
    if context == maps.NONE:
        return None
    shape = (x.shape[0], maps.packed_size(x.shape, context))
    return torch.rand(shape, dtype=maps.accumulate_dtype(x.dtype)).to(x.device)


def features_of(x: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """A gradient of pooled features and an argmax that points anywhere."""
    shape = (x.shape[0], maps.packed_size(x.shape, context))
    grad = torch.randn(shape[0], 2, shape[1], dtype=maps.accumulate_dtype(x.dtype)).to(x.device)
    noise = stored(torch.randn(x.shape, dtype=torch.float64), Case(tuple(x.shape), maps.storage_order(x)))
    _, argmax = plain.pool(noise.cpu(), context, None, maps.NONE)
    return grad, argmax.to(x.device)


def double(*inputs):
    """Inputs of a pass on the CPU with floating-point tensors in float64."""
    return [i.cpu().double() if isinstance(i, Tensor) and i.is_floating_point() else cpu(i) for i in inputs]


def magnitude(*inputs):
    return [i.abs() if isinstance(i, Tensor) and i.is_floating_point() else i for i in double(*inputs)]


def cpu(value):
    return value.cpu() if isinstance(value, Tensor) else value


def epsilon(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def terms(x: Tensor, context: int) -> int:
    """The longest sum over an axis of a context."""
    return max(maps.lengths(x.shape)[axis] for axis in maps.POOLED_AXES[context])


def agrees(got: Tensor, want: Tensor, magnitudes: Tensor, n: int) -> None:
    """Assert the error bound of a sum of n products (see the head of this file)."""
    bound = (n + 8) * epsilon(maps.accumulate_dtype(got.dtype)) * magnitudes + epsilon(got.dtype) * want.abs()
    error = (got.cpu().double() - want).abs()
    assert (error <= bound).all(), f"error up to {(error / bound).nan_to_num(math.inf).max():.3g} times its bound"


def test_memory_poison():
    assert torch.randn(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.randn(3)).isnan().all()


@each()
@pytest.mark.parametrize("context", [maps.CHANNEL, maps.SPACETIME])
def test_pool(case, context):
    x = activation(case)
    pooled, argmax = passes.pool(x, context, None, maps.NONE)
    want, want_argmax = plain.pool(x.cpu().double(), context, None, maps.NONE)
    assert pooled.dtype == maps.accumulate_dtype(x.dtype) and argmax.dtype == maps.index_dtype(x.shape, context)
    assert torch.equal(pooled[:, 0].cpu().double(), want[:, 0])
    assert torch.equal(argmax.cpu(), want_argmax)
    magnitudes, _ = plain.pool(x.cpu().double().abs(), context, None, maps.NONE)
    agrees(pooled[:, 1], want[:, 1], magnitudes[:, 1], terms(x, context))


@each(*SHORT, "runs of several rows, ragged", "long T, axis by axis")
@pytest.mark.parametrize("context, gate_context", [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_pool_gated(case, context, gate_context):
    """Rounding may exchange elements whose products lie within the bound: the chosen one must lie there too."""
    x = activation(case)
    gate = gate_of(x, gate_context)
    pooled, argmax = passes.pool(x, context, gate, gate_context)
    arguments = (x, context, gate, gate_context)
    want, _ = plain.pool(*double(*arguments))
    magnitudes, _ = plain.pool(*magnitude(*arguments))
    agrees(pooled[:, 0], want[:, 0], magnitudes[:, 0], 1)
    agrees(pooled[:, 1], want[:, 1], magnitudes[:, 1], terms(x, context))
    product = x.cpu().double() * plain.field(gate.cpu().double(), x.cpu(), gate_context)
    order = maps.storage_order(x)
    for axis, m, index in zip(
        maps.POOLED_AXES[context],
        maps.unpack(pooled[:, 0].cpu(), x.shape, context, order),
        maps.unpack(argmax.cpu(), x.shape, context, order),
        strict=True,
    ):
        axes = [0, *(1 + "TCHW".index(letter) for letter in (*maps.GATE_AXES[axis], axis))]
        chosen = product.permute(axes).gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        agrees(m, chosen, chosen.abs(), 1)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("runs")], indirect=True)
def test_cases_in_runs(case):
    """The cases named so take the road of contiguous runs in every kernel with a tile for them."""
    x = activation(case)
    assert tiles.elementwise(x).run and tiles.tile(x, whole="TW", looped="H").run


def test_cases_that_walk(monkeypatch):
    """Small tiles do make kernels walk, and refuse to hold all of T and W where these are long."""
    for name, case in CASES.items():
        monkeypatch.setattr(tiles, "ELEMENTS", case.elements or 1 << 20)
        tile = tiles.tile(activation(case), whole="TW", looped="H")
        if name.startswith("walking"):
            assert tile.block[2] < case.shape[3], name
        assert (tile is None) == name.endswith("axis by axis"), name


@each("prime", "runs", "runs of several rows, ragged", "walking THWC")
def test_wide_offsets(case, monkeypatch):
    """64-bit offsets inside a clip, as a clip of 2^31 elements has them, change nothing."""
    x = activation(case)

    def run():
        gate = torch.ones(x.shape[0], maps.packed_size(x.shape, maps.CHANNEL), device=DEVICE)
        outputs = *passes.pool(x, maps.CHANNEL, None, maps.NONE), *passes.pool(x, maps.SPACETIME, gate, maps.CHANNEL)
        return *outputs, passes.recalibrate(x, gate, maps.CHANNEL)

    narrow, tile = run(), tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda *args, **axes: (t := tile(*args, **axes)) and t._replace(wide=True))
    for first, second in zip(narrow, run(), strict=True):
        assert torch.equal(first, second)


def special(case: Case, kind: str) -> Tensor:
    x = torch.randint(-2, 3, case.shape, dtype=torch.float64)
    if kind == "nan":
        x[torch.rand(case.shape) < 0.1] = math.nan
        x[torch.rand(case.shape) < 0.1] = math.inf
        x[torch.rand(case.shape) < 0.1] = -math.inf
    elif kind == "nothing but -inf":
        x[:] = -math.inf
    elif kind == "zeros of both signs":
        x = torch.where(torch.rand(case.shape) < 0.5, -0.0, 0.0).double()
    return stored(x, case)


@each("prime", "bf16 THWC", "fp64", "fp16", "walking", "runs CTHW bf16")
@pytest.mark.parametrize("kind", ["ties", "nan", "nothing but -inf", "zeros of both signs"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the infinities that the interpreter meets
def test_pool_special_values(case, kind):
    """As torch.max: the first index on ties, the first NaN before any number. Small integers have exact sums."""
    x = special(case, kind)
    for context in (maps.CHANNEL, maps.SPACETIME):
        pooled, argmax = passes.pool(x, context, None, maps.NONE)
        want, want_argmax = plain.pool(x.cpu().double(), context, None, maps.NONE)
        assert torch.equal(argmax.cpu(), want_argmax)
        eps = epsilon(pooled.dtype)
        torch.testing.assert_close(pooled[:, 0].cpu().double(), want[:, 0], rtol=0, atol=0, equal_nan=True)
        # An exact sum, a rounded reciprocal of the length and a rounded product.
        torch.testing.assert_close(pooled[:, 1].cpu().double(), want[:, 1], rtol=2.5 * eps, atol=0, equal_nan=True)


@each()
def test_recalibrate(case):
    x, grad_y = activation(case), activation(case)
    for context in (maps.CHANNEL, maps.SPACETIME):
        gate = gate_of(x, context)
        y = passes.recalibrate(x, gate, context)
        assert y.dtype == x.dtype and maps.storage_order(y) == maps.storage_order(x)
        arguments = (x, gate, context)
        agrees(y, plain.recalibrate(*double(*arguments)), plain.recalibrate(*magnitude(*arguments)), 1)
        grad_gate = passes.recalibrate_reduce(grad_y, x, context)
        arguments = (grad_y, x, context)
        want, magnitudes = (
            plain.recalibrate_reduce(*double(*arguments)),
            plain.recalibrate_reduce(*magnitude(*arguments)),
        )
        agrees(grad_gate, want, magnitudes, terms(x, context))


@each()
@pytest.mark.parametrize(
    "context, inner_gate_context, inner_context",
    [(1, 0, 0), (3, 0, 0), (3, 1, 1), (1, 3, 3), (1, 1, 3)],
    ids=["C", "ST", "CinST", "STinC", "STinC2"],
)
def test_unpool(case, context, inner_gate_context, inner_context):
    grad_y = activation(case)
    inner = features_of(grad_y, inner_context) if inner_context else (None, None)
    arguments = (
        grad_y,
        gate_of(grad_y, context),
        *features_of(grad_y, context),
        context,
        gate_of(grad_y, inner_gate_context),
        inner_gate_context,
        *inner,
        inner_context,
    )
    grad_x = passes.unpool(*arguments)
    assert grad_x.dtype == grad_y.dtype and maps.storage_order(grad_x) == maps.storage_order(grad_y)
    agrees(grad_x, plain.unpool(*double(*arguments)), plain.unpool(*magnitude(*arguments)), 12)


@each()
@pytest.mark.parametrize("context, gate_context", [(3, 1), (1, 3)])
def test_unpool_reduce(case, context, gate_context):
    x = activation(case)
    arguments = (x, *features_of(x, context), context, gate_context)
    got = passes.unpool_reduce(*arguments)
    want, magnitudes = plain.unpool_reduce(*double(*arguments)), plain.unpool_reduce(*magnitude(*arguments))
    agrees(got, want, magnitudes, terms(x, gate_context) + 6)


GATES = {
    "three maps": (2, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float32),
    "one map": (3, (2, 9, 5), torch.float32),
    "one element": (1, (1, 1, 1), torch.float32),
    "fp64": (2, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float64),
}


class GateCase:
    """Inputs of the gate passes, with what they are normalised by of the order of one."""

    def __init__(self, batch: int, dims: tuple[int, ...], dtype: torch.dtype):
        def random(*shape):
            return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)

        n, self.dims = len(dims) // 3, dims
        self.sizes = [math.prod(dims[3 * i : 3 * i + 3]) for i in range(n)]
        m = sum(self.sizes)
        self.pooled, self.weight, self.grad_gate, self.z = (
            random(batch, 2, m),
            random(n, 2, 3, 3, 3),
            random(batch, m),
            random(batch, m),
        )
        self.norm = 1 + 0.3 * random(n, 4)
        self.correction = random(n, 2)
        self.count = batch * max(self.sizes)
        self.eps = epsilon(dtype)

    def per_map(self, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.split(self.sizes, -1)

    def spread(self, column: Tensor) -> Tensor:
        """One number per map, at every element [M]."""
        return torch.cat([value.expand(size) for value, size in zip(column, self.sizes, strict=True)])


@pytest.fixture(params=GATES)
def gate(request) -> GateCase:
    return GateCase(*GATES[request.param])


#: Roundings of xhat and of the gate, as the derivative of neither exceeds a few with numbers of the order of one: a
#: difference, a product, an affine map, an exponential (2 units, its argument 2 roundings off), 1 / (1 + e).
GATE_ROUNDINGS = 32


def test_gate_conv(gate):
    """54 products; the moments are taken of the z that came out, sums of as many terms as a map has in the batch."""
    z, moments = passes.gate_conv(gate.pooled, gate.weight, gate.dims)
    arguments = (gate.pooled, gate.weight, gate.dims)
    want, _ = plain.gate_conv(*double(*arguments))
    magnitudes, _ = plain.gate_conv(*magnitude(*arguments))
    agrees(z, want, magnitudes, 54)
    for m, (mean, variance) in zip(gate.per_map(z.cpu().double()), moments.cpu().double(), strict=True):
        bound = (gate.count + 8) * gate.eps
        assert (mean - m.mean()).abs() <= bound * m.abs().mean()
        assert (variance - m.var(correction=0)).abs() <= 2 * bound * m.square().mean()


def test_gate_activate(gate):
    got = passes.gate_activate(gate.z, gate.norm, gate.dims)
    want = plain.gate_activate(*double(gate.z, gate.norm, gate.dims))
    assert ((got.cpu().double() - want).abs() <= GATE_ROUNDINGS * gate.eps).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the exponential that overflows
def test_gate_saturates():
    """Far from zero a gate is exactly 0 or 1: the exponential may overflow, but not to NaN."""
    z = torch.tensor([[-1e30, -200.0, 200.0, 1e30]], device=DEVICE)
    norm = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=DEVICE)
    assert passes.gate_activate(z, norm, (1, 1, 4)).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_gate_backward_reduce(gate):
    got = passes.gate_backward_reduce(gate.grad_gate, gate.z, gate.norm, gate.dims)
    want = plain.gate_backward_reduce(*double(gate.grad_gate, gate.z, gate.norm, gate.dims))
    grad, z, norm = magnitude(gate.grad_gate, gate.z, gate.norm)
    xhat = (z + gate.spread(norm[:, 0])) * gate.spread(norm[:, 1])
    for i, (g, h) in enumerate(zip(gate.per_map(grad), gate.per_map(xhat), strict=True)):
        bound = (GATE_ROUNDINGS + gate.count) * gate.eps * torch.stack((g.sum(), (g * h).sum()))
        assert ((got[i].cpu().double() - want[i]).abs() <= bound).all()


def test_gate_backward(gate):
    """dz is off by GATE_ROUNDINGS of its terms; grad_pooled sums 27 products of it, grad_weight one per element."""
    arguments = (gate.grad_gate, gate.z, gate.norm, gate.correction, gate.pooled, gate.weight, gate.dims)
    grad_pooled, grad_weight = passes.gate_backward(*arguments)
    want_pooled, want_weight = plain.gate_backward(*double(*arguments))
    grad, z, norm, correction, pooled, weight = magnitude(*arguments[:-1])
    xhat = (z + gate.spread(norm[:, 0])) * gate.spread(norm[:, 1])
    scale = gate.spread(norm[:, 1] * norm[:, 2])
    dz = scale * (grad + gate.spread(correction[:, 0]) + xhat * gate.spread(correction[:, 1]))
    sum_pooled, sum_weight = conv_backward(dz, pooled, weight, gate.dims)
    assert ((grad_pooled.cpu().double() - want_pooled).abs() <= (GATE_ROUNDINGS + 27) * gate.eps * sum_pooled).all()
    bound = (GATE_ROUNDINGS + gate.count) * gate.eps * sum_weight
    assert ((grad_weight.cpu().double() - want_weight).abs() <= bound).all()


def conv_backward(dz: Tensor, pooled: Tensor, weight: Tensor, dims) -> tuple[Tensor, Tensor]:
    """Gradients of gate_conv with respect to pooled and weight, given that of z, by autograd."""
    pooled, weight = pooled.requires_grad_(), weight.requires_grad_()
    z, _ = plain.gate_conv(pooled, weight, dims)
    return torch.autograd.grad(z, (pooled, weight), dz)


def test_many_programs(monkeypatch):
    """More tasks than programs: lanes carry moments and weight gradients along, and two runs agree in bits."""
    from aia_kernels.triton import gate as room

    monkeypatch.setattr(room, "TAPPED", 16)
    monkeypatch.setattr(room, "FLAT", 16)
    monkeypatch.setattr(room, "PROGRAMS", 3)
    gate = GateCase(2, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float32)
    test_gate_conv(gate)
    test_gate_activate(gate)
    test_gate_backward_reduce(gate)
    test_gate_backward(gate)
    arguments = (gate.grad_gate, gate.z, gate.norm, gate.correction, gate.pooled, gate.weight, gate.dims)
    for first, second in zip(passes.gate_backward(*arguments), passes.gate_backward(*arguments), strict=True):
        assert torch.equal(first, second)


def test_refuses_strided_maps():
    x = torch.randn(1, 2, 3, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="gate has strides"):
        passes.recalibrate(x, torch.randn(1, 2 * maps.packed_size(x.shape, 1), device=DEVICE)[:, ::2], maps.CHANNEL)
    with pytest.raises(ValueError, match="grad_y"):
        passes.recalibrate_reduce(x.transpose(3, 4), x, maps.CHANNEL)


def test_map_order():
    assert [passes.map_order(order) for order in maps.ORDERS] == list(maps.ORDERS)
