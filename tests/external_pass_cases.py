"""Cases, inputs and error bounds for the tests of external attention's passes.

plain_double_norm.py in float64 gives the right answers.

Error bounds. t = logit - lse is off by one rounding of itself, and so is exp(t), relatively, by |t| roundings; where A
is taken from the maximum of its group, two more differences as large as the largest |t| of the group come in. Beside
them, a sum of n terms is off by n roundings of their magnitudes, and 8 cover exp, a division and the factors.
A result in a lower precision is rounded once more, and a number below the smallest normal one by a part of that.
"""

from __future__ import annotations

from typing import NamedTuple

import pass_cases
import torch
from pass_backends import CPU, CUDA
from pass_cases import double, epsilon, pick
from plain_double_norm import PlainDoubleNorm
from torch import Tensor

from aia_kernels.common.dtypes import accumulate_dtype


class Tokens(NamedTuple):
    """B samples of N tokens with M columns in groups; with padding, the last sample is nothing but padding."""

    b: int
    n: int
    m: int
    group: int
    dtype: torch.dtype = torch.float32
    padded: bool = False


TOKENS = {
    "block": Tokens(2, 197, 64, 64),
    "heads": Tokens(2, 37, 192, 64),
    "groups of one vector": Tokens(2, 33, 48, 16),
    "groups of two": Tokens(1, 50, 96, 32),
    "groups of three": Tokens(1, 19, 96, 48),
    "groups of eight": Tokens(1, 21, 256, 128),
    "groups of 1": Tokens(2, 19, 5, 1),
    "groups of 7": Tokens(2, 23, 35, 7),
    "groups of 18": Tokens(1, 29, 144, 18),
    "groups of 33": Tokens(1, 41, 99, 33),
    "several blocks of columns": Tokens(2, 9, 2112, 66),
    "a group wider than a block": Tokens(1, 11, 600, 300),
    "one column": Tokens(2, 77, 1, 1),
    "one token": Tokens(3, 1, 64, 64),
    "one element": Tokens(1, 1, 1, 1),
    "several chunks": Tokens(1, 3000, 64, 64),
    "several chunks, groups of 3": Tokens(1, 12000, 6, 3),
    "padded": Tokens(3, 57, 64, 64, padded=True),
    "padded chunks, groups of 7": Tokens(2, 2500, 21, 7, padded=True),
    "bf16": Tokens(2, 197, 64, 64, torch.bfloat16),
    "bf16, groups of 5, padded": Tokens(2, 31, 25, 5, torch.bfloat16, True),
    "fp16": Tokens(1, 133, 64, 64, torch.float16),
    "fp16, groups of 33": Tokens(2, 17, 66, 33, torch.float16),
    "fp64": Tokens(2, 61, 64, 64, torch.float64),
    "fp64, groups of 7, padded": Tokens(2, 33, 21, 7, torch.float64, True),
}

#: For CUDA: teams of every size, rows longer than a warp's, tiles of columns, chunks of tokens.
TEAMS = {
    "chunks": Tokens(1, 300, 16, 8),
    "shorter padded chunks, groups of 7": Tokens(2, 290, 21, 7, padded=True),
    "teams of 2": Tokens(2, 21, 24, 8),
    "teams of 3 vectors": Tokens(1, 21, 24, 12),
    "longer than a team": Tokens(1, 9, 400, 200),
    "longer than a team, bf16": Tokens(1, 9, 320, 320, torch.bfloat16),
    "fp64, longer than a team, padded": Tokens(2, 9, 132, 66, torch.float64, True),
    "tiles of columns": Tokens(1, 30, 640, 64),
    "tiles of columns, bf16": Tokens(1, 20, 1024, 128, torch.bfloat16),
}

#: For Triton, whose products have these passes inside of them: every kind of group and of type, a few programs each.
FEW_PROGRAMS = pick(
    TOKENS,
    *("heads", "groups of 7", "groups of 33", "a group wider than a block", "one element", "padded"),
    *("bf16, groups of 5, padded", "fp16", "fp64, groups of 7, padded"),
)


class Features(NamedTuple):
    """[B, N, C], stored as maps [B, C, N] or token by token."""

    b: int
    n: int
    c: int
    maps: bool = False
    dtype: torch.dtype = torch.float32


FEATURES = {
    "tokens": Features(2, 33, 64),
    "tokens of 7 features": Features(2, 31, 7),
    "tokens of 17": Features(1, 53, 17),
    "tokens, several units": Features(1, 700, 131),
    "maps": Features(2, 64, 33, True),
    "maps of 7 positions": Features(2, 7, 31, True),
    "maps of 4225, several units": Features(1, 4225, 19, True),
    "maps of one row over several units": Features(1, 100003, 1, True),
    "maps of one position": Features(3, 1, 21, True),
    "one feature": Features(2, 37, 1),
    "one element": Features(1, 1, 1),
    "15 elements": Features(1, 5, 3),
    "bf16": Features(2, 19, 33, False, torch.bfloat16),
    "bf16 maps": Features(2, 65, 19, True, torch.bfloat16),
    "fp16 maps": Features(1, 129, 5, True, torch.float16),
    "fp64": Features(1, 23, 40, False, torch.float64),
    "fp64 maps": Features(2, 23, 9, True, torch.float64),
}

