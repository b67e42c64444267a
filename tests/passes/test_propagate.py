"""All passes of a unit as one give what they give one by one, bit by bit, and refuse the same."""

from __future__ import annotations

import pytest
import torch
from pass_cases import CASES, TILES, special
from torch.library import opcheck
from torch.testing import assert_close
from unit_cases import NORMS, ONE_BY_ONE, PASSES, UNITS_IN_ONE, arguments

from aia_kernels import schemas
from aia_kernels.algorithms import attention_in_attention as algorithm
from aia_kernels.common.layouts import dense_clips
from aia_kernels.reference import UNITS


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["prime", "prime THWC", "prime CTHW", "one frame", "bf16 THWC", "fp16", "fp64"])
@pytest.mark.parametrize("unit", UNITS_IN_ONE)
def test_as_one_by_one(unit, case, norm):
    plan, x, grad_y, gates = arguments(unit, case, norm)
    weights = [gate.weight for gate in gates]
    found = []
    for passes in (PASSES, ONE_BY_ONE):
        plan = plan._replace(passes=passes)
        result = algorithm.forward(plan, x, gates)
        for needs_x in (True, False):
            found.append((result, algorithm.backward(plan, grad_y, x, weights, result.inner, result.outer, needs_x)))
    for as_one, one_by_one in zip(found[:2], found[2:], strict=True):
        for got, want in zip(tensors(as_one), tensors(one_by_one), strict=True):
            assert_close(got, want, rtol=0, atol=0, check_stride=True)


@pytest.mark.parametrize("kind", ["nan", "few nan", "nothing but -inf", "zeros of both signs"])
@pytest.mark.parametrize("case", ["bf16 THWC", "fp16", "fp64", *TILES])
@pytest.mark.parametrize("unit", UNITS_IN_ONE)
def test_evaluate_as_one_by_one(unit, case, kind):
    """It finds maxima without their indices."""
    plan, _, _, gates = arguments(unit, "fp64" if "fp64" in case else "prime", "fixed")
    x = dense_clips(special(TILES.get(case) or CASES[case], kind))
    want = algorithm.forward(plan._replace(passes=ONE_BY_ONE), x, gates).y
    assert_close(algorithm.evaluate(plan._replace(passes=PASSES), x, gates), want, rtol=0, atol=0, equal_nan=True)


def tensors(found) -> list:
    """All tensors of nested results, in order; None where one is not there."""
    if isinstance(found, torch.Tensor) or found is None:
        return [found]
    return [t for part in found for t in tensors(part)]


def test_wide_norms_and_process_groups_go_one_by_one():
    plan, *_ = arguments("CinST", "prime", "batch")
    plan = plan._replace(passes=PASSES)
    assert algorithm.can_propagate(plan)
    assert not algorithm.can_propagate(plan._replace(wide_norms=True))
    assert not algorithm.can_propagate(plan._replace(groups=("", "", "0", "")))
    assert not algorithm.can_propagate(plan._replace(unit=UNITS["STinC2"]))
    assert not algorithm.can_propagate(plan._replace(passes=ONE_BY_ONE))


def raw(unit: str = "CinST") -> tuple[list, list]:
    """Arguments of propagate and of propagate_back."""
    _, x, grad_y, gates = arguments(unit, "prime", "batch")
    weight, *norms = ([*of] for of in zip(*gates, strict=True))
    contexts = UNITS[unit].inner, UNITS[unit].outer
    forward = [x, weight, *norms, [1e-5] * len(gates), [True] * len(gates), *contexts]
    _, *kept = PASSES.propagate(*forward)
    return forward, [grad_y, x, weight, kept, *contexts, True]


BAD = {
    "no outer context": (0, 9, 0, "outer must be 1"),
    "both contexts the same": (0, 8, 3, "inner must be 0 or the context that outer is not, got 3 and 3"),
    "an entry of batch too few": (0, 7, [True] * 3, "every list must hold an entry for each of 4 gates, got 3"),
    "a weight too many": (1, 2, [torch.ones(1, 2, 3, 3, 3)] * 5, "every list must hold an entry for each of 4 gates"),
    "too few that are kept": (1, 3, [torch.ones(1)] * 4, "kept must hold four tensors for each of 2 contexts, got 4"),
    "kept of another shape": (1, 3, [torch.ones(1)] * 8, "pooled must be contiguous float32"),
    "a gradient of another shape": (1, 0, torch.ones(1), "grad_y and x must agree"),
}


@pytest.mark.parametrize("which, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(which, place, change, words):
    arguments = raw()[which]
    arguments[place] = change
    with pytest.raises(RuntimeError, match=words):
        (PASSES.propagate, PASSES.propagate_back)[which](*arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_opcheck(which):
    name = schemas.PROPAGATE_PASSES[which]
    arguments = raw()[which]
    opcheck(
        getattr(torch.ops.aia_kernels, name).default,
        tuple(arguments),
        test_utils=("test_schema", "test_faketensor"),
    )
