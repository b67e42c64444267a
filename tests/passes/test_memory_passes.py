"""The passes of attention by a memory per sample against the formula of phi and its derivatives in float64: Triton, the
CPU at every instruction level, CUDA, and PyTorch's own operators, which a backend takes that has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pass_cases
import pytest
import torch
from pass_backends import CPU, CUDA, on_threads, passes_of
from torch import Tensor

from aia_kernels import backends
from aia_kernels.backends import memory_passes
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.reference.linear_attention import FEATURES

EPS = 1e-2  # large, so that it would be missed


COMPILED = "triton", *CPU, *CUDA


@pytest.fixture(params=["plain", *COMPILED])
def memory_on(request, monkeypatch) -> Iterator[Any]:
    if request.param == "plain":
        yield memory_passes
    else:
        yield from _compiled(request, monkeypatch)


@pytest.fixture(params=COMPILED)
def memory_compiled_on(request, monkeypatch) -> Iterator[Any]:
    yield from _compiled(request, monkeypatch)


@pytest.fixture(params=["emulator, between vectors"])
def memory_between_vectors(request, monkeypatch) -> Iterator[Any]:
    yield from _compiled(request, monkeypatch)


@pytest.fixture(params=CPU)
def memory_on_cpu(request, monkeypatch) -> Iterator[Any]:
    yield from _compiled(request, monkeypatch)


def _compiled(request, monkeypatch) -> Iterator[Any]:
    with passes_of("linear_attention", request, monkeypatch) as passes:
        assert passes is not memory_passes, "passes of its own"
        yield passes


class Sizes(NamedTuple):
    b: int
    heads: int
    d: int
    n: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


#: Ends of vectors at every level, one of everything, several tiles (memory.h), whole vectors alone.
SIZES = (Sizes(2, 2, 3, 7), Sizes(1, 1, 1, 1), Sizes(2, 3, 5, 67), Sizes(1, 1, 70, 600), Sizes(1, 1, 4, 8300))
#: Each size in one type, each type with ends of vectors, and with whole vectors, tiles and strips of them.
SIZES_AND_DTYPES = [(sizes, torch.float32) for sizes in SIZES]
SIZES_AND_DTYPES += [
    (sizes, dtype)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
    for sizes in (SIZES[2], Sizes(2, 1, 9, 1160))
]


class Given(NamedTuple):
    """Arguments of the passes: narrow ones of one type, wide ones in its accumulation type."""

    logits: Tensor
    padding: Tensor | None
    sums: Tensor
    gamma: Tensor
    reached: Tensor
    grad_sums: Tensor


def given(sizes: Sizes, name: str, dtype: torch.dtype = torch.float64, masked: bool = False) -> Given:
    b, heads, d, n = sizes
    rows, generator = heads * (d + (name == "l2")), torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(pass_cases.DEVICE, dtype)

    padding = (torch.rand(b, n, generator=generator) < 0.4).to(pass_cases.DEVICE) if masked else None
    logits, reached, grad_sums = numbers(b, 2 * heads * d, n), numbers(b, rows, n), numbers(b, rows)
    wide = accumulate_dtype(dtype)
    # As sums over tokens are for l2: no query's mass comes near 0, where its inverse would magnify roundings.
    sums = (0.2 * numbers(b, rows).double().tanh() / d**0.5).unflatten(1, (heads, -1))
    sums = sums.abs() if name == "softplus" else sums
    if name == "l2":
        sums[:, :, 0] = 1.0
    return Given(logits, padding, (n * sums.flatten(1)).to(wide), numbers(1), reached, grad_sums.to(wide))


def phi(name: str, z: Tensor, over: int) -> Tensor:
    """Of z [B, H, d, N]; a softmax is over that axis."""
    if name == "softmax":
        return z.softmax(over)
    if name == "softplus":
        return (1 + z.exp()).log()
    length = (z * z).sum(2, keepdim=True).sqrt()
    return torch.cat((torch.ones_like(length), z / length), 2)


def split(logits: Tensor, heads: int) -> Tensor:
    return logits.double().unflatten(1, (2, heads, -1))


def phi_of_keys(name: str, logits: Tensor, heads: int, padding: Tensor | None) -> Tensor:
    key = split(logits, heads)[:, 0]
    if padding is None:
        return phi(name, key, 3).flatten(1, 2)
    hidden = padding[:, None, None]
    if name == "softmax":
        return key.masked_fill(hidden, -torch.inf).softmax(3).nan_to_num(0.0).flatten(1, 2)
    return phi(name, key, 3).masked_fill(hidden, 0.0).flatten(1, 2)


def query_of(name: str, logits: Tensor, heads: int, padding: Tensor | None, sums: Tensor, gamma: Tensor) -> Tensor:
    """phi(q)'."""
    found = phi(name, split(logits, heads)[:, 1], 2)
    factor = gamma.double()
    if name != "softmax":
        eps = torch.full((found.shape[2], 1), EPS, dtype=torch.float64)
        eps[: name == "l2"] = 0.0
        s = sums.double().view(found.shape[:3]).unsqueeze(3) + eps
        factor = factor * logits.shape[2] / (found * s).sum(2, keepdim=True)
    found = found * factor
    return (found if padding is None else found.masked_fill(padding[:, None, None], 0.0)).flatten(1, 2)


