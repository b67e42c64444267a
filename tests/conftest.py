"""What every test shares: the interpreter where there is no GPU, and the backends to run with their devices."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read by triton when it is first imported: before any test module imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        import triton_interpreter
    except ImportError as error:
        if error.name not in ("triton", "triton_interpreter"):
            raise
    else:
        triton_interpreter.install()

import aia_kernels

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
COMPILED = {"cpu": "cpu", "cuda": "triton"}


def runnable(backend: str, device: str) -> str | None:
    """None if a test can run a backend on a device of this machine, else the reason to skip it with."""
    from aia_kernels import backends

    return aia_kernels.available_backends()[backend] or backends.why_not(backend, device, torch.float32)


def skip_unless_runnable(backend: str, device: str) -> None:
    if (reason := runnable(backend, device)) is not None:
        pytest.skip(f"{backend} on {device}: {reason}")


def _chosen(request) -> Iterator[tuple[str, str]]:
    backend, device = request.param
    skip_unless_runnable(backend, device)
    with aia_kernels.use_backend(backend):
        yield backend, device


@pytest.fixture(params=[(b, d) for d in DEVICES for b in ("reference", COMPILED[d])], ids="-".join)
def backend_on(request) -> Iterator[tuple[str, str]]:
    """Each backend that is fast enough for many cases, with its device, chosen for the duration of the test."""
    yield from _chosen(request)


@pytest.fixture(params=[(COMPILED[d], d) for d in DEVICES], ids="-".join)
def compiled_on(request) -> Iterator[tuple[str, str]]:
    """The same without the reference."""
    yield from _chosen(request)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
