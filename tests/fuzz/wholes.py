"""Right arguments of the raw operators that are a whole unit, layer or double normalization, as arguments.py has those
of the others, and their checks.

Bounds. A unit, and the gradient of a double normalization, have the bits of their passes one by one. A layer of
external attention is held against float64: each of its numbers is made of sums over features, slots and tokens, so many
roundings of the largest magnitudes that take part. A batch norm multiplies them by its scale over the standard
deviation, and its gradient by that times the largest normalized number.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import torch
from plain_double_norm import PlainDoubleNorm
from torch import Tensor
from torch.testing import assert_close

from aia_kernels import schemas
from aia_kernels.algorithms import attention_in_attention as algorithm
from aia_kernels.algorithms import unit as of_units
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.common.layouts import as_clips, as_input, as_maps, as_tokens
from aia_kernels.reference import UNITS, Unit, double_normalize

from .arguments import (
    FLOATS,
    Operator,
    activation,
    epsilon,
    like,
    numbers,
    placed,
    plain,
    sums_within,
    within,
)
from .memory import largest, near

BITS = {"rtol": 0, "atol": 0, "equal_nan": True}
_PASSES = *schemas.PASSES, *schemas.AVERAGE_PASSES
ONE_BY_ONE = SimpleNamespace(**{name: schemas.callable_pass(name) for name in _PASSES})
ONE_BY_ONE.map_order = plain.map_order


def finite(*settings: float) -> bool:
    return all(map(math.isfinite, settings))


class Gates:
    """A unit's gates: weights in the paper's order of axes, and numbers of their BNs."""

    def __init__(self, r: random.Random, averaged: bool):
        self.r, self.unit = r, r.choice([unit for unit in UNITS.values() if averaged or not unit.averaged])
        self.n = len(self.unit.letters)
        self.eps = [r.choice((1e-5, 0.1)) for _ in range(self.n)]

    def weights(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        def weight() -> Tensor:
            w = torch.randn(1, 2, 3, 3, 3).to(dtype or self.r.choice(FLOATS))
            return placed(self.r, w.permute(0, 1, *self.r.sample((2, 3, 4), 3)) if self.r.random() < 0.3 else w)

        return [weight() for _ in range(self.n)]

    def numbers(self, there: bool | None = None) -> list[Tensor | None]:
        """One for each gate, or none; there: whether each is there."""

        def number() -> Tensor | None:
            absent = self.r.random() < 0.3 if there is None else not there
            return None if absent else (torch.rand(self.r.choice(((), (1,)))) + 0.5).to(self.r.choice(FLOATS))

        return [number() for _ in range(self.n)]

    def batch(self) -> list[bool]:
        return [self.r.random() < 0.5 for _ in range(self.n)]


def unit_of(inner: int, outer: int, averaged: bool = False) -> Unit:
    return next(u for u in UNITS.values() if (u.inner, u.outer, u.averaged) == (inner, outer, averaged))


def one_by_one(unit: Unit, batch: list[bool], eps: list[float]) -> algorithm.Plan:
    return algorithm.Plan(unit, ONE_BY_ONE, tuple(batch), tuple(eps), ("",) * len(batch))


def in_paper_order(unit: Unit, weights: list[Tensor], x: Tensor, back: bool = True) -> list[Tensor]:
    """Views of weights that are in the order in which x is stored; back: as the paper has them, or the other way."""
    order = plain.map_order(maps.storage_order(x))
    stored = {c: maps.weights_in_order(weights[unit.rows(c)], c, order, back) for c in (unit.inner, unit.outer) if c}
    return algorithm.by_gate(unit, stored)


def same_bits(results: list, wants: list) -> None:
    for got, want in zip(results, wants, strict=True):
        assert_close(got.reshape(want.shape), want, **BITS)


def draw_propagate(r):
    x, gates = activation(r), Gates(r, averaged=False)
    weights = in_paper_order(gates.unit, gates.weights(), x, back=False)
    settings = gates.eps, gates.batch(), gates.unit.inner, gates.unit.outer
    return [x, weights, *(gates.numbers() for _ in range(4)), *settings]


def forward_of(x, weight, *rest) -> algorithm.Forward:
    *norms, eps, batch, inner, outer = rest
    unit = unit_of(inner, outer)
    gates = [*map(algorithm.GateParameters, in_paper_order(unit, weight, x), *norms)]
    return algorithm.forward(one_by_one(unit, batch, eps), x, gates)


def check_propagate(before, after, results):
    found = forward_of(*before)
    same_bits(results, [found.y, *(found.inner or ()), *found.outer])


def draw_propagate_back(r):
    x, weight, *rest = draw_propagate(r)
    found = forward_of(x, weight, *rest)
    kept = [placed(r, t) for t in (*(found.inner or ()), *found.outer)]
    return [like(r, x), x, weight, kept, *rest[-2:], r.random() < 0.7]


def check_propagate_back(before, after, results):
    grad_y, x, weight, kept, inner, outer, needs_x = before
    unit = unit_of(inner, outer)
    plan = one_by_one(unit, [True] * len(weight), [0.0] * len(weight))
    contexts = algorithm.Kept(*kept[:4]) if inner else None, algorithm.Kept(*kept[-4:])
    weights = in_paper_order(unit, weight, x)
    grad_x, grads, affine = algorithm.backward(plan, grad_y, x, weights, *contexts, needs_x)
    shift_and_scale = [torch.cat((shift, scale)) for scale, shift in affine]
    same_bits(results[: len(weight)], in_paper_order(unit, grads, x, back=False))
    rows = [torch.cat(shift_and_scale[unit.rows(c)]) for c in (maps.CHANNEL, maps.SPACETIME) if c in (inner, outer)]
    same_bits(results[len(weight) :], [*rows, *([grad_x] if needs_x else [])])


def draw_evaluate(r):
    x, weight, *rest = draw_propagate(r)
    return [x, weight, *rest[:5], *rest[-2:]]


def check_evaluate(before, after, results):
    *given, inner, outer = before
    same_bits([results], [forward_of(*given, [False] * len(before[1]), inner, outer).y])


def draw_unit(r):
    """Arguments of unit_propagate_, which keeps what a backward takes."""
    clips, gates = activation(r), Gates(r, averaged=True)
    ndim = 4 if maps.storage_order(clips) in ("TCHW", "THWC") and r.random() < 0.7 else 5
    frames = clips.shape[1] if ndim == 4 else r.choice((1, 7))
    fixed = r.random() < 0.3
    batch = [False] * gates.n if fixed else gates.batch() if r.random() < 0.3 else [True] * gates.n
    means = [number for pair in zip(gates.numbers(), gates.numbers(), strict=True) for number in pair]
    parameters = [p for of in zip(gates.weights(), gates.numbers(), gates.numbers(), strict=True) for p in of]
    running: list[Tensor] = []
    if all(batch) and r.random() < 0.6:
        tracked, dtype = r.random() < 0.5, r.choice(FLOATS)
        for _ in range(gates.n):
            running += [torch.randn(1).to(dtype), torch.rand(1).to(dtype), *([torch.tensor(3)] if tracked else [])]
    contexts = gates.unit.inner, gates.unit.outer, gates.unit.averaged
    settings = gates.eps, batch, r.choice((0.1, 1.0)), *contexts, r.random() < 0.6
    return [placed(r, as_input(clips, ndim)), frames, parameters, [] if all(batch) else means, running, *settings]


def unit_forward(x, frames, parameters, fixed, eps, batch, inner, outer, averaged):
    clips, unit = as_clips(x, frames), unit_of(inner, outer, averaged)
    gates = algorithm.gate_parameters(parameters, fixed or [None] * (2 * len(eps)))
    return unit, algorithm.forward(one_by_one(unit, batch, eps), clips, gates)


def check_unit(before, after, results):
    x, frames, parameters, fixed, running, eps, batch, momentum, inner, outer, averaged, _ = before
    (y, kept), dtype = results, accumulate_dtype(x.dtype)
    unit, want = unit_forward(x, frames, parameters, fixed, eps, batch, inner, outer, averaged)
    same_bits([y], [as_input(want.y, x.ndim)])
    if not kept.numel():
        return
    statistics = algorithm.statistics_of(unit, want.inner, want.outer)
    same_bits([of_units.statistics_of(kept, len(eps), dtype)], [torch.cat(statistics)])
    if running and len({t.data_ptr() for t in after[4]}) == len(running):
        each = len(running) // len(eps)
        mean, var = running[::each], running[1::each]
        schemas.callable_pass("move_statistics_")(
            mean, var, running[2::each] if each == 3 else [], statistics, momentum
        )
        same_bits(after[4], running)


def draw_unit_back(r):
    """What was kept knows of what it was made: of another x or other weights there is nothing to compare."""
    x, frames, parameters, fixed, _, eps, batch, _, *contexts, _ = draw_unit(r)
    settings = eps, batch, 0.1, *contexts, True
    _, kept = schemas.callable_pass("unit_propagate_")(x, frames, parameters, fixed, [], *settings)
    kept = placed(r, kept)
    kept.made_of = [x.clone(), frames, [*parameters[::3]], *contexts], fixed, eps, batch, parameters
    clips = as_clips(x, frames)
    grad = placed(r, as_input(like(r, clips), x.ndim))
    needs = [p is not None and r.random() < 0.8 for p in (*parameters, x)]
    return [grad, x, frames, parameters, kept, *contexts, needs]


def check_unit_back(before, after, results):
    grad, x, frames, parameters, _, *contexts, needs = before
    if (made_of := getattr(after[4], "made_of", None)) is None:
        return
    given, fixed, eps, batch, drawn = made_of
    if x.stride() != given[0].stride() or not equal(given, [x, frames, parameters[::3], *contexts]):
        return
    unit, found = unit_forward(x, frames, drawn, fixed, eps, batch, *contexts)
    clips = as_clips(grad, frames), as_clips(x, frames)
    plan = one_by_one(unit, batch, eps)._replace(wide_norms=True)  # a number's gradient is rounded to its own type
    grad_x, grads, affine = algorithm.backward(plan, *clips, parameters[::3], found.inner, found.outer)
    wants = [g for weight, pair in zip(grads, affine, strict=True) for g in (weight, *pair)]
    wants.append(as_input(grad_x, x.ndim))
    wants = [want for want, needed in zip(wants, needs, strict=True) if needed]
    same_bits(results, [want.to(got.dtype) for got, want in zip(results, wants, strict=True)])


def equal(a: Any, b: Any) -> bool:
    """Whether two nested lists hold the same values."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def draw_average(back: bool):
    def draw(r):
        b, sizes = r.choice((1, 2, 3)), [r.choice((1, 2, 3, 8, 17, 70)) for _ in range(4)]
        while math.prod(sizes) > 20000:
            sizes[r.randrange(4)] = 2
        order = r.choice([order for order in maps.ORDERS if plain.map_order(order) == order])
        m = maps.packed_size((b, *sizes), maps.CHANNEL if back else maps.SPACETIME)
        return [numbers(r, (b, m), r.choice(FLOATS[:2])), sizes, maps.ORDERS.index(order)]

    return draw