def assert_near(found: Tensor, expected: Tensor, sizes: Sizes, term: float = 1.0) -> None:
    """Within a rounding for each term of the sums that a number is made of: over features, over tokens, and some thirty
    of the operations on them; each of at most the largest number's magnitude, or of a term that is larger, in the type
    of what was found."""
    unit = torch.finfo(found.dtype).eps / 2
    largest = max(term, float(expected.detach().abs().max()))
    bound = (sizes.d + sizes.n + 32) * unit * largest
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0, atol=bound)


def dtype_of_rows(passes: Any, a: Given) -> torch.dtype:
    """A GPU's products take bfloat16 as it is."""
    wide = passes is memory_passes or passes is backends.passes("cpu", "linear_attention")
    return torch.bfloat16 if a.logits.dtype == torch.bfloat16 and not wide else a.sums.dtype


CASES = pytest.mark.parametrize("name", FEATURES)
OF = pytest.mark.parametrize("sizes, dtype", SIZES_AND_DTYPES, ids=lambda a: str(a).removeprefix("torch."))
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


@CASES
@OF
@MASKED
def test_forward(memory_on, name, sizes, masked, dtype):
    a, of = given(sizes, name, dtype, masked), (FEATURES.index(name), sizes.heads)
    expected = phi_of_keys(name, a.logits, sizes.heads, a.padding)
    for gradients in (False, True):
        rows, sums = memory_on.memory_keys(a.logits, *of, a.padding, None, gradients)
        assert rows.shape[1] == expected.shape[1] + gradients * a.logits.shape[1]
        assert_near(rows[:, : expected.shape[1]], expected, sizes)
        assert_near(sums, expected.sum(2), sizes)
    query = memory_on.memory_queries(a.logits, *of, a.padding, a.sums, a.gamma, EPS)
    assert_near(query, query_of(name, a.logits, sizes.heads, a.padding, a.sums, a.gamma), sizes)
    query = memory_on.memory_queries(a.logits, *of, a.padding, a.sums, None, EPS)
    assert_near(query, query_of(name, a.logits, sizes.heads, a.padding, a.sums, torch.ones_like(a.gamma)), sizes)


