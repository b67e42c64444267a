"""All of linear attention in one direction as one operator gives what its passes and products give one by one, bit by
bit, and refuses what does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from aia_kernels import backends, schemas
from aia_kernels.algorithms import linear_attention as algorithm
from aia_kernels.backends import extension
from aia_kernels.reference import Form, Weights
from aia_kernels.reference.linear_attention import FEATURES

if extension.load() is not None:
    pytest.skip("only the C++ of the CPU has them", allow_module_level=True)

PASSES = backends.passes("cpu", "linear_attention")
ONE_BY_ONE = SimpleNamespace(**{name: getattr(PASSES, name) for name in schemas.MEMORY_PASSES})

#: Samples, tokens, channels, and of each head features of a key and of a value where an output projection follows.
SIZES = {"small": (2, 7, 6, 3, 4), "one": (1, 1, 1, 1, 1), "tiles": (1, 2100, 16, 8, 16), "batch": (3, 300, 24, 5, 9)}
SIZES["one feature of a head"] = 2, 9, 6, 1, 4
#: Of most sizes several heads; as many as a power of two, by which a bias is divided without rounding.
HEADS = {"small": 2, "one": 1, "tiles": 4, "batch": 4, "one feature of a head": 2}


def given(sizes: str, feature: str, bare: bool, maps: bool, dtype: torch.dtype = torch.float32):
    """x, the gradient of y and Weights; bare: without biases and gamma."""
    (b, n, c, d, v), heads = SIZES[sizes], HEADS[sizes]
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, grad = (numbers(b, c, n).mT if maps else numbers(b, n, c) for _ in range(2))
    last = feature == "softmax"
    v = v if last else c
    bias = None if bare else numbers(2 * heads * d), numbers(heads, v), numbers(c)
    of_values = numbers(heads, v, c), None if bare else bias[1], numbers(heads, c, v) if last else None
    ends = bias[2] if last and not bare else None, None if bare or last else numbers(1)
    return x, grad, Weights(numbers(2 * heads * d, c), None if bare else bias[0], *of_values, *ends)


def both_ways(passes, feature, x, grad, weights, kept, residual=True, needs_x=True):
    """What forward and backward return, flat."""
    plan = algorithm.Plan(passes, Form(feature, len(weights.value), 1e-3, residual))
    y, logits, sums = algorithm.forward(plan, x, weights, None)
    of = logits if kept != "nothing" else None, sums if kept == "all" else None
    return [y, logits, *sums, *algorithm.backward(plan, grad, x, weights, *of, None, needs_x)]


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "tokens"])
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("feature", FEATURES)
def test_as_one_by_one(feature, sizes, bare, maps):
    for dtype, kept, residual in ((torch.float32, "all", True), (torch.float64, "nothing", False)):
        arguments = given(sizes, feature, bare, maps, dtype)
        found, expected = (
            both_ways(passes, feature, *arguments, kept, residual, needs_x=kept == "all")
            for passes in (PASSES, ONE_BY_ONE)
        )
        for got, want in zip(found, expected, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                assert_close(got, want, rtol=0, atol=0, check_stride=True)


def test_what_goes_one_by_one():
    x, _, _ = given("small", "l2", False, True)
    plan = algorithm.Plan(PASSES, Form("l2"))
    assert algorithm.can_propagate(plan, x, None)
    assert algorithm.can_propagate(plan._replace(form=Form("l2", 2)), x, None)
    assert not algorithm.can_propagate(plan._replace(shards="0"), x, None)
    assert not algorithm.can_propagate(plan._replace(passes=ONE_BY_ONE), x, None)
    assert not algorithm.can_propagate(plan, x, torch.zeros(2, 7, dtype=torch.bool))
    assert not algorithm.can_propagate(plan, x.bfloat16(), None)
    assert not algorithm.can_propagate(plan, x.new_empty((1, algorithm.CHUNK + 1, 1)), None)


def raw(feature: str = "l2") -> tuple[list, list]:
    """Arguments of memory_propagate and of memory_propagate_back."""
    x, grad, weights = given("small", feature, False, True)
    settings = FEATURES.index(feature), 1e-3, True
    forward = [x, [*weights], *settings]
    _, *kept = PASSES.memory_propagate(*forward)
    return forward, [grad, x, [*weights], kept, *settings, True]


def put(place: int, entry: object):
    return lambda values: [*values[:place], entry, *values[place + 1 :]]


BAD = {
    "x of a narrow type": (0, 0, lambda x: x.bfloat16(), "x must be float32 or float64, got bfloat16"),
    "x with gaps": (0, 0, lambda x: x[:, ::2], "x must be stored densely"),
    "empty": (0, 0, lambda x: x[:, :0], "x must be .* not empty"),
    "another feature": (0, 2, lambda _: 3, "feature must be 0 .*, got 3"),
    "negative eps": (0, 3, lambda _: -1.0, "eps must not be negative"),
    "weights too few": (0, 1, lambda w: w[:6], "weights must hold the 7 tensors of Weights, got 6"),
    "no projection": (0, 1, put(0, None), "projection and value must be tensors, got None"),
    "an odd projection": (
        0,
        1,
        put(0, torch.ones(6, 6)),
        r"projection must be \[2 heads d, C\] of the 2 heads of value",
    ),
    "a projection of other channels": (0, 1, put(0, torch.ones(12, 5)), "projection must be contiguous float32"),
    "a value of another rank": (0, 1, put(2, torch.ones(6, 6)), r"value must be \[heads, v, C\] and not empty"),
    "a value of other channels": (0, 1, put(2, torch.ones(2, 6, 5)), r"value must be contiguous float32 \[2, 6, 6\]"),
    "a narrow value": (0, 1, put(2, torch.ones(2, 4, 6)), r"value must be \[heads, C, C\] without an output"),
    "a bias's type": (0, 1, put(1, torch.ones(12).double()), r"bias must be contiguous float32 \[12\]"),
    "a bias of nothing": (0, 1, put(5, torch.ones(6)), "output_bias must be None without an output"),
    "gamma": (0, 1, put(6, torch.ones(2)), r"gamma must be contiguous float32 \[1\]"),
    "a gradient of another shape": (1, 0, lambda g: g[:1], "grad and x must agree"),
    "kept too few": (1, 3, lambda kept: kept[:2], "kept must hold Z and, together, T and s"),
    "T alone": (1, 3, put(2, None), "kept must hold Z and, together, T and s"),
    "Z of another shape": (1, 3, put(0, torch.ones(2, 6, 7)), r"logits must be contiguous float32 \[2, 12, 7\]"),
    "T's type": (1, 3, put(1, torch.ones(2, 8, 6).double()), r"t must be contiguous float32 \[2, 8, 6\]"),
    "s of another shape": (1, 3, put(2, torch.ones(2, 3)), r"s must be contiguous float32 \[2, 8\]"),
}


@pytest.mark.parametrize("which, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(which, place, change, words):
    arguments = raw()[which]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=words):
        (PASSES.memory_propagate, PASSES.memory_propagate_back)[which](*arguments)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("which", [0, 1])
def test_opcheck(which, feature):
    name = schemas.MEMORY_PROPAGATE_PASSES[which]
    arguments = tuple(raw(feature)[which])
    opcheck(getattr(torch.ops.aia_kernels, name).default, arguments, test_utils=("test_schema", "test_faketensor"))
