"""All of CBAM in one direction as one operator gives what its passes give one by one, bit by bit,
and refuses what does not fit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pass_cases import same_bits_with_any_threads
from torch.library import opcheck
from torch.testing import assert_close

from aia_kernels import backends, schemas
from aia_kernels.algorithms import cbam as algorithm
from aia_kernels.algorithms import cbam_layer as layer
from aia_kernels.algorithms.unit import statistics_of
from aia_kernels.backends import extension

if extension.load() is not None:
    pytest.skip("only the C++ of the CPU has them", allow_module_level=True)

PASSES = backends.passes("cpu", "cbam")
NAMES = schemas.CBAM_PASSES + schemas.CONVOLVE_PASSES + schemas.CHANNEL_GATE_PASSES + schemas.SPATIAL_GATE_PASSES
ONE_BY_ONE = SimpleNamespace(**{name: getattr(PASSES, name) for name in NAMES})
BITS = {"rtol": 0, "atol": 0, "check_stride": True}

#: Samples, channels, height and width: fewer samples than threads and more, rows of less than a vector and of several.
SIZES = {"small": (2, 6, 3, 5), "one": (1, 1, 1, 2), "batch": (5, 33, 7, 7), "tiles": (1, 70, 41, 50)}
GATES = {"both": (True, True), "channel": (True, False), "spatial": (False, True)}
NORMS = ("batch", "fixed", "none")


def given(sizes: str, gates: str, norm: str, bare: bool, channels_last: bool, dtype=torch.float64):
    """A plan, x, both gradients, the learned parameters and the fixed mean and variance; bare: without biases, scale
    and shift."""
    b, c, h, w = SIZES[sizes]
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, *grads = (numbers(b, c, h, w).contiguous(memory_format=layout) for _ in range(3))
    has_channel, has_spatial = GATES[gates]
    hidden = max(1, c // 3)
    mlp = [numbers(hidden, c), None if bare else numbers(hidden), numbers(c, hidden), None if bare else numbers(c)]
    affine = [None, None] if bare or norm == "none" else [numbers(1), numbers(1)]
    of_gate = [numbers(1, 2, 3, 3), *affine]
    parameters = (mlp if has_channel else [None] * 4) + (of_gate if has_spatial else [None] * 3)
    fixed = [numbers(1), numbers(1).exp()] if norm == "fixed" and has_spatial else []
    plan = algorithm.Plan(PASSES, batch=norm == "batch" and has_spatial, eps=1e-3 if norm != "none" else 0.0)
    return plan, x, grads, parameters, fixed


def one_by_one(plan, x, grads, parameters, fixed):
    """Results, statistics, and gradients of parameters and of x."""
    plan = plan._replace(passes=ONE_BY_ONE)
    of_all = algorithm.Parameters(*parameters, *(fixed or (None, None)))
    results, kept = algorithm.forward(plan, x, of_all)
    of_confounder = grads[1] if plan.confounder else None
    grad_x, found = algorithm.backward(plan, grads[0], of_confounder, x, of_all, kept)
    return results, kept.statistics, [*algorithm.typed(found, parameters), grad_x]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("sizes", SIZES)
def test_as_one_by_one(sizes, gates, norm, channels_last):
    bare = sizes == "small"
    plan, x, grads, parameters, fixed = given(sizes, gates, norm, bare, channels_last)
    for confounder in (False, True):
        plan = plan._replace(confounder=confounder)
        want, statistics, wanted = one_by_one(plan, x, grads, parameters, fixed)
        *results, kept = layer.forward(plan, x, parameters, layer.Buffers(fixed), True)
        *again, short = layer.forward(plan, x, parameters, layer.Buffers(fixed), False)
        assert_close(results, want, **BITS)
        assert_close(again, results, **BITS)
        if statistics is not None:
            for of in (kept, short):
                assert_close(statistics_of(of, 1, x.dtype), statistics, **BITS)
        assert short.numel() == (0 if statistics is None else 7 * x.itemsize)
        of_confounder = grads[1] if confounder else None
        for left_out in (None, 0, 4, 7):
            needs = [i != left_out and g is not None for i, g in enumerate(wanted)]
            found = PASSES.cbam_propagate_back(grads[0], of_confounder, x, parameters, kept, needs)
            assert_close(found, [g for g, needed in zip(wanted, needs, strict=True) if needed], **BITS)


@pytest.mark.parametrize("x_type, of_parameters", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_parameters_of_narrow_types(x_type, of_parameters):
    """They are widened, as x is; gradients come out wide."""
    narrow, own = getattr(torch, x_type), getattr(torch, of_parameters)
    plan, x, grads, parameters, _ = given("batch", "both", "batch", False, False)
    x, *grads = (a.to(narrow) for a in (x, *grads))
    parameters = [p.to(own) for p in parameters]
    *results, kept = layer.forward(plan, x, parameters, layer.Buffers(), True)
    found = PASSES.cbam_propagate_back(grads[0], None, x, parameters, kept, [True] * 8)
    wide = [p.float() for p in parameters]
    *want, kept = layer.forward(plan, x, wide, layer.Buffers(), True)
    assert_close(results, want, **BITS)
    assert_close(found, PASSES.cbam_propagate_back(grads[0], None, x, wide, kept, [True] * 8), **BITS)
    assert {g.dtype for g in found[:-1]} == {torch.float32} and found[-1].dtype == narrow


def test_what_goes_one_by_one():
    plan, x, *_ = given("small", "both", "batch", False, False)
    assert layer.serves(plan, x, True)
    assert not layer.serves(plan._replace(group="0"), x, True)
    assert not layer.serves(plan._replace(passes=ONE_BY_ONE), x, True)
    assert not layer.serves(plan._replace(pool_types=("avg",)), x, True)
    many = x.new_empty((algorithm.MOST_ROWS // 2 + 1, 1, 1, 1))
    assert not layer.serves(plan, many, True)
    assert layer.serves(plan._replace(pool_types=("avg",)), many, False)


@pytest.mark.parametrize("each", [2, 3])
def test_running_statistics_move_as_by_their_pass(each):
    plan, x, _, parameters, _ = given("batch", "both", "batch", False, False, torch.float32)
    moved = [torch.randn(1), torch.rand(1), torch.tensor(3)][:each]
    wanted, versions = [b.clone() for b in moved], [b._version for b in moved]
    *_, kept = layer.forward(plan, x, parameters, layer.Buffers((), moved, 0.25), False)
    statistics = statistics_of(kept, 1, torch.float32)
    PASSES.move_statistics_(wanted[:1], wanted[1:2], wanted[2:], [statistics], 0.25)
    assert_close(moved, wanted, **BITS)
    assert all(b._version > before for b, before in zip(moved, versions, strict=True))


@pytest.mark.parametrize("sizes, norm", [("batch", "batch"), ("tiles", "fixed")])
def test_same_bits_on_any_number_of_threads(sizes, norm):
    """With as many samples as threads or more each is one thread's, with fewer each is split."""
    plan, x, grads, parameters, fixed = given(sizes, "both", norm, False, False, torch.float32)

    def everything():
        *results, kept = layer.forward(plan, x, parameters, layer.Buffers(fixed), True)
        return [*results, *PASSES.cbam_propagate_back(grads[0], None, x, parameters, kept, [True] * 8)]

    same_bits_with_any_threads(everything)


