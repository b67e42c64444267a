"""What the raw operators refuse, as an exported program may call them: one table, for the CPU, CUDA and Triton.

The checks of the first two are one source (csrc/register/checks.h and beside it); Triton's say the same
(aia_kernels/triton/checks.py). Those of CUDA come before anything that needs a device, so the CUDA implementation is
called here with CPU tensors: what passes its checks is refused for the device. Triton's come before a launch, which
fails here with the same words.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import skip_unless_runnable
from fuzz import sets, spoiled
from pass_cases import in_order
from raw_arguments import (
    DIMS,
    NO_DEVICE,
    REFUSED,
    SPACETIME,
    B,
    C,
    H,
    M,
    T,
    W,
    changed,
    good,
    implementation,
    launches_refused,
    of,
    places,
    put,
    to,
    wide,
)
from torch import Tensor

from aia_kernels import backends, schemas
from aia_kernels.backends import extension
from aia_kernels.common import maps

#: What the CPU alone has.
NOT_CUDA = schemas.CONVOLVE_PASSES + schemas.CHANNEL_GATE_PASSES + schemas.MEMORY_PROPAGATE_PASSES
NOT_CUDA += schemas.CBAM_PROPAGATE_PASSES + schemas.SPATIAL_GATE_PASSES + schemas.UNIT_PASSES
NOT_CUDA += schemas.NORMALIZE_PASSES + schemas.EXTERNAL_PROPAGATE_PASSES + schemas.PROPAGATE_PASSES
#: Of Triton the framework's own operators, or part of a product (values, signed).
NOT_TRITON = ("evaluate", "move_statistics_", *schemas.RESIDUAL_PASSES, *schemas.AVERAGE_PASSES, *NOT_CUDA)


def cpu(name: str, arguments: list) -> Any:
    skip_unless_runnable("cpu", "cpu")
    return implementation("CPU", name, arguments)


def cuda(name: str, arguments: list) -> Any:
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    if name in NOT_CUDA:
        pytest.skip(f"{name} has no CUDA kernel")
    return implementation("CUDA", name, arguments)


def triton(name: str, arguments: list) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed")
    if name in NOT_TRITON:
        pytest.skip(f"{name} is no kernel of Triton's")
    with launches_refused():
        return getattr(backends.passes("triton", "attention_in_attention"), name)(*arguments)


@pytest.fixture(params=[cpu, cuda, triton], ids=lambda call: call.__name__)
def call(request) -> Callable[[str, list], Any]:
    return request.param


@pytest.mark.parametrize("name", good())
def test_good_arguments_are_taken(call, name):
    if call is cpu:
        assert all(t.isfinite().all() for t in tensors_of(cpu(name, good()[name])))
    else:
        with pytest.raises(RuntimeError, match=NO_DEVICE):
            call(name, good()[name])


def tensors_of(values) -> list[Tensor]:
    if isinstance(values, (list, tuple)):
        return [t for value in values for t in tensors_of(value)]
    return [values] if isinstance(values, Tensor) else []


CONTEXT = r"must be 1 \(channel\) or 3 \(spacetime\)"

#: What is wrong: operator, which argument and which entry of it, what it becomes, the words expected.
BAD = {
    # Storage of an activation: every axis, and orders that are none of maps.ORDERS.
    **{
        f"{name}: {letter} apart": (name, 0, wide(axis), "must be stored densely in an order of maps.ORDERS")
        for name in ("pool", "unpool", "unpool_reduce", "recalibrate", "temporal_shift")
        for axis, letter in enumerate("BTCHW")
        if axis  # samples of a batch that is cut short still lie densely
    },
    "pool: samples apart": ("pool", 0, lambda x: x.repeat(2, 1, 1, 1, 1)[::2], "must be stored densely"),
    "pool: frames turned": ("pool", 0, lambda x: x.flip(1).mT.contiguous().mT, "must be stored densely"),
    "pool: expanded": ("pool", 0, lambda x: x[:, :1].expand(x.shape), "must be stored densely"),
    "pool: expanded over samples": ("pool", 0, lambda x: x[:1].expand(x.shape), "must be stored densely"),
    "pool: rank": ("pool", 0, lambda x: x[0], r"must be \[B, T, C, H, W\], got float32 \[3, 4, 5, 6\]"),
    "pool: empty": ("pool", 0, lambda x: x[:0], "x must not be empty"),
    "pool: integers": ("pool", 0, to(torch.int32), "x must be float16, bfloat16, float32 or float64, got int32"),
    "shift: empty": ("temporal_shift", 0, lambda x: x[:, :, :, :, :0], "x must not be empty"),
    "recalibrate_reduce: x alone apart": ("recalibrate_reduce", 1, wide(2), "x must be stored densely"),
    "recalibrate_reduce: grad_y otherwise": (
        "recalibrate_reduce",
        0,
        lambda g: in_order(g, "THWC"),
        "grad_y and x must agree in shape, strides and dtype",
    ),
    "recalibrate_reduce: grad_y's type": ("recalibrate_reduce", 0, to(torch.float64), "grad_y and x must agree"),
    # Contexts, and what comes with them.
    "pool: context 0": ("pool", 1, put(0), f"context {CONTEXT}, got 0"),
    "pool: context 2": ("pool", 1, put(2), CONTEXT),
    "pool: a gate of context 0": ("pool", 3, put(0), f"gate_context {CONTEXT}, got 0"),
    "pool: a gate of another context": ("pool", 3, put(3), rf"gate must be contiguous float32 \[2, {SPACETIME}\]"),
    "pool: the context of a missing gate": ("pool", 2, put(None), "gate_context must be 0, as there is no gate, got 1"),
    "unpool: a gradient without argmax": ("unpool", 8, put(None), "inner_grad_pooled and inner_argmax must come"),
    "unpool: argmax without its gradient": ("unpool", 7, put(None), "inner_grad_pooled and inner_argmax must come"),
    "unpool: an inner context of 0": ("unpool", 9, put(0), f"inner_context {CONTEXT}"),
    "unpool: an inner gate of context 0": ("unpool", 6, put(0), f"inner_gate_context {CONTEXT}"),
    "unpool: the context of no inner gate": ("unpool", 5, put(None), "inner_gate_context must be 0, as there is no"),
    "unpool: context 2^32 + 3": ("unpool", 4, put(2**32 + 3), f"context {CONTEXT}"),
    "unpool_reduce: gate_context 0": ("unpool_reduce", 4, put(0), f"gate_context {CONTEXT}"),
    "recalibrate: context 0": ("recalibrate", 2, put(0), f"context {CONTEXT}"),
    # Packed maps and indices.
    "gate: its type": (
        "recalibrate",
        1,
        to(torch.float64),
        rf"gate must be contiguous float32 \[2, {SPACETIME}\], got float64",
    ),
    "gate: turned": ("recalibrate", 1, lambda g: g.mT.contiguous().mT, "gate must be contiguous"),
    "gate: apart": ("recalibrate", 1, wide(1), "gate must be contiguous"),
    "gate: short": ("recalibrate", 1, lambda g: g[:, 1:].contiguous(), "gate must be contiguous"),
    "gate: of one sample": ("recalibrate", 1, lambda g: g[:1], "gate must be contiguous"),
    "features: without a mean": (
        "unpool",
        2,
        lambda g: g[:, :1].contiguous(),
        rf"grad_pooled must be .*\[2, 2, {SPACETIME}\]",
    ),
    "features: flat": ("unpool_reduce", 1, lambda g: g.flatten(1), "grad_pooled must be contiguous float32"),
    "argmax: its type": (
        "unpool",
        3,
        to(torch.int16),
        rf"argmax must be contiguous uint8 \[2, {SPACETIME}\], got int16",
    ),
    "argmax: int64": ("unpool_reduce", 2, to(torch.int64), "argmax must be contiguous uint8"),
    "argmax: short": ("unpool_reduce", 2, lambda i: i[:, 1:].contiguous(), "argmax must be contiguous"),
    "argmax: flat": ("unpool", 3, lambda i: i.flatten(), "argmax must be contiguous"),
    "argmax: apart": ("unpool", 8, wide(1), "inner_argmax must be contiguous"),
    # The maps of the gate operators.
    "dims: none": ("gate", 8, put([]), "dims must hold three lengths for each of 1 or 3 maps, got 0"),
    "dims: of two maps": ("gate", 8, put(DIMS * 2), "dims must hold three lengths"),
    "dims: four": ("gate_again", 3, put([*DIMS, 1]), "dims must hold three lengths"),
    "dims: negative": ("gate", 8, put([-3, -5, 6]), "dims must be positive"),
    "dims: zero": ("gate_again", 3, put([0, 5, 6]), "dims must be positive"),
    "dims: overflow to what is there": ("gate_backward_reduce", 3, put([2**62, 4, M]), "dims must be positive"),
    "dims: a sum that overflows": ("gate_backward_reduce", 3, put([2**62, 1, 1] * 3), "dims must be positive"),
    "dims: too short": ("gate_backward", 7, put([3, 5, 5]), r"dims must make up the 90 elements of z, got \[3, 5, 5\]"),
    "dims: three maps for one": ("gate", 8, put([1, 5, 6] * 3), "weight must hold a tensor for each of 3 maps, got 1"),
    "pooled: without a mean": ("gate", 0, lambda p: p[:, :1].contiguous(), r"pooled must be contiguous float32"),
    "pooled: flat": ("gate_again", 0, lambda p: p.flatten(1), r"pooled must be a packed \[B, 2, M\]"),
    "pooled: no sample": ("gate", 0, lambda p: p[:0], "pooled must be a packed"),
    "pooled: apart": ("gate", 0, wide(2), "pooled must be contiguous"),
    "pooled: half": ("gate", 0, to(torch.float16), "pooled must be float32 or float64"),
    "pooled: of another shape": ("gate_backward", 5, lambda p: p.view(B, -1), r"pooled must be .*\[2, 2, 90\]"),
    "weight: none": ("gate", 1, put([]), "weight must hold a tensor for each of 1 maps, got 0"),
    "weight: its shape": ("gate", (1, 0), lambda w: w[:, :1], r"each weight must be \[1, 2, 3, 3, 3\]"),
    "weight: its type": ("gate_again", (1, 0), to(torch.int32), "weight must be float16, bfloat16"),
    "norms: two scales": ("gate", 2, lambda s: s * 2, "scale must hold an entry for each of 1 maps, got 2"),
    "norms: no mean": ("gate", 4, put([]), "mean must hold an entry"),
    "norms: a vector": ("gate", (3, 0), lambda s: s.repeat(2), "shift must hold one number for each map"),
    "norms: integers": ("gate", (5, 0), put(torch.ones(1, dtype=torch.int64)), "var must be float16, bfloat16"),
    "norms: negative eps": ("gate", 6, put([-1e-5]), "eps must not be negative"),
    "norms: eps is NaN": ("gate", 6, put([math.nan]), "eps must not be negative, infinite or NaN"),
    "norms: no eps": ("gate", 6, put([]), "eps must hold an entry"),
    "norms: two flags": ("gate", 7, put([True, False]), "batch must hold an entry"),
    "norm: its shape": ("gate_again", 2, lambda n: n[:, :3].contiguous(), r"norm must be contiguous float32 \[1, 4\]"),
    "norm: its type": ("gate_backward_reduce", 2, to(torch.float64), "norm must be contiguous float32"),
    "z: its type": ("gate_backward_reduce", 1, to(torch.bfloat16), "z must be float32 or float64"),
    "z: another than grad_gate's": ("gate_backward", 0, to(torch.float64), "grad_gate and z must agree"),
    "sums: flat": ("gate_backward", 3, lambda s: s.flatten(), r"sums must be contiguous float32 \[1, 2\]"),
    "statistics: short": ("gate_backward", 4, lambda s: s[:, :2].contiguous(), "statistics must be contiguous"),
    # Running statistics.
    "running: lists": ("move_statistics_", 1, put([]), "mean, var and statistics must hold a tensor for each BN"),
    "running: channels": ("move_statistics_", (1, 0), lambda v: v[:4], r"var must be contiguous float32 \[5\]"),
    "running: apart": ("move_statistics_", (0, 0), lambda m: m.repeat_interleave(2)[::2], "mean must be contiguous"),
    "running: expanded": ("move_statistics_", (0, 0), lambda m: m[:1].expand(5), "mean must be contiguous"),
    "running: integers": ("move_statistics_", (0, 0), to(torch.int64), "mean must be float16, bfloat16"),
    "running: rank": ("move_statistics_", (0, 0), lambda m: m[None], r"mean must hold running statistics \[C\]"),
    "running: statistics' type": (
        "move_statistics_",
        (3, 0),
        to(torch.float16),
        "statistics must be contiguous float32",
    ),
    "running: statistics' shape": ("move_statistics_", (3, 0), lambda s: s.flatten(), r"statistics must be .*\[5, 3\]"),
    "running: a number of batches": (
        "move_statistics_",
        (2, 0),
        to(torch.int32),
        "tracked must hold numbers of batches",
    ),
    "running: several numbers": ("move_statistics_", (2, 0), lambda n: n.repeat(2), "tracked must hold numbers"),
    "running: momentum": ("move_statistics_", 4, put(math.nan), "momentum must be finite, got nan"),
    # External attention.
    "logits: rank": ("column_statistics", 0, lambda t: t[0], "logits must be contiguous"),
    "logits: turned": ("column_statistics", 0, lambda t: t.mT.contiguous().mT, "logits must be contiguous"),
    "logits: apart": ("double_norm_", 0, wide(2), "logits must be contiguous"),
    "logits: samples apart": ("double_norm_", 0, wide(1), "logits must be contiguous"),
    "logits: expanded": ("double_norm_", 0, lambda t: t[:1].expand(t.shape), "logits must be contiguous"),
    "logits: no column": ("double_norm_", 0, lambda t: t[..., :0], "with M > 0"),
    "padding: its type": ("column_statistics", 1, to(torch.uint8), r"padding must be contiguous bool \[2, 6\]"),
    "padding: its shape": ("double_norm_", 4, lambda p: p[:, 1:].contiguous(), "padding must be contiguous"),
    "lse: its type": ("double_norm_", 1, to(torch.float64), r"lse must be contiguous float32 \[2, 8\], got float64"),
    "group: does not divide": ("double_norm_", 2, put(3), "group must divide the 8 columns of logits, got 3"),
    "group: negative": ("double_norm_backward_reduce", 2, put(-4), "group must divide"),
    "eps: negative": ("double_norm_", 3, put(-1.0), "eps must not be negative"),
    "eps: infinite": ("double_norm_", 3, put(math.inf), "eps must not be negative, infinite"),
    "attention: turned": (
        "double_norm_backward_reduce",
        1,
        lambda t: t.mT.contiguous().mT,
        "attention and grad must agree in shape, strides and dtype",
    ),
    "attention: its type": ("double_norm_backward_", 1, to(torch.float16), "attention and grad must agree"),
    "mass: its groups": ("double_norm_backward_", 2, lambda m: m[..., :1], r"mass must be .*\[2, 6, 2\]"),
    "reduced: of one sample": ("double_norm_backward_", 3, lambda d: d[:1], "reduced must be contiguous"),
    "residual: apart": ("residual_relu_", 0, wide(2), "z must be stored densely"),
    "residual: empty": ("residual_relu_", 0, lambda z: z[:, :0], "z must be .* not empty"),
    "residual: expanded": ("residual_relu_", 0, lambda z: z[:1].expand(z.shape), "z must be stored densely"),
    "residual: x stored otherwise": ("residual_relu_", 1, lambda x: x.mT.contiguous().mT, "x and z must agree"),
    "residual: x's type": ("residual_relu_", 1, to(torch.float64), "x and z must agree"),
    "residual: shift's shape": ("residual_relu_", 2, lambda s: s[:6], r"shift must be contiguous float32 \[8\]"),
    "signs: their type": ("residual_relu_backward", 1, to(torch.int32), r"signs must be contiguous uint8 \[12\]"),
    "signs: short": ("residual_relu_backward", 1, lambda s: s[:11], "signs must be contiguous"),
    # CBAM.
    **{
        f"{name}: {letter} apart": (name, 0, wide(axis), "must be contiguous or channels_last")
        for name in ("cbam_pool_positions", "cbam_recalibrate", "cbam_unpool", "cbam_unpool_reduce")
        for axis, letter in enumerate("BCHW")
        if axis
    },
    "cbam: rank": ("cbam_pool_positions", 0, lambda x: x[0], r"x must be \[B, C, H, W\], got float32 \[4, 5, 6\]"),
    "cbam: empty": ("cbam_pool_channels", 0, lambda x: x[:0], "x must not be empty"),
    "cbam: integers": ("cbam_recalibrate", 0, to(torch.int32), "x must be float16, bfloat16, float32 or float64"),
    "cbam: expanded": ("cbam_pool_positions", 0, lambda x: x[:, :1].expand(x.shape), "must be contiguous or"),
    "cbam: turned": ("cbam_pool_positions", 0, lambda x: x.mT.contiguous().mT, "must be contiguous or channels_last"),
    "cbam: a gate of another batch": (
        "cbam_recalibrate",
        1,
        lambda g: g[:1],
        r"channel must be contiguous float32 \[2, 4\]",
    ),
    "cbam: a gate without its axis": ("cbam_recalibrate", 2, lambda g: g[:, 0], r"spatial must be .*\[2, 1, 5, 6\]"),
    "cbam: half a gate": ("cbam_pool_channels", 1, to(torch.float16), "channel must be contiguous float32"),
    "cbam: grad_y otherwise": (
        "cbam_recalibrate_reduce",
        0,
        lambda g: g.contiguous(memory_format=torch.channels_last),
        "grad_y and x must agree in shape, strides and dtype",
    ),
    "cbam: a confounder of another type": (
        "cbam_unpool",
        1,
        to(torch.float64),
        "grad_confounder and grad_y must agree in shape, strides and dtype",
    ),
    "cbam: no gradient of channels": (
        "cbam_unpool",
        3,
        put(None),
        "channel, grad_channel and channel_argmax must come",
    ),
    "cbam: no indices": ("cbam_unpool", 7, put(None), "spatial, grad_spatial and spatial_argmax must come together"),
    "cbam: indices of another type": (
        "cbam_unpool_reduce",
        2,
        to(torch.int64),
        r"spatial_argmax must be contiguous int32 \[2, 5, 6\], got int64",
    ),
    "cbam: features without a mean": ("cbam_unpool", 6, lambda g: g[:, :1], r"grad_spatial must be .*\[2, 2, 5, 6\]"),
    "convolve: even": ("cbam_convolve", 1, lambda w: w[..., :2, :2].contiguous(), "weight must be .* with an odd k"),
    "convolve: one plane": ("cbam_convolve", 0, lambda p: p[:, :1], r"pooled must be \[B, 2, H, W\] and not empty"),
    "convolve: half": ("cbam_convolve_backward", 1, to(torch.float16), "pooled must be float32 or float64"),
    "convolve: a gradient of two planes": (
        "cbam_convolve_backward",
        0,
        lambda g: g.repeat(1, 2, 1, 1),
        r"grad_z must be contiguous float32 \[2, 1, 5, 6\]",
    ),
    "mlp: rank": ("cbam_channel_gate", 0, lambda p: p[0], r"pooled must be \[B, pools, C\] and not empty"),
    "mlp: half": ("cbam_channel_gate", 0, to(torch.float16), "pooled must be float32 or float64"),
    "mlp: no features": ("cbam_channel_gate", 1, lambda w: w[:0], r"weight_1 must be \[hidden, 4\] and not empty"),
    "mlp: another width": ("cbam_channel_gate", 1, lambda w: w[:, :3], r"weight_1 must be contiguous .*\[3, 4\]"),
    "mlp: not turned": ("cbam_channel_gate", 3, lambda w: w.mT, r"weight_2 must be contiguous float32 \[4, 3\]"),
    "mlp: a long bias": ("cbam_channel_gate", 4, lambda b: b.repeat(2), r"bias_2 must be .*\[4\]"),
    "mlp: one pool": ("cbam_channel_gate_backward", 2, lambda h: h[:, :1], r"hidden must be .*\[2, 2, 3\]"),
    "mlp: a gradient of pools": (
        "cbam_channel_gate_backward",
        0,
        lambda g: g.unsqueeze(1),
        r"grad_channel must be contiguous float32 \[2, 4\]",
    ),
    # Attention by a memory per sample.
    "memory: rank": ("memory_queries", 0, lambda z: z[0], r"logits must be \[B, 2 H d, N\] and not empty"),
    "memory: empty": ("memory_queries", 0, lambda z: z[:0], "logits must be .* not empty"),
    "memory: turned": ("memory_keys", 0, lambda z: z.mT.contiguous().mT, "logits must be contiguous"),
    "memory: integers": ("memory_queries", 0, to(torch.int32), "logits must be float16, bfloat16"),
    "memory: feature": ("memory_queries", 1, put(3), "feature must be 0 .*, got 3"),
    "memory: another feature": ("memory_queries", 1, put(1), r"sums must be contiguous float32 \[2, 6\]"),
    "memory: heads": ("memory_keys", 2, put(4), "heads must divide half of the 12 rows of logits, got 4"),
    "memory: no head": ("memory_keys_backward_", 3, put(0), "heads must divide"),
    "memory: padding's shape": ("memory_queries", 3, lambda p: p[:, 1:].contiguous(), "padding must be contiguous"),
    "memory: padding's type": ("memory_keys", 3, to(torch.uint8), r"padding must be contiguous bool \[2, 6\]"),
    "memory: rows' type": ("memory_queries_backward_", 0, to(torch.float64), "rows must be contiguous float32"),
    "memory: rows without gradients": (
        "memory_queries_backward_",
        0,
        lambda r: r[:, :8].contiguous(),
        r"rows must be contiguous float32 \[2, 20, 6\], got float32 \[2, 8, 6\]",
    ),
    "memory: rows apart": ("memory_keys_backward_", 0, wide(1), "rows must be contiguous"),
    "memory: statistics of no softmax": ("memory_keys", 4, put(torch.ones(2, 2, 6)), "statistics must be None but"),
    "memory: reduced of no softmax": ("memory_keys_backward_", 7, put(torch.ones(2, 6)), "reduced must be None but"),
    "memory: sums' type": ("memory_queries", 4, to(torch.float64), r"sums must be contiguous float32 \[2, 8\]"),
    "memory: gamma's shape": ("memory_queries", 5, lambda g: g.repeat(2), r"gamma must be contiguous float32 \[1\]"),
    "memory: eps": ("memory_queries_backward_", 7, put(-1.0), "eps must not be negative"),
    "memory: reached": ("memory_queries_backward_", 8, lambda p: p[:, :6], r"reached must be .*\[2, 8, 6\]"),
    "memory: reached of keys": ("memory_keys_backward_", 5, to(torch.float16), "reached must be contiguous float32"),
    "memory: grad_sums": ("memory_keys_backward_", 6, lambda s: s[:1], "grad_sums must be contiguous"),
    # The temporal shift.
    "fold: more than half": ("temporal_shift", 1, put(3), "fold must be between 0 and half of the 4 channels, got 3"),
    "fold: negative": ("temporal_shift", 1, put(-1), "fold must be between"),
    "fold: twice it overflows": ("temporal_shift", 1, put(2**62), "fold must be between"),
}


@pytest.mark.parametrize("name, place, change, words", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(call, name, place, change, words):
    with pytest.raises(REFUSED, match=words):
        call(name, changed(good()[name], place, change))


#: Written operands in one place with another operand: operator, what is written, the other one.
SHARED = {
    "double_norm_backward_: attention": ("double_norm_backward_", 0, 1),
    "residual_relu_: x": ("residual_relu_", 0, 1),
    "move_statistics_: mean and var": ("move_statistics_", (0, 0), (1, 0)),
}


@pytest.mark.parametrize("name, written, other", SHARED.values(), ids=SHARED)
def test_what_is_written_shares_no_memory(call, name, written, other):
    arguments = good()[name]
    tensor = arguments[written] if isinstance(written, int) else arguments[written[0]][written[1]]
    with pytest.raises(REFUSED, match="is written, and must share no memory with"):
        call(name, changed(arguments, other, put(tensor)))


def test_parts_that_overlap(call):
    """Not only the same tensor: the statistics lie inside the logits, the mass one element into the gradient."""
    buffer = torch.randn(2 * 6 * 8 + 8)
    logits, lse = buffer[8:].view(2, 6, 8), buffer[:16].view(2, 8)
    with pytest.raises(REFUSED, match="logits is written, and must share no memory with lse"):
        call("double_norm_", [logits, lse, 4, 0.0, None])
    if call is triton:
        return
    running = torch.randn(9)
    with pytest.raises(RuntimeError, match="is written, and must share no memory with mean"):
        call(
            "move_statistics_",
            [[running[:5], running[4:]], [torch.rand(5), torch.rand(5)], [], [torch.rand(5, 3)] * 2, 0.1],
        )


@pytest.mark.parametrize(
    "name, place, shared",
    [
        ("memory_queries_backward_", 5, "sums"),
        ("memory_queries_backward_", 6, "gamma"),
        ("memory_queries_backward_", 8, "reached"),
        ("memory_keys_backward_", 5, "reached"),
        ("memory_keys_backward_", 6, "grad_sums"),
    ],
)
def test_rows_overlap_nothing(name, place, shared):
    """An operand that lies inside the rows that are written."""
    arguments = good()[name]
    inside = arguments[0].flatten()[-arguments[place].numel() :].view(arguments[place].shape)
    with pytest.raises(RuntimeError, match=f"rows is written, and must share no memory with {shared}"):
        cpu(name, changed(arguments, place, put(inside)))


def test_a_tensor_that_is_copied_when_written_is_apart():
    """A lazy copy shares the memory of its source until it is written to: the source must stay as it was."""
    attention = torch.rand(2, 6, 8)
    before, grad = attention.clone(), torch._lazy_clone(attention)
    cpu("double_norm_backward_", [grad, attention, torch.rand(2, 6, 2), torch.randn(2, 8), 4])
    assert torch.equal(attention, before) and not torch.equal(grad, before)


OPERANDS = [(name, place) for name, arguments in good().items() for place in places(arguments)]


@pytest.mark.parametrize("name, place", OPERANDS)
def test_memory_of_every_operand(call, name, place):
    """Between the addresses of its type, and beyond the end of its storage, of which nothing or a part was kept."""
    r = random.Random(0)
    if of(good()[name], place).element_size() > 1:
        with pytest.raises(REFUSED, match="must begin at an address that is a multiple of its"):
            call(name, changed(good()[name], place, lambda t: spoiled.misaligned(r, t)))
    for left in (0.0, 0.9):
        arguments = good()[name]
        storage = of(arguments, place).untyped_storage()
        storage.resize_(int(left * storage.nbytes()))
        with pytest.raises(REFUSED, match="must lie inside its storage of"):
            call(name, arguments)


@pytest.mark.parametrize("name, place", OPERANDS)
def test_types_and_sizes_of_every_operand(call, name, place):
    wrong = torch.complex64 if of(good()[name], place).is_floating_point() else torch.float32
    with pytest.raises(REFUSED, match="must"):
        call(name, changed(good()[name], place, to(wrong)))
    if name in ("temporal_shift", "cbam_pool_positions"):
        return  # they take any sizes
    with pytest.raises(REFUSED, match="must"):
        call(name, changed(good()[name], place, lambda t: t.repeat(*[2] * max(1, t.ndim))))


def test_strides_of_axes_of_length_one_do_not_matter(call):
    """The framework leaves them as they fall, in exports and after views."""
    x = torch.randn(1, 3, 1, 5, 1).as_strided((1, 3, 1, 5, 1), (7, 5, 1000, 1, 0))
    gate = torch.rand(1, maps.packed_size(x.shape, maps.SPACETIME)).as_strided((1, 23), (0, 1))
    if call is cpu:
        assert torch.equal(cpu("recalibrate", [x, gate, 3]), cpu("recalibrate", [x.contiguous(), gate.clone(), 3]))
    else:
        with pytest.raises(RuntimeError, match=NO_DEVICE):
            call("recalibrate", [x, gate, 3])


@pytest.mark.parametrize("name, place", OPERANDS)
def test_negative_views_of_every_operand(name, place):
    """A view of the negatives of what is stored: the framework resolves it on the CPU, or raises where it would be
    written; Triton's passes refuse it."""
    skip_unless_runnable("cpu", "cpu")
    if not of(good()[name], place).is_floating_point():
        return
    operator = getattr(torch.ops.aia_kernels, name)
    given = good()[name]
    plain = changed(given, place, lambda t: t.clone().neg_())
    negative = changed(given, place, lambda t: torch._neg_view(t.clone()))
    copied = [copy.deepcopy(value) for value in plain]
    alias = operator.default._schema.arguments[place if isinstance(place, int) else place[0]].alias_info
    if alias is not None and alias.is_write:
        with pytest.raises(RuntimeError):
            operator(*negative)
        return
    expected, found = operator(*copied), operator(*negative)
    for a, b in zip(tensors_of([found, negative]), tensors_of([expected, copied]), strict=True):
        torch.testing.assert_close(a.resolve_neg(), b, rtol=0, atol=0, equal_nan=True)
    if name not in NOT_TRITON:
        with pytest.raises(ValueError, match="must hold its own values"):
            triton(name, changed(good()[name], place, torch._neg_view))


