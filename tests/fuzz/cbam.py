"""Right arguments of CBAM's raw operators, as arguments.py has those of the others, and their checks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from pass_cases import double, magnitude
from plain_cbam import PlainCbam
from torch import Tensor

from aia_kernels import schemas
from aia_kernels.algorithms import cbam as algorithm
from aia_kernels.algorithms.unit import statistics_of
from aia_kernels.common.dtypes import accumulate_dtype

from .arguments import FLOATS, Operator, numbers, placed, sums_within
from .wholes import equal, same_bits

plain_cbam = PlainCbam()


def feature_maps(r: random.Random) -> Tensor:
    while True:
        shape = (
            r.choice((1, 1, 2, 3)),
            r.choice((1, 2, 3, 8, 15, 16, 17, 33, 70, 260, 4200)),
            r.choice((1, 2, 3, 4, 5, 9, 18, 70)),
            r.choice((1, 2, 3, 4, 7, 9, 17, 70)),
        )
        if math.prod(shape) <= 20000:
            return placed(r, in_layout(numbers(r, shape, r.choice(FLOATS)), r.random() < 0.5))


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def another(r: random.Random, x: Tensor) -> Tensor:
    """Another tensor that is stored as x, [B, C, H, W]."""
    return placed(r, in_layout(numbers(r, x.shape, x.dtype), not x.is_contiguous()))


def map_gates_for(r: random.Random, x: Tensor) -> list[Tensor | None]:
    """Of channels and of positions; one of them at least."""
    b, c, h, w = x.shape
    gates = [placed(r, torch.rand(shape, dtype=accumulate_dtype(x.dtype))) for shape in ((b, c), (b, 1, h, w))]
    return r.choice(([gates[0], None], [None, gates[1]], gates, gates))


def map_features_for(r: random.Random, x: Tensor, of_channels: bool) -> list[Tensor]:
    b, c, h, w = x.shape
    kept, length = ((c,), h * w) if of_channels else ((h, w), c)
    grad = numbers(r, (b, 2, *kept), accumulate_dtype(x.dtype))
    return [grad, placed(r, torch.randint(length, (b, *kept), dtype=torch.int32))]


def draw_pool_positions(r):
    return [feature_maps(r)]


def draw_pool_channels(r):
    x = feature_maps(r)
    return [x, r.choice((None, map_gates_for(r, x)[0]))]


def check_map_pool(name: str) -> Callable:
    """Maxima of what was multiplied by a gate may be off by that rounding, and their index with it."""

    def check(before, after, results):
        (x, *gate), (pooled, argmax), method = before, results, getattr(plain_cbam, name)
        (want, want_argmax), (sizes, _) = method(*double(*before)), method(*magnitude(*before))
        n = x.shape[2] * x.shape[3] if name == "cbam_pool_positions" else x.shape[1]
        sums_within(pooled[:, 1], want[:, 1], sizes[:, 1], n)
        if gate and gate[0] is not None:
            sums_within(pooled[:, 0], want[:, 0], sizes[:, 0], 1)
            chosen = (x.double() * gate[0].double()[:, :, None, None]).gather(1, argmax.long().unsqueeze(1)).squeeze(1)
            sums_within(pooled[:, 0], chosen, chosen.abs(), 1)
        else:
            assert torch.equal(pooled[:, 0].double(), want[:, 0]) and torch.equal(argmax, want_argmax)

    return check


def draw_map_recalibrate(r):
    x = feature_maps(r)
    return [x, *map_gates_for(r, x), r.random() < 0.5]


def check_map_recalibrate(before, after, results):
    x, *gates, confounder = before
    wants = plain_cbam.cbam_recalibrate(*double(x, *gates), confounder)
    for got, want in zip(results, wants, strict=True):
        sums_within(got, want, x.double().abs(), 1)


def draw_map_recalibrate_reduce(r):
    x = feature_maps(r)
    return [another(r, x), r.choice((None, another(r, x))), x, *map_gates_for(r, x)]


def check_map_recalibrate_reduce(before, after, results):
    sizes = magnitude(*before)
    if sizes[1] is not None:
        sizes[:2] = sizes[0] + sizes[1], None
    _, c, h, w = before[2].shape
    wants, of_sizes = plain_cbam.cbam_recalibrate_reduce(*double(*before)), plain_cbam.cbam_recalibrate_reduce(*sizes)
    for got, want, size, n in zip(results, wants, of_sizes, (h * w, c), strict=True):
        sums_within(got, want, size, n)


def draw_map_unpool_reduce(r):
    x = feature_maps(r)
    return [x, *map_features_for(r, x, False)]


def check_map_unpool_reduce(before, after, results):
    method, n = plain_cbam.cbam_unpool_reduce, before[0].shape[2] * before[0].shape[3]
    sums_within(results, method(*double(*before)), method(*magnitude(*before)), n)


def draw_map_unpool(r):
    x = feature_maps(r)
    channel, spatial = map_gates_for(r, x)
    of_channels = [None] * 3 if channel is None else [channel, *map_features_for(r, x, True)]
    of_positions = [None] * 3 if spatial is None else [spatial, *map_features_for(r, x, False)]
    return [x, r.choice((None, another(r, x))), *of_channels, *of_positions]


def check_map_unpool(before, after, results):
    sizes = magnitude(*before)
    if sizes[1] is not None:
        sizes[0] = sizes[0] + 2 * sizes[1]
    sums_within(results, plain_cbam.cbam_unpool(*double(*before)), plain_cbam.cbam_unpool(*sizes), 6)


def draw_convolve(r):
    b, h, w, k = r.choice((1, 2, 3)), r.choice((1, 2, 7, 40)), r.choice((1, 3, 16, 70)), r.choice((1, 3, 7))
    dtype = r.choice(FLOATS[:2])
    return [placed(r, torch.randn(shape).to(dtype)) for shape in ((b, 2, h, w), (1, 2, k, k))]


def check_convolve(before, after, results):
    pad = before[1].shape[-1] // 2
    want, sizes = (F.conv2d(*operands, padding=pad) for operands in (double(*before), magnitude(*before)))
    sums_within(results, want, sizes, 2 * before[1].shape[-1] ** 2)


def draw_convolve_backward(r):
    pooled, weight = draw_convolve(r)
    return [placed(r, torch.randn_like(pooled[:, :1])), pooled, weight]


def check_convolve_backward(before, after, results):
    def transposed(grad, *leaves):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        return torch.autograd.grad(F.conv2d(*leaves, padding=leaves[1].shape[-1] // 2), leaves, grad)

    terms_of = before[2].shape[-1] ** 2, before[0].numel()
    wants = zip(results, transposed(*double(*before)), transposed(*magnitude(*before)), terms_of, strict=True)
    for got, want, sizes, n in wants:
        sums_within(got, want, sizes, n)


def draw_mlp(r):
    b, pools, c, hidden = (
        r.choice((1, 2, 5, 9)),
        r.choice((1, 2, 3)),
        r.choice((1, 3, 16, 70)),
        r.choice((1, 2, 17, 40)),
    )
    dtype = r.choice(FLOATS[:2])
    sizes = (b, pools, c), (hidden, c), (hidden,), (c, hidden), (c,)
    pooled, first, first_bias, second, second_bias = (placed(r, torch.randn(size).to(dtype)) for size in sizes)
    return [pooled, first, r.choice((None, first_bias)), second, r.choice((None, second_bias))]


def check_mlp(before, after, results):
    wants, sizes = (
        plain_cbam.cbam_channel_gate(*double(*before)),
        [t if t is None else t.abs() for t in double(*before)],
    )
    of_hidden, _ = plain_cbam.cbam_channel_gate(*sizes)
    sums_within(results[0], wants[0], of_hidden, before[0].shape[2])
    # A logit's error reaches its sigmoid at most by a quarter.
    of_logits = (of_hidden @ sizes[3].mT + (0 if sizes[4] is None else sizes[4])).sum(1)
    sums_within(results[1], wants[1], of_logits / 4 + wants[1], sum(before[3].shape))


def draw_mlp_backward(r):
    pooled, first, _, second, _ = draw_mlp(r)
    (b, pools, c), hidden = pooled.shape, len(first)
    sizes = (b, c), (b, pools, hidden), (b, c)
    grad, of_hidden, channel = (torch.randn(size, dtype=pooled.dtype) for size in sizes)
    return [placed(r, grad), pooled, placed(r, of_hidden.relu()), placed(r, channel.sigmoid()), first, second]


def check_mlp_backward(before, after, results):
    (b, pools, c), hidden = before[1].shape, len(before[4])
    wants = plain_cbam.cbam_channel_gate_backward(*double(*before))
    sizes = plain_cbam.cbam_channel_gate_backward(*magnitude(*before))
    for got, want, of_magnitudes in zip(results, wants, sizes, strict=True):
        sums_within(got, want, of_magnitudes, b * pools + c + hidden)


def draw_whole(r):
    """x, the learned parameters, the fixed or running numbers of BN, and the settings behind them."""
    x = feature_maps(r)
    c, k, hidden = x.shape[1], r.choice((1, 3, 7)), r.choice((1, 2, 17))
    of_channels, of_positions = r.choice(((True, True), (True, True), (True, False), (False, True)))

    def parameter(*shape: int) -> Tensor:
        return placed(r, torch.randn(shape).to(r.choice((x.dtype, accumulate_dtype(x.dtype)))))

    def number() -> Tensor:
        return (torch.rand(r.choice(((), (1,)))) + 0.5).to(r.choice(FLOATS))

    mlp = (
        parameter(hidden, c),
        r.choice((None, parameter(hidden))),
        parameter(c, hidden),
        r.choice((None, parameter(c))),
    )
    gate = parameter(1, 2, k, k), r.choice((None, number())), r.choice((None, number()))
    parameters = [*(mlp if of_channels else [None] * 4), *(gate if of_positions else [None] * 3)]
    batch = of_positions and r.random() < 0.5
    fixed = [number(), number()] if of_positions and not batch and r.random() < 0.7 else []
    running = [number(), number(), torch.tensor(3)][: r.choice((2, 3))] if batch and r.random() < 0.5 else []
    settings = r.choice((1e-5, 0.1)), batch, r.choice((0.1, 0.9)), r.random() < 0.5, r.random() < 0.5
    return [x, parameters, fixed, running, *settings]


_GATES = schemas.CONVOLVE_PASSES + schemas.CHANNEL_GATE_PASSES + schemas.SPATIAL_GATE_PASSES
_ONE_BY_ONE = SimpleNamespace(**{name: schemas.callable_pass(name) for name in schemas.CBAM_PASSES + _GATES})


def one_by_one(x, parameters, fixed, eps, batch, confounder):
    """The plan, parameters, results and what is kept of the passes one by one."""
    plan = algorithm.Plan(_ONE_BY_ONE, batch=batch, eps=eps, confounder=confounder)
    of_all = algorithm.Parameters(*parameters, *(fixed or (None, None)))
    return plan, of_all, *algorithm.forward(plan, x, of_all)


def check_whole(before, after, results):
    """The bits of the passes one by one; and what is moved moves as by its pass."""
    x, parameters, fixed, running, eps, batch, momentum, confounder, _ = before
    if not all(map(math.isfinite, (eps, momentum))):
        return
    _, _, wants, kept = one_by_one(x, parameters, fixed, eps, batch, confounder)
    same_bits(results[:-1], wants)
    if kept.statistics is None:
        return
    same_bits([statistics_of(results[-1], 1, accumulate_dtype(x.dtype))], [kept.statistics])
    if running and after[3][0] is not after[3][1]:  # whose copies would be two
        tracked = running[2:]
        schemas.callable_pass("move_statistics_")(
            [running[0].view(1)], [running[1].view(1)], tracked, [kept.statistics], momentum
        )
        same_bits([*after[3]], running)


def draw_whole_back(r):
    """What was kept knows of what it was made."""
    x, parameters, fixed, _, eps, batch, _, confounder, _ = draw_whole(r)
    settings = fixed, [], eps, batch, 0.1, confounder, True
    *_, kept = schemas.callable_pass("cbam_propagate_")(x, parameters, *settings)
    kept = placed(r, kept)
    kept.made_of = [x.clone(), [*parameters]], fixed, eps, batch, confounder
    needs = [p is not None and r.random() < 0.8 for p in (*parameters, x)]
    return [another(r, x), another(r, x) if confounder else None, x, parameters, kept, needs]


def check_whole_back(before, after, results):
    grad_y, grad_confounder, x, parameters, _, needs = before
    if (made_of := getattr(after[4], "made_of", None)) is None:
        return
    given, *settings = made_of
    if x.stride() != given[0].stride() or not equal(given, [x, parameters]):
        return
    if settings[-1] != (grad_confounder is not None):
        return
    plan, of_all, _, kept = one_by_one(x, parameters, *settings)
    grad_x, grads = algorithm.backward(plan, grad_y, grad_confounder, x, of_all, kept)
    same_bits(results, [g for g, needed in zip((*grads, grad_x), needs, strict=True) if needed])


OPERATORS = {
    "cbam_pool_positions": Operator(draw_pool_positions, check_map_pool("cbam_pool_positions")),
    "cbam_pool_channels": Operator(draw_pool_channels, check_map_pool("cbam_pool_channels")),
    "cbam_recalibrate": Operator(draw_map_recalibrate, check_map_recalibrate),
    "cbam_recalibrate_reduce": Operator(draw_map_recalibrate_reduce, check_map_recalibrate_reduce),
    "cbam_unpool_reduce": Operator(draw_map_unpool_reduce, check_map_unpool_reduce),
    "cbam_unpool": Operator(draw_map_unpool, check_map_unpool),
    "cbam_channel_gate": Operator(draw_mlp, check_mlp),
    "cbam_channel_gate_backward": Operator(draw_mlp_backward, check_mlp_backward),
    "cbam_propagate_": Operator(draw_whole, check_whole),
    "cbam_propagate_back": Operator(draw_whole_back, check_whole_back),
    "cbam_convolve": Operator(draw_convolve, check_convolve),
    "cbam_convolve_backward": Operator(draw_convolve_backward, check_convolve_backward),
}
