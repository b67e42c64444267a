"""A unit as one operator for each direction gives what its passes give one by one, bit by bit, and refuses by name."""

from __future__ import annotations

import pytest
import torch
from pass_cases import CASES, Case, same_bits_with_any_threads
from torch.library import opcheck
from torch.testing import assert_close
from unit_cases import NORMS, ONE_BY_ONE, PASSES, arguments

from aia_kernels import schemas
from aia_kernels.algorithms import attention_in_attention as algorithm
from aia_kernels.algorithms import unit as of_units
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.common.layouts import as_clips, as_input
from aia_kernels.reference import UNITS

BITS = {"rtol": 0, "atol": 0, "check_stride": True}


def given(unit: str, case: str, norm: str, ndim: int = 5):
    """A plan, x and the gradient of y of so many axes, parameters, fixed statistics, and what the passes take."""
    plan, x, grad_y, gates = arguments(unit, case, norm)
    frames = x.shape[1]
    x, grad_y = (as_input(a, ndim) for a in (x, grad_y))
    of_unit = of_units.Plan(UNITS[unit], PASSES, frames, plan.batch, plan.eps, 0.25)
    parameters = [p for gate in gates for p in gate[:3]]
    fixed = [] if norm == "batch" else [p for gate in gates for p in gate[3:]]
    return of_unit, x, grad_y, parameters, fixed, (plan._replace(passes=ONE_BY_ONE), gates)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["prime", "prime THWC", "prime CTHW", "one frame", "bf16 THWC", "fp16", "fp64"])
@pytest.mark.parametrize("unit", UNITS)
def test_as_one_by_one(unit, case, norm):
    ndim = 5 if CASES[case][1] == "CTHW" else 4
    of_unit, x, grad_y, parameters, fixed, (plan, gates) = given(unit, case, norm, ndim)
    want = algorithm.forward(plan, as_clips(x, of_unit.frames), gates)
    y, kept = of_units.forward(of_unit, x, parameters, of_units.Buffers(fixed), True)
    assert_close(y, as_input(want.y, ndim), **BITS)
    n, dtype = len(gates), accumulate_dtype(x.dtype)
    statistics = torch.cat(algorithm.statistics_of(UNITS[unit], want.inner, want.outer))
    assert_close(of_units.statistics_of(kept, n, dtype), statistics, **BITS)

    clips = (as_clips(a, of_unit.frames) for a in (grad_y, x))
    grad_x, *of_parameters = algorithm.backward(plan, *clips, parameters[::3], want.inner, want.outer)
    of_gates = [g for weight, affine in zip(*of_parameters, strict=True) for g in (weight, *affine)]
    wanted = [None if p is None else g for p, g in zip(parameters, of_gates, strict=True)]
    wanted.append(as_input(grad_x, ndim))
    contexts = UNITS[unit].inner, UNITS[unit].outer, UNITS[unit].averaged
    for left_out in (None, 0, 1, len(wanted) - 1):
        needs = [i != left_out and g is not None for i, g in enumerate(wanted)]
        found = PASSES.unit_propagate_back(grad_y, x, of_unit.frames, parameters, kept, *contexts, needs)
        assert_close(found, [g for g, needed in zip(wanted, needs, strict=True) if needed], **BITS)


#: Large enough for threads to share: an odd number of elements in a clip, so that what lies in the gradient of x must
#: be aligned, and more channels than a vector has lanes. In bf16 that gradient has no room for it.
LARGE = {
    "odd": Case((4, 7, 23, 11, 13)),
    "THWC": Case((4, 8, 24, 11, 13), "THWC"),
    "bf16 CTHW": Case((4, 7, 23, 11, 13), "CTHW", torch.bfloat16),
}


