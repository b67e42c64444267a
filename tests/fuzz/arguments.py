"""Right arguments of every raw operator, drawn at random, and what the plain passes make of them in float64.

Bounds. Where an operator sums n products it is off by at most (n + 8) roundings of the accumulation type on the sum of
their magnitudes (pass_cases.py), the same at every instruction level: they add in another order, or fuse a product and
a sum, which saves a rounding. A result is rounded once more to its type, and below its least normal number by a part of
that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pass_cases import GATE_ROUNDINGS, conv_backward, double, epsilon, in_order, magnitude, terms
from plain_double_norm import PlainDoubleNorm
from plain_passes import PlainPasses
from torch import Tensor

from aia_kernels import backends
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONTEXTS = (maps.CHANNEL, maps.SPACETIME)
plain = PlainPasses(backends.passes("cpu", "attention_in_attention").map_order)
plain_norm = PlainDoubleNorm()


class Operator(NamedTuple):
    """draw(random): arguments. check(before, after, results): assert what became of arguments that were taken, given
    copies of them from before."""

    draw: Callable[[random.Random], list]
    check: Callable[[list, list, Any], None]


def within(got: Tensor, want: Tensor, error: Tensor | float) -> None:
    """Assert that a result is off by its error, and by one rounding to its type."""
    info = torch.finfo(got.dtype)
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    wrong = ~((got.double() - want).abs() <= error + epsilon(got.dtype) * want.abs() + info.smallest_normal * info.eps)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements exceed their bound"


def sums_within(got: Tensor, want: Tensor, magnitudes: Tensor, n: int) -> None:
    """Assert the bound of a sum of n products."""
    within(got, want, (n + 8) * epsilon(accumulate_dtype(got.dtype)) * magnitudes)


def placed(r: random.Random, t: Tensor) -> Tensor:
    """The same tensor at the end of a storage of its own, with any strides along axes of length one."""
    offset = r.choice((0, 0, 1, 7, 64))
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    buffer = torch.empty(offset + span, dtype=t.dtype)
    strides = [
        r.choice((stride, 1, 0, 1000)) if n == 1 else stride for n, stride in zip(t.shape, t.stride(), strict=True)
    ]
    return buffer.as_strided(t.shape, strides, offset).copy_(t)


def numbers(r: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    kind = r.choice(("normal", "normal", "ties", "small", "large"))
    if kind == "ties":
        return placed(r, torch.randint(-2, 3, tuple(shape)).to(dtype))
    return placed(r, (torch.randn(tuple(shape)) * {"normal": 1, "small": 0.01, "large": 30}[kind]).to(dtype))


def activation(r: random.Random) -> Tensor:
    while True:
        shape = (
            r.choice((1, 1, 2, 3)),
            r.choice((1, 2, 3, 5)),
            r.choice((1, 2, 3, 8, 15, 16, 17, 33, 70, 260)),
            r.choice((1, 2, 3, 4, 5, 9, 18)),
            r.choice((1, 2, 3, 4, 7, 9, 17, 70, 260)),
        )
        if math.prod(shape) <= 20000:
            return placed(r, in_order(numbers(r, shape, r.choice(FLOATS)), r.choice(maps.ORDERS)))


def like(r: random.Random, x: Tensor) -> Tensor:
    """Another tensor that is stored as x."""
    return placed(r, in_order(numbers(r, x.shape, x.dtype), maps.storage_order(x)))


def gate_for(r: random.Random, x: Tensor, context: int) -> Tensor | None:
    if not context:
        return None
    shape = x.shape[0], maps.packed_size(x.shape, context)
    return placed(r, torch.rand(shape, dtype=accumulate_dtype(x.dtype)))


def features_for(r: random.Random, x: Tensor, context: int) -> list[Tensor | None]:
    """A gradient of pooled features and an argmax that points anywhere."""
    if not context:
        return [None, None]
    packed = maps.packed_size(x.shape, context)
    grad = numbers(r, (x.shape[0], 2, packed), accumulate_dtype(x.dtype))
    _, argmax = plain.pool(torch.randn(x.shape), context, None, maps.NONE)
    return [grad, placed(r, argmax)]


def draw_pool(r):
    x, gate_context = activation(r), r.choice((0, *CONTEXTS))
    return [x, r.choice(CONTEXTS), gate_for(r, x, gate_context), gate_context]


def check_pool(before, after, results):
    x, context, gate, gate_context = before
    pooled, argmax = results
    want, want_argmax = plain.pool(*double(*before))
    magnitudes, _ = plain.pool(*magnitude(*before))
    assert argmax.dtype == maps.index_dtype(x.shape, context) and argmax.shape == want_argmax.shape
    sums_within(pooled[:, 1], want[:, 1], magnitudes[:, 1], terms(x, context))
    if gate is None:
        assert torch.equal(pooled[:, 0].double(), want[:, 0]) and torch.equal(argmax, want_argmax)
        return
    # Rounding may exchange elements whose products lie within the bound: the chosen one must lie there too.
    sums_within(pooled[:, 0], want[:, 0], magnitudes[:, 0], 1)
    order = plain.map_order(maps.storage_order(x))
    product = x.double() * plain.field(gate.double(), x, gate_context)
    for axis, m, index in zip(
        maps.POOLED_AXES[context],
        maps.unpack(pooled[:, 0], x.shape, context, order),
        maps.unpack(argmax, x.shape, context, order),
        strict=True,
    ):
        axes = [0, *(1 + "TCHW".index(letter) for letter in (*maps.GATE_AXES[axis], axis))]
        chosen = product.permute(axes).gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        sums_within(m, chosen, chosen.abs(), 1)


def draw_unpool(r):
    grad_y, context = activation(r), r.choice(CONTEXTS)
    guide, inner = (r.choice((0, *CONTEXTS)) for _ in range(2))
    outer = [gate_for(r, grad_y, context), *features_for(r, grad_y, context), context]
    return [grad_y, *outer, gate_for(r, grad_y, guide), guide, *features_for(r, grad_y, inner), inner]


def check_linear(name: str, n: Callable[[list], int]) -> Callable:
    """The check of a pass with one result, the sum of n(arguments) products."""

    def check(before, after, results):
        method = getattr(plain, name)
        sums_within(results, method(*double(*before)), method(*magnitude(*before)), n(before))

    return check


def draw_unpool_reduce(r):
    x, context = activation(r), r.choice(CONTEXTS)
    return [x, *features_for(r, x, context), context, r.choice(CONTEXTS)]


def draw_recalibrate(r):
    x, context = activation(r), r.choice(CONTEXTS)
    return [x, gate_for(r, x, context), context]


def draw_recalibrate_reduce(r):
    x = activation(r)
    return [like(r, x), x, r.choice(CONTEXTS)]


def draw_temporal_shift(r):
    x = activation(r)
    return [x, r.randint(0, x.shape[2] // 2), r.random() < 0.5]


def check_temporal_shift(before, after, results):
    x, fold, reverse = before
    ahead, behind = slice(0, fold), slice(fold, 2 * fold)
    if reverse:
        ahead, behind = behind, ahead
    want = torch.zeros_like(x)
    want[:, :-1, ahead], want[:, 1:, behind] = x[:, 1:, ahead], x[:, :-1, behind]
    want[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    assert torch.equal(results, want)


class Maps:
    """What the gate operators take of up to three maps, of the order of one."""

    def __init__(self, r: random.Random):
        self.n, self.b = r.choice((1, 3)), r.choice((1, 2, 3))
        lengths = (1, 2, 3, 5, 7, 16, 17, 33, 70)
        self.dims = [r.choice(lengths[:6]) if i % 3 < 2 else r.choice(lengths) for i in range(3 * self.n)]
        self.sizes = sizes_of(self.dims)
        self.m, self.dtype = sum(self.sizes), r.choice(FLOATS[:2])
        self.r = r

    def random(self, *shape: int) -> Tensor:
        return placed(self.r, torch.randn(shape).to(self.dtype))

    def weights(self) -> list[Tensor]:
        def weight() -> Tensor:
            w = torch.randn(1, 2, 3, 3, 3).to(self.r.choice(FLOATS))
            kind = self.r.choice(("as it is", "turned", "channels last", "expanded"))
            if kind == "turned":
                w = w.permute(0, 1, *self.r.sample((2, 3, 4), 3))
            elif kind == "channels last":
                w = w.to(memory_format=torch.channels_last_3d)
            elif kind == "expanded":
                return w[:, :, :1].expand(w.shape)
            return placed(self.r, w)

        return [weight() for _ in range(self.n)]

    def numbers(self) -> list[Tensor | None]:
        def number() -> Tensor | None:
            shape = self.r.choice(((), (1,), (1, 1)))
            return None if self.r.random() < 0.3 else (torch.rand(shape) + 0.5).to(self.r.choice(FLOATS))

        return [number() for _ in range(self.n)]

    def norm(self) -> Tensor:
        return placed(self.r, (1 + 0.3 * torch.randn(self.n, 4)).to(self.dtype))


def sizes_of(dims: Sequence[int]) -> list[int]:
    return [math.prod(dims[i : i + 3]) for i in range(0, len(dims), 3)]


def spread(column: Tensor, sizes: list[int]) -> Tensor:
    """One number per map, at every element [M]."""
    return torch.cat([value.expand(size) for value, size in zip(column, sizes, strict=True)])


def draw_gate(r):
    m = Maps(r)
    batch = [r.random() < 0.5 for _ in range(m.n)]
    eps = [r.choice((1e-5, 0.1)) for _ in range(m.n)]
    return [m.random(m.b, 2, m.m), m.weights(), *(m.numbers() for _ in range(4)), eps, batch, m.dims]


def check_gate(before, after, results):
    """As in test_passes.test_gate: sums of as many terms as a map has in the batch, of a z that sums 54 products; the
    gates are made of that z by the norm that came out."""
    pooled, weight, *_, eps, batch, dims = before
    found, norm, statistics = results
    unit, sizes = epsilon(pooled.dtype), sizes_of(dims)
    _, want_norm, want = plain.gate(*double(*before))
    z = plain.conv(*double(pooled, weight), dims)
    z_error = 62 * unit * plain.conv(*magnitude(pooled, weight), dims)
    statistics, norm = statistics.double(), norm.double()
    for i, (m, e) in enumerate(zip(z.split(sizes, -1), z_error.split(sizes, -1), strict=True)):
        bound = (m.numel() + 8) * unit
        mean_bound = bound * m.abs().mean() + e.mean() if batch[i] else 0
        var_bound = 2 * bound * m.square().mean() + 2 * (m.abs() * e).mean() + e.square().mean() if batch[i] else 0
        within(statistics[i, 0], want[i, 0], mean_bound + unit * want[i, 0].abs())
        within(statistics[i, 1], want[i, 1], var_bound + unit * want[i, 1])
        within(statistics[i, 2], want[i, 2], 2 * unit * want[i, 2])
        assert norm[i, 0] == statistics[i, 0]
        rstd = (statistics[i, 1] + eps[i]).rsqrt()
        within(norm[i, 1], rstd, 4 * unit * rstd)
    within(norm[:, 2:], want_norm[:, 2:], unit * want_norm[:, 2:].abs())
    slope = spread((norm[:, 1] * norm[:, 2]).abs(), sizes) / 4  # of the sigmoid at most
    # xhat is off by a rounding of z and of the mean, times their factor.
    turned = z.abs() + spread(norm[:, 0].abs(), sizes)
    within(found, plain.activate(z, norm, dims), GATE_ROUNDINGS * unit + slope * (z_error + 4 * unit * turned))


def draw_gate_again(r):
    m = Maps(r)
    return [m.random(m.b, 2, m.m), m.weights(), m.norm(), m.dims]


def check_gate_again(before, after, results):
    pooled, weight, norm, dims = before
    found, z = results
    sums_within(z, plain.conv(*double(pooled, weight), dims), plain.conv(*magnitude(pooled, weight), dims), 54)
    far = spread((norm[:, 0].abs() + 1) * norm[:, 1].abs() * norm[:, 2].abs(), sizes_of(dims)).double()
    bound = GATE_ROUNDINGS * epsilon(z.dtype) * (1 + far * z.double().abs().clamp(min=1))
    within(found, plain.activate(*double(z, norm), dims), bound)


def draw_gate_backward_reduce(r):
    m = Maps(r)
    return [m.random(m.b, m.m), m.random(m.b, m.m), m.norm(), m.dims]


def pre_activation(grad: Tensor, z: Tensor, norm: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of du and of xhat, and how many times GATE_ROUNDINGS roundings du is off where norms are not small."""
    grad, z, norm = magnitude(grad, z, norm)
    xhat = (z + spread(norm[:, 0], sizes)) * spread(norm[:, 1], sizes)
    return grad, xhat, 1 + xhat * spread(norm[:, 2], sizes)


