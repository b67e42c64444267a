"""A unit with fixed statistics as one operator: of the CPU, and of CUDA both ways, in clusters and in groups of clips.

The CUDA kernels run on the host emulator, and on a GPU where there is one. The plain passes in float64 give the right
answers, and a bound on errors with them.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_passes
import pass_cases
import pytest
import torch
from pass_backends import CPU_ON_THREADS, CUDA, on, on_threads, passes_fixture
from pass_cases import GATE_ROUNDINGS, Case, activation, epsilon, special
from plain_passes import PlainPasses
from torch import Tensor

import aia_kernels
from aia_kernels import backends
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.reference import UNITS

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

UNIT_NAMES = ("C", "ST", "CinST", "STinC")

#: Prime and degenerate sizes, every order and type, slices that move in vectors and that do not, blocks without
#: channels, and a last block with fewer than the others.
CASES = {
    **{
        name: pass_cases.CASES[name]
        for name in (
            *("prime", "prime THWC", "prime CTHW"),
            *("one frame", "one row", "one column", "one channel", "one pixel"),
        )
    },
    "one element": Case((1, 1, 1, 1, 1)),
    "vectors": Case((1, 2, 24, 4, 4)),
    "vectors across planes bf16": Case((2, 2, 40, 7, 7), "TCHW", torch.bfloat16),
    "vectors CTHW": Case((1, 3, 8, 2, 4), "CTHW"),
    "vectors THWC": Case((1, 2, 40, 3, 5), "THWC"),
    "bf16": pass_cases.CASES["bf16"],
    "fp16 CTHW": pass_cases.CASES["fp16"],
    "fp64": pass_cases.CASES["fp64"],
    "fp64 THWC": Case((1, 3, 6, 3, 3), "THWC", torch.float64),
}
SHORT = ("prime", "prime THWC", "vectors across planes bf16", "vectors CTHW")


class Parameters(NamedTuple):
    """Of each gate, as the operator takes them."""

    weight: list[Tensor]
    scale: list[Tensor | None]
    shift: list[Tensor | None]
    mean: list[Tensor | None]
    var: list[Tensor | None]
    eps: list[float]


def parameters_of(passes, x: Tensor, unit: str) -> Parameters:
    """Of the order of one; some absent, and each weight a view of one in the paper's order, not all contiguous."""
    dtype, found = x.dtype, Parameters([], [], [], [], [], [])
    order = passes.map_order(maps.storage_order(x))
    for context in (maps.CHANNEL, maps.SPACETIME):
        if context not in (UNITS[unit].inner, UNITS[unit].outer):
            continue
        weight = [0.3 * torch.randn(1, 2, 3, 3, 3, dtype=dtype) for _ in maps.POOLED_AXES[context]]
        weight[-1] = weight[-1].contiguous(memory_format=torch.channels_last_3d)
        found.weight.extend(maps.weights_in_order(weight, context, order))
        for i in range(len(weight)):
            norm = 1 + 0.3 * torch.randn(4, 1, dtype=dtype).tanh()
            for numbers, number in zip(found[1:5], norm, strict=True):
                numbers.append(None if i == 1 else number)
            found.eps.append(1e-5 if i else 0.1)
    return found


def dims_of(plain, x: Tensor, context: int) -> list[int]:
    order = plain.map_order(maps.storage_order(x))
    return [d for m in maps.map_dims(x.shape, context, order) for d in m]


def gates_of(plain, pooled: Tensor, x: Tensor, parameters: Parameters, rows: slice, context: int) -> Tensor:
    """The gates of a context, in the type of what is pooled."""
    *numbers, eps = (values[rows] for values in parameters)
    numbers = [[None if n is None else n.to(pooled.dtype) for n in of] for of in numbers]
    return plain.gate(pooled, *numbers, eps, [False] * len(eps), dims_of(plain, x, context))[0]