def check_average(form):
    def check(before, after, results):
        given, sizes, order = before
        of = (given.shape[0], *sizes), maps.ORDERS[order]
        want, size = (form(SimpleNamespace(), t, *of) for t in (given.double(), given.double().abs()))
        sums_within(results, want, size, 3 * max(sizes))

    return check


def draw_normalize(r):
    shape = r.choice((1, 2, 3)), r.choice((1, 2, 9, 33, 70, 300)), r.choice((1, 2, 5)), r.choice((1, 2, 7, 16, 33, 64))
    shape = shape if r.random() < 0.4 else (*shape[:2], shape[3] * r.choice((1, 1, 5)))
    logits = r.choice((0.1, 1, 4)) * torch.randn(shape)
    return [placed(r, logits.to(r.choice(FLOATS))), r.choice((0.0, 1e-9, 0.5))]


def check_normalize(before, after, results):
    """As of double_norm_, and a sum over tokens is off by as many roundings as it has terms."""
    (logits, eps), (attention, mass) = before, results
    if not finite(eps):
        return
    want, group, passes = logits.double().flatten(2).clone(), logits.shape[-1], PlainDoubleNorm()
    _, lse = passes.column_statistics(want, None)
    t = (want - lse.unsqueeze(1)).unflatten(-1, (-1, group)).abs()
    want_mass = passes.double_norm_(want, lse, group, eps, None)
    terms = group + logits.shape[1] + 16
    roundings = (3 * t.amax(-1, keepdim=True) + terms) * epsilon(mass.dtype)
    flushed = 2.0**-66 if mass.dtype == torch.float32 else 2.0**-510
    error = (roundings * want.unflatten(-1, (-1, group)) + flushed).flatten(-2)
    within(attention.flatten(2), want, error)
    within(mass, want_mass, roundings.squeeze(-1) * want_mass)


