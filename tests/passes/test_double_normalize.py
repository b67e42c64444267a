"""The double normalization as one operator for each direction: the numbers of its passes, its derivatives, how it is
recorded, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from external_pass_cases import EPS, FLUSHED, TOKENS, Tokens, roundings, tokens_of, within
from pass_backends import CPU, each, passes_fixture
from pass_cases import double, epsilon
from plain_double_norm import PlainDoubleNorm
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from aia_kernels import backends, reference, schemas
from aia_kernels.algorithms.double_normalization import NormalizeFunction
from aia_kernels.backends import extension
from aia_kernels.operators import external_attention as operators

if extension.load() is not None:
    pytest.skip("only the C++ of the CPU has it", allow_module_level=True)

PASSES = backends.passes("cpu", "external_attention")


#: Samples that stay in a core's own cache, and larger ones.
CASES = {name: case for name, case in TOKENS.items() if not case.padded}

passes = passes_fixture("external_attention")


def by_heads(case: Tokens, scale: float = 1.0) -> torch.Tensor:
    """[B, N, S], or [B, N, heads, S] where a case has several groups."""
    t = tokens_of(case, scale)
    return t if case.m == case.group else t.unflatten(2, (-1, case.group))


@each((CPU, CASES))
@pytest.mark.parametrize("eps", EPS.values(), ids=EPS)
def test_forward(passes, case, eps):
    """Beside the roundings of a P that is exp(logit - lse), a sum over tokens is off by as many as it has terms."""
    logits = by_heads(case, 4)
    before = logits.clone()
    attention, mass = passes.double_normalize(logits, eps)
    assert attention.shape == logits.shape and torch.equal(logits, before)
    want = double(logits.flatten(2))[0].clone()
    _, lse = PlainDoubleNorm().column_statistics(want, None)
    relative = roundings(want - lse.unsqueeze(1), case.group) + case.n + 8
    relative = relative * epsilon(mass.dtype)
    want_mass = PlainDoubleNorm().double_norm_(want, lse, case.group, eps, None)
    error = relative.repeat_interleave(case.group, -1) * want + FLUSHED[mass.dtype]
    within(attention.flatten(2), want, error)
    within(mass, want_mass, relative * want_mass)


@each((CPU, CASES))
def test_backward(passes, case):
    """Bit by bit what the two passes make."""
    attention, mass = passes.double_normalize(by_heads(case), 1e-6)
    grad = by_heads(case)
    kept, expected, rows = grad.clone(), grad.flatten(2).clone(), attention.flatten(2)
    reduced = passes.double_norm_backward_reduce(expected, rows, case.group)
    passes.double_norm_backward_(expected, rows, mass, reduced, case.group)
    assert torch.equal(passes.double_normalize_back(grad, attention, mass).flatten(2), expected)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 4, 2, 3), (2, 1, 4)])
@pytest.mark.parametrize("form", [lambda t, eps: NormalizeFunction.apply(t, PASSES, eps), operators.double_normalize])
def test_derivatives(form, shape, eps):
    """First and second, of the Function of eager calls and of what is recorded."""
    torch.manual_seed(0)

    def attention(logits):
        found = form(logits, eps)
        return found[0] if isinstance(found, tuple) else found

    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(attention, (logits,)) and gradgradcheck(attention, (logits,))


def test_expanded_gradients():
    logits = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64)
    for expanded in (True, False):
        y = NormalizeFunction.apply(logits, PASSES, 0.0)
        grad = weight.expand(2, 5, 3)
        found = torch.autograd.grad(y, logits, grad if expanded else grad.contiguous())[0]
        if expanded:
            first = found
    assert torch.equal(first, found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_of_a_record(backend):
    """Exact where the record is run as it is; raised, not dropped, where its backward was recorded too."""
    torch.manual_seed(0)
    torch.compiler.reset()
    logits = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 3, dtype=torch.float64)

    def second(form):
        first = torch.autograd.grad((form(logits, 0.0)[0].sin() * weight).sum(), logits, create_graph=True)[0]
        return torch.autograd.grad((first * first).sum(), logits)[0]

    compiled = torch.compile(lambda t, eps: operators.double_normalize(t, eps), backend=backend, fullgraph=True)
    if backend == "eager":
        expected = second(lambda t, eps: (reference.double_normalize(t, 3, eps),))
        assert_close(second(compiled), expected, rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(RuntimeError, match="double backward"):
            second(compiled)


def test_the_gradient_has_none():
    attention, mass = PASSES.double_normalize(torch.randn(2, 5, 3), 0.0)
    grad = torch.randn(2, 5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        operators.double_normalize_back(grad, attention, mass).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 4, 2, 3)])
def test_opcheck(shape, dtype):
    logits = torch.randn(shape).to(dtype)
    attention, mass = PASSES.double_normalize(logits, 1e-9)
    opcheck(operators.double_normalize, (logits.requires_grad_(), 1e-9))
    opcheck(operators.double_normalize_back, (torch.randn(shape).to(dtype), attention, mass))


def test_tokens_that_are_hidden_and_what_is_no_number():
    """A token whose logits are all -inf is 0 with eps, and a NaN spoils its sample alone."""
    logits = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    logits[0, 1] = -torch.inf
    found, _ = PASSES.double_normalize(logits, 1e-9)
    assert not found[0, 1].any() and found.isfinite().all()
    logits[0, 1, 0] = torch.nan
    found, _ = PASSES.double_normalize(logits, 0.0)
    assert found[0, :, 0].isnan().all() and found[1].isfinite().all()


def good(which: int) -> list:
    logits = torch.randn(2, 5, 2, 3)
    return [logits, 1e-9] if which == 0 else [torch.randn_like(logits), *PASSES.double_normalize(logits, 1e-9)]


BAD = {
    "rank": (0, 0, lambda t: t[0, 0], r"logits must be contiguous \[B, N, S\] or \[B, N, heads, S\] and not empty"),
    "empty": (0, 0, lambda t: t[:0], "not empty"),
    "turned": (0, 0, lambda t: t.mT.contiguous().mT, "logits must be contiguous"),
    "integers": (0, 0, lambda t: t.int(), "logits must be float16, bfloat16, float32 or float64, got int32"),
    "negative eps": (0, 1, lambda _: -1.0, "eps must not be negative"),
    "a gradient stored otherwise": (1, 0, lambda t: t.mT.contiguous().mT, "grad and attention must agree"),
    "a gradient of another type": (1, 0, lambda t: t.double(), "grad and attention must agree"),
    "attention with gaps": (1, 1, lambda t: t.repeat(1, 2, 1, 1)[:, ::2], "attention must be contiguous"),
    "mass of one head": (1, 2, lambda t: t[..., :1].contiguous(), r"mass must be contiguous float32 \[2, 5, 2\]"),
    "mass of another type": (1, 2, lambda t: t.double(), "mass must be contiguous float32"),
}


@pytest.mark.parametrize("which, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(which, place, change, words):
    arguments = good(which)
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=words):
        getattr(PASSES, schemas.NORMALIZE_PASSES[which])(*arguments)
