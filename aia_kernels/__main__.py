"""``python -m aia_kernels``: what is installed, which backends can run, why others cannot, and whether they are right.

The self-check runs every layer of every family forward and backward on each backend that can run here and holds every
result, values and gradients, against the reference in float64 (testing.py has the budget).
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable

import torch
from torch import nn

from . import __version__, backends, modules, testing
from .backends import extension
from .reference import UNITS

SEGMENTS = 4
TOKENS, MAPS = (2, 7, 8), (2, 8, 5, 3)

#: By family and name, a layer to check and the sizes of its input.
LAYERS: dict[str, dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "attention_in_attention": {
        name: (functools.partial(getattr(modules, name), SEGMENTS), (4, 6, 5, 3)) for name in UNITS
    },
    "external_attention": {
        "ExternalAttention": (lambda: modules.ExternalAttention(8, S=5), TOKENS),
        "ExternalAttention2d": (lambda: modules.ExternalAttention2d(8, k=4), MAPS),
        "MultiHeadExternalAttention": (lambda: modules.MultiHeadExternalAttention(8, num_heads=2), TOKENS),
        "TokenExternalAttention": (lambda: modules.TokenExternalAttention(8, 8, k=5), TOKENS),
    },
    "cbam": {
        "CBAM": (lambda: modules.CBAM(8, 2), MAPS),
        "ChannelGate": (lambda: modules.ChannelGate(8, 2), MAPS),
        "SpatialGate": (lambda: modules.SpatialGate(), MAPS),
    },
    "linear_attention": {
        "PositionLinearAttention": (lambda: modules.PositionLinearAttention(8, scale=4), MAPS),
        "PositionLinearAttention, softplus": (
            lambda: modules.PositionLinearAttention(8, scale=4, feature="softplus"),
            MAPS,
        ),
        "ChannelLinearAttention": (modules.ChannelLinearAttention, MAPS),
        "EfficientAttention": (lambda: modules.EfficientAttention(8, 4, 2, 6), MAPS),
    },
    "temporal_shift": {"TemporalShift": (lambda: modules.TemporalShift(SEGMENTS, fold_div=3), (4, 6, 5, 3))},
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return ", ".join(f"{device.name} (compute {device.major}.{device.minor})" for device in found)
    return f"CPU, {torch.get_num_threads()} threads; torch sees no CUDA device"


def self_check(backend: str, family: str) -> tuple[str, bool]:
    """One line on the agreement of a backend with the float64 reference, and whether it is within its budget."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    generator = torch.Generator().manual_seed(0)
    worst = []
    for name, (make, sizes) in LAYERS[family].items():
        module = testing.randomise(make()).to(device)
        x, grad_y = (torch.randn(sizes, generator=generator).to(device) for _ in range(2))
        worst.append((testing.compare(module, x, grad_y, backend)[0], name))
    excess, name = max(worst, key=lambda pair: pair[0].ratio)
    verdict = "right" if excess.ratio <= 1 else "WRONG"
    return f"{verdict}: worst error {excess.error:.1e} of {excess.budget:.1e} allowed ({name}, {excess.name})", (
        excess.ratio <= 1
    )


def main() -> int:
    versions = f"torch {torch.__version__}, triton {_version('triton')}, Python {platform.python_version()}"
    print(f"aia_kernels {__version__}, {versions}")
    print(f"{platform.platform()}, {_device()}\n")
    healthy = True
    try:
        print(f"backend in force: {backends.chosen_backend()}")
    except ValueError as error:
        healthy = False
        print(f"backend in force: none: {error}")
    if extension.has_cuda():
        print(f"CUDA part: {extension.cuda()}")
    for family in LAYERS:
        print(f"{family}:")
        for name, reason in backends.available_backends(family).items():
            if reason is None:
                line, right = self_check(name, family)
                healthy &= right
                print(f"  {name:<10} can run; {line}")
            else:
                print(f"  {name:<10} cannot: {reason}")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
