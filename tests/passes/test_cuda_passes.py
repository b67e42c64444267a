"""What is particular to the kernels of csrc/cuda: the order of blocks and threads, and barriers.

They run on the host emulator, and on a GPU where there is one.
"""

from __future__ import annotations

from pathlib import Path

import cbam_cases
import cuda_passes
import pass_cases
import pytest
import torch
from emulator import Emulator, build
from external_pass_cases import TEAMS, TOKENS, WHOLE_BYTES, stored_features, tokens_of
from pass_backends import CUDA, on, passes_of
from pass_cases import Case, GateCase, activation, features_of, gate_of
from plain_passes import PlainPasses

from aia_kernels.common import maps

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

ROOT = Path(__file__).parents[2]
CONTEXTS = (maps.CHANNEL, maps.SPACETIME)
plain = PlainPasses()


def pools_and_gates(passes) -> list[torch.Tensor]:
    """Results of all kernels of Attention in Attention that have barriers, from the same inputs every time."""
    torch.manual_seed(0)
    results = []
    cases = Case((1, 3, 20, 7, 8)), Case((1, 2, 44, 7, 7)), Case((1, 2, 24, 3, 5), "THWC", torch.bfloat16)
    for case in (*cases, Case((1, 11, 1, 28, 28)), Case((1, 13, 4, 14, 14))):
        x = activation(case)
        for context in CONTEXTS:
            results += passes.pool(x, context, gate_of(x, maps.CHANNEL), maps.CHANNEL)
            results.append(passes.unpool_reduce(x, *features_of(x, context, plain), context, maps.CHANNEL))
            results.append(passes.recalibrate_reduce(x, x, context))
    x = activation(Case((1, 3, 32, 7, 7)))
    results.append(passes.recalibrate(x, gate_of(x, maps.SPACETIME), maps.SPACETIME))
    gates = (13, (20, 9, 4, 4, 5, 7, 2, 2, 2), torch.float32), (2, (5, 41, 37), torch.float64)
    items = (13, (4, 6, 7), torch.float32), (13, (1, 6, 5), torch.float32)  # several of a block
    for gate in (GateCase(*of) for of in (*gates, *items)):
        n = len(gate.weight)
        norms = gate.scale, gate.shift, [None] * n, [None] * n, [1e-5] * n, [True] * n
        results += passes.gate(gate.pooled, gate.weight, *norms, gate.dims)
        results += passes.gate_again(gate.pooled, gate.weight, gate.norm, gate.dims)
        results.append(passes.gate_backward_reduce(gate.grad_gate, gate.z, gate.norm, gate.dims))
        arguments = gate.grad_gate, gate.z, gate.norm, None, gate.statistics, gate.pooled, gate.weight, gate.dims
        grad_pooled, grad_weight, sums = passes.gate_backward(*arguments)
        results += [grad_pooled, *grad_weight, sums]
    for sizes, order in (((1, 3, 20, 2, 8), 0), ((1, 3, 20, 2, 3), 1)):
        gate = torch.randn(1, maps.packed_size(sizes, maps.SPACETIME), device=pass_cases.DEVICE)
        averaged = passes.average_gate(gate, sizes[1:], order)
        results += [averaged, passes.average_gate_back(averaged, sizes[1:], order)]
    return results


def double_norm_fold_and_residual(passes) -> list[torch.Tensor]:
    """Results of all kernels of external attention, from the same inputs every time."""
    torch.manual_seed(0)
    results = []
    for case in (TEAMS["chunks"], TOKENS["groups of 7"], TEAMS["longer than a team"]):
        logits, grad = tokens_of(case, 4), tokens_of(case)
        statistics, lse = passes.column_statistics(logits, None)
        mass = passes.double_norm_(logits, lse, case.group, 1e-9, None)
        reduced = passes.double_norm_backward_reduce(grad, logits, case.group)
        passes.double_norm_backward_(grad, logits, mass, reduced, case.group)
        results += [statistics, lse, logits, mass, reduced, grad]
    value, second, total, sums = (torch.randn(n, device=pass_cases.DEVICE) for n in ((35, 70), (70, 70), (70,), (35,)))
    folded, _, statistics, off = passes.fold(value, None, None, [total, total, second @ second.mT], 9.0, [], 1e-5)
    joint, center = passes.fold_sums(value, folded, sums, statistics, off, 1e-5)
    results += [folded, statistics, off, joint, center]
    results += passes.fold_back(value, None, folded, joint, center, statistics, [off, total, second], 1e-5)
    for case in (WHOLE_BYTES["tokens, chunks"], WHOLE_BYTES["maps, chunks"]):
        grad_y = stored_features(torch.randn(case[:3]), case)
        signs = passes.residual_relu_(grad_y.clone(), grad_y, None)
        results += [signs, *passes.residual_relu_backward(grad_y, signs)]
    return results


