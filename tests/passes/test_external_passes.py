"""External attention's elementary passes of each backend that this machine runs, against the plain ones in float64."""

from __future__ import annotations

import math

import pass_cases
import pytest
import torch
from external_pass_cases import (
    EPS,
    FEATURES,
    OF_FEATURES,
    OF_TOKENS,
    TOKENS,
    Features,
    normalized_within,
    padding_of,
    small_integers,
    statistics_within,
    stored_features,
    tokens_of,
    within,
)
from pass_backends import BACKENDS, CPU, CUDA, each, on, passes_fixture
from pass_cases import agrees, double, epsilon, pick, same_bits_with_any_threads
from plain_double_norm import PlainDoubleNorm

from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

plain = PlainDoubleNorm()


passes = passes_fixture("external_attention")


@each(*OF_TOKENS)
def test_column_statistics(passes, case):
    logits, padding = tokens_of(case, 4), padding_of(case)
    statistics_within(*passes.column_statistics(logits, padding), logits, padding)


@each(*OF_TOKENS)
@pytest.mark.parametrize("eps", EPS.values(), ids=EPS)
def test_double_norm(passes, case, eps):
    padding = padding_of(case)
    attention = normalized_within(passes, tokens_of(case, 4), case.group, eps, padding)
    if padding is not None:
        assert (attention[padding] == 0).all()


@each(*OF_TOKENS)
def test_double_norm_backward(passes, case):
    padding = padding_of(case)
    attention, grad = tokens_of(case), tokens_of(case)
    _, lse = passes.column_statistics(attention, padding)
    mass = passes.double_norm_(attention, lse, case.group, 1e-6, padding)
    reduced = passes.double_norm_backward_reduce(grad, attention, case.group)
    want, *others = double(grad.clone(), attention, mass, reduced)
    g, a = (t.unflatten(-1, (-1, case.group)) for t in (want.clone(), others[0]))
    rows = a.abs() * (g.abs() + (g * a).abs().sum(-1, keepdim=True))
    want_reduced = plain.double_norm_backward_reduce(want, others[0], case.group)
    agrees(reduced, want_reduced, rows.flatten(-2).sum(1), case.n + case.group)

    plain.double_norm_backward_(want, *others, case.group)
    passes.double_norm_backward_(grad, attention, mass, reduced, case.group)
    columns = others[2].abs().unflatten(-1, (-1, case.group)).unsqueeze(1) * others[1].unsqueeze(-1)
    error = (case.group + 8) * epsilon(mass.dtype) * (rows + a.abs() * columns)
    within(grad, want, error.flatten(-2))


