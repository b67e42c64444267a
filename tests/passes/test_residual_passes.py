"""The CPU passes at the end of external attention's block against the plain ones in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from conftest import LEVELS, at_level, skip_unless_runnable
from pass_cases import agrees, same_bits_with_any_threads
from plain_double_norm import PlainDoubleNorm
from torch import Tensor

from aia_kernels import backends
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


class Case(NamedTuple):
    """[B, N, C], stored as maps [B, C, N] or token by token."""

    b: int
    n: int
    c: int
    maps: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "tokens": Case(2, 33, 64),
    "tokens of 7 features": Case(2, 31, 7),
    "tokens of 17": Case(1, 53, 17),
    "tokens, several units": Case(1, 700, 131),
    "maps": Case(2, 64, 33, True),
    "maps of 7 positions": Case(2, 7, 31, True),
    "maps of 4225, several units": Case(1, 4225, 19, True),
    "maps of one row over several units": Case(1, 100003, 1, True),
    "maps of one position": Case(3, 1, 21, True),
    "one feature": Case(2, 37, 1),
    "one element": Case(1, 1, 1),
    "15 elements": Case(1, 5, 3),
    "bf16": Case(2, 19, 33, False, torch.bfloat16),
    "bf16 maps": Case(2, 65, 19, True, torch.bfloat16),
    "fp16 maps": Case(1, 129, 5, True, torch.float16),
    "fp64": Case(1, 23, 40, False, torch.float64),
    "fp64 maps": Case(2, 23, 9, True, torch.float64),
}


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


def stored(values: Tensor, case: Case) -> Tensor:
    values = values.to(case.dtype)
    return values.mT.contiguous().mT if case.maps else values.contiguous()


def small(*shape: int) -> Tensor:
    """Small integers: every sum of three is exact in every type, zero among them."""
    return torch.randint(-8, 9, shape).double()


@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no shift"])
def test_residual_relu(passes, plain, case, shifted):
    shape = case[:3]
    z, x = (stored(small(*shape), case) for _ in range(2))
    shift = small(case.c).to(accumulate_dtype(case.dtype)) if shifted else None
    want = z.double().clone()
    want_signs = plain.residual_relu_(want, x.double(), None if shift is None else shift.double())
    signs = passes.residual_relu_(z, x, shift)
    assert torch.equal(z.double(), want)
    assert torch.equal(signs, want_signs)


def test_residual_relu_backward(passes, plain, case):
    """The gradient is a selection, so exact; its sums have as many terms as there are tokens."""
    grad_y = stored(torch.randn(case[:3], dtype=torch.float64), case)
    signs = torch.randint(0, 256, ((grad_y.numel() + 7) // 8,), dtype=torch.uint8)
    grad, sums = passes.residual_relu_backward(grad_y, signs)
    want, want_sums = plain.residual_relu_backward(grad_y.double(), signs)
    assert grad.dtype == grad_y.dtype and grad.stride() == torch.empty_like(grad_y).stride()
    assert torch.equal(grad.double(), want)
    assert sums.dtype == accumulate_dtype(case.dtype)
    agrees(sums, want_sums, want.abs().sum((0, 1)), case.b * case.n)


@pytest.mark.parametrize("by_maps", [False, True], ids=["tokens", "maps"])
def test_not_finite(passes, by_maps):
    """NaN is kept and lets the gradient pass, as torch.relu does; infinities are numbers like others."""
    z = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0, math.inf]).view(1, 2, 3)
    x = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan, -math.inf]).view(1, 2, 3)
    case = Case(1, 2, 3, by_maps)
    z, x = stored(z, case), stored(x, case)
    want = (z + x).relu()
    signs = passes.residual_relu_(z, x, None)
    torch.testing.assert_close(z, want, rtol=0, atol=0, equal_nan=True)
    grad, _ = passes.residual_relu_backward(torch.ones_like(z), signs)
    assert torch.equal(grad, (~(want <= 0)).float())


@pytest.mark.parametrize("name", ["tokens, several units", "maps of 4225, several units"])
def test_threads_change_nothing(passes, name):
    case = CASES[name]
    z, x, grad_y = (stored(torch.randn(case[:3]), case) for _ in range(3))
    shift = torch.randn(case.c)

    def everything():
        y = torch.empty_like(z).copy_(z)
        signs = passes.residual_relu_(y, x, shift)
        return y, signs, *passes.residual_relu_backward(grad_y, signs)

    same_bits_with_any_threads(everything)


@pytest.mark.parametrize("name", ["tokens", "bf16 maps"])
def test_schemas_and_fakes(passes, name):
    case = CASES[name]
    z, x = (stored(torch.randn(case[:3]), case) for _ in range(2))
    signs = torch.zeros((z.numel() + 7) // 8, dtype=torch.uint8)
    for operator, arguments in {"residual_relu_": (z, x, None), "residual_relu_backward": (x, signs)}.items():
        torch.library.opcheck(
            getattr(torch.ops.aia_kernels, operator), arguments, test_utils=("test_schema", "test_faketensor")
        )