def draw_normalize_back(r):
    logits, _ = draw_normalize(r)
    heads = logits.shape[2] if logits.ndim == 4 else 1
    mass = torch.rand(*logits.shape[:2], heads).to(accumulate_dtype(logits.dtype))
    return [placed(r, t) for t in (logits, torch.rand(logits.shape).to(logits.dtype), mass)]


def check_normalize_back(before, after, results):
    grad, attention, mass = (t.flatten(2).clone() for t in before)
    group = before[1].shape[-1]
    reduced = schemas.callable_pass("double_norm_backward_reduce")(grad, attention, group)
    schemas.callable_pass("double_norm_backward_")(grad, attention, mass, reduced, group)
    same_bits([results.flatten(2)], [grad])


class Settings:
    """What is constant about a layer of external attention, as its operators take it."""

    def __init__(self, heads: int, eps: float, fold: bool, batch: bool, norm_eps: float, momentum: float):
        self.heads, self.eps, self.fold, self.batch = heads, eps, fold, batch
        self.norm_eps, self.momentum = norm_eps, momentum


def draw_layer(r):
    """Arguments of external_propagate_: tokens, maps, or a block."""
    kind, dtype = r.choice(("tokens", "maps", "block", "block")), r.choice(FLOATS)
    b, c, slots = r.choice((1, 1, 2, 3)), r.choice((1, 2, 5, 16, 33)), r.choice((1, 2, 7, 16, 33, 64))
    heads, k, v = r.choice((1, 1, 2, 3)) if kind == "tokens" else 1, r.choice((1, 3, 8)), r.choice((1, 4, 9))
    of_heads = kind != "tokens" or heads > 1

    def matrix(p: int, q: int) -> Tensor:
        sizes = (p, q, *(1,) * r.choice((0, 0, 1, 2)))
        return placed(r, (torch.randn(sizes) / q**0.5).to(dtype))

    def perhaps(made, chance: float = 0.7):
        return made() if r.random() < chance else None

    def column(size: int) -> Tensor:
        return placed(r, torch.randn(size).to(dtype))

    first = perhaps(lambda: matrix(heads * k, c), 1.0 if of_heads else 0.5)
    inner = k if first is not None else c
    last = perhaps(lambda: matrix(c, heads * v), 1.0 if heads > 1 else 0.6)
    v = v if last is not None or kind == "tokens" else c
    biases = [None, None]
    if kind == "tokens":
        out = c if last is not None else v
        biases = [perhaps(lambda: column(v)), None if last is None else perhaps(lambda: column(out))]
    weights = [first, matrix(slots, inner), matrix(v, slots), biases[0], last, biases[1]]
    if kind == "tokens":
        x = torch.randn(b, r.choice((1, 2, 9, 33, 70)), c)
    else:
        x = torch.randn(b, c, r.choice((1, 3, 6)), r.choice((2, 3, 7)))
        x = x.contiguous(memory_format=r.choice((torch.contiguous_format, torch.channels_last)))
    x = placed(r, x.to(dtype))
    batch = kind == "block" and r.random() < 0.6
    norm, running = [], []
    if kind == "block":
        moments = [None, None] if batch else [column(c), placed(r, (torch.rand(c) + 0.5).to(dtype))]
        norm = [perhaps(lambda: column(c)), perhaps(lambda: column(c)), *moments]
        if batch and r.random() < 0.6:
            running = [torch.randn(c).to(dtype), torch.rand(c).to(dtype), torch.tensor(3)][: r.choice((2, 3))]
    fold = heads == 1 and kind != "tokens" and first is not None and last is not None and r.random() < 0.5
    settings = heads, r.choice((0.0, 1e-9, 0.1)), fold, batch, r.choice((1e-5, 0.1)), r.choice((0.1, 1.0))
    return [x, weights, norm, running, *settings]


