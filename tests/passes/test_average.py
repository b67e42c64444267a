"""STinC2's averaged gate: the passes that CUDA and the CPU have for it, and PyTorch's operators in their place."""

from __future__ import annotations

import pass_cases
import pytest
import torch
from agreement import assert_within_budget
from pass_backends import CPU, CUDA, each, on, passes_fixture
from pass_cases import Case, agrees
from raw_arguments import REFUSED, changed, implementation, put, to, wide

from aia_kernels import backends, schemas, testing
from aia_kernels.algorithms import attention_in_attention as algorithm
from aia_kernels.backends import extension
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.modules import STinC2

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")
FAMILY = "attention_in_attention"

#: Beyond the shared table: several boxes along each axis, more channels than threads share, and many positions.
CASES = pass_cases.CASES | {
    "many channels": Case((2, 3, 300, 3, 2)),
    "many channels THWC": Case((2, 3, 300, 3, 2), "THWC"),
    "boxes": Case((1, 18, 2, 35, 70)),
    "boxes THWC": Case((1, 18, 3, 20, 66), "THWC"),
    "boxes CTHW": Case((3, 4, 9, 40, 9), "CTHW"),
}


passes = passes_fixture(FAMILY)


def random_map(case: Case, context: int) -> torch.Tensor:
    sizes = case.shape[0], maps.packed_size(case.shape, context)
    return torch.randn(sizes, dtype=accumulate_dtype(case.dtype)).to(pass_cases.DEVICE)


@each((CPU, CASES), (CUDA, CASES))
def test_against_operators_of_pytorch(passes, case):
    sizes, order = case.shape, passes.map_order(case.order)
    average, spread = algorithm.average_over_channels, algorithm.spread_over_channels
    for context, forms, terms in ((maps.SPACETIME, average, 3 * sizes[2]), (maps.CHANNEL, spread, max(sizes))):
        given = random_map(case, context)
        found = forms(passes, given, sizes, order)
        want, magnitudes = (forms(None, t.cpu().double(), sizes, order) for t in (given, given.abs()))
        assert found.dtype == given.dtype and found.shape == want.shape
        agrees(found, want, magnitudes, terms)


@on("emulator")
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_the_unit_takes_them(passes, layout, monkeypatch):
    calls = []
    for name in schemas.AVERAGE_PASSES:
        own = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, own=own, name=name: calls.append(name) or own(*a), raising=False)
    monkeypatch.setattr(backends, "passes", lambda *_: passes)
    monkeypatch.setattr(algorithm, "can_evaluate", lambda _: False)
    unit = testing.randomise(STinC2(num_segments=2))
    x = testing.make_input(testing.Shape(2, 2, 3, 4, 5), torch.float32, layout)
    assert_within_budget(testing.compare(unit, x, torch.randn_like(x), "cpu"))
    # Averaged once: the backward finds what the forward made.
    assert calls == ["average_gate", "average_gate_back"]


GATE, GRAD = ((2, maps.packed_size((2, 3, 4, 5, 6), context)) for context in (maps.SPACETIME, maps.CHANNEL))

#: Operator, argument, what it becomes, the words expected.
BAD = [
    ("average_gate", 0, to(torch.bfloat16), "gate must be float32 or float64"),
    ("average_gate", 0, lambda t: t[:, 1:], r"gate must be contiguous float32 \[2, 252\]"),
    ("average_gate", 0, wide(1), "gate must be contiguous"),
    ("average_gate", 0, lambda t: t[:0], r"gate must be \[B, M\] with B > 0"),
    ("average_gate_back", 0, lambda t: t[0], r"grad must be \[B, M\] with B > 0"),
    ("average_gate_back", 1, put([3, 4, 5]), r"sizes must be lengths of T, C, H and W"),
    ("average_gate_back", 1, put([3, 0, 5, 6]), r"sizes must be lengths of T, C, H and W"),
    ("average_gate", 2, put(3), "order must be a place in maps.ORDERS, got 3"),
]


@pytest.mark.parametrize("key", ["CPU", "CUDA"])
@pytest.mark.parametrize("name, place, change, words", BAD)
def test_what_is_refused(name, place, change, words, key):
    if (reason := extension.load() if key == "CPU" else extension.without_cuda()) is not None:
        pytest.skip(reason)
    good = [torch.randn(GATE if name == "average_gate" else GRAD), [3, 4, 5, 6], 0]
    with pytest.raises(REFUSED, match=words):
        implementation(key, name, changed(good, place, change))


def test_an_order_that_the_cpu_does_not_store():
    if (reason := extension.load()) is not None:
        pytest.skip(reason)
    for name, sizes in (("average_gate", GATE), ("average_gate_back", GRAD)):
        with pytest.raises(REFUSED, match="order must be that in which the CPU stores maps, got 2"):
            implementation("CPU", name, [torch.randn(sizes), [3, 4, 5, 6], 2])


@pytest.mark.parametrize("name, sizes, found", [("average_gate", GATE, GRAD), ("average_gate_back", GRAD, GATE)])
def test_fakes(name, sizes, found):
    operator = getattr(torch.ops.aia_kernels, name)
    result = operator(torch.empty(sizes, device="meta", dtype=torch.float64), [3, 4, 5, 6], 2)
    assert result.shape == found and result.dtype == torch.float64