@pytest.mark.parametrize(("case", "norm"), [*((case, "batch") for case in LARGE), ("odd", "fixed")])
@pytest.mark.parametrize("unit", UNITS)
def test_threads_with_clips_of_their_own_and_threads_that_share_them(unit, case, norm, monkeypatch):
    """As many clips as threads, more, and fewer: the bits of the passes one by one."""
    monkeypatch.setitem(CASES, case, LARGE[case])
    ndim = 5 if case.endswith("CTHW") else 4
    of_unit, x, grad_y, parameters, fixed, (plan, gates) = given(unit, case, norm, ndim)
    contexts = UNITS[unit].inner, UNITS[unit].outer, UNITS[unit].averaged
    want = algorithm.forward(plan, as_clips(x, of_unit.frames), gates)
    clips = (as_clips(a, of_unit.frames) for a in (grad_y, x))
    grad_x, grad_weight, _ = algorithm.backward(plan, *clips, parameters[::3], want.inner, want.outer)

    def everything():
        y, kept = of_units.forward(of_unit, x, parameters, of_units.Buffers(fixed), True)
        needs = [*(i % 3 == 0 for i in range(len(parameters))), True]
        found = PASSES.unit_propagate_back(grad_y, x, of_unit.frames, parameters, kept, *contexts, needs)
        assert_close([y, *found], [as_input(want.y, ndim), *grad_weight, as_input(grad_x, ndim)], **BITS)
        needs[-1] = False  # with no gradient of x to lie in
        found = PASSES.unit_propagate_back(grad_y, x, of_unit.frames, parameters, kept, *contexts, needs)
        assert_close(found, list(grad_weight), **BITS)
        return [y, of_units.statistics_of(kept, len(gates), accumulate_dtype(x.dtype))]

    same_bits_with_any_threads(everything)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("unit", UNITS)
def test_nothing_is_kept_where_nobody_asks(unit, norm):
    of_unit, x, _, parameters, fixed, _ = given(unit, "prime", norm)
    (y, kept), (found, numbers) = (
        of_units.forward(of_unit, x, parameters, of_units.Buffers(fixed), keep) for keep in (True, False)
    )
    assert_close(found, y, **BITS)
    n = len(of_unit.batch)
    if norm != "batch":
        assert numbers.numel() == 0
    else:
        assert numbers.numel() == (7 * n * 4 + 63) // 64 * 64
        assert_close(*(of_units.statistics_of(of, n, torch.float32) for of in (numbers, kept)), **BITS)


def buffers(n: int, each: int, dtype: torch.dtype = torch.float32) -> list:
    made = []
    for _ in range(n):
        made += [torch.randn(1, dtype=dtype), torch.rand(1, dtype=dtype), torch.tensor(3)][:each]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_running_statistics_move_as_by_their_pass(keep, each, dtype):
    of_unit, x, _, parameters, _, _ = given("STinC", "prime", "batch")
    moved, wanted = (buffers(4, each, dtype) for _ in range(2))
    for a, b in zip(moved, wanted, strict=True):
        b.copy_(a)
    moved[each : 2 * each] = moved[2 * each : 3 * each]  # gates over T and H share one
    wanted[each : 2 * each] = wanted[2 * each : 3 * each]
    versions = [b._version for b in moved]
    _, kept = of_units.forward(of_unit, x, parameters, of_units.Buffers((), moved), keep)
    order = (1, 2, 3, 0)  # the inner context is over T, H and W
    statistics = of_units.statistics_of(kept, 4, torch.float32).split(1)
    mean, var = ([wanted[each * i + k] for i in order] for k in (0, 1))
    tracked = [wanted[each * i + 2] for i in order] if each == 3 else []
    PASSES.move_statistics_(mean, var, tracked, [statistics[i] for i in order], 0.25)
    assert_close(moved, wanted, **BITS)
    assert all(b._version > before for b, before in zip(moved, versions, strict=True))


def test_what_is_kept_may_lie_anywhere():
    """A hook on saved tensors may give it back from the middle of another storage."""
    of_unit, x, grad_y, parameters, _, _ = given("CinST", "prime", "batch")
    _, kept = of_units.forward(of_unit, x, parameters, of_units.Buffers(), True)
    moved = torch.empty(kept.numel() + 1, dtype=torch.uint8)[1:].copy_(kept)
    settings = of_unit.unit.inner, of_unit.unit.outer, False, [True] * 13
    want, found = (
        PASSES.unit_propagate_back(grad_y, x, of_unit.frames, parameters, of, *settings) for of in (kept, moved)
    )
    assert_close(found, want, **BITS)


def raw() -> tuple[list, list]:
    """Arguments of unit_propagate_ and of unit_propagate_back."""
    of_unit, x, grad_y, parameters, _, _ = given("CinST", "prime", "batch", 4)
    contexts = of_unit.unit.inner, of_unit.unit.outer, False
    settings = [1e-5] * 4, [True] * 4, 0.25, *contexts, True
    forward = [x, of_unit.frames, parameters, [], buffers(4, 3), *settings]
    _, kept = PASSES.unit_propagate_(*forward)
    return forward, [grad_y, x, of_unit.frames, parameters, kept, *contexts, [True] * 13]


