"""The CPU passes of the double normalisation against the plain ones in float64.

Error bounds. t = logit - lse is off by one rounding of itself, and so is exp(t), relatively, by |t| roundings; where A
is taken from the maximum of its group, two more differences as large as the largest |t| of the group come in. Beside
them, a sum of n terms is off by n roundings of their magnitudes, and 8 cover exp, a division and the factors.
A result in a lower precision is rounded once more, and a number below the smallest normal one by a part of that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from conftest import LEVELS, at_level, skip_unless_runnable
from pass_cases import agrees, double, epsilon, same_bits_with_any_threads
from plain_double_norm import PlainDoubleNorm
from torch import Tensor

from aia_kernels import backends
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


class Case(NamedTuple):
    """B samples of N tokens with M columns in groups; with padding, the last sample is nothing but padding."""

    b: int
    n: int
    m: int
    group: int
    dtype: torch.dtype = torch.float32
    padded: bool = False


CASES = {
    "block": Case(2, 197, 64, 64),
    "heads": Case(2, 37, 192, 64),
    "groups of one vector": Case(2, 33, 48, 16),
    "groups of two": Case(1, 50, 96, 32),
    "groups of three": Case(1, 19, 96, 48),
    "groups of eight": Case(1, 21, 256, 128),
    "groups of 1": Case(2, 19, 5, 1),
    "groups of 7": Case(2, 23, 35, 7),
    "groups of 18": Case(1, 29, 144, 18),
    "groups of 33": Case(1, 41, 99, 33),
    "several blocks of columns": Case(2, 9, 2112, 66),
    "a group wider than a block": Case(1, 11, 600, 300),
    "one column": Case(2, 77, 1, 1),
    "one token": Case(3, 1, 64, 64),
    "one element": Case(1, 1, 1, 1),
    "several chunks": Case(1, 3000, 64, 64),
    "several chunks, groups of 3": Case(1, 12000, 6, 3),
    "padded": Case(3, 57, 64, 64, padded=True),
    "padded chunks, groups of 7": Case(2, 2500, 21, 7, padded=True),
    "bf16": Case(2, 197, 64, 64, torch.bfloat16),
    "bf16, groups of 5, padded": Case(2, 31, 25, 5, torch.bfloat16, True),
    "fp16": Case(1, 133, 64, 64, torch.float16),
    "fp16, groups of 33": Case(2, 17, 66, 33, torch.float16),
    "fp64": Case(2, 61, 64, 64, torch.float64),
    "fp64, groups of 7, padded": Case(2, 33, 21, 7, torch.float64, True),
}

EPS = {"no eps": 0.0, "published eps": 1e-9, "eps that weighs": 0.5}

#: What becomes of P below the least normal number, in terms of A, where the mass is large enough not to be inspected.
FLUSHED = {torch.float32: 2.0**-66, torch.float64: 2.0**-510}


@pytest.fixture(params=LEVELS)
def passes(request):
    skip_unless_runnable("cpu", "cpu", "external_attention")
    with at_level(request.param):
        yield backends.passes("cpu", "external_attention")


@pytest.fixture
def plain() -> PlainDoubleNorm:
    return PlainDoubleNorm()


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def tokens_of(case: Case, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(case.b, case.n, case.m, dtype=torch.float64)).to(case.dtype)


def padding_of(case: Case) -> Tensor | None:
    if not case.padded:
        return None
    padding = torch.rand(case.b, case.n) < 0.3
    padding[-1] = True
    return padding


def lse_of(statistics: Tensor) -> Tensor:
    return statistics[:, 0] + statistics[:, 1].log()


def stored_within(got: Tensor, want: Tensor, error: Tensor) -> None:
    """Assert that a result is off by its error before it was stored, and by one rounding to its type."""
    info = torch.finfo(got.dtype)
    bound = error + epsilon(got.dtype) * want.abs() + info.smallest_normal * info.eps
    wrong = (got.double() - want).abs() > bound
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} exceed their bound"


def normalised_within(passes, plain, logits: Tensor, group: int, eps: float, padding: Tensor | None) -> Tensor:
    """Assert the bounds of A and of the mass, and return A."""
    lse = lse_of(passes.column_statistics(logits, padding))
    attention, want = logits.clone(), logits.double()
    want = want.clone()
    mass = passes.double_norm_(attention, lse, group, eps, padding)
    want_mass = plain.double_norm_(want, lse.double(), group, eps, padding)
    assert mass.dtype == lse.dtype and mass.shape == want_mass.shape
    t = (logits.double() - lse.double().unsqueeze(1)).unflatten(-1, (-1, group)).abs()
    if padding is not None:
        t = t.masked_fill(padding[:, :, None, None], 0.0)
    roundings = (3 * t.amax(-1, keepdim=True) + group + 8) * epsilon(lse.dtype)
    error = roundings * want.unflatten(-1, (-1, group)) + FLUSHED[lse.dtype]
    stored_within(attention, want, error.flatten(-2))
    stored_within(mass, want_mass, roundings.squeeze(-1) * want_mass)
    return attention


def test_column_statistics(passes, plain, case):
    logits, padding = tokens_of(case, 4), padding_of(case)
    got, want = passes.column_statistics(logits, padding), plain.column_statistics(logits.double(), padding)
    assert got.dtype == accumulate_dtype(case.dtype)
    assert torch.equal(got[:, 0].double(), want[:, 0])
    shift = want[:, 0].masked_fill(want[:, 0].isinf(), 0.0).unsqueeze(1)
    # exp(t) |t| is at most 1 / e for t <= 0: the roundings of t cost less than one rounding a term, absolutely.
    distance = (logits.double() - shift).abs()
    terms = (-distance).exp() * (distance + case.n + 8)
    if padding is not None:
        terms = terms.masked_fill(padding.unsqueeze(-1), 0.0)
    assert ((got[:, 1].double() - want[:, 1]).abs() <= epsilon(got.dtype) * terms.sum(1)).all()


@pytest.mark.parametrize("eps", EPS.values(), ids=EPS)
def test_double_norm(passes, plain, case, eps):
    padding = padding_of(case)
    attention = normalised_within(passes, plain, tokens_of(case, 4), case.group, eps, padding)
    if padding is not None:
        assert (attention[padding] == 0).all()


def test_double_norm_backward(passes, plain, case):
    padding = padding_of(case)
    attention, grad = tokens_of(case), tokens_of(case)
    mass = passes.double_norm_(
        attention, lse_of(passes.column_statistics(attention, padding)), case.group, 1e-6, padding
    )
    reduced = passes.double_norm_backward_reduce(grad, attention, case.group)
    g, a = (t.double().unflatten(-1, (-1, case.group)) for t in (grad, attention))
    rows = a.abs() * (g.abs() + (g * a).abs().sum(-1, keepdim=True))
    want = plain.double_norm_backward_reduce(*double(grad, attention), case.group)
    agrees(reduced, want, rows.flatten(-2).sum(1), case.n + case.group)

    want, got = grad.double().clone(), grad.clone()
    plain.double_norm_backward_(want, *double(attention, mass, reduced), case.group)
    passes.double_norm_backward_(got, attention, mass, reduced, case.group)
    columns = reduced.double().abs().unflatten(-1, (-1, case.group)).unsqueeze(1) * mass.double().unsqueeze(-1)
    error = (case.group + 8) * epsilon(mass.dtype) * (rows + a.abs() * columns)
    stored_within(got, want, error.flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential(passes, dtype):
    """A group of one has the mass exp(logit - lse): within two units in the last place, a sum of 16 in 16 more."""
    logits = torch.linspace(-40, 85, 100003, dtype=dtype).view(1, -1, 1).repeat(1, 1, 16)
    want = logits[:, :, :1].double().exp()
    for group in (1, 16):
        mass = passes.double_norm_(logits.clone(), torch.zeros(1, 16, dtype=dtype), group, 0.0, None)[..., :1].double()
        assert ((mass / group - want).abs() <= (4 + group * (group > 1)) * epsilon(dtype) * want).all()


@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("group", [64, 33, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_extreme_logits(passes, plain, dtype, group, eps):
    """±1e4, all equal, one that dominates: finite, and A without eps sums to one over its group."""
    base = 1e4 * torch.randn(1, 70, 2 * group, dtype=torch.float64).clamp(-1, 1)
    dominant = torch.zeros_like(base)
    dominant[0, 3, 0] = 1e4
    for values in (base, base.sign() * 1e4, torch.full_like(base, -1e4), dominant, -dominant):
        attention = normalised_within(passes, plain, values.to(dtype), group, eps, None)
        assert attention.isfinite().all()
        if not eps:
            sums = attention.double().unflatten(-1, (-1, group)).sum(-1)
            assert ((sums - 1).abs() <= (group + 8) * epsilon(dtype)).all()


@pytest.mark.parametrize("group", [64, 33])
def test_not_finite(passes, plain, group):
    """NaN and infinities reach what the formula lets them reach, and nothing else."""
    logits = torch.randn(2, 300, 2 * group)
    logits[0, 7, 3] = math.nan
    logits[0, 9, group + 1] = math.inf
    logits[1, :, 5] = -math.inf
    logits[1, 11, group + 2] = -math.inf
    statistics, want = passes.column_statistics(logits, None), plain.column_statistics(logits.double(), None)
    torch.testing.assert_close(statistics[:, 0].double(), want[:, 0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(statistics[:, 1].isnan(), want[:, 1].isnan())
    lse = lse_of(statistics)
    attention, want = logits.clone(), logits.double()
    mass = passes.double_norm_(attention, lse, group, 1e-9, None)
    want_mass = plain.double_norm_(want, lse.double(), group, 1e-9, None)
    assert torch.equal(attention.isnan(), want.isnan()) and torch.equal(mass.isnan(), want_mass.isnan())
    assert attention[1, 11, group + 2] == 0


def test_padding_holds_anything(passes):
    """What lies at padding tokens, NaN too, changes no bit; masked equals shortened, for all that one token shows."""
    case = CASES["padded"]
    logits, padding = tokens_of(case), padding_of(case)
    poisoned = logits.masked_fill(padding.unsqueeze(-1), math.nan)
    statistics = passes.column_statistics(logits, padding)
    assert torch.equal(passes.column_statistics(poisoned, padding), statistics)
    lse = lse_of(statistics)
    passes.double_norm_(logits, lse, case.group, 1e-9, padding)
    mass = passes.double_norm_(poisoned, lse, case.group, 1e-9, padding)
    assert torch.equal(poisoned, logits) and (mass[padding] == torch.tensor(1e-9)).all()


def test_nothing_but_padding(passes):
    logits, padding = torch.randn(1, 20, 64), torch.ones(1, 20, dtype=torch.bool)
    statistics = passes.column_statistics(logits, padding)
    assert (statistics[:, 0] == -math.inf).all() and (statistics[:, 1] == 0).all()
    mass = passes.double_norm_(logits, lse_of(statistics), 64, 0.0, padding)
    assert (logits == 0).all() and (mass == 0).all()


def test_no_token(passes):
    """A member of a process group may hold no token at all."""
    logits = torch.empty(2, 0, 64)
    statistics = passes.column_statistics(logits, None)
    assert (statistics[:, 0] == -math.inf).all() and (statistics[:, 1] == 0).all()
    assert passes.double_norm_(logits, lse_of(statistics), 64, 0.0, None).shape == (2, 0, 1)
    assert (passes.double_norm_backward_reduce(logits, logits, 64) == 0).all()


@pytest.mark.parametrize("name", ["several chunks", "several chunks, groups of 3", "several blocks of columns", "bf16"])
def test_threads_change_nothing(passes, name):
    """How the work is split depends on the sizes alone."""
    case = CASES[name]
    logits, grad = tokens_of(case, 4), tokens_of(case)

    def everything():
        attention, out = logits.clone(), grad.clone()
        statistics = passes.column_statistics(attention, None)
        mass = passes.double_norm_(attention, lse_of(statistics), case.group, 1e-9, None)
        reduced = passes.double_norm_backward_reduce(grad, attention, case.group)
        passes.double_norm_backward_(out, attention, mass, reduced, case.group)
        return statistics, attention, mass, reduced, out

    same_bits_with_any_threads(everything)


def test_a_row_is_its_own(passes):
    """The same token gives the same bits wherever it stands."""
    case = CASES["heads"]
    logits, order = tokens_of(case, 30), torch.randperm(case.n)
    lse = lse_of(passes.column_statistics(logits, None))
    permuted = logits[:, order].contiguous()
    passes.double_norm_(logits, lse, case.group, 1e-9, None)
    passes.double_norm_(permuted, lse, case.group, 1e-9, None)
    assert torch.equal(permuted, logits[:, order])


@pytest.mark.parametrize("name", ["heads", "bf16, groups of 5, padded"])
def test_schemas_and_fakes(passes, name):
    case = CASES[name]
    logits, padding = tokens_of(case), padding_of(case)
    lse = torch.zeros(case.b, case.m)
    mass = torch.ones(case.b, case.n, case.m // case.group)
    calls = {
        "column_statistics": (logits, padding),
        "double_norm_": (logits.clone(), lse, case.group, 1e-9, padding),
        "double_norm_backward_reduce": (logits, logits.clone(), case.group),
        "double_norm_backward_": (logits.clone(), logits, mass, lse, case.group),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.aia_kernels, operator), arguments, test_utils=("test_schema", "test_faketensor")
        )
