"""The passes of csrc/cuda against the plain ones in float64: on the host emulator, and on a GPU where there is one.

Error bounds. Every pass but the maximum is linear in each of its inputs, so a sum of n products is off by at most
(n + 8) roundings of the accumulation type on the sum of the products' magnitudes (8 covers what makes one product:
three maps added, reciprocals, the factors), and one rounding of the output type on the result. The sum of magnitudes is
the same pass on the magnitudes of its inputs. Without a gate the index of the maximum is exact.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulator import Emulator, build
from pass_cases import Case, in_order
from plain_passes import PlainPasses
from torch import Tensor

from aia_kernels import _extension, maps

ROOT = Path(__file__).parent.parent
CONTEXTS = (maps.CHANNEL, maps.SPACETIME)
plain = PlainPasses()


CASES = {
    "prime": Case((2, 3, 5, 7, 11)),
    "prime THWC": Case((2, 3, 5, 7, 11), "THWC"),
    "prime CTHW": Case((2, 3, 5, 7, 11), "CTHW"),
    "one frame": Case((3, 1, 3, 4, 5)),
    "one row": Case((1, 2, 3, 1, 7), "CTHW"),
    "one column": Case((1, 2, 3, 5, 1), "THWC"),
    "one channel": Case((2, 3, 1, 3, 4)),
    "one pixel": Case((2, 2, 37, 1, 1)),
    "vectors": Case((2, 2, 8, 4, 6)),
    "vectors THWC": Case((2, 2, 40, 3, 5), "THWC"),
    "vectors CTHW": Case((2, 3, 2, 4, 6), "CTHW"),
    "vectors across planes": Case((1, 2, 44, 7, 7)),
    "bf16": Case((1, 3, 4, 5, 6), "TCHW", torch.bfloat16),
    "bf16 vectors across planes": Case((1, 2, 16, 7, 7), "TCHW", torch.bfloat16),
    "bf16 THWC": Case((1, 3, 24, 5, 3), "THWC", torch.bfloat16),
    "bf16 CTHW": Case((1, 3, 3, 4, 4), "CTHW", torch.bfloat16),
    "fp16": Case((1, 2, 3, 5, 4), "CTHW", torch.float16),
    "fp16 THWC": Case((1, 2, 9, 5, 4), "THWC", torch.float16),
    "fp64": Case((2, 3, 4, 5, 3), "TCHW", torch.float64),
    "fp64 THWC": Case((1, 3, 6, 5, 3), "THWC", torch.float64),
    "plane beyond a tile": Case((1, 2, 2, 40, 53)),
    "plane beyond a tile, vectors": Case((1, 2, 1, 44, 56)),
    "plane beyond a tile THWC": Case((1, 2, 20, 12, 19), "THWC"),
    "row beyond a tile": Case((1, 2, 1, 2, 2051)),
    "row beyond a tile, vectors": Case((1, 1, 2, 2, 2300), "CTHW"),
    "16-bit indices": Case((1, 1, 300, 2, 1)),
    "32-bit indices": Case((1, 1, 1, 1, 32770)),
}


@pytest.fixture(scope="module")
def emulator():
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    found = Emulator(build(ROOT / "build" / "emulator"))
    yield found
    found.close()


class Device:
    """The operators on the GPU, for CPU tensors."""

    def __getattr__(self, name: str):
        def call(*arguments):
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            results = getattr(torch.ops.aia_kernels, name)(*moved)
            return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()

        return call


RUNNERS = ["emulator"]
if torch.cuda.is_available():
    RUNNERS.append(pytest.param("device", marks=pytest.mark.sanitizer))


@pytest.fixture(params=RUNNERS)
def passes(request):
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if (reason := _extension.cuda_reason()) is not None:
        pytest.skip(reason)
    return Device()


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


def normal(case: Case, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return in_order(torch.randn(case.shape, generator=generator, dtype=torch.float64).to(case.dtype), case.order)


def gate_of(x: Tensor, context: int, seed: int = 1) -> Tensor | None:
    """A packed gate, between 0 and 1 as a sigmoid leaves it."""
    if context == maps.NONE:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = x.shape[0], maps.packed_size(x.shape, context)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(maps.accumulate_dtype(x.dtype))


def features_of(x: Tensor, case: Case, context: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """A gradient of pooled features and an argmax, of another activation."""
    generator = torch.Generator().manual_seed(seed)
    shape = x.shape[0], 2, maps.packed_size(x.shape, context)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(maps.accumulate_dtype(x.dtype))
    return grad, plain.pool(normal(case, seed), context, None, maps.NONE)[1]


def changed(arguments, change):
    """The arguments of a pass with every floating-point tensor changed."""
    return [change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check(found: Tensor, pass_, *arguments, terms: int) -> None:
    """found against a plain pass in float64, within the bound of the module's docstring."""
    exact = pass_(*changed(arguments, Tensor.double))
    magnitude = pass_(*changed(arguments, lambda a: a.double().abs()))
    bound = (terms + 8) * torch.finfo(maps.accumulate_dtype(arguments[0].dtype)).eps * magnitude
    bound += torch.finfo(found.dtype).eps * exact.abs()
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"error up to {(error / bound).nan_to_num(torch.inf).max():.3g} times its bound"


def longest(case: Case) -> int:
    return max(case.shape[1:])


