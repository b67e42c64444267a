"""External attention's CUDA passes: the tables of the CPU's tests, and cases of their own.

The kernels run on the host emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import cuda_passes
import pytest
import test_double_norm_passes as double_norm
import test_residual_passes as residual
import torch
from plain_double_norm import PlainDoubleNorm

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

plain = PlainDoubleNorm()


def small(cases: dict) -> dict:
    """The cases of a table that an emulator gets through quickly: its reductions have several chunks of few rows."""
    return {name: case for name, case in cases.items() if case[0] * case[1] * case[2] <= 26000}


#: Beyond the tables of the CPU: teams of every size, rows longer than a warp's, tiles of columns, chunks of tokens.
TOKENS = small(double_norm.CASES) | {
    "chunks": double_norm.Case(1, 300, 16, 8),
    "padded chunks, groups of 7": double_norm.Case(2, 290, 21, 7, padded=True),
    "teams of 2": double_norm.Case(2, 21, 24, 8),
    "teams of 3 vectors": double_norm.Case(1, 21, 24, 12),
    "longer than a team": double_norm.Case(1, 9, 400, 200),
    "longer than a team, bf16": double_norm.Case(1, 9, 320, 320, torch.bfloat16),
    "fp64, longer than a team, padded": double_norm.Case(2, 9, 132, 66, torch.float64, True),
    "tiles of columns": double_norm.Case(1, 30, 640, 64),
    "tiles of columns, bf16": double_norm.Case(1, 20, 1024, 128, torch.bfloat16),
}
FEATURES = small(residual.CASES) | {
    "tokens of whole bytes, tiles of columns": residual.Case(1, 20, 1040),
    "tokens, chunks": residual.Case(2, 170, 9),
    "bf16 tokens of whole bytes": residual.Case(2, 45, 16, False, torch.bfloat16),
    "maps of whole bytes": residual.Case(2, 400, 5, True),
    "maps of whole bytes, chunks": residual.Case(1, 5000, 3, True, torch.float16),
    "maps, chunks": residual.Case(2, 4101, 1, True),
}


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.sanitizer)])
def passes(request, monkeypatch):
    return cuda_passes.chosen(request, monkeypatch)


@pytest.fixture(params=TOKENS.values(), ids=TOKENS)
def tokens(request) -> double_norm.Case:
    return request.param


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def features(request) -> residual.Case:
    return request.param


def test_column_statistics(passes, tokens):
    double_norm.test_column_statistics(passes, plain, tokens)


@pytest.mark.parametrize("eps", double_norm.EPS.values(), ids=double_norm.EPS)
def test_double_norm(passes, tokens, eps):
    double_norm.test_double_norm(passes, plain, tokens, eps)


def test_double_norm_backward(passes, tokens):
    double_norm.test_double_norm_backward(passes, plain, tokens)


@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("group", [64, 33, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_extreme_logits(passes, dtype, group, eps):
    double_norm.test_extreme_logits(passes, plain, dtype, group, eps)


@pytest.mark.parametrize("group", [64, 33])
def test_not_finite(passes, group):
    double_norm.test_not_finite(passes, plain, group)


def test_padding(passes):
    double_norm.test_padding_holds_anything(passes)
    double_norm.test_nothing_but_padding(passes)


def test_a_row_is_its_own(passes):
    double_norm.test_a_row_is_its_own(passes)


@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no shift"])
def test_residual_relu(passes, features, shifted):
    residual.test_residual_relu(passes, plain, features, shifted)


def test_residual_relu_backward(passes, features):
    residual.test_residual_relu_backward(passes, plain, features)


@pytest.mark.parametrize("by_maps", [False, True], ids=["tokens", "maps"])
def test_residual_not_finite(passes, by_maps):
    residual.test_not_finite(passes, by_maps)


def test_blocks_and_threads_may_run_in_any_order(emulator):
    def everything(emulator) -> list[torch.Tensor]:
        torch.manual_seed(0)
        results = []
        for name in ("chunks", "groups of 7", "longer than a team"):
            case = TOKENS[name]
            logits, grad = double_norm.tokens_of(case, 4), double_norm.tokens_of(case)
            statistics = emulator.column_statistics(logits, None)
            mass = emulator.double_norm_(logits, double_norm.lse_of(statistics), case.group, 1e-9, None)
            reduced = emulator.double_norm_backward_reduce(grad, logits, case.group)
            emulator.double_norm_backward_(grad, logits, mass, reduced, case.group)
            results += [statistics, logits, mass, reduced, grad]
        for name in ("tokens, chunks", "maps, chunks"):
            grad_y = residual.stored(torch.randn(FEATURES[name][:3]), FEATURES[name])
            signs = emulator.residual_relu_(grad_y.clone(), grad_y, None)
            results += [signs, *emulator.residual_relu_backward(grad_y, signs)]
        return results

    cuda_passes.same_in_any_order(emulator, everything)