@CASES
@OF
@MASKED
def test_backward(memory_on, name, sizes, masked, dtype):
    a, heads = given(sizes, name, dtype, masked), sizes.heads
    of = FEATURES.index(name), heads
    leaves = [t.double().clone().requires_grad_() for t in (a.logits, a.sums, a.gamma)]
    keys = phi_of_keys(name, leaves[0], heads, a.padding)
    (of_keys,) = torch.autograd.grad(keys, leaves[:1], a.reached.double() + a.grad_sums.double().unsqueeze(2))
    query = query_of(name, leaves[0], heads, a.padding, *leaves[1:])
    expected = torch.autograd.grad(query, leaves, a.reached.double(), allow_unused=True)
    half = a.logits.shape[1] // 2
    shown = a.reached
    if a.padding is not None:
        # What comes back of a token that takes no part is 0, as its gradient is.
        shown = shown.masked_fill(a.padding.unsqueeze(1), 0.0)
    rows, _ = memory_on.memory_keys(a.logits, *of, a.padding, None, True)
    rows[:, keys.shape[1] :] = torch.nan
    found = memory_on.memory_queries_backward_(rows, a.logits, *of, a.padding, a.sums, a.gamma, EPS, shown)
    assert rows[:, -2 * half : -half].isnan().all()
    memory_on.memory_keys_backward_(rows, a.logits, *of, a.padding, a.reached, a.grad_sums, None)
    assert_near(rows[:, : keys.shape[1]], keys, sizes)
    assert_near(rows[:, -2 * half : -half], of_keys[:, :half], sizes)
    # Of one feature nothing is left of its gradient: two terms cancel, each P times gamma / mass.
    factor = query / phi(name, split(a.logits, heads)[:, 1], 2).flatten(1, 2)
    term = max(1.0, float((factor.detach().abs().amax() * a.reached.abs().amax()).nan_to_num()))
    assert_near(rows[:, -half:], expected[0][:, half:], sizes, term)
    assert_near(found[0], query, sizes)
    of_sums = torch.zeros_like(leaves[1]) if expected[1] is None else expected[1]
    # The gradient of s is a sum over tokens of numbers as large as a token's own: 1 / N of phi(q)' times P.
    assert_near(found[1], of_sums, sizes)
    magnitude = max(1.0, float((query.detach() * a.reached.double() / a.gamma.double()).abs().sum()))
    assert_near(found[2] / magnitude, expected[2] / magnitude, sizes)
    assert {rows.dtype, found[0].dtype} == {dtype_of_rows(memory_on, a)}
    assert {found[1].dtype, found[2].dtype} == {a.sums.dtype}


@CASES
def test_rows_that_begin_between_vectors(memory_between_vectors, name):
    """They are as long as whole vectors."""
    for dtype in (torch.float32, torch.bfloat16):
        test_forward(memory_between_vectors, name, Sizes(1, 1, 9, 520), True, dtype)
        test_backward(memory_between_vectors, name, Sizes(1, 1, 9, 520), True, dtype)


@MASKED
def test_what_is_known_of_a_softmax(memory_on, masked):
    """The maximum and the sum of a column, and the product with its gradient, as the members of a group exchange them:
    here those of twice as many tokens."""
    sizes = SIZES[2]
    a, of = given(sizes, "softmax", masked=masked), (FEATURES.index("softmax"), sizes.heads)
    key, half = split(a.logits, sizes.heads)[:, 0].flatten(1, 2), a.reached.shape[1]
    shown = key if a.padding is None else key.masked_fill(a.padding[:, None], -torch.inf)
    maximum = shown.amax(2) + 1
    total = 2 * (shown - maximum.unsqueeze(2)).exp().sum(2)
    rows, sums = memory_on.memory_keys(a.logits, *of, a.padding, torch.stack((maximum, total), 1), True)
    assert_near(rows[:, :half], phi_of_keys("softmax", a.logits, sizes.heads, a.padding) / 2, sizes)
    assert_near(sums, torch.full_like(sums, 0.5), sizes)
    reduced = torch.randn_like(sums)
    memory_on.memory_keys_backward_(rows, a.logits, *of, a.padding, a.reached, a.grad_sums, reduced)
    expected = rows[:, :half] * (a.reached + (a.grad_sums - reduced).unsqueeze(2))
    assert_near(rows[:, half : 2 * half], expected, sizes)