@pytest.mark.parametrize("gate_context", [maps.NONE, *CONTEXTS], ids=["no gate", "channel gate", "spacetime gate"])
@pytest.mark.parametrize("context", CONTEXTS, ids=["channel", "spacetime"])
def test_pool(passes, case, context, gate_context):
    x = normal(case)
    gate = gate_of(x, gate_context)
    pooled, argmax = passes.pool(x, context, gate, gate_context)
    check(pooled, lambda *a: plain.pool(*a)[0], x, context, gate, gate_context, terms=longest(case))
    assert argmax.dtype == maps.index_dtype(x.shape, context)
    expected = plain.pool(x, context, gate, gate_context)[1]
    if gate_context == maps.NONE:
        assert torch.equal(argmax, expected)
        return
    # Products one rounding apart may change places: then what the index points at is the maximum but for a rounding.
    product = x.double() * plain.field(gate.double(), x, gate_context)
    order = maps.storage_order(x)
    largest = maps.unpack(pooled[:, 0].double(), x.shape, context, order)
    indices = maps.unpack(argmax.long(), x.shape, context, order)
    for axis, largest_map, index in zip(maps.POOLED_AXES[context], largest, indices, strict=True):
        axes = [0, *(1 + "TCHW".index(letter) for letter in maps.GATE_AXES[axis] + axis)]
        chosen = product.permute(axes).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(largest_map, chosen, rtol=8 * torch.finfo(pooled.dtype).eps, atol=0)


@pytest.mark.parametrize("context", CONTEXTS, ids=["channel", "spacetime"])
def test_pool_takes_the_first_of_equals_and_propagates_nan(passes, case, context):
    x = (normal(case) * 2).round()
    generator = torch.Generator().manual_seed(3)
    kind = torch.randint(0, 40, x.shape, generator=generator)
    for which, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[kind == which] = value
    pooled, argmax = passes.pool(x, context, None, maps.NONE)
    expected, expected_argmax = plain.pool(x, context, None, maps.NONE)
    assert torch.equal(argmax, expected_argmax)
    # Sums of whole numbers are exact; their mean takes a reciprocal and a product.
    torch.testing.assert_close(pooled, expected, rtol=4 * torch.finfo(pooled.dtype).eps, atol=0, equal_nan=True)


def test_pool_of_minus_infinity_points_at_the_first(passes):
    x = torch.full((1, 3, 5, 2, 4), -torch.inf)
    for context in CONTEXTS:
        pooled, argmax = passes.pool(x, context, None, maps.NONE)
        assert (pooled == -torch.inf).all()
        assert (argmax == 0).all()


@pytest.mark.parametrize("inner_context", [maps.NONE, *CONTEXTS], ids=["alone", "channel inside", "spacetime inside"])
@pytest.mark.parametrize("context", CONTEXTS, ids=["channel", "spacetime"])
def test_unpool(passes, case, context, inner_context):
    grad_y = normal(case)
    arguments = [gate_of(grad_y, context), *features_of(grad_y, case, context), context]
    if inner_context == maps.NONE:
        arguments += [None, maps.NONE, None, None, maps.NONE]
    else:  # an inner gate of the other context, as STinC2 has it
        gate_context = maps.CHANNEL + maps.SPACETIME - inner_context
        features = features_of(grad_y, case, inner_context, seed=3)
        arguments += [gate_of(grad_y, gate_context, seed=4), gate_context, *features, inner_context]
    grad_x = passes.unpool(grad_y, *arguments)
    assert grad_x.stride() == grad_y.stride()
    check(grad_x, plain.unpool, grad_y, *arguments, terms=15)


@pytest.mark.parametrize("gate_context", CONTEXTS, ids=["channel gate", "spacetime gate"])
@pytest.mark.parametrize("context", CONTEXTS, ids=["channel", "spacetime"])
def test_unpool_reduce(passes, case, context, gate_context):
    x = normal(case)
    arguments = x, *features_of(x, case, context), context, gate_context
    check(passes.unpool_reduce(*arguments), plain.unpool_reduce, *arguments, terms=6 * longest(case))


def test_threads_may_run_in_any_order(emulator, case):
    x = normal(case)
    gate = gate_of(x, maps.CHANNEL)
    forward = [emulator.pool(x, context, gate, maps.CHANNEL) for context in CONTEXTS]
    emulator.schedule(backward=True)
    try:
        backward = [emulator.pool(x, context, gate, maps.CHANNEL) for context in CONTEXTS]
    finally:
        emulator.schedule()
    for (pooled, argmax), (pooled_backward, argmax_backward) in zip(forward, backward, strict=True):
        assert torch.equal(pooled, pooled_backward)
        assert torch.equal(argmax, argmax_backward)


def test_every_barrier_is_needed(emulator):
    """Skipping any one barrier must show, or the emulator would not notice that one is missing."""
    x = normal(Case((1, 3, 20, 7, 8)))
    expected = [emulator.pool(x, context, None, maps.NONE) for context in CONTEXTS]
    barriers = emulator.barriers()
    assert len(barriers) == 2
    for barrier in barriers:
        emulator.schedule(dropped=barrier)
        try:
            found = [emulator.pool(x, context, None, maps.NONE) for context in CONTEXTS]
        finally:
            emulator.schedule()
        assert any(
            not torch.equal(a, b) for a, b in zip(found, expected, strict=True) for a, b in zip(a, b, strict=True)
        )


def test_the_sanitizer_sees_an_output_that_is_too_short(emulator):
    own = Emulator(build(ROOT / "build" / "emulator"))
    x, short = torch.randn(1, 2, 3, 20, 20), torch.empty(2 * 2 * 20 * 20 - 1)
    argmax = torch.empty(2 * 20 * 20, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        own.call(
            "pool", tuple(x.shape), 0, 0, x.flatten().numpy(), maps.CHANNEL, None, 0, short.numpy(), argmax.numpy()
        )
    own.close()