def check_gate_backward_reduce(before, after, results):
    grad_gate, z, norm, dims = before
    sizes, unit = sizes_of(dims), epsilon(z.dtype)
    grad, xhat, far = pre_activation(grad_gate, z, norm, sizes)
    want = plain.gate_backward_reduce(*double(*before))
    for i, (g, h, f) in enumerate(zip(*(t.split(sizes, -1) for t in (grad, xhat, far)), strict=True)):
        bound = unit * (GATE_ROUNDINGS * f + g.numel())
        within(results[i], want[i], torch.stack(((bound * g).sum(), (bound * g * h).sum())))


def draw_gate_backward(r):
    m = Maps(r)
    sums = m.random(m.n, 2) if r.random() < 0.5 else None
    share = torch.tensor([[r.choice((0.0, 1 / (m.b * size)))] for size in m.sizes], dtype=m.dtype)
    statistics = placed(r, torch.cat((m.random(m.n, 2), share), 1))
    maps_of_gate = [m.random(m.b, m.m), m.random(m.b, m.m), m.norm()]
    return [*maps_of_gate, sums, statistics, m.random(m.b, 2, m.m), m.weights(), m.dims]


def check_gate_backward(before, after, results):
    """dz is off by GATE_ROUNDINGS of its terms; grad_pooled sums 27 products of it, grad_weight one per element, and so
    do the sums."""
    grad_gate, z, norm, sums, statistics, pooled, weight, dims = before
    grad_pooled, grad_weight, found = results
    sizes, unit, rounding = sizes_of(dims), epsilon(z.dtype), epsilon(weight[0].dtype)
    count = z.shape[0] * max(sizes)
    want_pooled, want_weight, want = plain.gate_backward(*double(*before))
    grad, xhat, far = pre_activation(grad_gate, z, norm, sizes)
    pooled, weights, norms, statistics = magnitude(pooled, list(weight), norm, statistics)
    split = [t.split(sizes, -1) for t in (grad, xhat, far)]
    totals = torch.stack([torch.stack(((g * f).sum(), (g * h * f).sum())) for g, h, f in zip(*split, strict=True)])
    if sums is None:
        within(found, want, (GATE_ROUNDINGS + count) * unit * totals + rounding * want.abs())
        means, rounded = totals * statistics[:, 2:], count
    else:
        within(found, want, rounding * want.abs())
        means, rounded = sums.double().abs() * statistics[:, 2:], 0
    corrected = spread(means[:, 0], sizes) + xhat * spread(means[:, 1], sizes)
    dz = spread(norms[:, 1] * norms[:, 2], sizes) * (grad * far + (1 + rounded / GATE_ROUNDINGS) * corrected)
    sum_pooled, sum_weight = conv_backward(dz, pooled, weights, dims)
    within(grad_pooled, want_pooled, (GATE_ROUNDINGS + 27) * unit * sum_pooled)
    for got, wanted, w, total in zip(grad_weight, want_weight, weight, sum_weight, strict=True):
        assert got.dtype == w.dtype and got.stride() == torch.empty_like(w).stride()
        within(got, wanted, (GATE_ROUNDINGS + count) * unit * total)