def expected_of(passes, x: Tensor, parameters: Parameters, unit: str) -> tuple[Tensor, float]:
    """y in float64, and a bound on the error of its gates, in roundings of the accumulation type.

    A pooled feature is off by one rounding for each element of an axis and 8 more, z by 54 more, on the convolution of
    magnitudes, and a gate by a quarter of that times scale * rstd, and GATE_ROUNDINGS. An error of the inner gate is
    one of what is pooled, of which the magnitudes are those of x, as gates do not exceed 1.
    """
    plain, described, double = PlainPasses(passes.map_order), UNITS[unit], x.double()
    guide, error = None, 0.0
    for context in (described.inner, described.outer):
        if context == maps.NONE:
            continue
        rows = described.rows(context)
        pooled, _ = plain.pool(double, context, guide, described.inner if guide is not None else maps.NONE)
        guide = gates_of(plain, pooled, x, parameters, rows, context)
        magnitudes, _ = plain.pool(double.abs(), context, None, maps.NONE)
        weights = [w.double().abs() for w in parameters.weight[rows]]
        largest = plain.conv(magnitudes, weights, dims_of(plain, x, context)).max().item()
        slope = max(
            1.0 if scale is None else (scale.double().abs() / (var.double() + eps).sqrt()).item()
            for scale, var, eps in zip(parameters.scale[rows], parameters.var[rows], parameters.eps[rows], strict=True)
        )
        error = slope / 4 * largest * (error + max(x.shape[1:]) + 8 + 54) + GATE_ROUNDINGS
    return double * plain.field(guide, double, described.outer), error


def check(passes, y: Tensor, x: Tensor, parameters: Parameters, unit: str) -> None:
    x = x.cpu()
    want, roundings = expected_of(passes, x, parameters, unit)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    bound = roundings * epsilon(accumulate_dtype(x.dtype)) * x.double().abs() + epsilon(x.dtype) * want.abs()
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"error up to {(error / bound).nan_to_num(torch.inf).max():.3g} times its bound"


passes = passes_fixture("attention_in_attention")


@pytest.fixture(params=UNIT_NAMES)
def unit(request) -> str:
    return request.param


def evaluated(passes, x: Tensor, parameters: Parameters, unit: str, **way) -> Tensor:
    """y, on the CPU as the parameters are."""
    moved = [[t.to(x.device) if isinstance(t, Tensor) else t for t in of] for of in parameters]
    return passes.evaluate(x, *moved, UNITS[unit].inner, UNITS[unit].outer, **way).cpu()


@on(*CPU_ON_THREADS, *CUDA)
@pytest.mark.parametrize("name", CASES)
def test_the_way_that_is_chosen(passes, name, unit):
    x = activation(CASES[name])
    parameters = parameters_of(passes, x, unit)
    check(passes, evaluated(passes, x, parameters, unit), x, parameters, unit)


@on("emulator")
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("cluster", [1, 2, 4, 16])
def test_clusters_of_every_size(passes, name, unit, cluster):
    x = activation(CASES[name])
    parameters = parameters_of(passes, x, unit)
    check(passes, evaluated(passes, x, parameters, unit, cluster=cluster), x, parameters, unit)


@on("emulator")
@pytest.mark.parametrize("name", [*SHORT, "one element", "fp16 CTHW", "fp64"])
@pytest.mark.parametrize("clips", [1, 3])
def test_groups(passes, name, unit, clips):
    """What queues the passes; the passes themselves have tests of their own."""
    case = CASES[name]
    x = activation(case._replace(shape=(5, *case.shape[1:])))
    parameters = parameters_of(passes, x, unit)
    check(passes, evaluated(passes, x, parameters, unit, cluster=0, clips=clips), x, parameters, unit)


