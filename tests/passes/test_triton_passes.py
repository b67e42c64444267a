"""What is particular to the Triton passes: tiles, offsets, programs. Their results are held in test_passes.py."""

from __future__ import annotations

import pytest
import torch
from pass_backends import few_programs
from pass_cases import CASES, DEVICE, GATES, GateCase, activation

from aia_kernels.common import maps

pytest.importorskip("triton", reason="Triton is not installed")

from aia_kernels import triton as passes
from aia_kernels.triton import tiles


@pytest.fixture
def case(request, monkeypatch):
    found = CASES[request.param]
    if found.elements:
        monkeypatch.setattr(tiles, "ELEMENTS", found.elements)
    return found


def each(*names: str):
    return pytest.mark.parametrize("case", names, indirect=True)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("runs")], indirect=True)
def test_cases_in_runs(case):
    """The cases named so read contiguous runs in every kernel with a tile for them."""
    x = activation(case)
    assert tiles.elementwise(x).run and tiles.tile(x, whole="TW", looped="H").run


def test_cases_that_walk(monkeypatch):
    """Small tiles do make kernels walk, and refuse to hold all of T and W where these are long."""
    for name, case in CASES.items():
        monkeypatch.setattr(tiles, "ELEMENTS", case.elements or 1 << 20)
        tile = tiles.tile(activation(case), whole="TW", looped="H")
        if name.startswith("walking"):
            assert tile.block[2] < case.shape[3], name
        assert (tile is None) == name.endswith("axis by axis"), name


@each("prime", "runs", "runs of several rows, ragged", "walking THWC")
def test_wide_offsets(case, monkeypatch):
    """64-bit offsets inside a clip, as a clip of 2^31 elements has them, change nothing."""
    x = activation(case)

    def run():
        gate = torch.ones(x.shape[0], maps.packed_size(x.shape, maps.CHANNEL), device=DEVICE)
        outputs = *passes.pool(x, maps.CHANNEL, None, maps.NONE), *passes.pool(x, maps.SPACETIME, gate, maps.CHANNEL)
        return *outputs, passes.recalibrate(x, gate, maps.CHANNEL)

    narrow, tile = run(), tiles.tile
    monkeypatch.setattr(tiles, "tile", lambda *args, **axes: (t := tile(*args, **axes)) and t._replace(wide=True))
    for first, second in zip(narrow, run(), strict=True):
        assert torch.equal(first, second)


def test_two_runs_of_many_programs_give_the_same_bits():
    """More tasks than programs, as test_passes.py runs them too."""
    gate = GateCase(*GATES["three maps"])
    arguments = gate.grad_gate, gate.z, gate.norm, None, gate.statistics, gate.pooled, gate.weight, gate.dims
    with few_programs():
        (first, grads, sums), (second, others, same) = (passes.gate_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((first, sums, *grads), (second, same, *others), strict=True))


def test_map_order():
    assert [passes.map_order(order) for order in maps.ORDERS] == list(maps.ORDERS)
