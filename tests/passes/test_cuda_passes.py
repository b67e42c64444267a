"""What is particular to the CUDA passes: vectors, tiles, blocks, barriers. The shared table is test_passes.py's.

The kernels run on the host emulator, and on a GPU where there is one.
"""

from __future__ import annotations

from pathlib import Path

import cuda_passes
import pytest
import test_passes
import torch
from emulator import Emulator, build
from pass_cases import Case, GateCase, activation, features_of, gate_of
from plain_passes import PlainPasses

from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

ROOT = Path(__file__).parents[2]
CONTEXTS = (maps.CHANNEL, maps.SPACETIME)
plain = PlainPasses()

#: Beyond the shared table: vectors that keep to rows, planes and frames or do not, tiles that do not hold a plane or a
#: row, frames that are one run, wide indices.
CASES = {
    "vectors in rows": Case((2, 2, 8, 4, 8)),
    "vectors in rows CTHW": Case((2, 3, 2, 4, 8), "CTHW"),
    "vectors in rows bf16": Case((1, 2, 3, 3, 16), "TCHW", torch.bfloat16),
    "half vectors in rows bf16": Case((1, 2, 3, 4, 12), "TCHW", torch.bfloat16),
    "vectors in rows, ragged maps": Case((2, 1, 3, 3, 4)),
    "vectors THWC": Case((2, 2, 40, 3, 5), "THWC"),
    "half vectors THWC bf16": Case((1, 2, 12, 2, 5), "THWC", torch.bfloat16),
    "vectors in planes": Case((2, 2, 3, 6, 6), "CTHW"),
    "vectors across planes": Case((1, 2, 44, 7, 7)),
    "vectors across planes bf16": Case((2, 2, 16, 7, 7), "TCHW", torch.bfloat16),
    "vectors across planes fp64": Case((1, 2, 6, 3, 3), "TCHW", torch.float64),
    "planes as wide as a block": Case((1, 1, 8, 15, 17)),
    "plane beyond a tile": Case((1, 2, 2, 40, 53)),
    "plane beyond a tile, vectors": Case((1, 2, 1, 44, 56)),
    "plane beyond a tile THWC": Case((1, 2, 20, 12, 19), "THWC"),
    "row beyond a tile": Case((1, 2, 1, 2, 2051)),
    "row beyond a tile, vectors": Case((1, 1, 2, 2, 2300), "CTHW"),
    "16-bit indices": Case((1, 1, 300, 2, 1)),
    "16-bit indices, vectors": Case((1, 1, 300, 2, 4)),
    "32-bit indices": Case((1, 1, 1, 1, 32770)),
}

SHORT = [name for name in CASES if "indices" not in name]

#: Batch and lengths: rows and columns beyond a tile, several chunks of planes, chunks side by side (the emulator has 12
#: blocks), more than one item for a block.
GATES = {
    "tiles": (2, (5, 41, 37), torch.float32),
    "long column": (1, (2, 700, 1), torch.float32),
    "chunks": (1, (70, 3, 5, 2, 6, 40, 33, 1, 1), torch.float64),
    "chunks side by side": (9, (64, 2, 3), torch.float32),
    "pixels": (3, (50, 1, 1), torch.float32),
}


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.sanitizer)])
def passes(request, monkeypatch):
    return cuda_passes.chosen(request, monkeypatch)


@pytest.fixture
def case(request) -> Case:
    return CASES[request.param]


def each(*names: str):
    return pytest.mark.parametrize("case", names or CASES, indirect=True)


@pytest.fixture(params=GATES)
def gate(request, passes) -> GateCase:
    return GateCase(*GATES[request.param])


@each()
@pytest.mark.parametrize("context", CONTEXTS)
def test_pool(passes, case, context):
    test_passes.test_pool(passes, plain, case, context)


@each(*SHORT)
@pytest.mark.parametrize("context, gate_context", [(1, 3), (3, 1), (1, 1), (3, 3)])
def test_pool_gated(passes, case, context, gate_context):
    test_passes.test_pool_gated(passes, plain, case, context, gate_context)


@each("vectors in rows", "vectors across planes", "vectors across planes bf16", "plane beyond a tile THWC")
@pytest.mark.parametrize("kind", ["ties", "nan", "nothing but -inf"])
def test_pool_special_values(passes, case, kind):
    test_passes.test_pool_special_values(passes, plain, case, kind)


@each()
def test_recalibrate(passes, case):
    test_passes.test_recalibrate(passes, plain, case)


@each()
@pytest.mark.parametrize("context, inner_gate_context, inner_context", [(1, 0, 0), (3, 0, 0), (3, 1, 1), (1, 3, 3)])
def test_unpool(passes, case, context, inner_gate_context, inner_context):
    test_passes.test_unpool(passes, plain, case, context, inner_gate_context, inner_context)


@each(*SHORT)
@pytest.mark.parametrize("context, gate_context", [(3, 1), (1, 3), (1, 1), (3, 3)])
def test_unpool_reduce(passes, case, context, gate_context):
    test_passes.test_unpool_reduce(passes, plain, case, context, gate_context)


def test_gate(passes, gate):
    for of_batch in ("all", "none", "last"):
        test_passes.test_gate(passes, plain, gate, of_batch)
    test_passes.test_gate_again(passes, plain, gate)
    test_passes.test_gate_backward_reduce(passes, plain, gate)
    for given in (False, True):
        test_passes.test_gate_backward(passes, plain, gate, given)