def draw_move_statistics(r):
    n, dtype, wide = r.randint(1, 4), r.choice(FLOATS), r.choice(FLOATS[:2])
    channels = [r.choice((1, 1, 5, 19)) for _ in range(n)]
    mean = [placed(r, torch.randn(c).to(dtype)) for c in channels]
    var = [placed(r, (0.5 + torch.rand(c)).to(dtype)) for c in channels]
    latest = [placed(r, (0.9 * torch.rand(c, 3)).to(wide)) for c in channels]
    tracked = [torch.tensor(r.randint(0, 9)) for _ in range(r.randint(0, n))]
    if r.random() < 0.3:  # a norm that several contexts share
        mean, var, latest = ([*of, of[0]] for of in (mean, var, latest))
        tracked += tracked[:1]
    return [mean, var, tracked, latest, r.choice((0.0, 0.1, 0.75, 1.0))]


def check_move_statistics(before, after, results):
    """Rounded a few times on the way and once in the end, each time it moves: var / (1 - share) by four roundings."""
    mean, var, tracked, latest, momentum = before
    unit = epsilon(latest[0].dtype) if latest else 0.0
    unbiased = [s[:, 1].double() / (1 - s[:, 2].double()) for s in latest]
    for buffers, starts, values in ((after[0], mean, [s[:, 0].double() for s in latest]), (after[1], var, unbiased)):
        for got, start in zip(buffers, starts, strict=True):
            times = [j for j, other in enumerate(buffers) if other is got or other.data_ptr() == got.data_ptr() != 0]
            want, largest = start.double(), start.double().abs()
            for j in times:
                want = want + momentum * (values[j] - want)
                largest = torch.maximum(largest, values[j].abs() + want.abs())
            within(got, want, 8 * len(times) * (unit + epsilon(got.dtype)) * (1 + abs(momentum)) * largest)
    for number, count in zip(after[2], tracked, strict=True):
        assert number == count + sum(other.data_ptr() == number.data_ptr() for other in after[2])


