"""The passes of each backend that this machine runs as a whole, against the plain ones in float64."""

from __future__ import annotations

import math

import pass_cases
import pytest
import torch
from pass_backends import BACKENDS, CPU, CUDA, each, on, passes_fixture
from pass_cases import (
    CASES,
    EVERY,
    EVERY_GATE,
    FEWER,
    FRAMES,
    GATE_ROUNDINGS,
    OTHERS,
    PATCHES,
    SPECIAL,
    STRIPS,
    SWEPT,
    WIDE,
    WIDE_INDICES,
    Case,
    GateCase,
    activation,
    agrees,
    conv_backward,
    double,
    epsilon,
    features_of,
    gate_of,
    magnitude,
    pick,
    special,
    terms,
)
from plain_passes import PlainPasses

from aia_kernels import backends
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


passes = passes_fixture("attention_in_attention")


@pytest.fixture
def plain(passes) -> PlainPasses:
    """The oracle, packing maps in the order of the backend."""
    return PlainPasses(passes.map_order)


@pytest.fixture
def case(request, monkeypatch) -> Case:
    if request.param.elements and backends.available_backends()["triton"] is None:
        monkeypatch.setattr("aia_kernels.triton.tiles.ELEMENTS", request.param.elements)
    return request.param


@pytest.fixture
def gate(request, passes) -> GateCase:
    return GateCase(*request.param)


def test_memory_poison():
    assert torch.randn(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.randn(3)).isnan().all()


@each(*EVERY, sweep=(*SWEPT, *WIDE))
@pytest.mark.parametrize("context", [maps.CHANNEL, maps.SPACETIME])
def test_pool(passes, plain, case, context):
    pool_agrees(passes, plain, activation(case), context)


def pool_agrees(passes, plain, x, context):
    pooled, argmax = passes.pool(x, context, None, maps.NONE)
    want, want_argmax = plain.pool(x.cpu().double(), context, None, maps.NONE)
    assert pooled.dtype == accumulate_dtype(x.dtype) and argmax.dtype == maps.index_dtype(x.shape, context)
    assert torch.equal(pooled[:, 0].cpu().double(), want[:, 0])
    assert torch.equal(argmax.cpu(), want_argmax)
    magnitudes, _ = plain.pool(x.cpu().double().abs(), context, None, maps.NONE)
    agrees(pooled[:, 1], want[:, 1], magnitudes[:, 1], terms(x, context))