@on("cpu")
@pytest.mark.parametrize("name", ["prime", "prime THWC", "bf16"])
def test_threads_with_clips_of_their_own_and_threads_that_share_them(passes, name, unit):
    """As many clips as threads, and fewer: the same bits."""
    x = activation(CASES[name]._replace(shape=(4, *CASES[name].shape[1:])))
    parameters, results = parameters_of(passes, x, unit), []
    for threads in (1, 2, 3, 4, 16):
        with on_threads(threads):
            results.append(evaluated(passes, x, parameters, unit))
    assert all(torch.equal(result, results[0]) for result in results)


@on("cpu")
@pytest.mark.parametrize("kind", ["nan", "nothing but -inf"])
def test_special_values_on_a_cpu(passes, unit, kind):
    check_special_values(passes, unit, kind)


@on("emulator")
@pytest.mark.parametrize("way", [{"cluster": 2}, {"cluster": 0}], ids=["clusters", "groups"])
@pytest.mark.parametrize("kind", ["nan", "nothing but -inf"])
def test_special_values(passes, unit, way, kind):
    check_special_values(passes, unit, kind, **way)


def check_special_values(passes, unit, kind, **way):
    """What is NaN is NaN, and the rest as it should be."""
    x = special(Case((2, 3, 5, 4, 6)), kind)
    parameters = parameters_of(passes, x, unit)
    got, (want, _) = evaluated(passes, x, parameters, unit, **way), expected_of(passes, x, parameters, unit)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "shape, dtype, unit, fits",
    [
        ((8, 8, 64, 56, 56), torch.bfloat16, "CinST", False),
        ((8, 8, 128, 28, 28), torch.float32, "CinST", False),
        ((8, 8, 128, 28, 28), torch.bfloat16, "CinST", True),
        ((8, 8, 256, 14, 14), torch.float32, "CinST", True),
        ((8, 8, 256, 14, 14), torch.bfloat16, "CinST", True),
        ((8, 8, 512, 7, 7), torch.float32, "CinST", True),
        ((8, 8, 512, 7, 7), torch.bfloat16, "STinC", True),
    ],
)
def test_what_fits(emulator, shape, dtype, unit, fits):
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert (emulator.cluster_size(x, UNITS[unit].inner, UNITS[unit].outer) > 0) == fits


class WithEvaluate(PlainPasses):
    """Plain passes, and the emulator's evaluate, which counts its calls."""

    calls = 0

    def __init__(self, emulator):
        super().__init__()
        self._emulator = emulator

    def evaluate(self, *arguments):
        self.calls += 1
        return self._emulator.evaluate(*arguments)


@pytest.mark.parametrize("name", [*UNIT_NAMES, "STinC2"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_path_of_calls_without_gradients(emulator, name, channels_last, monkeypatch):
    """Taken where all statistics are fixed and no gradients wanted, except by the averaged unit; the same results."""
    found = WithEvaluate(emulator)
    monkeypatch.setattr(backends, "select", lambda *_: "cpu")
    monkeypatch.setattr(backends, "passes", lambda *_: found)
    module = getattr(aia_kernels, name)(3).double()
    x = torch.randn(6, 4, 5, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    module(x)  # moves the running statistics
    assert found.calls == 0
    module.eval()
    expected = module(x).detach()
    assert found.calls == 0
    with torch.no_grad():
        y = module(x)
    assert found.calls == (name != "STinC2")
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


def everything(emulator) -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    for case in (Case((1, 2, 8, 5, 4)), Case((1, 3, 10, 3, 3), "THWC")):
        x = activation(case)
        for unit in UNIT_NAMES:
            parameters = parameters_of(emulator, x, unit)
            results.append(evaluated(emulator, x, parameters, unit, cluster=2))
    return results


@on("emulator")
def test_blocks_and_threads_may_run_in_any_order(passes):
    cuda_passes.same_in_any_order(passes, everything)


@on("emulator")
def test_every_barrier_is_needed(passes):
    cuda_passes.every_barrier_is_needed(passes, everything, {"cluster.cuh"})