class Columns:
    """What the double normalization takes."""

    def __init__(self, r: random.Random):
        self.r, self.group, groups = r, r.choice((1, 2, 5, 7, 16, 18, 32, 33, 48, 64, 128, 300)), r.choice((1, 1, 2, 3))
        self.b, self.n = r.choice((0, 1, 1, 2, 3)), r.choice((0, 1, 2, 9, 33, 70))
        self.m, self.dtype = self.group * groups, r.choice(FLOATS)
        self.wide = accumulate_dtype(self.dtype)

    def tokens(self) -> Tensor:
        return placed(self.r, (self.r.choice((0.1, 1, 4)) * torch.randn(self.b, self.n, self.m)).to(self.dtype))

    def attention(self) -> Tensor:
        return placed(self.r, torch.rand(self.b, self.n, self.m).to(self.dtype))

    def padding(self) -> Tensor | None:
        return None if self.r.random() < 0.5 else placed(self.r, torch.rand(self.b, self.n) < self.r.choice((0.3, 1.0)))

    def per_sample(self) -> Tensor:
        return placed(self.r, torch.randn(self.b, self.m).to(self.wide))


def draw_column_statistics(r):
    c = Columns(r)
    return [c.tokens(), c.padding()]


def check_column_statistics(before, after, results):
    """exp(t) |t| is at most 1 / e for t <= 0: the roundings of t cost less than one rounding a term, absolutely."""
    logits, padding = before
    statistics, lse = results
    if not logits.shape[1]:
        assert (statistics[:, 0] == -math.inf).all() and (statistics[:, 1] == 0).all() and (lse == -math.inf).all()
        return
    want, _ = plain_norm.column_statistics(logits.double(), padding)
    assert torch.equal(statistics[:, 0].double(), want[:, 0])
    shift = want[:, 0].masked_fill(want[:, 0].isinf(), 0.0).unsqueeze(1)
    distance = (logits.double() - shift).abs()
    parts = (-distance).exp() * (distance + logits.shape[1] + 8)
    if padding is not None:
        parts = parts.masked_fill(padding.unsqueeze(-1), 0.0)
    within(statistics[:, 1], want[:, 1], epsilon(lse.dtype) * parts.sum(1))
    assert torch.equal(lse.isinf(), statistics[:, 0].isinf())


