"""The batch norm of external attention's block, folded into V: CUDA's passes, or PyTorch's operators."""

from __future__ import annotations

from typing import NamedTuple

import pass_cases
import pytest
import torch
from agreement import assert_within_budget
from external_cases import SIZES, make, make_grad, make_input
from external_pass_cases import within
from pass_backends import CUDA, each, on, passes_fixture
from pass_cases import epsilon
from raw_arguments import REFUSED, changed, implementation, put, to, wide
from torch import Tensor

from aia_kernels import backends, schemas, testing
from aia_kernels.algorithms import folds
from aia_kernels.backends import extension
from aia_kernels.backends.matmul_passes import MatmulPasses
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")
EPS = 1e-5


class Case(NamedTuple):
    """C, M and the tokens; dtype of V; whether statistics are fixed, and a BN without weight and bias."""

    c: int
    m: int
    n: int = 50
    dtype: torch.dtype = torch.float32
    fixed: bool = False
    affine: bool = True


#: Rows and columns that fill blocks, tiles and what is staged, and that do not; several blocks across.
CASES = {
    "a network's": Case(64, 64),
    "prime": Case(13, 7),
    "one": Case(1, 1),
    "rows of blocks, ragged": Case(33, 70),
    "columns of several passes": Case(5, 300),
    "fp64": Case(18, 20, dtype=torch.float64),
    "bf16": Case(24, 33, dtype=torch.bfloat16),
    "fp16": Case(10, 64, dtype=torch.float16),
    "not affine": Case(9, 17, affine=False),
    "fixed": Case(20, 40, fixed=True),
    "fixed, bf16, not affine": Case(20, 40, dtype=torch.bfloat16, fixed=True, affine=False),
}


passes = passes_fixture("external_attention")


class Inputs:
    """Of a map A of softmax rows, whose moments are about a rounded mean."""

    def __init__(self, case: Case):
        wide = accumulate_dtype(case.dtype)

        def random(*sizes: int, dtype=wide) -> Tensor:
            return torch.randn(sizes, dtype=torch.float64).to(dtype).to(pass_cases.DEVICE)

        a = (3 * torch.randn(case.n, case.m, dtype=torch.float64)).softmax(1)
        self.origin = a.mean(0).to(wide)
        centred = a - self.origin
        total, second = (t.to(wide).to(pass_cases.DEVICE) for t in (centred.sum(0), centred.mT @ centred))
        self.origin = self.origin.to(pass_cases.DEVICE)
        self.of_batch = [] if case.fixed else [self.origin, total, second]
        self.fixed = [random(case.c), random(case.c).abs() + 0.5] if case.fixed else []
        self.value, self.product = random(case.c, case.m, dtype=case.dtype), random(case.c, case.m)
        self.weight, self.bias = (random(case.c, dtype=case.dtype) if case.affine else None for _ in range(2))
        self.sums = random(case.c)


def double(values):
    if isinstance(values, list | tuple):
        return [double(v) for v in values]
    return values.cpu().double() if isinstance(values, Tensor) else values


def close(found: Tensor, want: Tensor, terms: int, magnitude: Tensor | float = 0.0) -> None:
    """Off by a rounding for each term of the largest sum beside it, and by one to its own type."""
    if not want.numel():
        assert found.shape == want.shape
        return
    scale = max(float(want.abs().max()), float(torch.as_tensor(magnitude).max()))
    error = (terms + 32) * epsilon(accumulate_dtype(found.dtype)) * scale
    within(found, want, torch.full_like(want, error))


@each((CUDA, CASES))
def test_against_operators_of_pytorch(passes, case):
    i = Inputs(case)
    arguments = i.value, i.weight, i.bias, i.of_batch, float(case.n), i.fixed, EPS
    found, want = passes.fold(*arguments), folds.fold(*double(arguments))
    assert found[0].dtype == case.dtype and {t.dtype for t in found[1:]} == {accumulate_dtype(case.dtype)}
    # The variance is a sum of M^2 terms; of rows of V that cancel in z, its root is off by more than its share.
    terms = case.m**2 if not case.fixed else 1
    for one, other in zip(found, want, strict=True):
        close(one, other, terms)

    *_, statistics, off = found
    sums = i.value, i.product, i.sums, statistics, None if case.fixed else off, EPS
    joint, center = passes.fold_sums(*sums)
    want_joint, want_center = folds.fold_sums(*double(sums))
    assert torch.equal(joint[0], i.sums)
    terms = i.value.double().abs().cpu() * i.product.double().abs().cpu()
    rstd = (statistics[:, 1].double().cpu() + EPS).rsqrt()
    close(joint[1], want_joint[1], case.m, rstd * terms.sum(1))
    close(center, want_center, case.m, i.value.double().abs().sum(1))

    given = i.value, i.weight, i.product, joint, center, statistics, [off, *i.of_batch[1:]] if i.of_batch else [], EPS
    found, want = passes.fold_back(*given), folds.fold_back(*double(given))
    assert found[0].dtype == found[1].dtype == case.dtype
    for one, other in zip(found, want, strict=True):
        close(one, other, case.m + case.c)


