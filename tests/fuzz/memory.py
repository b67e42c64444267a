"""Right arguments of the raw operators of attention by a memory per sample, as arguments.py has those of the others,
and their checks.

Bounds. A number is made of sums over features and over tokens and of some thirty operations, and of exponentials whose
argument is off by a rounding of a logit: so many roundings of the accumulation type, each of at most the largest
magnitude that takes part. Where a query is divided by its mass, magnitudes grow with what the mass loses by
cancellation, and where a gradient is divided by a length, with its inverse. An operator that has all of a direction
gives what the others give one by one, bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from aia_kernels import schemas
from aia_kernels.algorithms import linear_attention as algorithm
from aia_kernels.backends import memory_passes
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.reference import Form, Weights
from aia_kernels.reference.linear_attention import FEATURES

from .arguments import FLOATS, Operator, epsilon, numbers, placed, within

#: The largest logits of softplus that are drawn.
LARGE = 15.0


class Logits:
    """What the passes take of keys and queries, of the sizes of one."""

    def __init__(self, r: random.Random):
        self.r, self.b, self.heads = r, r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3))
        self.d, self.n = r.choice((1, 2, 3, 5, 8, 17, 70)), r.choice((1, 2, 7, 16, 17, 67, 130, 700))
        if self.b * self.heads * self.d * self.n > 20000:
            self.b, self.heads, self.d = 1, 1, min(self.d, 17)
        self.feature, self.dtype = r.randrange(3), r.choice(FLOATS)
        self.rows = self.heads * (self.d + (self.feature == 0))
        self.wide = accumulate_dtype(self.dtype)
        self.logits = numbers(r, (self.b, 2 * self.heads * self.d, self.n), self.dtype)
        if FEATURES[self.feature] == "softplus":
            self.logits.clamp_(-LARGE, LARGE)
        hidden = torch.rand(self.b, self.n) < r.choice((0.3, 1.0))
        self.padding = None if r.random() < 0.5 else placed(r, hidden)
        self.of = [self.logits, self.feature, self.heads, self.padding]

    def random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return placed(self.r, torch.randn(shape).to(dtype))

    def divisor(self) -> list:
        """Sums over tokens that give no query a mass near 0, gamma and eps."""
        sums = (0.2 * torch.randn(self.b, self.rows).tanh() / self.d**0.5).unflatten(1, (self.heads, -1))
        sums = sums.abs() if FEATURES[self.feature] == "softplus" else sums
        if FEATURES[self.feature] == "l2":
            sums[:, :, 0] = 1.0
        gamma = None if self.r.random() < 0.3 else self.random((1,), self.dtype)
        return [placed(self.r, (self.n * sums.flatten(1)).to(self.wide)), gamma, self.r.choice((0.0, 1e-6, 0.1))]

    def reached(self) -> Tensor:
        return self.random((self.b, self.rows, self.n), self.dtype)

    def rows_and_room(self) -> Tensor:
        """phi(k), and room for the gradients of keys and queries."""
        rows, _ = memory_passes.memory_keys(*self.of, None, True)
        rows[:, self.rows :].normal_()  # no two draws find the same in new memory
        return placed(self.r, rows.nan_to_num().to(self.wide))


def roundings(logits: Tensor, feature: int, heads: int) -> float:
    """inf for softplus of large logits: PyTorch's is z itself beyond 20, and a sum of what underflows may be 0."""
    d, n, most = logits.shape[1] // (2 * heads), logits.shape[2], float(logits.double().abs().max())
    if FEATURES[feature] == "softplus" and most > LARGE:
        return float("inf")
    return (d + n + 32 + 2 * most) * epsilon(accumulate_dtype(logits.dtype))


def near(got: Tensor, want: Tensor, error: float) -> None:
    """Within an error, which is inf where nothing can be said."""
    assert got.shape == want.shape
    if error < float("inf"):
        within(got, want, error)