#: For CUDA: signs that fill their bytes, tiles of columns, chunks of tokens and of maps.
WHOLE_BYTES = {
    "tokens of whole bytes, tiles of columns": Features(1, 20, 1040),
    "tokens, chunks": Features(2, 170, 9),
    "bf16 tokens of whole bytes": Features(2, 45, 16, False, torch.bfloat16),
    "maps of whole bytes": Features(2, 400, 5, True),
    "maps of whole bytes, chunks": Features(1, 5000, 3, True, torch.float16),
    "maps, chunks": Features(2, 4101, 1, True),
}


def small(cases: dict) -> dict:
    """The cases that an emulator gets through quickly: its reductions have several chunks of few rows."""
    return {name: case for name, case in cases.items() if case[0] * case[1] * case[2] <= 26000}


#: Which cases run where.
OF_TOKENS = (CPU, TOKENS), (CUDA, small(TOKENS) | TEAMS), (("triton",), FEW_PROGRAMS)
OF_FEATURES = (CPU, FEATURES), (CUDA, small(FEATURES) | WHOLE_BYTES)

EPS = {"no eps": 0.0, "published eps": 1e-9, "eps that weighs": 0.5}

#: What becomes of P below the least normal number, in terms of A, where the mass is large enough not to be inspected.
FLUSHED = {torch.float32: 2.0**-66, torch.float64: 2.0**-510}


def tokens_of(case: Tokens, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(case.b, case.n, case.m, dtype=torch.float64)).to(case.dtype).to(pass_cases.DEVICE)


def padding_of(case: Tokens) -> Tensor | None:
    if not case.padded:
        return None
    padding = torch.rand(case.b, case.n) < 0.3
    padding[-1] = True
    return padding.to(pass_cases.DEVICE)


def stored_features(values: Tensor, case: Features) -> Tensor:
    """Values [B, N, C] in the type and the order of storage of a case, on the device."""
    values = values.to(case.dtype).to(pass_cases.DEVICE)
    return values.mT.contiguous().mT if case.maps else values.contiguous()


def small_integers(*shape: int) -> Tensor:
    """Every sum of three is exact in every type, zero among them."""
    return torch.randint(-8, 9, shape).double()


def within(got: Tensor, want: Tensor, error: Tensor) -> None:
    """Assert that a result is off by its error before it was stored, and by one rounding to its type."""
    assert got.shape == want.shape
    info, got, want = torch.finfo(got.dtype), got.cpu(), want.cpu()
    bound = error.cpu() + epsilon(got.dtype) * want.abs() + info.smallest_normal * info.eps
    excess = ((got.double() - want).abs() / bound).nan_to_num(torch.inf).max()
    assert excess <= 1, f"error up to {excess:.3g} times its bound"


def statistics_within(statistics: Tensor, lse: Tensor, logits: Tensor, padding: Tensor | None) -> None:
    """Assert that maxima over tokens are exact, and the bounds of the sums and of lse as made of both."""
    assert statistics.dtype == lse.dtype == accumulate_dtype(logits.dtype)
    statistics, lse, logits, padding = statistics.cpu(), lse.cpu(), *double(logits, padding)
    want, _ = PlainDoubleNorm().column_statistics(logits, padding)
    maximum, logarithm = statistics[:, 0].double(), statistics[:, 1].double().log()
    hidden = maximum == -torch.inf
    assert torch.equal(lse == -torch.inf, hidden)
    # Two units in the last place of the logarithm, and the rounding of the sum.
    error = epsilon(lse.dtype) * (maximum.abs() + 4 * logarithm.abs())
    assert ((lse.double() - maximum - logarithm).abs() <= error)[~hidden].all()
    assert torch.equal(statistics[:, 0].double(), want[:, 0])
    shift = want[:, 0].masked_fill(want[:, 0].isinf(), 0.0).unsqueeze(1)
    # exp(t) |t| is at most 1 / e for t <= 0: the roundings of t cost less than one rounding a term, absolutely.
    distance = (logits - shift).abs()
    terms = (-distance).exp() * (distance + logits.shape[1] + 8)
    if padding is not None:
        terms = terms.masked_fill(padding.unsqueeze(-1), 0.0)
    assert ((statistics[:, 1].double() - want[:, 1]).abs() <= epsilon(statistics.dtype) * terms.sum(1)).all()


def roundings(t: Tensor, group: int) -> Tensor:
    """How many roundings A and the mass are off by, relatively: [B, N, M / group], of t [B, N, M]."""
    return 3 * t.abs().unflatten(-1, (-1, group)).amax(-1) + group + 8


def normalized_within(passes, logits: Tensor, group: int, eps: float, padding: Tensor | None) -> Tensor:
    """Assert the bounds of A and of the mass, and return A."""
    (_, lse), attention = passes.column_statistics(logits, padding), logits.clone()
    mass = passes.double_norm_(attention, lse, group, eps, padding)
    want, exact_lse, hidden = double(logits, lse, padding)
    t = want - exact_lse.unsqueeze(1)
    if padding is not None:
        t = t.masked_fill(hidden.unsqueeze(-1), 0.0)
    want = want.clone()
    want_mass = PlainDoubleNorm().double_norm_(want, exact_lse, group, eps, hidden)
    assert mass.dtype == lse.dtype
    relative = roundings(t, group) * epsilon(lse.dtype)
    within(attention, want, relative.repeat_interleave(group, -1) * want + FLUSHED[lse.dtype])
    within(mass, want_mass, relative * want_mass)
    return attention