def draw_double_norm(r):
    c = Columns(r)
    return [c.tokens(), c.per_sample(), c.group, r.choice((0.0, 1e-9, 0.5)), c.padding()]


def check_double_norm(before, after, results):
    """As in external_pass_cases.normalized_within: t is off by a rounding of itself, and A, where it is taken from
    the maximum of its group, by two more differences as large as the largest t."""
    logits, lse, group, eps, padding = before
    want = logits.double()
    want = want.clone()
    want_mass = plain_norm.double_norm_(want, lse.double(), group, eps, padding)
    t = (logits.double() - lse.double().unsqueeze(1)).unflatten(-1, (-1, group)).abs()
    if padding is not None:
        t = t.masked_fill(padding[:, :, None, None], 0.0)
    roundings = (3 * t.amax(-1, keepdim=True) + group + 8) * epsilon(lse.dtype)
    # P below the least normal number becomes 0, where the mass is large enough not to be inspected.
    flushed = 2.0**-66 if lse.dtype == torch.float32 else 2.0**-510
    within(after[0], want, (roundings * want.unflatten(-1, (-1, group)) + flushed).flatten(-2))
    within(results, want_mass, roundings.squeeze(-1) * want_mass)


def draw_double_norm_backward_reduce(r):
    c = Columns(r)
    return [c.tokens(), c.attention(), c.group]