@pytest.mark.usefixtures("on_the_cpu")
def test_gates_of_fewer_blocks(emulator, monkeypatch, gate):
    """One for each map, as few as a launch may be told to have."""
    monkeypatch.setattr(emulator, "blocks", 3)
    test_passes.test_gate(emulator, plain, gate, "all")
    test_passes.test_gate_backward_reduce(emulator, plain, gate)
    test_passes.test_gate_backward(emulator, plain, gate, False)


def test_gate_moments_far_from_zero(passes):
    """The variance of numbers whose mean is 2000 times their spread: no cancellation of squares."""
    pooled = torch.zeros(3, 2, 5 * 6 * 7)
    pooled[:, 0] = 2000 + torch.randn(3, 5 * 6 * 7)
    weight = torch.zeros(1, 2, 3, 3, 3)
    weight[0, 0, 1, 1, 1] = 1
    nothing = [None]
    _, _, statistics = passes.gate(pooled, [weight], nothing, nothing, nothing, nothing, [0.0], [True], (5, 6, 7))
    torch.testing.assert_close(statistics[0, 1].double(), pooled[:, 0].double().var(correction=0), rtol=1e-5, atol=0)


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("pass_cases.DEVICE", "cpu")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("order, dtype", [("TCHW", torch.float32), ("THWC", torch.bfloat16), ("CTHW", torch.float64)])
def test_between_vectors(emulator, monkeypatch, order, dtype):
    """Tensors that begin between vectors, as a slice of a batch may, are read element by element."""
    monkeypatch.setattr(emulator, "misaligned", True)
    case = Case((2, 2, 16, 4, 8), order, dtype)
    test_passes.test_recalibrate(emulator, plain, case)
    for context, other in ((maps.CHANNEL, maps.SPACETIME), (maps.SPACETIME, maps.CHANNEL)):
        test_passes.test_pool(emulator, plain, case, context)
        test_passes.test_unpool(emulator, plain, case, context, other, other)
        test_passes.test_unpool_reduce(emulator, plain, case, context, other)
    gate = GateCase(2, (4, 4, 8, 4, 4, 8, 2, 2, 4), accumulate_dtype(dtype))
    test_passes.test_gate(emulator, plain, gate, "all")
    test_passes.test_gate_backward(emulator, plain, gate, False)


def every_pass(passes) -> list[torch.Tensor]:
    """Results of all kernels that have barriers, from the same inputs every time."""
    torch.manual_seed(0)
    results = []
    for case in (Case((1, 3, 20, 7, 8)), Case((1, 2, 40, 7, 7)), Case((1, 2, 24, 3, 5), "THWC", torch.bfloat16)):
        x = activation(case)
        for context in CONTEXTS:
            results += passes.pool(x, context, gate_of(x, maps.CHANNEL), maps.CHANNEL)
            results.append(passes.unpool_reduce(x, *features_of(x, context, plain), context, maps.CHANNEL))
            results.append(passes.recalibrate_reduce(x, x, context))
    for gate in (GateCase(40, (20, 9, 4, 3, 5, 7, 2, 2, 2), torch.float32), GateCase(2, (5, 41, 37), torch.float64)):
        n = len(gate.weight)
        norms = gate.scale, gate.shift, [None] * n, [None] * n, [1e-5] * n, [True] * n
        results += passes.gate(gate.pooled, gate.weight, *norms, gate.dims)
        results += passes.gate_again(gate.pooled, gate.weight, gate.norm, gate.dims)
        results.append(passes.gate_backward_reduce(gate.grad_gate, gate.z, gate.norm, gate.dims))
        arguments = gate.grad_gate, gate.z, gate.norm, None, gate.statistics, gate.pooled, gate.weight, gate.dims
        grad_pooled, grad_weight, sums = passes.gate_backward(*arguments)
        results += [grad_pooled, *grad_weight, sums]
    results.append(passes.column_statistics(torch.randn(1, 300, 16), None))
    attention, grad = torch.rand(1, 300, 16), torch.randn(1, 300, 16)
    results.append(passes.double_norm_backward_reduce(grad, attention, 8))
    grad_y = torch.randn(2, 170, 9)
    results += passes.residual_relu_backward(grad_y, torch.randint(256, (383,), dtype=torch.uint8))
    return results


def test_two_runs_give_the_same_bits(passes):
    """Above all where the blocks of a gate meet, in whatever order a GPU runs them."""
    assert all(torch.equal(a, b) for a, b in zip(every_pass(passes), every_pass(passes), strict=True))


@pytest.mark.usefixtures("on_the_cpu")
def test_blocks_and_threads_may_run_in_any_order(emulator):
    cuda_passes.same_in_any_order(emulator, every_pass)


@pytest.mark.usefixtures("on_the_cpu")
def test_every_barrier_is_needed(emulator):
    own = {"gate.cu", "gate_backward.cu", "packed_maps.cuh"}
    cuda_passes.every_barrier_is_needed(emulator, every_pass, {"columns.cuh", "partials.cuh", "reduce.cuh"} | own)


def test_the_sanitizer_sees_an_output_that_is_too_short():
    own = Emulator(build(ROOT / "build" / "emulator"))
    x, short = torch.randn(1, 2, 3, 20, 20), torch.empty(2 * 2 * 20 * 20 - 1)
    argmax = torch.empty(2 * 20 * 20, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        own.call(
            "pool", tuple(x.shape), 0, 0, x.flatten().numpy(), maps.CHANNEL, None, 0, short.numpy(), argmax.numpy()
        )
    own.close()