class Layer:
    """A layer of external attention in float64: y before a ReLU, the mean and biased variance of its BN, and how far
    the numbers of another type may be off.

    small: magnitudes of what a rounding meets up to z. loss: by how much BN multiplies an error of z.
    """

    def __init__(self, x: Tensor, weights: list, norm: list, settings: Settings):
        self.tensors = [None if t is None else t.double().requires_grad_() for t in (x, *weights, *norm[:2])]
        x_, first, key, value, value_bias, last, last_bias, *affine = self.tensors
        first, key, value, last = (None if w is None else w.flatten(1) for w in (first, key, value, last))
        tokens = as_tokens(x_) if x.ndim == 4 else x_
        h = tokens if first is None else tokens @ first.mT
        logits = h.unflatten(2, (settings.heads, -1)) @ key.mT
        attention = double_normalize(logits.flatten(2), key.shape[0], settings.eps).view(logits.shape)
        u = attention @ value.mT
        u = (u if value_bias is None else u + value_bias).flatten(2)
        z = u if last is None else u @ last.mT
        z = z if last_bias is None else z + last_bias
        terms = sum(tokens.shape[1:]) + sum(w.numel() for w in (key, value)) ** 0.5 * 8 + 64
        unit = terms * epsilon(accumulate_dtype(x.dtype))
        sizes = [1 + largest(t.detach()) for t in (tokens, h, logits, u, z)]
        folded = [1 + largest(w) * w.shape[1] for w in (first, last, key, value) if w is not None]
        self.small = unit * math.prod(folded) * max(sizes) * (1 + largest(logits))
        self.loss, self.mean, self.var = 1.0, None, None
        if norm:
            if settings.batch:
                self.mean, self.var = z.mean((0, 1)), z.var((0, 1), correction=0)
            else:
                self.mean, self.var = norm[2].double(), norm[3].double()
            rstd = (self.var + settings.norm_eps).rsqrt()
            xhat = (z - self.mean) * rstd
            self.loss = (1 + largest(rstd)) * (1 + largest(xhat)) * (1 + largest(affine[0]))
            z = xhat if affine[0] is None else xhat * affine[0]
            z = (z if affine[1] is None else z + affine[1]) + tokens
        self.y = as_maps(z, x_) if x.ndim == 4 else z
        self.count = z.shape[0] * z.shape[1]