def rows_of(grad: Tensor, attention: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """|A| in groups and the magnitudes of Q."""
    g, a = (t.double().unflatten(-1, (-1, group)).abs() for t in (grad, attention))
    return a, a * (g + (g * a).sum(-1, keepdim=True))


def check_double_norm_backward_reduce(before, after, results):
    grad, attention, group = before
    _, rows = rows_of(grad, attention, group)
    want = plain_norm.double_norm_backward_reduce(*double(grad, attention), group)
    sums_within(results, want, rows.flatten(-2).sum(1), grad.shape[1] + group)


def draw_double_norm_backward(r):
    c = Columns(r)
    mass = placed(r, torch.rand(c.b, c.n, c.m // c.group).to(c.wide))
    return [c.tokens(), c.attention(), mass, c.per_sample(), c.group]


def check_double_norm_backward(before, after, results):
    grad, attention, mass, reduced, group = before
    a, rows = rows_of(grad, attention, group)
    want = grad.double().clone()
    plain_norm.double_norm_backward_(want, *double(attention, mass, reduced), group)
    columns = reduced.double().abs().unflatten(-1, (-1, group)).unsqueeze(1) * mass.double().unsqueeze(-1)
    within(after[0], want, ((group + 8) * epsilon(mass.dtype) * (rows + a * columns)).flatten(-2))


def draw_residual(r) -> tuple[Tensor, Callable[[], Tensor]]:
    """[B, N, C] stored token by token or feature by feature, small integers: every sum of three is exact."""
    shape = r.choice((1, 2, 3)), r.choice((1, 2, 7, 33, 100)), r.choice((1, 3, 16, 19, 64, 131))
    dtype, by_maps = r.choice(FLOATS), r.random() < 0.5

    def tensor() -> Tensor:
        t = torch.randint(-8, 9, shape).to(dtype)
        return placed(r, t.mT.contiguous().mT if by_maps else t)

    return tensor(), tensor


def draw_residual_relu(r):
    z, another = draw_residual(r)
    shift = torch.randint(-8, 9, (z.shape[2],)).to(accumulate_dtype(z.dtype))
    return [z, another(), None if r.random() < 0.3 else placed(r, shift)]


def check_residual_relu(before, after, results):
    z, x, shift = before
    want = torch.empty_like(z, dtype=torch.float64).copy_(z)
    signs = plain_norm.residual_relu_(want, x.double(), None if shift is None else shift.double())
    assert torch.equal(after[0].double(), want) and torch.equal(results, signs)


def draw_residual_relu_backward(r):
    grad_y, _ = draw_residual(r)
    return [grad_y, placed(r, torch.randint(0, 256, ((grad_y.numel() + 7) // 8,), dtype=torch.uint8))]


def check_residual_relu_backward(before, after, results):
    grad_y, signs = before
    wide = torch.empty_like(grad_y, dtype=torch.float64).copy_(grad_y)
    want, want_sums = plain_norm.residual_relu_backward(wide, signs)
    assert torch.equal(results[0].double(), want)
    sums_within(results[1], want_sums, want.abs().sum((0, 1)), grad_y.shape[0] * grad_y.shape[1])


OPERATORS = {
    "pool": Operator(draw_pool, check_pool),
    "unpool": Operator(draw_unpool, check_linear("unpool", lambda _: 12)),
    "unpool_reduce": Operator(draw_unpool_reduce, check_linear("unpool_reduce", lambda a: terms(a[0], a[4]) + 6)),
    "recalibrate": Operator(draw_recalibrate, check_linear("recalibrate", lambda _: 1)),
    "recalibrate_reduce": Operator(
        draw_recalibrate_reduce, check_linear("recalibrate_reduce", lambda a: terms(a[0], a[2]))
    ),
    "temporal_shift": Operator(draw_temporal_shift, check_temporal_shift),
    "gate": Operator(draw_gate, check_gate),
    "gate_again": Operator(draw_gate_again, check_gate_again),
    "gate_backward_reduce": Operator(draw_gate_backward_reduce, check_gate_backward_reduce),
    "gate_backward": Operator(draw_gate_backward, check_gate_backward),
    "move_statistics_": Operator(draw_move_statistics, check_move_statistics),
    "column_statistics": Operator(draw_column_statistics, check_column_statistics),
    "double_norm_": Operator(draw_double_norm, check_double_norm),
    "double_norm_backward_reduce": Operator(draw_double_norm_backward_reduce, check_double_norm_backward_reduce),
    "double_norm_backward_": Operator(draw_double_norm_backward, check_double_norm_backward),
    "residual_relu_": Operator(draw_residual_relu, check_residual_relu),
    "residual_relu_backward": Operator(draw_residual_relu_backward, check_residual_relu_backward),
}