@on(*CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential(passes, dtype):
    """A group of one has the mass exp(logit - lse): within two units in the last place, a sum of 16 in 16 more."""
    logits = torch.linspace(-40, 85, 100003, dtype=dtype).view(1, -1, 1).repeat(1, 1, 16)
    want = logits[:, :, :1].double().exp()
    for group in (1, 16):
        mass = passes.double_norm_(logits.clone(), torch.zeros(1, 16, dtype=dtype), group, 0.0, None)[..., :1].double()
        assert ((mass / group - want).abs() <= (4 + group * (group > 1)) * epsilon(dtype) * want).all()


#: Types and groups of extreme logits.
EXTREMES = {
    f"{dtype}-{group}": (dtype, group)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for group in (64, 33, 1)
}


@each(
    ((*CPU, *CUDA), EXTREMES),
    (("triton",), pick(EXTREMES, "torch.float32-33", "torch.float16-33")),
)
@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_extreme_logits(passes, case, eps):
    """±1e4, all equal, one that dominates: finite, and A without eps sums to one over its group."""
    dtype, group = case
    base = 1e4 * torch.randn(1, 70, 2 * group, dtype=torch.float64).clamp(-1, 1)
    dominant = torch.zeros_like(base)
    dominant[0, 3, 0] = 1e4
    for values in (base, base.sign() * 1e4, torch.full_like(base, -1e4), dominant, -dominant):
        attention = normalized_within(passes, values.to(dtype).to(pass_cases.DEVICE), group, eps, None)
        assert attention.isfinite().all()
        if not eps:
            sums = attention.double().unflatten(-1, (-1, group)).sum(-1)
            assert ((sums - 1).abs() <= (group + 8) * epsilon(dtype)).all()


@on(*BACKENDS)
@pytest.mark.parametrize("group", [64, 33])
def test_not_finite(passes, group):
    """NaN and infinities reach what the formula lets them reach, and nothing else."""
    logits = torch.randn(2, 300, 2 * group)
    logits[0, 7, 3] = math.nan
    logits[0, 9, group + 1] = math.inf
    logits[1, :, 5] = -math.inf
    logits[1, 11, group + 2] = -math.inf
    logits[1, 13, group:] = -math.inf
    want_attention, attention = logits.double(), logits.to(pass_cases.DEVICE)
    want, _ = plain.column_statistics(want_attention, None)
    statistics, lse = passes.column_statistics(attention, None)
    mass = passes.double_norm_(attention, lse, group, 1e-9, None)
    want_mass = plain.double_norm_(want_attention, lse.cpu().double(), group, 1e-9, None)
    torch.testing.assert_close(statistics[:, 0].cpu().double(), want[:, 0], rtol=0, atol=0, equal_nan=True)
    for got, of in ((statistics[:, 1], want[:, 1]), (attention, want_attention), (mass, want_mass)):
        assert torch.equal(got.isnan().cpu(), of.isnan())
    assert attention[1, 11, group + 2] == 0
    assert (attention[1, 13, group:] == 0).all() and mass[1, 13, 1] == torch.tensor(1e-9)


@on(*BACKENDS)
def test_padding_holds_anything(passes):
    """What lies at padding tokens, NaN too, changes no bit; masked equals shortened, for all that one token shows."""
    case = TOKENS["padded"]
    logits, padding = tokens_of(case), padding_of(case)
    poisoned = logits.masked_fill(padding.unsqueeze(-1), math.nan)
    statistics, lse = passes.column_statistics(logits, padding)
    assert all(map(torch.equal, passes.column_statistics(poisoned, padding), (statistics, lse)))
    passes.double_norm_(logits, lse, case.group, 1e-9, padding)
    mass = passes.double_norm_(poisoned, lse, case.group, 1e-9, padding)
    assert torch.equal(poisoned, logits) and (mass[padding] == torch.tensor(1e-9)).all()


@on(*BACKENDS)
def test_nothing_but_padding(passes):
    logits = torch.randn(1, 20, 64).to(pass_cases.DEVICE)
    padding = torch.ones(1, 20, dtype=torch.bool, device=logits.device)
    statistics, lse = passes.column_statistics(logits, padding)
    assert (statistics[:, 0] == -math.inf).all() and (statistics[:, 1] == 0).all() and (lse == -math.inf).all()
    mass = passes.double_norm_(logits, lse, 64, 0.0, padding)
    assert (logits == 0).all() and (mass == 0).all()


@on("triton", *CPU)
def test_no_token(passes):
    """A member of a process group may hold no token at all."""
    logits = torch.empty(2, 0, 64, device=pass_cases.DEVICE)
    statistics, lse = passes.column_statistics(logits, None)
    assert (statistics[:, 0] == -math.inf).all() and (statistics[:, 1] == 0).all() and (lse == -math.inf).all()
    assert passes.double_norm_(logits, lse, 64, 0.0, None).shape == (2, 0, 1)
    assert (passes.double_norm_backward_reduce(logits, logits, 64) == 0).all()


@each((CPU, pick(TOKENS, "several chunks", "several chunks, groups of 3", "several blocks of columns", "bf16")))
def test_threads_change_no_token(passes, case):
    """How the work is split depends on the sizes alone."""
    logits, grad = tokens_of(case, 4), tokens_of(case)

    def everything():
        attention, out = logits.clone(), grad.clone()
        statistics, lse = passes.column_statistics(attention, None)
        mass = passes.double_norm_(attention, lse, case.group, 1e-9, None)
        reduced = passes.double_norm_backward_reduce(grad, attention, case.group)
        passes.double_norm_backward_(out, attention, mass, reduced, case.group)
        return statistics, lse, attention, mass, reduced, out

    same_bits_with_any_threads(everything)


@on(*BACKENDS)
def test_a_row_is_its_own(passes):
    """The same token gives the same bits wherever it stands."""
    case = TOKENS["heads"]
    logits, order = tokens_of(case, 30), torch.randperm(case.n)
    _, lse = passes.column_statistics(logits, None)
    permuted = logits[:, order].contiguous()
    passes.double_norm_(logits, lse, case.group, 1e-9, None)
    passes.double_norm_(permuted, lse, case.group, 1e-9, None)
    assert torch.equal(permuted, logits[:, order])


@each(*OF_FEATURES)
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no shift"])
def test_residual_relu(passes, case, shifted):
    z, x = (stored_features(small_integers(*case[:3]), case) for _ in range(2))
    shift = small_integers(case.c).to(accumulate_dtype(case.dtype)).to(z.device) if shifted else None
    want, *others = double(z.clone(), x, shift)
    want_signs = plain.residual_relu_(want, *others)
    signs = passes.residual_relu_(z, x, shift)
    assert torch.equal(z.cpu().double(), want)
    assert torch.equal(signs.cpu(), want_signs)


@each(*OF_FEATURES)
def test_residual_relu_backward(passes, case):
    """The gradient is a selection, so exact; its sums have as many terms as there are tokens."""
    grad_y = stored_features(torch.randn(case[:3], dtype=torch.float64), case)
    signs = torch.randint(0, 256, ((grad_y.numel() + 7) // 8,), dtype=torch.uint8).to(grad_y.device)
    grad, sums = passes.residual_relu_backward(grad_y, signs)
    want, want_sums = plain.residual_relu_backward(*double(grad_y, signs))
    assert grad.dtype == grad_y.dtype and grad.stride() == torch.empty_like(grad_y).stride()
    assert torch.equal(grad.cpu().double(), want)
    assert sums.dtype == accumulate_dtype(case.dtype)
    agrees(sums, want_sums, want.abs().sum((0, 1)), case.b * case.n)


@on(*CPU, *CUDA)
@pytest.mark.parametrize("by_maps", [False, True], ids=["tokens", "maps"])
def test_residual_not_finite(passes, by_maps):
    """NaN is kept and lets the gradient pass, as torch.relu does; infinities are numbers like others."""
    z = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0, math.inf]).view(1, 2, 3)
    x = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan, -math.inf]).view(1, 2, 3)
    case = Features(1, 2, 3, by_maps)
    z, x = stored_features(z, case), stored_features(x, case)
    want = (z + x).relu()
    signs = passes.residual_relu_(z, x, None)
    torch.testing.assert_close(z, want, rtol=0, atol=0, equal_nan=True)
    grad, _ = passes.residual_relu_backward(torch.ones_like(z), signs)
    assert torch.equal(grad, (~(want <= 0)).float())


