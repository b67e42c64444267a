"""Linear and efficient attention in the forms that are taken where a call is a launch, with the passes of PyTorch's
operators, those of Triton and those of CUDA.

Only a GPU takes them by itself. Here the CPU is made to. Triton's kernels run in their interpreter, those of CUDA on
the emulator."""

from __future__ import annotations

import pytest
import torch
from agreement import EXACT, assert_within_budget
from conftest import skip_unless_runnable
from torch import Tensor, nn

from aia_kernels import (
    ChannelLinearAttention,
    EfficientAttention,
    PositionLinearAttention,
    backends,
    functional,
    operators,
    testing,
)
from aia_kernels.algorithms import linear_attention as algorithm
from aia_kernels.backends import memory_passes

FAMILY = "linear_attention"
LAYERS = {
    "linear": lambda: PositionLinearAttention(8),
    "kernel": lambda: PositionLinearAttention(8, 4, feature="softplus"),
    "efficient": lambda: EfficientAttention(8, 4, 1, 6),
    "efficient, heads": lambda: EfficientAttention(8, 6, 3, 9),
}
MATRICES = {"query": (4, 6), "key": (4, 6), "value": (6, 6), "reprojection": (6, 6)}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.setattr(algorithm, "_is_launched", lambda _: True)


@pytest.fixture(params=["plain", "triton", "emulator"])
def backend(request, monkeypatch) -> str:
    """One that has the passes; those of PyTorch's operators as they are taken where a backend has none."""
    if request.param != "triton":
        found = memory_passes if request.param == "plain" else request.getfixturevalue("emulator")
        monkeypatch.setattr(backends, "passes", lambda *_: found)
        return "cpu"
    skip_unless_runnable("triton", "cpu", FAMILY)
    assert backends.passes("triton", FAMILY) is not memory_passes
    return "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_error_budget(name, dtype, backend):
    """Of three inputs in bfloat16, whose small products round too, the median: the one evaluation of the reference of
    which a budget is made may be right by luck."""
    module = testing.randomise(LAYERS[name]()).to(dtype)
    # No query whose mass is near 0, as 1 + q k / |q k| may be: its inverse would magnify every rounding.
    generator = torch.Generator().manual_seed(0)
    excesses = []
    for _ in range(3 if dtype == torch.bfloat16 else 1):
        x, grad_y = torch.randn(2, 2, 8, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
        if dtype in (torch.bfloat16, torch.float64):
            x, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y))
        excesses.append(testing.compare(module, x, grad_y, backend))
    assert_within_budget(sorted(excesses, key=lambda of: of[0].ratio)[len(excesses) // 2])


@pytest.mark.parametrize("sizes", [(2, 6, 5, 7), (2, 20, 3, 3)], ids=["positions", "channels"])
@pytest.mark.parametrize("stored", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_error_budget_over_channels(sizes, stored):
    """In bfloat16 all is made in it, where x has more positions than channels and where it has fewer."""
    module = testing.randomise(ChannelLinearAttention()).bfloat16()
    excesses = []
    for _ in range(3):
        x, grad_y = (t.contiguous(memory_format=stored) for t in torch.randn(2, *sizes).bfloat16())
        excesses.append(testing.compare(module, x, grad_y, "cpu"))
    assert_within_budget(sorted(excesses, key=lambda of: of[0].ratio)[1])


def call(feature: str, x: Tensor, tensors: dict[str, Tensor], **settings) -> Tensor:
    if feature == "softmax":
        return functional.efficient_attention(x, **tensors, biases=(None,) * 4, **settings)
    matrices = {name: t for name, t in tensors.items() if name != "reprojection"}
    return functional.linear_attention(x, **matrices, feature=feature, **settings)


@pytest.mark.parametrize("case", ["padding", "all of a sample", "chunks", "one token", "no residual", "extreme"])
@pytest.mark.parametrize("feature", ["l2", "softplus", "softmax"])
def test_is_the_reference(feature, case, backend, monkeypatch):
    if case == "chunks":
        monkeypatch.setattr(algorithm, "CHUNK", 4)
    n = 1 if case == "one token" else 9
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    scales = {"query": 1e4, "key": 1e4} if case == "extreme" else {}
    made = {name: scales.get(name, 1.0) * torch.randn(*shape) for name, shape in MATRICES.items()}
    tensors = {name: t.double() for name, t in made.items()}
    leaves = [t.requires_grad_() for t in tensors.values()][: 4 if feature == "softmax" else 3]
    padding = torch.zeros(2, n, dtype=torch.bool)
    padding[0, -2:], padding[1] = case == "padding", case == "all of a sample"
    settings = {"heads": 2, "padding_mask": padding if padding.any() else None, "residual": case != "no residual"}
    found, weights = [], torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    for chosen in (backend, "reference"):
        with backends.use_backend(chosen):
            y = call(feature, x, tensors, **settings)
            found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *leaves))))
    for one, other in zip(*found, strict=True):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one / size, other / size, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear", "efficient"])
def test_what_tracers_are_told(name, dtype):
    """The types and shapes of what the operators return, keeping all, where the memory is of a narrow type."""
    skip_unless_runnable("triton", "cpu", FAMILY)
    feature, c = ("l2", 6) if name == "linear" else ("softmax", 6)
    made = [torch.randn(s).to(dtype) for s in ((2, 9, c), (8, c), (8,), (1, c, c), (1, c), (1, c, c), (c,), (1,))]
    x, *weights = made
    if name == "linear":
        weights[4] = weights[5] = None
    settings = feature, 1, 1e-6, True, "", True, True, "triton"
    arguments = x, *weights, None, *settings
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.aia_kernels.linear_attention_forward, arguments, **checks)
    y, *kept = operators.linear_attention.linear_attention_forward(*arguments)
    assert kept[1].dtype == dtype and kept[2].dtype == torch.float32
    arguments = torch.ones_like(y), x, *kept, *weights, None, *settings
    torch.library.opcheck(torch.ops.aia_kernels.linear_attention_backward, arguments, **checks)


def test_gradients_of_parameters_are_of_their_type(backend):
    module: nn.Module = EfficientAttention(8, 4, 2, 8).bfloat16()
    x = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    with backends.use_backend(backend):
        module(x).sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.bfloat16} == {x.grad.dtype}