def test_no_samples_and_no_tokens(call):
    """The double normalization takes them on both, as a member of a process group may have none."""
    for b, n in ((0, 6), (2, 0), (0, 0)):
        logits, padding = torch.randn(b, n, 8), torch.zeros(b, n, dtype=torch.bool)
        mass = torch.rand(b, n, 2)
        for name, arguments in {
            "column_statistics": [logits, padding],
            "double_norm_": [logits, torch.randn(b, 8), 4, 0.0, padding],
            "double_norm_backward_reduce": [logits, logits.clone(), 4],
            "double_norm_backward_": [logits, logits.clone(), mass, torch.randn(b, 8), 4],
        }.items():
            if call is cpu:
                cpu(name, arguments)
            else:
                with pytest.raises(RuntimeError, match=NO_DEVICE):
                    call(name, arguments)


@pytest.mark.parametrize("other", [cuda, triton], ids=["cuda", "triton"])
def test_backends_take_and_refuse_the_same(other):
    """Over random argument sets the CUDA operators and the Triton passes say word for word what the CPU's do."""
    for seed in range(1500):
        one = sets.Set(seed)
        if one.operator in (NOT_TRITON if other is triton else NOT_CUDA):
            continue
        said = []
        for call in (other, cpu):
            try:
                call(one.operator, one.arguments)
                said.append(NO_DEVICE)
            except REFUSED as error:
                said.append(str(error))
        if "Expected a value of type" in said[1]:  # the framework's word, before that of an operator
            assert said[0] != NO_DEVICE, one
        else:
            assert said[0] == said[1], one