def largest(*tensors: Tensor | None) -> float:
    return max((float(t.detach().double().abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)


def draw_keys(r):
    c = Logits(r)
    statistics = None
    if FEATURES[c.feature] == "softmax" and r.random() < 0.5:
        key = c.logits[:, : c.heads * c.d].to(c.wide)
        maximum = key.amax(2) + r.random()
        total = (key - maximum.unsqueeze(2)).exp().sum(2) * r.choice((1.0, 3.0))
        statistics = placed(r, torch.stack((maximum, total), 1))
    return [*c.of, statistics, r.random() < 0.5]


def check_keys(before, after, results):
    logits, feature, heads, padding, statistics, gradients = before
    (rows, sums), unit = results, roundings(logits, feature, heads)
    known = None if statistics is None else statistics.double()
    want, want_sums = memory_passes.memory_keys(logits.double(), feature, heads, padding, known, False)
    assert rows.shape[1] == want.shape[1] + (logits.shape[1] if gradients else 0)
    near(rows[:, : want.shape[1]], want, unit * max(1.0, largest(want)))
    near(sums, want_sums, unit * max(1.0, largest(want.abs().sum(2))))


def draw_queries(r):
    c = Logits(r)
    return [*c.of, *c.divisor()]


class Masses:
    """Magnitudes of queries: those of phi(q), of what it is multiplied by, and how many digits the mass loses."""

    def __init__(self, logits, feature, heads, padding, sums, gamma, eps):
        of, none = (logits.double(), feature, heads), torch.zeros_like(sums, dtype=torch.float64)
        key_of_query = torch.cat([*logits.double().chunk(2, 1)][::-1], 1)
        phi = memory_passes.memory_keys(key_of_query, feature, heads, None, None, False)[0]
        name, gamma = FEATURES[feature], 1.0 if gamma is None else abs(float(gamma))
        raw = of[0][:, logits.shape[1] // 2 :].unflatten(1, (heads, -1))
        self.phi, self.weight, self.factor, self.loss, self.inverse = 1.0, 0.0, gamma, 1.0, 1.0
        if name == "softmax":
            return
        phi = phi.unflatten(1, (heads, -1))
        added = torch.full_like(none, eps).unflatten(1, (heads, -1))
        if name == "l2":
            added[:, :, 0] = 0.0
            length = raw.norm(dim=2)
            self.inverse = 1 / float(torch.where(length == 0, 1.0, length).min())
        weight = ((sums.double().unflatten(1, (heads, -1)) + added) / logits.shape[2]).unsqueeze(3)
        mass, size = (phi * weight).sum(2).abs(), (phi * weight).abs().sum(2)
        self.phi, self.weight = max(1.0, largest(phi)), largest(weight)
        self.loss = float((size / mass).nan_to_num(float("inf"), float("inf")).max())
        self.factor = float((gamma / mass).max()) if self.loss < 1e6 else float("inf")


def check_queries(before, after, results):
    logits, feature, heads, padding, sums, gamma, eps = before
    at = Masses(*before)
    wide = (None if t is None else t.double() for t in (sums, gamma))
    want = memory_passes.memory_queries(logits.double(), feature, heads, padding, *wide, eps)
    near(results, want, roundings(logits, feature, heads) * at.loss * at.factor * at.phi)


def draw_queries_backward(r):
    c = Logits(r)
    reached = c.reached()
    if c.padding is not None:  # what comes back of a token that takes no part is 0
        reached = reached.masked_fill_(c.padding.unsqueeze(1), 0.0)
    return [c.rows_and_room(), *c.of, *c.divisor(), reached]


def check_queries_backward(before, after, results):
    rows, logits, feature, heads, padding, sums, gamma, eps, reached = before
    at, unit, count = (
        Masses(logits, feature, heads, padding, sums, gamma, eps),
        roundings(logits, feature, heads),
        rows.shape[1],
    )
    wide = [None if t is None else t.double() for t in (sums, gamma)]
    want_rows, half = rows.double(), logits.shape[1] // 2
    want = memory_passes.memory_queries_backward_(
        want_rows, logits.double(), feature, heads, padding, *wide, eps, reached.double()
    )
    assert torch.equal(after[0][:, : count - half], rows[:, : count - half]), (
        "more than the queries' gradient was written"
    )
    # phi(q)', of which the others are made with P, and by way of the mass.
    query, features = at.loss * at.factor * at.phi, reached.shape[1] / heads
    by_mass = at.loss * features * at.phi * largest(reached) * max(1.0, at.factor)
    grad = at.inverse * features * (query * largest(reached) + at.weight * at.factor * by_mass) * at.phi
    near(after[0][:, -half:], want_rows[:, -half:], unit * grad)
    near(results[0], want[0], unit * query)
    near(results[1], want[1], unit * by_mass * max(1.0, at.factor) * at.phi)
    near(results[2], want[2], unit * by_mass * logits.shape[0] * heads * logits.shape[2])


def draw_keys_backward(r):
    c = Logits(r)
    with_reduced = FEATURES[c.feature] == "softmax" and r.random() < 0.5
    reduced = c.random((c.b, c.heads * c.d), c.wide) if with_reduced else None
    return [c.rows_and_room(), *c.of, c.reached(), c.random((c.b, c.rows), c.wide), reduced]


def check_keys_backward(before, after, results):
    rows, logits, feature, heads, padding, reached, grad_sums, reduced = before
    want, half = rows.double(), logits.shape[1] // 2
    known = None if reduced is None else reduced.double()
    memory_passes.memory_keys_backward_(
        want, logits.double(), feature, heads, padding, reached.double(), grad_sums.double(), known
    )
    first, last = rows.shape[1] - 2 * half, rows.shape[1] - half
    assert torch.equal(after[0][:, :first], rows[:, :first]) and torch.equal(after[0][:, last:], rows[:, last:])
    length = logits.double()[:, :half].unflatten(1, (heads, -1)).norm(dim=2)
    inverse = 1 / float(torch.where(length == 0, 1.0, length).min()) if FEATURES[feature] == "l2" else 1.0
    phi, terms = max(1.0, largest(rows[:, :first])), reached.shape[1] / heads + reached.shape[2]
    size = (largest(reached) + largest(grad_sums)) * phi * phi * terms + largest(reduced) * phi
    near(after[0][:, first:last], want[:, first:last], roundings(logits, feature, heads) * inverse * size)


def draw_layer(r) -> list:
    """x, Weights and the settings behind them. What makes keys and queries is positive: nothing is lost in a mass."""
    b, n, c, d = r.choice((1, 2, 3)), r.choice((1, 2, 7, 33, 300)), r.choice((1, 2, 6, 17)), r.choice((1, 3, 8))
    heads, feature, dtype = r.choice((1, 1, 2, 4)), r.randrange(3), r.choice(FLOATS[:2])
    v = r.choice((1, 4, 9)) if FEATURES[feature] == "softmax" else c

    def matrix(*shape: int) -> Tensor:
        return placed(r, (0.1 + torch.rand(shape)).to(dtype))

    def perhaps(*shape: int) -> Tensor | None:
        return matrix(*shape) if r.random() < 0.6 else None

    x = matrix(b, c, n).mT if r.random() < 0.5 else matrix(b, n, c)
    output = matrix(heads, c, v) if FEATURES[feature] == "softmax" else None
    keys = 2 * heads * d
    weights = [matrix(keys, c), perhaps(keys), matrix(heads, v, c), perhaps(heads, v), output]
    weights += [None if output is None else perhaps(c), perhaps(1)]
    return [x, weights, feature, r.choice((0.0, 1e-6, 0.1)), r.random() < 0.5]


def plan(weights: list, feature: int, eps: float, residual: bool) -> algorithm.Plan:
    """Of the passes one by one."""
    passes = SimpleNamespace(**{name: schemas.callable_pass(name) for name in schemas.MEMORY_PASSES})
    return algorithm.Plan(passes, Form(FEATURES[feature], len(weights[2]), eps, residual))


def tidy(value: Any) -> Any:
    """Arguments at the beginning of a storage, with the usual strides along axes of length one: a product chooses its
    way by these, and rounds accordingly."""
    if isinstance(value, list):
        return [tidy(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    by_columns = value.ndim == 3 and not value.is_contiguous()
    return value.mT.clone(memory_format=torch.contiguous_format).mT if by_columns else torch.clone(value).contiguous()


def is_positive(value: Any) -> bool:
    """Whether all tensors among arguments are, as they were drawn."""
    if isinstance(value, list):
        return all(map(is_positive, value))
    return not isinstance(value, Tensor) or bool((value > 0).all())


def check_as_one(name: str, one_by_one: Callable[..., list[Tensor]]) -> Callable:
    """Of tidy arguments, where no axis of length one leaves a choice, the bits of the passes and products one by one.
    The results of those that were given are these up to the roundings of sums over tokens, of numbers as large as the
    largest of all results."""

    def check(before, after, results):
        arguments, x = tidy(before), before[0]
        found = getattr(torch.ops.aia_kernels, name)(*arguments)
        size = 64 * x.shape[1] * epsilon(x.dtype) * max(1.0, largest(*found))
        for one, tidied, want in zip(results, found, one_by_one(*arguments), strict=True):
            assert one.shape == tidied.shape == want.view(tidied.shape).shape
            assert 1 in x.shape[1:] or torch.equal(tidied, want.view(tidied.shape))
            if all(map(is_positive, before)):
                near(one, tidied.double(), size)

    return check


def forward_one_by_one(x, weights, *settings) -> list[Tensor]:
    y, logits, sums = algorithm.forward(plan(weights, *settings), x, Weights(*weights), None)
    return [y, logits, *sums]


def draw_propagate_back(r):
    x, weights, *settings = draw_layer(r)
    _, *kept = forward_one_by_one(x, weights, *settings)
    keeps_logits, keeps_sums = r.random() < 0.5, r.random() < 0.5
    kept = [t if keeps else None for t, keeps in zip(kept, (keeps_logits, keeps_sums, keeps_sums), strict=True)]
    return [placed(r, torch.rand_like(x)), x, weights, kept, *settings, r.random() < 0.7]


def backward_one_by_one(grad, x, weights, kept, feature, eps, residual, needs_x) -> list[Tensor]:
    logits, *sums = kept
    given = logits, None if sums[0] is None else algorithm.Sums(*sums)
    found = algorithm.backward(plan(weights, feature, eps, residual), grad, x, Weights(*weights), *given, None, needs_x)
    return [x.new_zeros(0) if g is None else g for g in found]


OPERATORS = {
    "memory_keys": Operator(draw_keys, check_keys),
    "memory_queries": Operator(draw_queries, check_queries),
    "memory_queries_backward_": Operator(draw_queries_backward, check_queries_backward),
    "memory_keys_backward_": Operator(draw_keys_backward, check_keys_backward),
    "memory_propagate": Operator(draw_layer, check_as_one("memory_propagate", forward_one_by_one)),
    "memory_propagate_back": Operator(draw_propagate_back, check_as_one("memory_propagate_back", backward_one_by_one)),
}