@CASES
def test_extreme_logits(memory_compiled_on, name):
    """Whatever PyTorch's operators make of them: nothing overflows that does not there, and no NaN comes of numbers."""
    sizes = Sizes(1, 2, 3, 37)
    a, of = given(sizes, name, torch.float32), (FEATURES.index(name), sizes.heads)
    for scale in (1e30, 1e4, 1e-4, 1e-30, 0.0):
        logits = a.logits * scale
        results = []
        for passes in (memory_passes, memory_compiled_on):
            rows, sums = passes.memory_keys(logits, *of, None, None, True)
            back = passes.memory_queries_backward_(rows, logits, *of, None, a.sums, a.gamma, EPS, a.reached)
            passes.memory_keys_backward_(rows, logits, *of, None, a.reached, a.grad_sums, None)
            query = passes.memory_queries(logits, *of, None, a.sums, a.gamma, EPS)
            results.append((rows, sums, *back, query))
        # Float32 has 7 digits, of which the last two differ by the order of sums.
        for found, expected in zip(*results[::-1], strict=True):
            bound = 1e-5 * max(1.0, float(expected.abs().nan_to_num(0, 0).max()))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=bound, equal_nan=True)


@CASES
@pytest.mark.parametrize("place", [0, 3, 36], ids=str)
def test_nan_stays_where_it_belongs(memory_compiled_on, name, place):
    sizes = Sizes(1, 2, 3, 37)
    a, of = given(sizes, name, torch.float32), (FEATURES.index(name), sizes.heads)
    a.logits[0, 1, place] = a.logits[0, 7, place] = torch.nan  # a key and a query of the first head
    for passes in (memory_passes, memory_compiled_on):
        rows, _ = passes.memory_keys(a.logits, *of, None, None, False)
        query = passes.memory_queries(a.logits, *of, None, a.sums, a.gamma, EPS)
        per_head = a.reached.shape[1] // 2
        spoiled = rows[0, : 2 * per_head].isnan()
        row = 1 + (name == "l2")
        if name == "softmax":
            assert spoiled[1].all() and spoiled.sum() == sizes.n
        else:
            assert spoiled[row, place] and not spoiled[:, torch.arange(sizes.n) != place].any()
            assert not spoiled[per_head:].any()
        assert query[0, :per_head, place].isnan().all() and not query[0, per_head:].isnan().any()
        assert not query[0, :, torch.arange(sizes.n) != place].isnan().any()


@MASKED
def test_strips_of_several_blocks(memory_on, masked):
    """More tokens than a softmax over them has strips."""
    sizes = Sizes(1, 1, 1, 70_000)
    a, of = given(sizes, "softmax", torch.float32, masked), (FEATURES.index("softmax"), 1)
    rows, sums = memory_on.memory_keys(a.logits, *of, a.padding, None, True)
    expected = phi_of_keys("softmax", a.logits, 1, a.padding)
    assert_near(rows[:, :1] * sizes.n, expected * sizes.n, sizes)
    assert_near(sums, expected.sum(2), sizes)
    memory_on.memory_keys_backward_(rows, a.logits, *of, a.padding, a.reached, a.grad_sums, None)
    reached = a.reached.double()
    gradient = expected * (reached - (expected * reached).sum(2, keepdim=True))
    assert_near(rows[:, 1:2] * sizes.n, gradient * sizes.n, sizes)


@CASES
@pytest.mark.parametrize("tokens", [9, 700], ids=["one tile", "tiles"])
def test_launches_of_cuda(emulator, name, tokens):
    """One for what is of each token alone; another joins sums over tiles of tokens, or is the second of a softmax."""
    sizes, softmax = Sizes(1, 1, 3, tokens), name == "softmax"
    a, of = given(sizes, name, torch.float32), (FEATURES.index(name), 1)

    def count(call: str, *arguments) -> int:
        emulator.schedule()
        getattr(emulator, call)(*arguments)
        return emulator.launches()

    rows = emulator.memory_keys(a.logits, *of, None, None, True)[0]
    assert count("memory_keys", a.logits, *of, None, None, True) == (2 if softmax or tokens == 700 else 1)
    divisor = a.logits, *of, None, a.sums, a.gamma, EPS
    assert count("memory_queries", *divisor) == 1
    assert count("memory_queries_backward_", rows, *divisor, a.reached) == 2
    backward = rows, a.logits, *of, None, a.reached, a.grad_sums
    assert count("memory_keys_backward_", *backward, None) == (2 if softmax else 1)
    if softmax:
        assert count("memory_keys_backward_", *backward, a.grad_sums) == 1
        known = torch.stack((a.grad_sums, a.grad_sums.abs()), 1)
        assert count("memory_keys", a.logits, *of, None, known, True) == (2 if tokens == 700 else 1)


