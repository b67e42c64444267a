"""CBAM's passes on every backend that this machine runs, against the plain ones in float64."""

from __future__ import annotations

import math

import cbam_cases
import pytest
import torch
import torch.nn.functional as F
from cbam_cases import EVERY, MAPS, SWEPT, Maps, features_of, gates_of, maps_of, numbers, stored
from conftest import skip_unless_runnable
from pass_backends import CPU, CUDA, each, on, passes_fixture
from pass_cases import agrees, double, magnitude, same_bits_with_any_threads
from plain_cbam import PlainCbam

from aia_kernels import backends
from aia_kernels.common.dtypes import accumulate_dtype

pytestmark = pytest.mark.usefixtures("uninitialized_memory_is_nan")

plain = PlainCbam()


passes = passes_fixture("cbam")


def everywhere(test):
    return each(*EVERY, sweep=SWEPT)(test)


def pooled_agrees(pooled, argmax, x, want, magnitudes, n):
    assert pooled.dtype == accumulate_dtype(x.dtype) and argmax.dtype == torch.int32
    assert torch.equal(pooled[:, 0].cpu().double(), want[0][:, 0])
    assert torch.equal(argmax.cpu(), want[1])
    agrees(pooled[:, 1], want[0][:, 1], magnitudes[:, 1], n)


@everywhere
def test_pool_positions(passes, case):
    x = maps_of(case)
    pooled, argmax = passes.cbam_pool_positions(x)
    magnitudes, _ = plain.cbam_pool_positions(*magnitude(x))
    pooled_agrees(pooled, argmax, x, plain.cbam_pool_positions(*double(x)), magnitudes, x.shape[2] * x.shape[3])


@everywhere
def test_pool_channels(passes, case):
    """Of x alone, and of x times a gate: there rounding may exchange elements whose products lie within the bound."""
    x, (gate, _) = maps_of(case), gates_of(maps_of(case))
    pooled, argmax = passes.cbam_pool_channels(x, None)
    magnitudes, _ = plain.cbam_pool_channels(*magnitude(x, None))
    pooled_agrees(pooled, argmax, x, plain.cbam_pool_channels(*double(x, None)), magnitudes, x.shape[1])

    pooled, argmax = passes.cbam_pool_channels(x, gate)
    (want, _), (magnitudes, _) = (
        plain.cbam_pool_channels(*double(x, gate)),
        plain.cbam_pool_channels(*magnitude(x, gate)),
    )
    agrees(pooled[:, 1], want[:, 1], magnitudes[:, 1], x.shape[1])
    agrees(pooled[:, 0], want[:, 0], want[:, 0].abs(), 1)
    wide, factors = double(x, gate)
    chosen = (wide * factors[:, :, None, None]).gather(1, argmax.cpu().long().unsqueeze(1)).squeeze(1)
    agrees(pooled[:, 0], chosen, chosen.abs(), 1)


#: Which gates there are.
GATES = {"both": (True, True), "channel": (True, False), "spatial": (False, True)}
every_gate = pytest.mark.parametrize("which", GATES.values(), ids=GATES)


def kept(which, values):
    return [value if used else None for used, value in zip(which, values, strict=True)]


@everywhere
@every_gate
def test_recalibrate(passes, case, which):
    x = maps_of(case)
    gates = kept(which, gates_of(x))
    for confounder in (False, True):
        found = passes.cbam_recalibrate(x, *gates, confounder)
        want = plain.cbam_recalibrate(*double(x, *gates), confounder)
        assert len(found) == 1 + confounder and all(y.dtype == x.dtype and y.stride() == x.stride() for y in found)
        for y, exact in zip(found, want, strict=True):
            # Two products and, of the confounder, a difference from x.
            agrees(y, exact, x.cpu().double().abs(), 1)


@everywhere
@every_gate
def test_recalibrate_reduce(passes, case, which):
    x, grad_y, other = (maps_of(case) for _ in range(3))
    gates = kept(which, gates_of(x))
    for confounder in (None, other):
        arguments = grad_y, confounder, x, *gates
        found = passes.cbam_recalibrate_reduce(*arguments)
        want = plain.cbam_recalibrate_reduce(*double(*arguments))
        sizes = magnitude(*arguments)
        if confounder is not None:
            sizes[:2] = sizes[0] + sizes[1], None
        _, c, h, w = x.shape
        for got, exact, of_magnitudes, n in zip(
            found, want, plain.cbam_recalibrate_reduce(*sizes), (h * w, c), strict=True
        ):
            assert got.dtype == accumulate_dtype(x.dtype)
            agrees(got, exact, of_magnitudes, n)