@on("emulator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sizes", ["prime", "wide"])
def test_the_block_takes_them(passes, sizes, train, dtype, monkeypatch):
    calls = []
    for name in schemas.FOLD_PASSES:
        own = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, own=own, name=name: calls.append(name) or own(*a), raising=False)
    found = MatmulPasses(passes)
    monkeypatch.setattr(backends, "passes", lambda *_: found)
    module = make("block", SIZES[sizes], dtype).train(train)
    x, grad = make_input("block", SIZES[sizes], dtype), make_grad("block", SIZES[sizes], dtype)
    assert_within_budget(testing.compare(module, x, grad, "cpu"))
    assert calls == list(schemas.FOLD_PASSES)


def good(name: str) -> list:
    torch.manual_seed(0)
    i = Inputs(Case(6, 4))
    _, _, statistics, off = folds.fold(i.value, i.weight, i.bias, i.of_batch, 50.0, [], EPS)
    joint, center = folds.fold_sums(i.value, i.product, i.sums, statistics, off, EPS)
    return {
        "fold": [i.value, i.weight, i.bias, i.of_batch, 50.0, [], EPS],
        "fold_sums": [i.value, i.product, i.sums, statistics, off, EPS],
        "fold_back": [i.value, i.weight, i.product, joint, center, statistics, [off, *i.of_batch[1:]], EPS],
    }[name]


#: Operator, argument, what it becomes, the words expected.
BAD = [
    *((name, 0, wide(1), r"value must be contiguous \[C, M\]") for name in schemas.FOLD_PASSES),
    *((name, 0, lambda t: t[:0], "value must be contiguous") for name in schemas.FOLD_PASSES),
    ("fold", 0, to(torch.int32), "value must be float16, bfloat16, float32 or float64"),
    ("fold", 1, lambda t: t[1:], r"weight must be contiguous float32 \[6\]"),
    ("fold", 2, lambda t: t.repeat(2)[::2], "bias must be contiguous"),
    ("fold", 3, lambda of: of[:2], "of_batch must hold three tensors or none"),
    ("fold", (3, 0), to(torch.float64), r"origin must be contiguous float32 \[4\]"),
    ("fold", (3, 2), lambda t: t[1:], r"second must be contiguous float32 \[4, 4\]"),
    ("fold", 4, put(0.0), "count must be positive"),
    ("fold", 5, put([torch.ones(6)]), "fixed must hold mean and variance"),
    ("fold", 6, put(-1.0), "eps must not be negative"),
    ("fold_sums", 1, lambda t: t.mT, r"product must be contiguous float32 \[6, 4\]"),
    ("fold_sums", 2, lambda t: t[1:], r"sums must be contiguous float32 \[6\]"),
    ("fold_sums", 3, to(torch.bfloat16), r"statistics must be contiguous float32 \[6, 3\]"),
    ("fold_sums", 4, lambda t: t[1:], r"off must be contiguous float32 \[4\]"),
    ("fold_back", 3, lambda t: t[:1], r"joint must be contiguous float32 \[2, 6\]"),
    ("fold_back", 4, lambda t: t[1:], r"center must be contiguous float32 \[6\]"),
    ("fold_back", (6, 1), lambda t: t[1:], r"total must be contiguous float32 \[4\]"),
]


@pytest.mark.parametrize("name, place, change, words", BAD)
def test_what_is_refused(name, place, change, words):
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    with pytest.raises(REFUSED, match=words):
        implementation("CUDA", name, changed(good(name), place, change))


@pytest.mark.parametrize("fixed", [False, True], ids=["batch", "fixed"])
def test_fakes(fixed):
    """Shapes and types are those of what PyTorch's operators return, but that V's gradient is in the type of V."""
    i = Inputs(Case(6, 4, fixed=fixed))
    arguments = i.value, i.weight, i.bias, i.of_batch, 50.0, i.fixed, EPS
    results = [folds.fold(*arguments)]
    _, _, statistics, off = results[0]
    sums = i.value, i.product, i.sums, statistics, None if fixed else off, EPS
    results.append(folds.fold_sums(*sums))
    back = i.value, i.weight, i.product, *results[1], statistics, [off, *i.of_batch[1:]] if i.of_batch else [], EPS
    results.append(folds.fold_back(*back))
    for name, given, want in zip(schemas.FOLD_PASSES, (arguments, sums, back), results, strict=True):
        meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), given)
        for one, other in zip(getattr(torch.ops.aia_kernels, name)(*meta), want, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