WEIGHT = torch.ones(1, 2, 3, 3, 3)
BAD = {
    "x of three axes": (0, 0, torch.ones(4, 4, 4), r"x must be \[B \* T, C, H, W\] or \[B, C, T, H, W\]"),
    "no frames": (0, 1, 0, "frames must divide the .* frames of x, got 0"),
    "frames that do not divide": (0, 1, 4, "frames must divide the .* frames of x, got 4"),
    "a parameter too few": (0, 2, [WEIGHT] * 11, "parameters must hold weight, scale and shift for each gate, got 11"),
    "a gate too few": (0, 2, [WEIGHT] * 9, "every list must hold an entry for each of 4 gates, got 3"),
    "no weight": (0, 2, [None] * 12, "weight of gate 0 must be a tensor, got None"),
    "a weight of another shape": (0, 2, [torch.ones(1)] * 12, r"each weight must be \[1, 2, 3, 3, 3\]"),
    "scales of several numbers": (0, 2, [WEIGHT] * 12, "scale must hold one number for each map"),
    "a fixed number too few": (0, 3, [None] * 7, "fixed must be empty or hold mean and variance for each of 4 gates"),
    "a running number too few": (0, 4, buffers(3, 3), "running must be empty or hold mean, variance and perhaps"),
    "running of several numbers": (0, 4, [torch.ones(2)] * 12, "running must hold one number in each entry"),
    "numbers of batches in float": (0, 4, [torch.ones(1)] * 12, "running must hold numbers of batches in int64"),
    "an eps too few": (0, 5, [1e-5] * 3, "every list must hold an entry for each of 4 gates, got 3"),
    "a negative eps": (0, 5, [-1.0] * 4, "eps must not be negative"),
    "running of fixed gates": (0, 6, [False] * 4, "running statistics move toward those of the batch"),
    "an infinite momentum": (0, 7, float("inf"), "momentum must be finite"),
    "no outer context": (0, 9, 0, "outer must be 1"),
    "a gradient of another shape": (1, 0, torch.ones(1), "grad_y and x must agree"),
    "kept of another size": (1, 4, torch.ones(64, dtype=torch.uint8), "kept must be contiguous uint8"),
    "kept of another type": (1, 4, torch.ones(64), "kept must be contiguous uint8"),
    "an average over the channels of a gate over C": (
        0,
        10,
        True,
        "averaged must be of an inner context over T, H and W",
    ),
    "the same, backward": (1, 7, True, "averaged must be of an inner context over T, H and W, got 1"),
    "a scale of several numbers, backward": (
        1,
        3,
        [WEIGHT] * 12,
        "scale must hold one number for each map",
    ),
    "needs of what is not there": (
        1,
        3,
        [WEIGHT, None, None] * 4,
        "needs must be of parameters that are there, got parameter 1",
    ),
    "no answer for x": (1, 8, [True] * 12, "needs must hold an entry for each of 12 parameters and for x, got 12"),
}


@pytest.mark.parametrize("which, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(which, place, change, words):
    arguments = raw()[which]
    before = [t.clone() for t in arguments[4]] if which == 0 else []
    arguments[place] = change
    with pytest.raises(RuntimeError, match=words):
        (PASSES.unit_propagate_, PASSES.unit_propagate_back)[which](*arguments)
    if which == 0 and place != 4:
        assert_close(arguments[4], before, **BITS)  # nothing has moved


def test_running_statistics_apart_from_x():
    forward, _ = raw()
    forward[4][0] = forward[0].view(-1)[:1]
    with pytest.raises(RuntimeError, match="running is written, and must share no memory with x"):
        PASSES.unit_propagate_(*forward)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep):
    forward, back = raw()
    forward[-1] = keep
    names = dict(zip(schemas.UNIT_PASSES, (forward, back), strict=True))
    for name, values in names.items():
        operator = getattr(torch.ops.aia_kernels, name).default
        opcheck(operator, tuple(values), test_utils=("test_schema", "test_faketensor"))


def test_views_of_negatives():
    """A list's entries that are views of the negatives of what is stored are read as what they are."""
    forward, _ = raw()
    forward[-1], forward[4] = False, []
    want = PASSES.unit_propagate_(*forward)[0]
    forward[2] = [torch._neg_view(-p) for p in forward[2]]
    assert_close(PASSES.unit_propagate_(*forward)[0], want, **BITS)


def test_views_of_negatives_move():
    forward, _ = raw()
    want = [b.clone() for b in forward[4]]
    forward[4] = [torch._neg_view(-b) for b in want]
    PASSES.unit_propagate_(*forward)
    moved = forward[4]
    forward[4] = want
    PASSES.unit_propagate_(*forward)
    assert_close([b.resolve_neg() for b in moved], want, **BITS)