@each((CPU, pick(FEATURES, "tokens, several units", "maps of 4225, several units")))
def test_threads_change_no_feature(passes, case):
    z, x, grad_y = (stored_features(torch.randn(case[:3]), case) for _ in range(3))
    shift = torch.randn(case.c)

    def everything():
        y = torch.empty_like(z).copy_(z)
        signs = passes.residual_relu_(y, x, shift)
        return y, signs, *passes.residual_relu_backward(grad_y, signs)

    same_bits_with_any_threads(everything)


def assert_schemas_and_fakes(calls: dict[str, tuple]) -> None:
    for operator, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.aia_kernels, operator), arguments, test_utils=("test_schema", "test_faketensor")
        )


@each((CPU, pick(TOKENS, "heads", "bf16, groups of 5, padded")))
def test_schemas_and_fakes_of_tokens(passes, case):
    logits, padding = tokens_of(case), padding_of(case)
    lse = torch.zeros(case.b, case.m)
    mass = torch.ones(case.b, case.n, case.m // case.group)
    assert_schemas_and_fakes(
        {
            "column_statistics": (logits, padding),
            "double_norm_": (logits.clone(), lse, case.group, 1e-9, padding),
            "double_norm_backward_reduce": (logits, logits.clone(), case.group),
            "double_norm_backward_": (logits.clone(), logits, mass, lse, case.group),
        }
    )


@each((CPU, pick(FEATURES, "tokens", "bf16 maps")))
def test_schemas_and_fakes_of_features(passes, case):
    z, x = (stored_features(torch.randn(case[:3]), case) for _ in range(2))
    signs = torch.zeros((z.numel() + 7) // 8, dtype=torch.uint8)
    assert_schemas_and_fakes({"residual_relu_": (z, x, None), "residual_relu_backward": (x, signs)})