def check_layer(before, after, results):
    x, weights, norm, running, *settings = before
    at, (y, _) = Settings(*settings), results
    if not finite(at.eps, at.norm_eps, at.momentum):
        return
    layer = Layer(x, weights, norm, at)
    near(y, layer.y.detach().relu() if norm else layer.y.detach(), layer.small * layer.loss)
    if running and len({t.data_ptr() for t in after[3]}) == len(running) and layer.count > 1:
        unbiased = layer.var * (layer.count / (layer.count - 1))
        for got, old, now in zip(after[3], running, (layer.mean, unbiased), strict=False):
            want = old.double() + at.momentum * (now - old.double())
            size = largest(old, now, want) * (1 + abs(at.momentum))
            near(got, want.detach(), layer.small * (1 + largest(layer.y)) ** 2 + 4 * epsilon(got.dtype) * size)
        assert all(new == old + 1 for new, old in zip(after[3][2:], running[2:], strict=True))


def draw_layer_back(r):
    """What was kept knows of what it was made, as in draw_unit_back."""
    x, weights, norm, _, *settings = draw_layer(r)
    at = Settings(*settings)
    y, kept = schemas.callable_pass("external_propagate_")(x, weights, norm, [], *settings)
    kept = placed(r, kept)
    kept.made_of = [x.clone(), [*weights], [*norm]], at
    by_maps = x.ndim == 4 and not x.is_contiguous()
    grad = torch.randn_like(y, memory_format=torch.channels_last if by_maps else torch.contiguous_format)
    there = [*weights, *(norm[:2] if norm else (None, None)), x]
    if norm:  # a BN without scale or shift may be asked for their gradients too
        there[6:8] = x, x
    needs = [t is not None and r.random() < 0.8 for t in there]
    return [placed(r, grad), x, y if norm else None, weights, norm, kept, at.heads, at.fold, at.norm_eps, needs]