def test_what_is_kept_may_lie_anywhere():
    """A hook on saved tensors may give it back from the middle of another storage."""
    plan, x, grads, parameters, _ = given("batch", "both", "batch", False, False)
    *_, kept = layer.forward(plan, x, parameters, layer.Buffers(), True)
    moved = torch.empty(kept.numel() + 1, dtype=torch.uint8)[1:].copy_(kept)
    want, found = (PASSES.cbam_propagate_back(grads[0], None, x, parameters, of, [True] * 8) for of in (kept, moved))
    assert_close(found, want, **BITS)


def raw() -> tuple[list, list]:
    """Arguments of cbam_propagate_ and of cbam_propagate_back."""
    _, x, grads, parameters, _ = given("small", "both", "batch", False, True, torch.float32)
    running = [torch.zeros(1), torch.ones(1), torch.tensor(0)]
    forward = [x, parameters, [], running, 1e-3, True, 0.25, True, True]
    *_, kept = PASSES.cbam_propagate_(*forward)
    return forward, [*grads, x, parameters, kept, [True] * 8]


def put(place: int, entry: object):
    return lambda values: [*values[:place], entry, *values[place + 1 :]]


BAD = {
    "x of three axes": (0, 0, lambda x: x[0], r"x must be \[B, C, H, W\]"),
    "a parameter too few": (0, 1, lambda p: p[:6], "parameters must hold the 7 that are learned, got 6"),
    "one weight of two": (0, 1, put(2, None), "weight_1 and weight_2 must come together"),
    "no gate": (0, 1, lambda p: [None] * 7, "weight_1 or conv must be a tensor, got None twice"),
    "no hidden features": (0, 1, put(0, torch.ones(0, 6)), r"weight_1 must be \[hidden, 6\] and not empty"),
    "other channels": (0, 1, put(0, torch.ones(2, 5)), r"weight_1 must be contiguous float32 \[2, 6\]"),
    "a weight with gaps": (0, 1, put(2, torch.ones(6, 4)[:, ::2]), r"weight_2 must be contiguous float32 \[6, 2\]"),
    "a long bias": (0, 1, put(1, torch.ones(3)), r"bias_1 must be contiguous float32 \[2\]"),
    "a wide bias": (0, 1, put(3, torch.ones(6).double()), r"bias_2 must be contiguous float32 \[6\]"),
    "an even kernel": (0, 1, put(4, torch.ones(1, 2, 2, 2)), r"conv must be \[1, 2, k, k\] with an odd k"),
    "a kernel of one feature": (
        0,
        1,
        put(4, torch.ones(1, 1, 3, 3)),
        r"conv must be contiguous float32 \[1, 2, 3, 3\]",
    ),
    "scales of several numbers": (0, 1, put(5, torch.ones(2)), "scale must hold one number"),
    "biases alone": (0, 1, lambda p: [None, p[1], None, *p[3:]], "bias_1 and bias_2 must be None without weights"),
    "a scale alone": (0, 1, put(4, None), "scale and shift must be None without conv"),
    "a fixed number too few": (0, 2, lambda _: [None], "fixed must be empty or hold mean and variance, got 1"),
    "a running number too few": (0, 3, lambda r: r[:1], "running must be empty or hold mean, variance and perhaps"),
    "running of several numbers": (0, 3, put(0, torch.ones(2)), "running must hold one number in each entry"),
    "numbers of batches in float": (0, 3, put(2, torch.ones(1)), "running must hold a number of batches in int64"),
    "running without conv": (0, 1, lambda p: [*p[:4], None, None, None], "running must be empty without conv"),
    "a negative eps": (0, 4, lambda _: -1.0, "eps must not be negative"),
    "running of a fixed gate": (0, 5, lambda _: False, "running statistics move toward those of the batch"),
    "an infinite momentum": (0, 6, lambda _: float("inf"), "momentum must be finite"),
    "a gradient of another shape": (1, 0, lambda g: g[:1], "grad_y and x must agree"),
    "a confounder's of another type": (1, 1, lambda g: g.double(), "grad_confounder and grad_y must agree"),
    "kept of another size": (1, 4, lambda k: k[:-1], "kept must be contiguous uint8"),
    "needs of what is not there": (1, 3, put(6, None), "needs must be of parameters that are there, got parameter 6"),
    "no answer for x": (1, 5, lambda n: n[:7], "needs must hold an entry for each of 7 parameters and for x, got 7"),
}


@pytest.mark.parametrize("which, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(which, place, change, words):
    arguments = raw()[which]
    before = [b.clone() for b in arguments[3]] if which == 0 else []
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=words):
        (PASSES.cbam_propagate_, PASSES.cbam_propagate_back)[which](*arguments)
    if which == 0 and place != 3:
        assert_close(arguments[3], before, **BITS)  # nothing has moved


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep):
    forward, back = raw()
    forward[-1] = keep
    for name, values in zip(schemas.CBAM_PROPAGATE_PASSES, (forward, back), strict=True):
        operator = getattr(torch.ops.aia_kernels, name).default
        opcheck(operator, tuple(values), test_utils=("test_schema", "test_faketensor"))
