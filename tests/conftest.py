"""What every test shares: the interpreter where there is no GPU, and the backends to run with their devices."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores, and threads that wait leave theirs to others: spinning takes twenty times as long. OpenMP
    # reads this when torch is first imported, as does every process that a test starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

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

ROOT = Path(__file__).parent.parent
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
#: The compiled backends of each device, and each backend with its device: what whole layers are tested on.
COMPILED = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
COMPILED_ON = [(b, d) for d in DEVICES for b in COMPILED[d]]
BACKENDS_ON = [(b, d) for d in DEVICES for b in ("reference", *COMPILED[d])]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of -n auto: one a core, two on a single core, which waits for compilers at times. A worker takes 2 GB."""
    return min(max(len(os.sched_getaffinity(0)), 2), 8)


#: Files that compile or start processes for long. They begin first: no worker is left alone with one at the end.
LONG = (
    *("test_fuzz", "test_cuda_offline", "test_passes", "test_external_passes", "test_cuda_passes"),
    *("test_uses_distributed", "test_triton_double_norm_offline", "test_triton_offline", "test_promises_compile"),
    *("test_promises_distributed", "test_models_resnet", "test_promises_imports", "test_uses_compile"),
    *("test_models_external_attention", "test_onnx", "test_external_attention_promises", "test_triton_double_norm"),
    *("test_shift", "test_benchmarks", "test_packages", "test_example_distributed", "test_checks", "test_cuda_runtime"),
    *("test_uses_surroundings", "test_roofline"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    if " " in torch.__file__:  # Inductor's command lines are cut at spaces
        for item in items:
            if "inductor" in item.name:
                item.add_marker(
                    pytest.mark.skip(reason=f"Inductor compiles nothing with a torch in {torch.__file__!r}")
                )


def runnable(backend: str, device: str, family: str = "attention_in_attention") -> str | None:
    """None if a test can run a backend on a device of this machine, else the reason to skip it with."""
    from aia_kernels import backends

    return aia_kernels.available_backends(family)[backend] or backends.why_not(backend, device, torch.float32, family)


def skip_unless_runnable(backend: str, device: str, family: str = "attention_in_attention") -> None:
    if (reason := runnable(backend, device, family)) is not None:
        pytest.skip(f"{backend} on {device}: {reason}")


def _chosen(request, family: str = "attention_in_attention") -> Iterator[tuple[str, str]]:
    backend, device = request.param
    skip_unless_runnable(backend, device, family)
    with aia_kernels.use_backend(backend):
        yield backend, device


@pytest.fixture(params=BACKENDS_ON, ids="-".join)
def backend_on(request) -> Iterator[tuple[str, str]]:
    """Each backend that is fast enough for many cases, with its device, chosen for the duration of the test."""
    yield from _chosen(request)


@pytest.fixture(params=COMPILED_ON, ids="-".join)
def compiled_on(request) -> Iterator[tuple[str, str]]:
    """The same without the reference."""
    yield from _chosen(request)


@pytest.fixture
def case(request) -> Any:
    """The case of a row of pass_backends.each."""
    return request.param


def some_of(names: str, cases: Iterable, *in_every_run, indirect: bool = False) -> pytest.MarkDecorator:
    """Parametrize a test that takes long: a few of its cases run each time, all of them in sweeps."""
    cases = list(cases)
    assert all(case in cases for case in in_every_run), in_every_run
    several = "," in names
    rows = [
        pytest.param(*(case if several else (case,)), marks=() if case in in_every_run else pytest.mark.sweep)
        for case in cases
    ]
    return pytest.mark.parametrize(names, rows, indirect=indirect)


#: For tests that compile for seconds. Of plain PyTorch, which torch is tested with, a few small cases hold the same.
_TRACED = [pytest.param((b, d), marks=pytest.mark.sweep if b == "reference" else ()) for b, d in BACKENDS_ON]


@pytest.fixture(params=_TRACED, ids="-".join)
def traced_on(request) -> Iterator[tuple[str, str]]:
    """backend_on, with the reference in sweeps alone."""
    yield from _chosen(request)


@pytest.fixture(params=_TRACED, ids="-".join)
def external_traced_on(request) -> Iterator[tuple[str, str]]:
    """traced_on for external attention."""
    yield from _chosen(request, "external_attention")


@pytest.fixture(params=BACKENDS_ON, ids="-".join)
def external_on(request) -> Iterator[tuple[str, str]]:
    """backend_on for external attention."""
    yield from _chosen(request, "external_attention")


@pytest.fixture(params=COMPILED_ON, ids="-".join)
def external_compiled_on(request) -> Iterator[tuple[str, str]]:
    """compiled_on for external attention."""
    yield from _chosen(request, "external_attention")


@pytest.fixture(params=BACKENDS_ON, ids="-".join)
def cbam_on(request) -> Iterator[tuple[str, str]]:
    """backend_on for CBAM."""
    yield from _chosen(request, "cbam")


@pytest.fixture(params=COMPILED_ON, ids="-".join)
def cbam_compiled_on(request) -> Iterator[tuple[str, str]]:
    """compiled_on for CBAM."""
    yield from _chosen(request, "cbam")


@pytest.fixture(params=_TRACED, ids="-".join)
def cbam_traced_on(request) -> Iterator[tuple[str, str]]:
    """traced_on for CBAM."""
    yield from _chosen(request, "cbam")


@pytest.fixture(params=BACKENDS_ON, ids="-".join)
def linear_on(request) -> Iterator[tuple[str, str]]:
    """backend_on for linear attention."""
    yield from _chosen(request, "linear_attention")


@pytest.fixture(params=COMPILED_ON, ids="-".join)
def linear_compiled_on(request) -> Iterator[tuple[str, str]]:
    """compiled_on for linear attention."""
    yield from _chosen(request, "linear_attention")


#: Instruction levels for which the C++ passes are compiled: each must be right, not only the one in force here.
LEVELS = ("v4", "v3", "base")


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """The C++ passes at one of LEVELS, in this process; skipped where the processor does not have it."""
    from aia_kernels.backends import extension

    choose = ctypes.CDLL(str(extension.LIBRARY)).aia_kernels_cpu_level
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    if (reason := choose(level.encode())) is not None:
        pytest.skip(reason.decode())
    try:
        yield
    finally:
        choose(None)


def nvcc() -> str:
    """nvcc, where a test can compile csrc/cuda."""
    if not (ROOT / "csrc" / "cuda").exists():
        pytest.skip("the sources are not here, only the package")
    if (found := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")) is None:
        pytest.skip("nvcc is not here")
    return found


#: Sources of csrc/cuda that are compiled as in the library where it holds no CUDA; they are small.
COMPILED_SOURCES = ("recalibrate", "residual")


@pytest.fixture(scope="session")
def cuda_binaries(tmp_path_factory) -> list[Path]:
    """Machine code of csrc/cuda for sm_90: the library, if it holds CUDA, or the smaller sources, compiled here."""
    from aia_kernels.backends import extension

    if extension.has_cuda():
        return [extension.LIBRARY]
    folder, binaries = tmp_path_factory.mktemp("cuda"), []
    for name in COMPILED_SOURCES:
        binaries.append(folder / f"{name}.cubin")
        flags = ["-std=c++20", "-O3", "-Xptxas", "-warn-spills,-Werror", "-arch=sm_90", "-cubin"]
        command = [nvcc(), *flags, ROOT / "csrc" / "cuda" / f"{name}.cu", "-o", binaries[-1]]
        subprocess.run(command, check=True)
    return binaries


@pytest.fixture(scope="session")
def emulator():
    """The passes of csrc/cuda on the host emulator, for CPU tensors."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    from emulator import Emulator, build

    found = Emulator(build(ROOT / "build" / "emulator"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A test may set the number of threads, as the benchmarks do. Bits of products hang on it, and some files compare
    bits with those that a test before has left (uses_layers.plain_step)."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch) -> None:
    """Inputs of tests are small; "auto" would leave external and linear attention, CaaM's pair and HaloNet's windows to
    plain PyTorch (test_small_calls.py, test_linear_attention_modules.py, test_causal_attention.py and
    test_halo_attention.py)."""
    for cost in ("CALL_COST", "FOLDING_COST"):
        monkeypatch.setattr(f"aia_kernels.backends.choices.{cost}", float("-inf"))
    for few in ("_MAPS_IN_CACHE", "_OPERANDS_IN_CACHE"):
        monkeypatch.setattr(f"aia_kernels.functional.dot_product.{few}", 0)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """torch.empty and its kin return NaN and largest integers: an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
