"""The fused Triton passes of external attention against the plain formulas in float64.

Error bounds. Each pass is held against float64 on the very inputs that it got, so that errors do not pile up. Where a
product's factor (A, or the gradient of the logits) is off by E at each element, a sum of n products with weights w is
off by E |w| and by n + 8 roundings of the accumulation type on the sum of magnitudes, and what is stored by a rounding
of its type. A is relatively off by as many roundings of the accumulation type as external_pass_cases.py counts (t =
logit - lse is off by |t| of them, and so is exp(t)), and by one of the type of the product, in which it enters.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import some_of
from external_pass_cases import roundings, statistics_within, within
from pass_cases import DEVICE, epsilon
from plain_double_norm import PlainDoubleNorm
from torch import Tensor

from aia_kernels.algorithms.external_attention_passes import BatchTerm, DoubleNorm, Dropout
from aia_kernels.backends.matmul_passes import MatmulPasses
from aia_kernels.common.dtypes import accumulate_dtype

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import triton as passes
from aia_kernels.triton import columns, double_norm, products, residual, token_sums

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")


class Case(NamedTuple):
    """B samples of N tokens with H * k features, H heads of M' columns in groups, H * v features of o.

    by_feature: x lies feature by feature, as maps do. masked: with padding and dropout. block: o has a residual, its
    relu and signs, and the gradient of A the two terms of the block's BN; then H = 1 and k = v.
    """

    b: int
    n: int
    heads: int
    k: int
    width: int
    v: int
    group: int
    dtype: torch.dtype = torch.float32
    by_feature: bool = False
    masked: bool = False
    block: bool = False
    eps: float = 1e-9


CASES = {
    "block of maps, two groups of 12": Case(2, 37, 1, 20, 24, 20, 12, by_feature=True, block=True),
    "block, bf16": Case(1, 45, 1, 24, 16, 24, 16, torch.bfloat16, block=True),
    "block of maps, fp16, no eps": Case(2, 21, 1, 150, 33, 150, 33, torch.float16, True, block=True, eps=0.0),
    "block, fp64": Case(1, 19, 1, 5, 64, 5, 64, torch.float64, block=True),
    "heads, masked, bf16 maps": Case(2, 33, 2, 7, 12, 5, 3, torch.bfloat16, True, True),
    "heads, masked, fp64": Case(2, 17, 3, 4, 5, 6, 5, torch.float64, masked=True, eps=0.5),
    "a group in pieces, masked": Case(2, 18, 1, 6, 300, 5, 300, masked=True, eps=0.0),
    "block, a group in pieces": Case(1, 18, 1, 6, 150, 6, 150, torch.float16, True, block=True),
    "tiles of groups": Case(1, 20, 1, 9, 160, 9, 32),
    "groups of one": Case(2, 5, 1, 3, 7, 2, 1),
    "one of everything": Case(1, 1, 1, 1, 1, 1, 1, block=True),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    """By name, for all or, with indirect=True, some of the cases."""
    return CASES[request.param]


@pytest.fixture
def many_programs(monkeypatch) -> None:
    """Tokens and their sums divided among many programs, as on a GPU."""
    for module in (columns, token_sums, residual):
        monkeypatch.setattr(module, "PROGRAMS", 12)
    monkeypatch.setattr(token_sums, "SUMMED", 16)
    monkeypatch.setattr(residual, "RUN", 16)
    monkeypatch.setattr(residual, "ROWS", 8)


class Inputs:
    """Inputs of all fused passes, on the device, and what float64 makes of the attention that they were given."""

    def __init__(self, case: Case):
        c, self.case = case, case
        m = c.heads * c.width
        self.acc = accumulate_dtype(c.dtype)
        self.padding = self.dropout = self.batch_term = self.origin = None
        if c.masked:
            self.padding = torch.rand(c.b, c.n, device=DEVICE) < 0.3
            self.padding[-1] = c.b > 1
            self.dropout = Dropout((torch.rand(c.b, c.n, m, device=DEVICE) < 0.7).to(torch.uint8), 1 / 0.7)
        self.norm = DoubleNorm(c.group, c.eps, self.padding)
        self.x = self.tokens(c.heads * c.k, c.by_feature)
        self.grad = self.tokens(c.heads * c.v, c.by_feature and c.block)
        self.key, self.value = self.random(c.heads, c.width, c.k), self.random(c.heads, c.v, c.width)
        self.bias = self.random(c.heads * c.v, dtype=self.acc)
        if c.block:
            inner, constant = self.random(m, m, dtype=self.acc), self.random(m, dtype=self.acc)
            self.origin = torch.rand(m, dtype=torch.float64).to(self.acc).to(DEVICE)
            self.batch_term = BatchTerm(self.origin, inner, constant)
        self.residual = self.x if c.block else None
        logits = self.random(c.b, c.n, m)
        shown = logits.double() if self.padding is None else logits.double().masked_fill(self.hidden, -torch.inf)
        lse = shown.logsumexp(1).to(self.acc)
        self.attention = passes.normalize(logits.clone(), lse, norm=self.norm)
        self.t = (logits.double() - lse.double().unsqueeze(1)).nan_to_num(0, 0, 0)
        exact = MatmulPasses(PlainDoubleNorm())
        self.a, _ = exact.normalize(logits.double(), lse.double(), norm=self.norm)
        self.eps = epsilon(self.acc)
        low = c.dtype != self.acc
        #: A rounding to the type of the product, relative, and absolute below its normal numbers.
        self.low = epsilon(c.dtype) if low else 0.0
        self.tiny = torch.finfo(c.dtype).smallest_normal * epsilon(c.dtype) if low else 1e-40
        #: The error of A in the accumulation type.
        self.a_error = roundings(self.t, c.group).repeat_interleave(c.group, -1) * self.eps * self.a + self.tiny

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype or self.case.dtype).to(DEVICE)

    def tokens(self, features: int, by_feature: bool) -> Tensor:
        b, n = self.case.b, self.case.n
        tokens = self.random(b, features, n).mT if by_feature else self.random(b, n, features)
        return tokens if self.padding is None else tokens.masked_fill_(self.hidden, 0.0)

    @property
    def hidden(self) -> Tensor:
        return self.padding.unsqueeze(-1)

    def by_head(self, tokens: Tensor) -> Tensor:
        """[B, N, H * f] as [H, B * N, f]."""
        return tokens.double().unflatten(-1, (self.case.heads, -1)).flatten(0, 1).transpose(0, 1)

    def by_token(self, per_head: Tensor) -> Tensor:
        """The inverse of by_head."""
        return per_head.transpose(0, 1).flatten(1).unflatten(0, (self.case.b, self.case.n))

    def dropped(self, a: Tensor) -> Tensor:
        return a if self.dropout is None else a * self.dropout.keep * self.dropout.scale

    def values(self) -> tuple[Tensor, Tensor | None]:
        given = {"bias": self.bias, "dropout": self.dropout, "residual": self.residual}
        return passes.values(self.attention, self.value, norm=self.norm, **given)

    def value_gradient(self, needs_sums: bool) -> tuple[Tensor, Tensor | None]:
        given = {"dropout": self.dropout, "origin": self.origin, "needs_sums": needs_sums}
        return passes.value_gradient(self.grad, self.attention, shape=self.value.shape, norm=self.norm, **given)

    def attention_gradient(self) -> tuple[Tensor, Tensor]:
        given = {"dropout": self.dropout, "batch_term": self.batch_term}
        return passes.attention_gradient(self.grad, self.attention, value=self.value, norm=self.norm, **given)

    def logits_gradient(self, grad_attention: Tensor, **given) -> tuple[Tensor | None, Tensor]:
        given = {"x": self.x, "key": self.key, "norm": self.norm} | given
        return passes.logits_gradient(grad_attention, self.attention, **given)

    def shifted(self) -> tuple[Tensor, Tensor]:
        """A - origin and its error."""
        origin = self.origin.double()
        return self.a - origin, self.a_error + self.eps * (self.a + origin)

    def product(self, factor: Tensor, error: Tensor, weight: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """factor @ weight and its error, where the factor is off by error and rounded to the type of the product."""
        error = error + self.low * factor.abs() + self.tiny
        size = weight.double().abs()
        return factor @ weight.double(), error @ size + (terms + 8) * self.eps * (factor.abs() @ size)


def test_logits(case):
    i = Inputs(case)
    logits, *found = passes.logits(i.x, i.key, padding=i.padding)
    x, key = i.by_head(i.x), i.key.double().mT
    within(logits, i.by_token(x @ key), i.by_token((case.k + 8) * i.eps * (x.abs() @ key.abs())))
    statistics_within(*found, logits, i.padding)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.heads == 1], indirect=True)
def test_moments(case):
    i = Inputs(case)
    origin, sums, second = passes.moments(i.attention, norm=i.norm)
    a, error = i.a.flatten(0, 1), i.a_error.flatten(0, 1)
    terms = a.shape[0] + 8
    within(origin, a.mean(0), error.mean(0) + terms * i.eps * a.mean(0))
    error = error + i.eps * (a + origin.double())
    a = a - origin.double()
    error = error + i.low * a.abs() + i.tiny
    within(sums, a.sum(0), error.sum(0) + terms * i.eps * a.abs().sum(0))
    one_sided = error.mT @ (a.abs() + error)
    within(second, a.mT @ a, one_sided + one_sided.mT + terms * i.eps * (a.abs().mT @ a.abs()))


def test_values(case):
    i = Inputs(case)
    o, signs = i.values()
    want, error = i.product(i.by_head(i.dropped(i.a)), i.by_head(i.dropped(i.a_error)), i.value.mT, case.width)
    want, error = i.by_token(want) + i.bias.double(), i.by_token(error)
    error = error + 4 * i.eps * (want.abs() + i.bias.double().abs())
    if case.block:
        want = want + i.x.double()
        error = error + 2 * i.eps * (want.abs() + i.x.double().abs())
        want = want.relu()
        assert o.stride() == i.x.stride()
    else:
        assert o.is_contiguous() and signs is None
    within(o, want, error)
    if case.block:
        g, sums = passes.signed(i.grad, signs)
        assert signs.shape == passes.empty_signs(o).shape and g.stride() == i.grad.stride()
        assert torch.equal(g, i.grad.where(o > 0, 0.0))
        flat = g.double().flatten(0, 1)
        within(sums, flat.sum(0), (flat.shape[0] + 8) * i.eps * flat.abs().sum(0))


def test_value_gradient(case):
    i = Inputs(case)
    got, sums = i.value_gradient(True)
    factors = i.shifted() if case.block else (i.dropped(i.a), i.dropped(i.a_error))
    want, error = i.product(*(i.by_head(t).mT for t in factors), i.by_head(i.grad), case.b * case.n)
    within(got, want.mT, error.mT)
    assert got.dtype == sums.dtype == i.acc
    flat = i.grad.double().flatten(0, 1)
    within(sums, flat.sum(0), (flat.shape[0] + 8) * i.eps * flat.abs().sum(0))
    again, absent = i.value_gradient(False)
    assert torch.equal(again, got) and absent is None


def test_attention_gradient(case):
    i = Inputs(case)
    got, reduced = i.attention_gradient()
    grad, value = i.by_head(i.grad), i.value.double()
    want, error = (i.dropped(i.by_token(t)) for t in (grad @ value, (case.v + 10) * i.eps * grad.abs() @ value.abs()))
    if case.block:
        through, through_error = i.product(*i.shifted(), i.batch_term.inner, case.width)
        want = want + through + i.batch_term.constant.double()
        error = error + through_error + 4 * i.eps * (want.abs() + i.batch_term.constant.double().abs())
    # For groups in pieces the gradient of A is stored on the way.
    error = error + i.low * want.abs()

    def over_groups(t):
        return t.unflatten(-1, (-1, case.group)).sum(-1, keepdim=True).expand(*t.shape[:2], -1, case.group).flatten(-2)

    size = want.abs() + over_groups(i.a * want.abs())
    q = i.a * (want - over_groups(i.a * want))
    error = i.a * (error + over_groups(i.a * error)) + i.a_error * size + i.a * over_groups(i.a_error * want.abs())
    error = error + (case.group + 8) * i.eps * i.a * size + i.tiny
    within(got, q, error)
    within(reduced, q.sum(1), (error + (case.n + 8) * i.eps * q.abs()).sum(1))


def test_logits_gradient(case):
    i = Inputs(case)
    q = i.random(case.b, case.n, case.heads * case.width)
    if i.padding is not None:
        q.masked_fill_(i.hidden, 0.0)
    reduced = i.random(case.b, case.heads * case.width, dtype=i.acc)
    residual_grad = i.tokens(case.k, case.by_feature) if case.block else None
    given = {"reduced": reduced, "residual_grad": residual_grad}
    logits = i.attention[0].clone()
    grad_x, grad_key = i.logits_gradient(q.clone(), needs_x=True, **given)
    assert torch.equal(i.attention[0], logits)
    p = i.t.exp() if i.padding is None else i.t.exp().masked_fill(i.hidden, 0.0)
    through = p * reduced.double().unsqueeze(1)
    grad = q.double() - through
    error = ((i.t.abs() + 8) * through.abs() + 2 * q.double().abs()) * i.eps
    want, bound = i.product(i.by_head(grad), i.by_head(error), i.key, case.width)
    want, bound = i.by_token(want), i.by_token(bound)
    if case.block:
        want = want + residual_grad.double()
        bound = bound + 2 * i.eps * (want.abs() + residual_grad.double().abs())
    assert grad_x.stride() == torch.empty_like(i.x).stride()
    within(grad_x, want, bound)
    want, bound = i.product(i.by_head(grad).mT, i.by_head(error).mT, i.by_head(i.x), case.b * case.n)
    within(grad_key, want, bound)
    absent, again = i.logits_gradient(q.clone(), needs_x=False, **given)
    assert absent is None and torch.equal(again, grad_key)


def everything(i: Inputs) -> list[Tensor]:
    """The results of all fused passes."""
    o, signs = i.values()
    results = [*passes.logits(i.x, i.key, padding=i.padding), o, *i.value_gradient(True)]
    grad, reduced = i.attention_gradient()
    results += grad.clone(), reduced
    results += i.logits_gradient(grad, reduced=reduced, residual_grad=i.residual, needs_x=True)
    if i.case.block:
        results += passes.moments(i.attention, norm=i.norm)
        results += passes.signed(i.grad, signs)
    return results


MIXED = ("block of maps, two groups of 12", "heads, masked, bf16 maps", "block, a group in pieces")


@some_of("case", MIXED, "block of maps, two groups of 12", indirect=True)
def test_many_programs(case, many_programs):
    """Tokens divided among many programs: the same bounds, and the same bits in two runs."""
    tests = [test_logits, test_values, test_value_gradient, test_attention_gradient, test_logits_gradient]
    for test in tests + [test_moments] * (case.heads == 1):
        test(case)
    i = Inputs(case)
    for first, second in zip(everything(i), everything(i), strict=True):
        assert torch.equal(first, second)


@some_of("case", MIXED, "block, a group in pieces", indirect=True)
def test_wide_offsets(case, monkeypatch):
    """64-bit offsets inside a sample, as a sample of 2^31 elements has them, change nothing."""
    i = Inputs(case)
    narrow = everything(i)
    for module in (double_norm, products, residual):
        monkeypatch.setattr(module, "is_wide", lambda elements: True)
    for first, second in zip(narrow, everything(i), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [16, 150])
def test_extreme_logits(dtype, group):
    """±1e4, all equal and one that dominates give a finite A whose rows sum to one, and o is then V times that."""
    for kind in ("both signs", "equal", "dominant"):
        x = torch.ones(1, 18, 1, dtype=dtype, device=DEVICE)
        x[0, ::3] = {"both signs": -1.0, "equal": 1.0, "dominant": 0.0}[kind]
        key = torch.full((1, group, 1), 1e4, dtype=dtype, device=DEVICE)
        key[0, 1:] = 1e4 if kind == "equal" else -1e4
        logits, _, lse = passes.logits(x, key, padding=None)
        norm = DoubleNorm(group, 0.0, None)
        attention = passes.normalize(logits, lse, norm=norm)
        value = torch.ones(1, 3, group, dtype=dtype, device=DEVICE)
        o, _ = passes.values(attention, value, norm=norm)
        assert ((o.double() - 1).abs() <= (group + 8) * epsilon(dtype)).all()


def test_nan_and_infinity():
    """They reach what the formula lets them reach: NaN in a token, its whole sample."""
    i = Inputs(CASES["block, bf16"]._replace(b=2))
    i.x[1, 3, 2] = torch.nan
    plain = MatmulPasses(PlainDoubleNorm())
    results = []
    for used, convert in ((passes, lambda t: t), (plain, Tensor.double)):
        x, key, value, bias = map(convert, (i.x, i.key, i.value, i.bias))
        logits, statistics, lse = used.logits(x, key, padding=None)
        attention = used.normalize(logits, lse, norm=i.norm)
        o, signs = used.values(attention, value, norm=i.norm, bias=bias, residual=x)
        g, _ = used.signed(convert(i.grad), signs)
        grad, reduced = used.attention_gradient(g, attention, value=value, norm=i.norm)
        given = {"reduced": reduced, "x": x, "key": key, "norm": i.norm, "residual_grad": g.clone()}
        grad_x, grad_key = used.logits_gradient(grad, attention, **given, needs_x=True)
        results.append([statistics, o, g, reduced, grad_x, grad_key])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    assert results[0][1][1].isnan().all() and results[0][1][0].isfinite().all()


def test_no_token():
    """A member of a process group may hold no token at all."""
    i = Inputs(CASES["groups of one"])
    i.x, i.grad = i.x[:, :0], i.grad[:, :0]
    logits, statistics, lse = passes.logits(i.x, i.key, padding=None)
    assert (statistics[:, 0] == -torch.inf).all() and (statistics[:, 1] == 0).all() and (lse == -torch.inf).all()
    i.attention = passes.normalize(logits, i.attention[1], norm=i.norm)
    o, _ = i.values()
    grad_value, sums = i.value_gradient(True)
    grad_a, reduced = i.attention_gradient()
    grad_x, grad_key = i.logits_gradient(grad_a, reduced=reduced, needs_x=True)
    assert o.shape == (2, 0, 2) and grad_x.shape == i.x.shape
    assert all((t == 0).all() for t in (grad_value, sums, reduced, grad_key))


def test_strided_rows():
    """x and the gradient of o may be parts of wider tensors."""
    i = Inputs(CASES["tiles of groups"])
    dense = everything(i)
    for name in ("x", "grad"):
        t = getattr(i, name)
        setattr(i, name, torch.cat((t, t.new_full(t.shape, torch.nan)), -1)[..., : t.shape[-1]])
    for first, second in zip(dense, everything(i), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", ["block, fp64", "block, a group in pieces"], indirect=True)
def test_empty_attention(case):
    """What is kept has the shapes and types that the fakes of the layer operators promise."""
    i = Inputs(case)
    for kept, empty in zip(i.attention, passes.empty_attention(i.x, columns=case.width, group=case.group), strict=True):
        assert kept.shape == empty.shape and kept.dtype == empty.dtype