def check_layer_back(before, after, results):
    grad, x, y, weights, norm, _, heads, fold, norm_eps, needs = before
    if (made_of := getattr(after[5], "made_of", None)) is None:
        return
    given, at = made_of
    if not equal([*given, at.heads, at.fold, at.norm_eps], [x, weights, norm, heads, fold, norm_eps]):
        return
    layer = Layer(x, weights, norm, at)
    if norm:
        if not torch.equal(y.double() > 0, y != 0):
            return  # no y that a ReLU made
        grad = grad * (y != 0)
    leaves = [*layer.tensors[1:7], *(layer.tensors[7:9] if norm else (None, None)), layer.tensors[0]]
    wants = torch.autograd.grad(
        layer.y, [t for t in leaves if t is not None], grad.double(), allow_unused=True, materialize_grads=True
    )
    of = {id(t): g for t, g in zip([t for t in leaves if t is not None], wants, strict=True)}
    size = layer.small * layer.loss**2 * largest(grad) * layer.count * (1 + largest(*wants))
    found = iter(results)
    for leaf, needed in zip(leaves, needs, strict=True):
        if needed:
            got = next(found)
            if leaf is not None:
                near(got, of[id(leaf)].view(got.shape), size)


#: Take what another operator kept, between whose parts are numbers that nobody writes.
TAKE_KEPT = ("unit_propagate_back", "external_propagate_back", "cbam_propagate_back")

OPERATORS = {
    "propagate": Operator(draw_propagate, check_propagate),
    "propagate_back": Operator(draw_propagate_back, check_propagate_back),
    "evaluate": Operator(draw_evaluate, check_evaluate),
    "unit_propagate_": Operator(draw_unit, check_unit),
    "unit_propagate_back": Operator(draw_unit_back, check_unit_back),
    "average_gate": Operator(draw_average(False), check_average(algorithm.average_over_channels)),
    "average_gate_back": Operator(draw_average(True), check_average(algorithm.spread_over_channels)),
    "double_normalize": Operator(draw_normalize, check_normalize),
    "double_normalize_back": Operator(draw_normalize_back, check_normalize_back),
    "external_propagate_": Operator(draw_layer, check_layer),
    "external_propagate_back": Operator(draw_layer_back, check_layer_back),
}