@each(
    *FEWER,
    (BACKENDS, pick(CASES, "runs of several rows, ragged")),
    sweep=((BACKENDS, pick(CASES, "long T, axis by axis")),),
)
@pytest.mark.parametrize("context, gate_context", [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_pool_gated(passes, plain, case, context, gate_context):
    gated_pool_agrees(passes, plain, activation(case), context, gate_context)


def gated_pool_agrees(passes, plain, x, context, gate_context):
    """Rounding may exchange elements whose products lie within the bound: the chosen one must lie there too."""
    gate = gate_of(x, gate_context)
    pooled, argmax = passes.pool(x, context, gate, gate_context)
    arguments = (x, context, gate, gate_context)
    want, _ = plain.pool(*double(*arguments))
    magnitudes, _ = plain.pool(*magnitude(*arguments))
    agrees(pooled[:, 0], want[:, 0], magnitudes[:, 0], 1)
    agrees(pooled[:, 1], want[:, 1], magnitudes[:, 1], terms(x, context))
    product = x.cpu().double() * plain.field(gate.cpu().double(), x.cpu(), gate_context)
    order = passes.map_order(maps.storage_order(x))
    for axis, m, index in zip(
        maps.POOLED_AXES[context],
        maps.unpack(pooled[:, 0].cpu(), x.shape, context, order),
        maps.unpack(argmax.cpu(), x.shape, context, order),
        strict=True,
    ):
        axes = [0, *(1 + "TCHW".index(letter) for letter in (*maps.GATE_AXES[axis], axis))]
        chosen = product.permute(axes).gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        agrees(m, chosen, chosen.abs(), 1)


@each((CUDA, STRIPS), (CUDA, PATCHES))
def test_reductions_by_strips(passes, plain, case):
    pool_agrees(passes, plain, activation(case), maps.SPACETIME)
    gated_pool_agrees(passes, plain, activation(case), maps.SPACETIME, maps.CHANNEL)
    unpool_reduce_agrees(passes, plain, activation(case), maps.CHANNEL, maps.SPACETIME)
    recalibrate_reduce_agrees(passes, plain, activation(case), activation(case), maps.SPACETIME)


@each(*SPECIAL)
@pytest.mark.parametrize("kind", ["ties", "nan", "few nan", "nothing but -inf", "zeros of both signs"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the infinities that the interpreter meets
def test_pool_special_values(passes, plain, case, kind):
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


@each(*EVERY, sweep=(*SWEPT, *WIDE))
def test_recalibrate(passes, plain, case):
    x, grad_y = activation(case), activation(case)
    for context in (maps.CHANNEL, maps.SPACETIME):
        recalibrate_agrees(passes, plain, x, context)
        recalibrate_reduce_agrees(passes, plain, grad_y, x, context)


@each((CUDA, FRAMES))
def test_recalibrate_walks_over_frames(passes, plain, case):
    recalibrate_agrees(passes, plain, activation(case), maps.SPACETIME)


def recalibrate_agrees(passes, plain, x, context):
    gate = gate_of(x, context)
    y = passes.recalibrate(x, gate, context)
    assert y.dtype == x.dtype and maps.storage_order(y) == maps.storage_order(x)
    arguments = (x, gate, context)
    agrees(y, plain.recalibrate(*double(*arguments)), plain.recalibrate(*magnitude(*arguments)), 1)


def recalibrate_reduce_agrees(passes, plain, grad_y, x, context):
    arguments = (grad_y, x, context)
    got = passes.recalibrate_reduce(*arguments)
    want, magnitudes = plain.recalibrate_reduce(*double(*arguments)), plain.recalibrate_reduce(*magnitude(*arguments))
    agrees(got, want, magnitudes, terms(x, context))


@each(*EVERY, sweep=(*SWEPT, *WIDE))
@pytest.mark.parametrize("unit", ["CinST", "STinC"])
def test_unpool(passes, plain, case, unit):
    unpool_agrees(passes, plain, activation(case), *UNPOOLED[unit])


@each(*FEWER, sweep=(*OTHERS, *WIDE))  # in every run they are of test_unpool alone
@pytest.mark.parametrize("unit", ["C", "ST", "STinC2"])
def test_unpool_of_other_units(passes, plain, case, unit):
    unpool_agrees(passes, plain, activation(case), *UNPOOLED[unit])


@each((CUDA, FRAMES))
@pytest.mark.parametrize("unit", ["CinST", "STinC"])
def test_unpool_walks_over_frames(passes, plain, case, unit):
    unpool_agrees(passes, plain, activation(case), *UNPOOLED[unit])


@each(sweep=((CUDA, FRAMES),))
@pytest.mark.parametrize("unit", ["C", "ST", "STinC2"])
def test_unpool_walks_over_frames_of_other_units(passes, plain, case, unit):
    unpool_agrees(passes, plain, activation(case), *UNPOOLED[unit])


@each((CUDA, pick(FRAMES, "7x7 bf16", "across planes")))
@pytest.mark.parametrize("unit", ["ST", "CinST", "STinC"])
def test_unpool_special_values(passes, plain, case, unit):
    """NaN and infinities of every tensor reach the elements that they reach in the oracle, and no others."""
    arguments = [not_all_finite(t) for t in arguments_of_unpool(plain, activation(case), *UNPOOLED[unit])]
    agrees_where_finite(passes.unpool(*arguments), plain.unpool, arguments, 12)


@each((CUDA, pick(FRAMES, "7x7 bf16", "across planes")))
def test_recalibrate_special_values(passes, plain, case):
    x = activation(case)
    arguments = not_all_finite(x), not_all_finite(gate_of(x, maps.SPACETIME)), maps.SPACETIME
    agrees_where_finite(passes.recalibrate(*arguments), plain.recalibrate, arguments, 1)


def not_all_finite(value):
    """A tensor of floating-point numbers with one of each kind that is not finite; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        for special in (math.nan, math.inf, -math.inf):
            value[tuple(int(torch.randint(size, ())) for size in value.shape)] = special
    return value


def agrees_where_finite(got, oracle, arguments, n):
    """Assert the error bound of a sum of n products where it is finite, and elsewhere that the value is the same."""
    want = oracle(*double(*arguments))
    finite = want.isfinite()
    assert finite.any() and not finite.all()
    torch.testing.assert_close(got.cpu().double()[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    agrees(got.cpu()[finite], want[finite], oracle(*magnitude(*arguments))[finite], n)


#: By unit: the contexts of the outer gate, of the gate and the features of the inner one.
UNPOOLED = {"C": (1, 0, 0), "ST": (3, 0, 0), "CinST": (3, 1, 1), "STinC": (1, 3, 3), "STinC2": (1, 1, 3)}


def arguments_of_unpool(plain, grad_y, context, inner_gate_context, inner_context) -> tuple:
    inner = features_of(grad_y, inner_context, plain) if inner_context else (None, None)
    return (
        grad_y,
        gate_of(grad_y, context),
        *features_of(grad_y, context, plain),
        context,
        gate_of(grad_y, inner_gate_context),
        inner_gate_context,
        *inner,
        inner_context,
    )


def unpool_agrees(passes, plain, grad_y, *contexts):
    arguments = arguments_of_unpool(plain, grad_y, *contexts)
    grad_x = passes.unpool(*arguments)
    assert grad_x.dtype == grad_y.dtype and maps.storage_order(grad_x) == maps.storage_order(grad_y)
    agrees(grad_x, plain.unpool(*double(*arguments)), plain.unpool(*magnitude(*arguments)), 12)


@each(*EVERY, sweep=(*SWEPT, *WIDE))
@pytest.mark.parametrize("context, gate_context", [(3, 1), (1, 3)])
def test_unpool_reduce(passes, plain, case, context, gate_context):
    unpool_reduce_agrees(passes, plain, activation(case), context, gate_context)


@each(*FEWER)
@pytest.mark.parametrize("context", [1, 3])
def test_unpool_reduce_of_one_context(passes, plain, case, context):
    unpool_reduce_agrees(passes, plain, activation(case), context, context)


def unpool_reduce_agrees(passes, plain, x, context, gate_context):
    arguments = (x, *features_of(x, context, plain), context, gate_context)
    got = passes.unpool_reduce(*arguments)
    want, magnitudes = plain.unpool_reduce(*double(*arguments)), plain.unpool_reduce(*magnitude(*arguments))
    agrees(got, want, magnitudes, terms(x, gate_context) + 6)


@each(*WIDE, (("triton", *CPU), pick(WIDE_INDICES, "16-bit indices")))
def test_wide_indices(passes, plain, case):
    """Of the axis that is long."""
    x, context, other = activation(case), *((1, 3) if case.shape[2] > 1 else (3, 1))
    pool_agrees(passes, plain, x, context)
    unpool_agrees(passes, plain, x, context, other, context)
    unpool_reduce_agrees(passes, plain, x, context, other)


@each(*EVERY_GATE, argument="gate")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the exponential that overflows
@pytest.mark.parametrize("of_batch", ["all", "none", "last"])
def test_gate(passes, plain, gate, of_batch):
    """Statistics are sums of as many terms as a map has in the batch, of a z that sums 54 products; the gates are made
    of that z by the norm that came out."""
    n = len(gate.weight)
    batch = [of_batch == "all" or (of_batch == "last" and i == n - 1) for i in range(n)]
    mean, var = ([None if use else p for use, p in zip(batch, given, strict=True)] for given in (gate.mean, gate.var))
    arguments = gate.pooled, gate.weight, gate.scale, gate.shift, mean, var, [1e-5] * n, batch, gate.dims
    found, norm, statistics = passes.gate(*arguments)
    _, _, want = plain.gate(*double(*arguments))
    z = plain.conv(*double(gate.pooled, gate.weight), gate.dims)
    z_error = 62 * gate.eps * plain.conv(*magnitude(gate.pooled, gate.weight), gate.dims)
    statistics, norm = statistics.cpu().double(), norm.cpu().double()
    for i, (m, e) in enumerate(zip(gate.per_map(z), gate.per_map(z_error), strict=True)):
        bound = (gate.count + 8) * gate.eps
        mean_bound = bound * m.abs().mean() + e.mean() if batch[i] else 0
        var_bound = 2 * bound * m.square().mean() + 2 * (m.abs() * e).mean() + e.square().mean() if batch[i] else 0
        assert (statistics[i, 0] - want[i, 0]).abs() <= mean_bound
        assert (statistics[i, 1] - want[i, 1]).abs() <= var_bound
        assert (statistics[i, 2] - want[i, 2]).abs() <= 2 * gate.eps
        assert norm[i, 0] == statistics[i, 0]
        rstd = (statistics[i, 1] + 1e-5).rsqrt()
        assert (norm[i, 1] - rstd).abs() <= 4 * gate.eps * rstd
        assert norm[i, 2:].tolist() == [gate.scale[i].item(), gate.shift[i].item()]
    slope = gate.spread((norm[:, 1] * norm[:, 2]).abs()) / 4  # of the sigmoid at most
    bound = GATE_ROUNDINGS * gate.eps + slope * (z_error + 2 * gate.eps * z.abs())
    assert ((found.cpu().double() - plain.activate(z, norm, gate.dims)).abs() <= bound).all()


@each(*EVERY_GATE, argument="gate")
def test_gate_without_a_norm(passes, plain, gate):
    n = len(gate.weight)
    nothing = [None] * n
    arguments = gate.pooled, gate.weight, nothing, nothing, nothing, nothing, [0.0] * n, [False] * n, gate.dims
    found, norm, statistics = passes.gate(*arguments)
    assert norm.tolist() == [[0, 1, 1, 0]] * n and statistics.tolist() == [[0, 1, 0]] * n
    z_error = 62 * gate.eps * plain.conv(*magnitude(gate.pooled, gate.weight), gate.dims)
    want = plain.conv(*double(gate.pooled, gate.weight), gate.dims).sigmoid()
    assert ((found.cpu().double() - want).abs() <= z_error / 4 + GATE_ROUNDINGS * gate.eps).all()


@each(*EVERY_GATE, argument="gate")
def test_gate_again(passes, plain, gate):
    """54 products; the gates are made of the z that came out."""
    found, z = passes.gate_again(gate.pooled, gate.weight, gate.norm, gate.dims)
    want = plain.conv(*double(gate.pooled, gate.weight), gate.dims)
    agrees(z, want, plain.conv(*magnitude(gate.pooled, gate.weight), gate.dims), 54)
    want, spread = plain.activate(*double(z, gate.norm), gate.dims), z.cpu().double().abs().clamp(min=1)
    assert ((found.cpu().double() - want).abs() <= GATE_ROUNDINGS * gate.eps * spread).all()


@on(*BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the exponential that overflows
def test_gate_saturates(passes):
    """Far from zero a gate is exactly 0 or 1: the exponential may overflow, but not to NaN."""
    pooled = torch.zeros(1, 2, 4, device=pass_cases.DEVICE)
    pooled[0, 0] = torch.tensor([-1e30, -200.0, 200.0, 1e30])
    weight = torch.zeros(1, 2, 3, 3, 3, device=pass_cases.DEVICE)
    weight[0, 0, 1, 1, 1] = 1
    norm = torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=pass_cases.DEVICE)
    found, _ = passes.gate_again(pooled, [weight], norm, (1, 1, 4))
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@on(*BACKENDS)
def test_gate_moments_far_from_zero(passes):
    """The variance of numbers whose mean is 2000 times their spread: no cancellation of squares."""
    pooled = torch.zeros(3, 2, 5 * 6 * 7)
    pooled[:, 0] = 2000 + torch.randn(3, 5 * 6 * 7)
    weight = torch.zeros(1, 2, 3, 3, 3)
    weight[0, 0, 1, 1, 1] = 1
    nothing, on_device = [None], (pooled.to(pass_cases.DEVICE), [weight.to(pass_cases.DEVICE)])
    _, _, statistics = passes.gate(*on_device, nothing, nothing, nothing, nothing, [0.0], [True], (5, 6, 7))
    want = pooled[:, 0].double().var(correction=0)
    torch.testing.assert_close(statistics[0, 1].cpu().double(), want, rtol=1e-5, atol=0)


@each(*EVERY_GATE, argument="gate")
def test_gate_backward_reduce(passes, plain, gate):
    got = passes.gate_backward_reduce(gate.grad_gate, gate.z, gate.norm, gate.dims)
    want = plain.gate_backward_reduce(*double(gate.grad_gate, gate.z, gate.norm, gate.dims))
    grad, z, norm = magnitude(gate.grad_gate, gate.z, gate.norm)
    xhat = (z + gate.spread(norm[:, 0])) * gate.spread(norm[:, 1])
    for i, (g, h) in enumerate(zip(gate.per_map(grad), gate.per_map(xhat), strict=True)):
        bound = (GATE_ROUNDINGS + gate.count) * gate.eps * torch.stack((g.sum(), (g * h).sum()))
        assert ((got[i].cpu().double() - want[i]).abs() <= bound).all()


@each(*EVERY_GATE, argument="gate")
@pytest.mark.parametrize("given", [True, False], ids=["sums given", "sums found"])
def test_gate_backward(passes, plain, gate, given):
    """dz is off by GATE_ROUNDINGS of its terms; grad_pooled sums 27 products of it, grad_weight one per element, and so
    do the sums."""
    sums = gate.sums if given else None
    arguments = gate.grad_gate, gate.z, gate.norm, sums, gate.statistics, gate.pooled, gate.weight, gate.dims
    grad_pooled, grad_weight, found = passes.gate_backward(*arguments)
    want_pooled, want_weight, want = plain.gate_backward(*double(*arguments))
    grad, z, norm, _, statistics, pooled, weight = magnitude(*arguments[:-1])
    xhat = (z + gate.spread(norm[:, 0])) * gate.spread(norm[:, 1])
    scale = gate.spread(norm[:, 1] * norm[:, 2])
    rounding = epsilon(gate.weight[0].dtype)  # of what is returned in the type of the parameters
    if given:
        assert torch.equal(found, sums.to(found.dtype))
        means, rounded = gate.sums.cpu().double().abs() * statistics[:, 2:], 0
    else:
        terms = [
            torch.stack((g.sum(), (g * h).sum())) for g, h in zip(gate.per_map(grad), gate.per_map(xhat), strict=True)
        ]
        means, rounded = torch.stack(terms) * statistics[:, 2:], gate.count
        bound = (GATE_ROUNDINGS + gate.count) * gate.eps * torch.stack(terms)
        assert ((found.cpu().double() - want).abs() <= bound + rounding * want.abs()).all()
    corrected = gate.spread(means[:, 0]) + xhat * gate.spread(means[:, 1])
    dz = scale * (grad + (1 + rounded / GATE_ROUNDINGS) * corrected)
    sum_pooled, sum_weight = conv_backward(dz, pooled, weight, gate.dims)
    assert ((grad_pooled.cpu().double() - want_pooled).abs() <= (GATE_ROUNDINGS + 27) * gate.eps * sum_pooled).all()
    for i, w in enumerate(gate.weight):
        bound = (GATE_ROUNDINGS + gate.count) * gate.eps * sum_weight[i] + rounding * want_weight[i].abs()
        assert grad_weight[i].stride() == w.stride() and grad_weight[i].dtype == found.dtype == w.dtype
        assert ((grad_weight[i].cpu().double() - want_weight[i]).abs() <= bound).all()


@on(*BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the NaN
@pytest.mark.parametrize("total", [0.0, float("nan")])
def test_gate_backward_under_fixed_statistics(passes, total):
    """Nothing is corrected: a saturated gate has no gradient and spoils none, nor does a sum that is NaN."""
    values = torch.tensor([[float("inf"), float("-inf"), 0.0, 1.0]], device=pass_cases.DEVICE)
    norm = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).to(values)
    pooled, weight = torch.ones(1, 2, 4).to(values), torch.ones(1, 2, 3, 3, 3).to(values)
    sums, statistics = torch.full((1, 2), total).to(values), torch.tensor([[0.0, 1.0, 0.0]]).to(values)
    grad_pooled, grad_weight, _ = passes.gate_backward(
        torch.ones_like(values), values, norm, sums, statistics, pooled, [weight], (1, 1, 4)
    )
    assert grad_pooled.isfinite().all() and grad_weight[0].isfinite().all()


@on(*BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 0.75])
def test_move_statistics(passes, dtype, momentum):
    """Rounded once on the way and once in the end."""

    def running() -> list[list[torch.Tensor]]:
        numbers = [torch.arange(1, 1 + c).to(dtype).to(pass_cases.DEVICE) for c in (1, 1, 5)]
        return [[r.clone() for r in numbers], [2 * r for r in numbers], [torch.tensor(7), torch.tensor(0)]]

    like = accumulate_dtype(dtype)
    statistics = [torch.rand(c, 3, dtype=like).to(pass_cases.DEVICE) for c in (1, 1, 5)]
    found, want = running(), running()
    tracked = [number.to(pass_cases.DEVICE) for number in found[2]]
    passes.move_statistics_(*found[:2], tracked, statistics, momentum)
    PlainPasses.move_statistics_(*want, statistics, momentum)
    assert [number.item() for number in tracked] == [8, 1]
    for buffers, expected in zip(found[:2], want[:2], strict=True):
        torch.testing.assert_close(buffers, expected, rtol=4 * epsilon(dtype), atol=0)