@everywhere
def test_unpool_reduce(passes, case):
    x = maps_of(case)
    *_, grad, argmax = features_of(x)
    found = passes.cbam_unpool_reduce(x, grad, argmax)
    n = x.shape[2] * x.shape[3]
    agrees(
        found,
        plain.cbam_unpool_reduce(*double(x, grad, argmax)),
        plain.cbam_unpool_reduce(*magnitude(x, grad, argmax)),
        n,
    )


@everywhere
@every_gate
def test_unpool(passes, case, which):
    grad_y, other = maps_of(case), maps_of(case)
    channel, spatial = gates_of(grad_y)
    of_channels, of_positions = features_of(grad_y)[:2], features_of(grad_y)[2:]
    used = [a for a, there in zip((channel, *of_channels), [which[0]] * 3, strict=True) for a in [a if there else None]]
    used += [a if which[1] else None for a in (spatial, *of_positions)]
    for confounder in (None, other):
        found = passes.cbam_unpool(grad_y, confounder, *used)
        want = plain.cbam_unpool(*double(grad_y, confounder, *used))
        sizes = magnitude(grad_y, confounder, *used)
        if confounder is not None:
            sizes[0] = sizes[0] + 2 * sizes[1]  # it is subtracted once and added once
        assert found.dtype == grad_y.dtype and found.stride() == grad_y.stride()
        agrees(found, want, plain.cbam_unpool(*sizes), 6)


def values(case: Maps, kind: str) -> torch.Tensor:
    x = torch.randint(-2, 3, case.shape, dtype=torch.float64)
    if kind == "nan":
        x[torch.rand(case.shape) < 0.1] = math.nan
        x[torch.rand(case.shape) < 0.1] = math.inf
        x[torch.rand(case.shape) < 0.1] = -math.inf
    elif kind == "nothing but -inf":
        x[:] = -math.inf
    elif kind == "zeros of both signs":
        x = torch.where(torch.rand(case.shape) < 0.5, -0.0, 0.0).double()
    return stored(x, case)


SPECIAL = {name: case for name, case in (MAPS | cbam_cases.TILES).items() if "one " not in name}
OF_CUDA = {name: case for name, case in (MAPS | cbam_cases.CHUNKS).items() if "one " not in name}


@each((CPU, SPECIAL), (CUDA, OF_CUDA), (("triton",), cbam_cases.INTERPRETED))
@pytest.mark.parametrize("kind", ["ties", "nan", "nothing but -inf", "zeros of both signs"])
def test_special_values(passes, case, kind):
    """The first index wins ties, NaN wins over numbers and the first NaN over later ones, as in torch.max(dim)."""
    x = values(case, kind)
    for found, want in (
        (passes.cbam_pool_positions(x), plain.cbam_pool_positions(*double(x))),
        (passes.cbam_pool_channels(x, None), plain.cbam_pool_channels(*double(x, None))),
    ):
        assert torch.equal(found[1].cpu(), want[1])
        torch.testing.assert_close(found[0][:, 0].cpu().double(), want[0][:, 0], rtol=0, atol=0, equal_nan=True)
        # Sums of small integers are exact; infinities and NaN are met in any order.
        torch.testing.assert_close(found[0][:, 1].cpu().double(), want[0][:, 1], rtol=1e-6, atol=0, equal_nan=True)


