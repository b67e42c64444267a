"""What the CUDA part of the library finds where it runs, tested where there is no device: torch's current stream, the
driver, and the devices that its kernels are for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, some_of

import aia_kernels
from aia_kernels.backends import extension
from aia_kernels.backends.extension import Cuda

FOUND = Cuda("libtorch_cuda.so", (13, 0), (13, 1), ("9.0",), 528)


@pytest.mark.parametrize(
    "architectures, runs, fails",
    [
        (("8.0",), [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (("8.0", "9.0"), [(8, 6), (9, 0)], [(10, 0)]),
        (("8.0+PTX",), [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        (("9.0a",), [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        (("10.0+PTX", "9.0"), [(9, 0), (10, 0), (10, 3), (12, 0)], [(8, 9)]),
    ],
)
def test_devices_that_the_kernels_are_for(architectures, runs, fails):
    found = FOUND._replace(architectures=architectures)
    assert all(map(found.holds, runs))
    assert not any(map(found.holds, fails))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"stream": None}, "stream was not found: torch .* was built (without CUDA|for CUDA)"),
        ({"driver": None}, "no CUDA driver was found"),
        ({"driver": (12, 8)}, r"the driver knows CUDA 12\.8, and the library was built with 13\.0; update the driver"),
        # Of one major version each driver runs what all toolkits build.
        ({"runtime": (13, 2)}, None),
        ({"gate_blocks": 0}, "AIA_KERNELS_GATE_BLOCKS must be a number from 3 on"),
        ({}, None),
    ],
)
def test_reason(change, words):
    reason = FOUND._replace(**change).reason()
    assert reason is None if words is None else re.search(words, reason)


def test_a_device_without_kernels_is_named(monkeypatch):
    monkeypatch.setattr(extension, "without_cuda", lambda: None)
    monkeypatch.setattr(extension, "cuda", lambda: FOUND)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    of_devices = [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", of_devices.__getitem__)
    reason = extension.cuda_reason.__wrapped__()
    assert "kernels for 9.0, and the device is of 7.5, 8.0" in reason and "TORCH_CUDA_ARCH_LIST=7.5" in reason
    of_devices[1] = (9, 0)
    # One of several devices is enough to have the backend, and each is asked for itself before it computes.
    assert [extension.cuda_reason.__wrapped__(index) for index in (None, 1)] == [None, None]
    assert "the device is of 7.5" in extension.cuda_reason.__wrapped__(0)


ASKS = """
import ctypes, os, sys
import torch
for library in sys.argv[2:]:
    ctypes.CDLL(library, os.RTLD_LOCAL)
library = ctypes.CDLL(sys.argv[1])
library.aia_kernels_stream.restype = ctypes.c_char_p
print(library.aia_kernels_stream(), library.aia_kernels_gate_blocks())
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """asked(*libraries, blocks=): the stream and the blocks that the CUDA part finds beside other libraries. Its file
    register/cuda_runtime.cpp is compiled alone, with a CUDA runtime that does nothing."""
    if shutil.which("g++") is None or torch.version.cuda:
        pytest.skip("for g++ beside a torch without CUDA")
    folder = tmp_path_factory.mktemp("runtime")
    versions = ("cudaRuntimeGetVersion", "cudaDriverGetVersion")
    (folder / "cuda.cpp").write_text("".join(f'extern "C" int {name}(int*) {{ return 1; }}' for name in versions))
    sources = ROOT / "csrc" / "register" / "cuda_runtime.cpp", folder / "cuda.cpp"
    library = shared_library(folder / "library.so", *sources)

    def ask(*others: Path, blocks: str = "") -> list[str]:
        command = [sys.executable, "-c", ASKS, library, *others]
        environment = os.environ | {"AIA_KERNELS_GATE_BLOCKS": blocks}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()

    return ask


def shared_library(library: Path, *arguments) -> Path:
    build = ["g++", "-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    include = Path(torch.__file__).parent / "include"
    subprocess.run([*build, "-isystem", include, *arguments, "-o", library], check=True)
    return library


def test_the_stream_is_found_in_a_library_that_shows_it_to_nobody(asked, tmp_path):
    """Torch loads libtorch_cuda.so for itself alone. A library of that name, loaded so, stands for it here."""
    source = tmp_path / "torch.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }')
    torch_cuda = shared_library(tmp_path / "libtorch_cuda.so", source, "-Wl,-soname,libtorch_cuda.so")
    assert asked()[0] == "None"
    assert asked(torch_cuda)[0] == "b'libtorch_cuda.so'"


@some_of(
    "given, found",
    [("", 528), ("16", 16), ("9999", 528), ("2", 0), ("-4", 0), ("16 blocks", 0)],
    *[("9999", 528), ("2", 0), ("16 blocks", 0)],
)
def test_the_most_blocks_that_wait_for_one_another(asked, given, found):
    assert int(asked(blocks=given)[1]) == found


def test_reason_and_operators_agree_under_a_torch_with_cuda():
    """Where torch has CUDA the stream is found, and what is missing for an operator is what the reason names."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} was built without CUDA")
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    assert extension.cuda().stream == "libtorch_cuda.so"
    assert ("driver" in (extension.cuda_reason() or "")) == (extension.cuda().driver is None)
    assert aia_kernels.available_backends()["cuda"] is None or not torch.cuda.is_available()
