"""What is particular to the Triton passes: tiles, offsets, programs. Their results are held in test_passes.py."""

from __future__ import annotations

import importlib

import pytest
import test_passes
import torch
from pass_cases import CASES, DEVICE, GateCase, activation
from plain_passes import PlainPasses

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


def test_many_programs(monkeypatch):
    """More tasks than programs: lanes carry moments and weight gradients along, and two runs agree in bits."""
    module = importlib.import_module("aia_kernels.triton.gate")  # the package names its function so

    monkeypatch.setattr(module, "TAPPED", 16)
    monkeypatch.setattr(module, "FLAT", 16)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    gate = GateCase(2, (3, 5, 7, 4, 3, 2, 1, 1, 6), torch.float32)
    test_passes.test_gate(passes, PlainPasses(), gate, "all")
    test_passes.test_gate_again(passes, PlainPasses(), gate)
    test_passes.test_gate_backward_reduce(passes, PlainPasses(), gate)
    test_passes.test_gate_backward(passes, PlainPasses(), gate, False)
    arguments = gate.grad_gate, gate.z, gate.norm, None, gate.statistics, gate.pooled, gate.weight, gate.dims
    (first, grads, sums), (second, others, same) = passes.gate_backward(*arguments), passes.gate_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip((first, sums, *grads), (second, same, *others), strict=True))


def test_map_order():
    assert [passes.map_order(order) for order in maps.ORDERS] == list(maps.ORDERS)
