"""Inputs and error budgets, shared by tests, benchmarks and the self-check.

A backend is measured against the reference in float64. Its budget for a result is the sum of:

* twice the error that the reference itself makes in the low precision;
* one rounding of the result to its own type, and four of the accumulation type for the last steps, such as a momentum;
* eight times what the result moves when every parameter and every element of grad_y is perturbed by one rounding of the
  accumulation type, as a term passes about eight roundings on its way.

The last two are there because one evaluation of the reference can be right by luck. This is likely where a result is
one number, the sum of thousands of terms that cancel. The perturbation measures how much accuracy the terms allow. x
itself is not perturbed: that would break the ties that a low precision makes, and a tie decides which element gets a
gradient.

In float32 the reference accumulates as the backend does, and luck is more likely: with its samples in another order
such a number may be thirty times as far off. So the error there is the worst of four evaluations, with parameters a
rounding apart. Nothing is more exact than float64: for it, the reference's own error is that in float32, scaled down.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends
from .common.dtypes import accumulate_dtype

LAYOUTS = ("contiguous", "channels_last", "5d", "channels_last_3d")


class Shape(NamedTuple):
    """B clips of T frames with C channels of H x W.

    Attributes:
        b: Clips.
        t: Frames of a clip.
        c: Channels.
        h: Rows of a frame.
        w: Columns of a frame.
    """

    b: int
    t: int
    c: int
    h: int
    w: int


#: Named shapes for tests: odd, prime and degenerate sizes beside small cuts of a real network's.
SHAPES = {
    "small": Shape(2, 4, 6, 5, 3),
    "prime": Shape(2, 3, 7, 5, 11),
    "one frame": Shape(3, 1, 5, 4, 6),
    "one channel": Shape(2, 4, 1, 5, 3),
    "one row": Shape(2, 3, 4, 1, 7),
    "one column": Shape(2, 3, 4, 7, 1),
    "one pixel": Shape(2, 3, 17, 1, 1),
    "only channels": Shape(5, 1, 33, 1, 1),
    "one clip": Shape(1, 8, 16, 7, 7),
    "stage 5": Shape(2, 4, 40, 7, 7),
    "stage 3": Shape(1, 4, 9, 28, 28),
    "wide": Shape(1, 2, 3, 2, 300),
}


def make_input(
    shape: Shape, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Make an input of normal numbers, the same for all types and layouts but for rounding.

    Args:
        shape: The sizes of the clips.
        dtype: A floating-point type.
        layout: One of LAYOUTS.
        seed: That of the random numbers.
        device: Where the result lies.

    Returns:
        x, [B * T, C, H, W], or [B, C, T, H, W] for the last two layouts.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout in ("5d", "channels_last_3d"):
        x = clips.transpose(1, 2).contiguous()
        return x.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last_3d" else x
    x = clips.flatten(0, 1)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating-point buffer of a module a value that no default hides behind, in place.

    Args:
        module: Any module.
        seed: That of the random numbers.

    Returns:
        The module.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                r = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if name.endswith("running_var"):
                    r = 0.5 + 0.3 * r.abs()
                elif tensor.ndim == 1:
                    r = (1 if name.endswith("weight") else 0) + 0.3 * r
                else:
                    r = 0.4 * r
                tensor.copy_(r)
    return module


def run(module: nn.Module, x: Tensor, grad_y: Tensor, backend: str) -> dict[str, Tensor]:
    """Run one forward and backward of a copy of a module.

    Args:
        module: Any module that takes x alone.
        x: Its input.
        grad_y: The gradient of its output, in the shape of that.
        backend: A name that use_backend takes.

    Returns:
        y, the gradients of x and of every parameter, and the floating-point buffers after it, each by its name.
    """
    module = copy.deepcopy(module)
    x = x.detach().requires_grad_()
    with backends.use_backend(backend):
        y = module(x)
        y.backward(grad_y)
    results = {"y": y.detach(), "grad x": x.grad}
    results |= {f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


class Excess(NamedTuple):
    """One result beside its budget.

    Attributes:
        name: That of the result, as run gives it.
        error: The largest distance to the reference in float64.
        budget: The error that is allowed.
    """

    name: str
    error: float
    budget: float

    @property
    def ratio(self) -> float:
        return self.error / self.budget


def compare(module: nn.Module, x: Tensor, grad_y: Tensor, backend: str, low: nn.Module | None = None) -> list[Excess]:
    """Measure the error of every result of a module against the reference in float64.

    Args:
        module: Any module that takes x alone.
        x: Its input, float32, bfloat16, float16 or float64.
        grad_y: The gradient of its output, in the shape of that.
        backend: The backend that is measured.
        low: The module whose reference sets the budget; None: a copy of module in the type of x.

    Returns:
        The error and the budget of each result, the worst ratio first.
    """
    double = copy.deepcopy(module).double()
    exact = run(double, x.double(), grad_y.double(), "reference")
    coarse_dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    low = low or copy.deepcopy(module).to(coarse_dtype)
    coarse = run(low, x.to(coarse_dtype), grad_y.to(coarse_dtype), "reference")
    own = {name: _distance(coarse[name], exact[name]) for name in exact}
    for seed in range(3 if coarse_dtype == torch.float32 else 0):
        for name, error in _own_errors(low, x.to(coarse_dtype), grad_y.to(coarse_dtype), seed).items():
            own[name] = max(own[name], error)
    scaled = torch.finfo(x.dtype).eps / torch.finfo(coarse_dtype).eps
    found = run(module, x, grad_y, backend)
    moved = dict.fromkeys(exact, 0.0)
    for seed in range(3):
        perturbed = _perturbed(double, x, grad_y, seed)
        moved = {name: max(moved[name], _distance(perturbed[name], exact[name])) for name in exact}
    excesses = []
    for name, result in found.items():
        scale = exact[name].abs().max().item()
        roundings = torch.finfo(result.dtype).eps + 4 * torch.finfo(accumulate_dtype(x.dtype)).eps
        band = roundings * (scale or 1.0) + 8 * moved[name]
        budget = 2 * scaled * own[name] + band
        excesses.append(Excess(name, _distance(result, exact[name]), budget))
    return sorted(excesses, key=lambda excess: -excess.ratio)


def _distance(found: Tensor, exact: Tensor) -> float:
    distance = (found.double() - exact).abs().max().item()
    return math.inf if math.isnan(distance) else distance


def _own_errors(low: nn.Module, x: Tensor, grad_y: Tensor, seed: int) -> dict[str, float]:
    """Errors of the reference in a low precision, for parameters a rounding beside those of the module."""
    generator = torch.Generator().manual_seed(seed)
    low = copy.deepcopy(low)
    with torch.no_grad():
        for p in low.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
            p.copy_(p.double() * (1 + torch.finfo(p.dtype).eps * noise))
    exact = run(copy.deepcopy(low).double(), x.double(), grad_y.double(), "reference")
    return {name: _distance(value, exact[name]) for name, value in run(low, x, grad_y, "reference").items()}


def _perturbed(double: nn.Module, x: Tensor, grad_y: Tensor, seed: int) -> dict[str, Tensor]:
    """Results of the reference with parameters and grad_y off by about one rounding of the accumulation type."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(accumulate_dtype(x.dtype)).eps

    def off(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return tensor.double() * (1 + eps * noise)

    module = copy.deepcopy(double)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(off(p))
    return run(module, x.double(), off(grad_y), "reference")