def cbam(passes) -> list[torch.Tensor]:
    """Results of all kernels of CBAM that have barriers, from the same inputs every time."""
    torch.manual_seed(0)
    results = []
    for name in ("chunks", "several warps", "chunks, channels_last", "several warps, channels_last"):
        x = cbam_cases.maps_of(cbam_cases.CHUNKS[name])
        (channel, spatial), (*_, of_positions, argmax) = cbam_cases.gates_of(x), cbam_cases.features_of(x)
        results += passes.cbam_pool_positions(x)
        results += passes.cbam_pool_channels(x, channel)
        results += passes.cbam_recalibrate_reduce(x, None, x, channel, spatial)
        results.append(passes.cbam_unpool_reduce(x, of_positions, argmax))
    return results


def memories(passes) -> list[torch.Tensor]:
    """Results of all kernels of attention by a memory per sample that have barriers, from the same inputs every time: a
    feature map with a constant, and a softmax over the features of the queries, over several tiles of tokens."""
    torch.manual_seed(0)
    results = []
    for feature, rows in ((0, 10), (2, 9)):
        sizes = (2, 18, 150), (2, rows, 150), (2, rows)
        logits, reached, sums = (1 + torch.rand(of).to(pass_cases.DEVICE) for of in sizes)
        of = logits, feature, 1, None
        phi, s = passes.memory_keys(*of, None, True)
        phi[:, rows:] = 0.0
        results += s, passes.memory_queries(*of, sums, None, 1e-3)
        results += passes.memory_queries_backward_(phi, *of, sums, None, 1e-3, reached)
        passes.memory_keys_backward_(phi, *of, reached, sums, None)
        results.append(phi)
    return results


#: By family, its kernels, and the files whose barriers they meet.
FAMILIES = {
    "attention_in_attention": (
        pools_and_gates,
        {"average.cu", "bricks.cu", "patches.cu", "reduce.cuh", "staged.cu", "strips.cu"}
        | {"gate.cu", "gate_backward.cu", "packed_maps.cuh"},
    ),
    "external_attention": (double_norm_fold_and_residual, {"columns.cuh", "fold.cu"}),
    "cbam": (cbam, {"columns.cuh", "rows.cuh"}),
    "linear_attention": (memories, {"memory_join.cu", "memory_tiles.cuh"}),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def passes(request, family, monkeypatch):
    with passes_of(family, request, monkeypatch) as found:
        yield found


@on(*CUDA)
def test_two_runs_give_the_same_bits(passes, family):
    """Above all where the blocks of a gate meet, in whatever order a GPU runs them."""
    everything, _ = FAMILIES[family]
    assert all(torch.equal(a, b) for a, b in zip(everything(passes), everything(passes), strict=True))


@on("emulator")
def test_blocks_and_threads_may_run_in_any_order(passes, family):
    cuda_passes.same_in_any_order(passes, FAMILIES[family][0])


@pytest.mark.sweep  # what it finds is a barrier too many, which makes nothing wrong
@on("emulator")
def test_every_barrier_is_needed(passes, family):
    cuda_passes.every_barrier_is_needed(passes, *FAMILIES[family])


def test_the_sanitizer_sees_an_output_that_is_too_short():
    own = Emulator(build(ROOT / "build" / "emulator"))
    x, short = torch.randn(1, 2, 3, 20, 20), torch.empty(2 * 2 * 20 * 20 - 1)
    argmax = torch.empty(2 * 20 * 20, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        own.call(
            "pool", tuple(x.shape), 0, 0, x.flatten().numpy(), maps.CHANNEL, None, 0, short.numpy(), argmax.numpy()
        )
    own.close()