@CASES
def test_threads_change_no_bit(memory_on_cpu, name):
    sizes = Sizes(2, 2, 9, 5000)
    a, of = given(sizes, name, torch.float32, True), (FEATURES.index(name), sizes.heads)
    results = []
    for threads in (1, 2, 7):
        with on_threads(threads):
            rows, sums = memory_on_cpu.memory_keys(a.logits, *of, a.padding, None, True)
            args = a.padding, a.sums, a.gamma, EPS
            back = memory_on_cpu.memory_queries_backward_(rows, a.logits, *of, *args, a.reached)
            memory_on_cpu.memory_keys_backward_(rows, a.logits, *of, a.padding, a.reached, a.grad_sums, None)
            results.append((rows, sums, *back, memory_on_cpu.memory_queries(a.logits, *of, *args)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@CASES
def test_schemas_and_fakes(memory_on_cpu, name):
    sizes = SIZES[0]
    a, of = given(sizes, name, torch.float32, True), (FEATURES.index(name), sizes.heads)
    rows = memory_on_cpu.memory_keys(a.logits, *of, a.padding, None, True)[0].nan_to_num()
    divisor = a.sums, a.gamma, EPS
    for operator, arguments in {
        "memory_keys": (a.logits, *of, a.padding, None, False),
        "memory_queries": (a.logits, *of, a.padding, *divisor),
        "memory_queries_backward_": (rows, a.logits, *of, a.padding, *divisor, a.reached),
        "memory_keys_backward_": (rows, a.logits, *of, a.padding, a.reached, a.grad_sums, None),
    }.items():
        torch.library.opcheck(
            getattr(torch.ops.aia_kernels, operator), arguments, test_utils=("test_schema", "test_faketensor")
        )


@CASES
@pytest.mark.parametrize("way", ["small tiles", "64 bits"])
def test_tiles_of_triton(name, way, monkeypatch):
    """Many tiles of rows and tokens, strips of several tiles, and offsets in 64 bits, as a sample of 2^31 elements has
    them; two runs give the same bits."""
    memory_tiles = pytest.importorskip("aia_kernels.triton.memory_tiles", reason="Triton is not installed")
    if way == "64 bits":
        monkeypatch.setattr(memory_tiles, "is_wide", lambda _: True)
    else:
        for constant, value in {"ELEMENTS": 64, "ROWS": 4, "TOKENS": 16, "STRIP_TOKENS": 16, "STRIPS": 2}.items():
            monkeypatch.setattr(memory_tiles, constant, value)
    sizes = Sizes(2, 2, 5, 67)
    a, of = given(sizes, name, masked=True), (FEATURES.index(name), sizes.heads)
    if way == "small tiles":
        assert memory_tiles.strips_of(sizes.n, memory_tiles.memory(a.logits, *of, over_tokens=True)) == (3, 2)
    shown, results = a.reached.masked_fill(a.padding.unsqueeze(1), 0.0), []
    for passes in (memory_passes, *[backends.passes("triton", "linear_attention")] * 2):
        rows, sums = passes.memory_keys(a.logits, *of, a.padding, None, True)
        back = passes.memory_queries_backward_(rows, a.logits, *of, a.padding, a.sums, a.gamma, EPS, shown)
        passes.memory_keys_backward_(rows, a.logits, *of, a.padding, shown, a.grad_sums, None)
        results.append((rows, sums, *back, passes.memory_queries(a.logits, *of, a.padding, a.sums, a.gamma, EPS)))
    for expected, found, again in zip(*results, strict=True):
        assert_near(found, expected, sizes, term=float(shown.abs().sum()))  # gamma's gradient is a sum over all of P
        assert torch.equal(found, again)