@each((CPU, MAPS | cbam_cases.TILES))
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_convolve(passes, case, kernel_size):
    b, _, h, w = case.shape
    dtype = accumulate_dtype(case.dtype)
    pooled, weight = torch.randn(b, 2, h, w, dtype=dtype), torch.randn(1, 2, kernel_size, kernel_size, dtype=dtype)
    grad = torch.randn(b, 1, h, w, dtype=dtype)

    def transposed(pooled, weight, grad):
        leaves = [t.requires_grad_() for t in (pooled, weight)]
        z = F.conv2d(*leaves, padding=kernel_size // 2)
        return z.detach(), *torch.autograd.grad(z, leaves, grad)

    found = passes.cbam_convolve(pooled, weight), *passes.cbam_convolve_backward(grad, pooled, weight)
    terms = 2 * kernel_size**2, kernel_size**2, b * h * w
    for got, want, sizes, n in zip(
        found,
        transposed(*double(pooled, weight, grad)),
        transposed(*magnitude(pooled, weight, grad)),
        terms,
        strict=True,
    ):
        assert got.dtype == dtype and got.shape == want.shape
        agrees(got, want, sizes, n)


@on(*CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["batch", "fixed", "none"])
@pytest.mark.parametrize("size", [(2, 1, 7, 7), (1, 1, 1, 2), (3, 1, 70, 61)], ids=str)
def test_spatial_gate(passes, size, norm, dtype):
    z, grad = torch.randn(2, *size, dtype=dtype)
    scale, shift, mean, var = (torch.randn(1, dtype=t) for t in (dtype, dtype, torch.bfloat16, torch.float64))
    fixed = (mean, var.exp()) if norm == "fixed" else (None, None)
    affine = (None, None) if norm == "none" else (scale, shift)
    spatial, statistics = passes.cbam_spatial_gate(z, *affine, *fixed, 1e-2, norm == "batch")
    found = passes.cbam_spatial_gate_backward(grad, z, spatial, statistics, affine[0], 1e-2)

    leaves = [t.double().requires_grad_() for t in (z, scale if norm != "none" else torch.ones(1), shift)]
    wide, factor, added = leaves
    used = [t.double() for t in fixed] if norm == "fixed" else [torch.tensor(n).double() for n in (0.0, 1.0)]
    if norm == "batch":
        used = list(torch.var_mean(wide, correction=0))[::-1]
    share = 1 / z.numel() if norm == "batch" else 0.0
    want = factor * (wide - used[0]) / (used[1] + 1e-2).sqrt() + (0.0 if norm == "none" else added)
    want = want.sigmoid()
    grads = torch.autograd.grad(want, leaves, grad.double(), allow_unused=True)
    # Sums of as many products as z has elements, of which none is larger than some ten.
    bound = {"rtol": 0.0, "atol": 20 * (z.numel() + 8) ** 0.5 * torch.finfo(dtype).eps}
    torch.testing.assert_close(spatial.double(), want.detach(), **bound)
    of_all = [float(n.detach()) for n in used] + [share]
    torch.testing.assert_close(statistics.double(), torch.tensor([of_all], dtype=torch.float64), **bound)
    for got, exact in zip(found, grads[: 2 if norm == "none" else 3], strict=norm != "none"):
        torch.testing.assert_close(got.double(), exact.view(got.shape), **bound)
    assert [t.dtype for t in (spatial, statistics, *found)] == [dtype] * 5


#: Samples, pools, channels and hidden features: vectors that are full, in part and less than one, rows beyond a block.
MLPS = [(1, 1, 1, 1), (1, 2, 5, 3), (3, 2, 70, 17), (8, 2, 64, 16), (9, 3, 33, 40), (17, 2, 256, 31)]


def mlp_of(sizes: tuple[int, ...], dtype: torch.dtype):
    b, pools, c, hidden = sizes
    return [torch.randn(s, dtype=dtype) for s in ((b, pools, c), (hidden, c), (hidden,), (c, hidden), (c,), (b, c))]


@on(*CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", MLPS, ids=str)
@pytest.mark.parametrize("biases", [True, False])
def test_channel_gate(passes, sizes, dtype, biases):
    pooled, first, first_bias, second, second_bias, grad = mlp_of(sizes, dtype)
    if not biases:
        first_bias = second_bias = None
    b, pools, c, width = sizes
    arguments = pooled, first, first_bias, second, second_bias
    hidden, channel = passes.cbam_channel_gate(*arguments)
    assert hidden.dtype is channel.dtype is dtype
    want = plain.cbam_channel_gate(*double(*arguments))
    sizes_of = magnitude(*arguments)
    of_hidden, _ = plain.cbam_channel_gate(*sizes_of)
    agrees(hidden, want[0], of_hidden, c)
    # A logit's error reaches its sigmoid at most by a quarter.
    of_logits = (of_hidden @ sizes_of[3].mT + (sizes_of[4] if biases else 0)).sum(1)
    agrees(channel, want[1], of_logits / 4 + want[1], c + width)

    arguments = grad, pooled, hidden, channel, first, second
    found = passes.cbam_channel_gate_backward(*arguments)
    wants = plain.cbam_channel_gate_backward(*double(*arguments))
    for got, exact, magnitudes in zip(
        found, wants, plain.cbam_channel_gate_backward(*magnitude(*arguments)), strict=True
    ):
        assert got.dtype is dtype and got.shape == exact.shape
        agrees(got, exact, magnitudes, b * pools + c + width)


@on(*CPU)
def test_channel_gate_of_values_that_are_no_numbers(passes):
    """NaN goes through ReLU and sigmoid as through torch's; a gate of an infinite logit is 0 or 1."""
    pooled, first = torch.tensor([math.nan, math.inf, -math.inf]).view(3, 1, 1), torch.tensor([[1.0]])
    arguments = pooled, first, None, torch.tensor([[-2.0]]), None
    hidden, channel = passes.cbam_channel_gate(*arguments)
    want = plain.cbam_channel_gate(*arguments)
    torch.testing.assert_close((hidden, channel), want, rtol=1e-6, atol=0, equal_nan=True)


@on(*CPU)
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_on_any_number_of_threads(passes, channels_last):
    case = Maps((3, 90, 45, 50), channels_last)
    x, grad_y, other = (maps_of(case) for _ in range(3))
    gates, (of_c, arg_c, of_s, arg_s) = gates_of(x), features_of(x)
    weight = numbers(x, 1, 2, 7, 7)
    pooled, *mlp, grad = mlp_of((9, 2, 512, 65), torch.float32)
    hidden, channel = passes.cbam_channel_gate(pooled, *mlp)

    def everything():
        return [
            *passes.cbam_pool_positions(x),
            *passes.cbam_pool_channels(x, gates[0]),
            *passes.cbam_recalibrate(x, *gates, True),
            *passes.cbam_recalibrate_reduce(grad_y, other, x, *gates),
            passes.cbam_unpool_reduce(x, of_s, arg_s),
            passes.cbam_unpool(grad_y, other, gates[0], of_c, arg_c, gates[1], of_s, arg_s),
            passes.cbam_convolve(of_s, weight),
            *passes.cbam_convolve_backward(gates[1], of_s, weight),
            *passes.cbam_channel_gate(pooled, *mlp),
            *passes.cbam_channel_gate_backward(grad, pooled, hidden, channel, *mlp[::2]),
        ]

    same_bits_with_any_threads(everything)


@pytest.mark.parametrize("kind", ["contiguous", "axes of length one"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_operator_checks_of_the_framework(kind, channels_last):
    """opcheck: schemas, fakes and results agree in shape, type and strides."""
    skip_unless_runnable("cpu", "cpu", "cbam")
    shape = (2, 3, 4, 5) if kind == "contiguous" else (1, 3, 1, 5)
    x = maps_of(Maps(shape, channels_last)).cpu()
    gates, (of_c, arg_c, of_s, arg_s) = gates_of(x), features_of(x)
    weight = numbers(x, 1, 2, 3, 3)
    pooled, *mlp, grad = mlp_of((2, 2, 5, 3), torch.float32)
    passes = backends.passes("cpu", "cbam")
    for operator, arguments in (
        (passes.cbam_pool_positions, (x,)),
        (passes.cbam_pool_channels, (x, gates[0])),
        (passes.cbam_recalibrate, (x, *gates, True)),
        (passes.cbam_recalibrate_reduce, (x, x.clone(), x, *gates)),
        (passes.cbam_unpool_reduce, (x, of_s, arg_s)),
        (passes.cbam_unpool, (x, None, gates[0], of_c, arg_c, gates[1], of_s, arg_s)),
        (passes.cbam_convolve, (of_s, weight)),
        (passes.cbam_convolve_backward, (gates[1].contiguous(), of_s, weight)),
        (passes.cbam_spatial_gate, (gates[1], None, *[numbers(x, 1) for _ in range(3)], 1e-3, False)),
        (passes.cbam_spatial_gate_backward, (gates[1], x[:, :1].contiguous(), gates[1], numbers(x, 1, 3), None, 1e-3)),
        (passes.cbam_channel_gate, (pooled, *mlp)),
        (passes.cbam_channel_gate_backward, (grad, pooled, numbers(x, 2, 2, 3), grad, *mlp[::2])),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