def unit() -> list:
    """Arguments of evaluate for CinST: gates over C, T, H and W."""
    numbers = [[torch.rand(1) for _ in range(4)] for _ in range(4)]
    return [torch.randn(B, T, C, H, W), [torch.randn(1, 2, 3, 3, 3) for _ in range(4)], *numbers, [1e-5] * 4, 1, 3]


#: Of evaluate: which argument and which entry of it, what it becomes, the words expected.
BAD_UNITS = {
    "x apart": (0, wide(2), "x must be stored densely"),
    "no outer context": (8, put(0), f"outer {CONTEXT}"),
    "both contexts the same": (7, put(3), "inner must be 0 or the context that outer is not, got 3 and 3"),
    "gates for one context": (7, put(0), "every list must hold an entry for each of 3 gates, got 4"),
    "a weight's shape": ((1, 3), lambda w: w[:, :1], r"each weight must be \[1, 2, 3, 3, 3\]"),
    "a scale's size": ((2, 1), lambda s: s.repeat(2), "scale must hold one number"),
    "a variance's type": ((5, 0), to(torch.int64), "var must be float16"),
    "a mean that begins between addresses": (
        (4, 2),
        lambda m: spoiled.misaligned(random.Random(0), m),
        "mean must begin at an address that is a multiple of its 4 bytes",
    ),
    "an eps that is NaN": ((6, 0), put(math.nan), "eps must not be negative"),
}


@pytest.mark.parametrize("call", [cpu, cuda])
@pytest.mark.parametrize("place, change, words", BAD_UNITS.values(), ids=BAD_UNITS)
def test_bad_units_are_refused(call, place, change, words):
    with pytest.raises(RuntimeError, match=NO_DEVICE) if call is cuda else contextlib.nullcontext():
        call("evaluate", unit())
    with pytest.raises(RuntimeError, match=words):
        call("evaluate", changed(unit(), place, change))
