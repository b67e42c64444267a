"""The compiled part of the package, aia_kernels/_C.so: loads it, or says in one sentence why it cannot be used."""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import sources

LIBRARY = Path(__file__).parents[1] / "_C.so"
#: What the library is built from. It lies beside the package in a checkout, and nowhere once a wheel is installed.
SOURCES = LIBRARY.parents[1] / "csrc"


@functools.cache
def load() -> str | None:
    """Load the library and with it every compiled operator. None on success, else the reason."""
    if not LIBRARY.exists():
        return (
            "the C++ extension was not built; install a C++20 compiler (apt install g++) and reinstall aia_kernels"
            " with pip install -v --no-build-isolation, which says what else is missing"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # torch wraps the linker's words
        return f"the C++ extension does not load ({reason}); reinstall aia_kernels"
    if _is_of_other_sources():
        reason = f"the C++ extension was built from other sources than {SOURCES} holds; build it again (make install)"
        warnings.warn(f"plain PyTorch runs in place of the kernels: {reason}", stacklevel=2)
        return reason
    return None


def _is_of_other_sources() -> bool:
    """Whether the library and the sources beside it differ, as after a pull without a build.

    Passes of two versions agree on names and types, yet not on the order of what they hand one another: such a library
    gives wrong numbers without an error. A library that tells no sources (None) was built elsewhere on purpose.
    """
    if not SOURCES.is_dir():
        return False
    try:
        told = _text("sources")
    except AttributeError:  # of a version that did not tell them yet
        return True
    return told is not None and told != sources.digest(SOURCES)


class Cuda(NamedTuple):
    """What the CUDA part of the library found where it runs.

    stream: where torch's current stream was found, or None. runtime: the CUDA that the library was built with, and
    driver: the newest that the driver knows, as (major, minor), None without a driver. architectures: those whose
    kernels the library holds, as TORCH_CUDA_ARCH_LIST writes them. gate_blocks: the most blocks that wait for one
    another, by AIA_KERNELS_GATE_BLOCKS, or 0 if that cannot be.
    """

    stream: str | None
    runtime: tuple[int, int]
    driver: tuple[int, int] | None
    architectures: tuple[str, ...]
    gate_blocks: int

    def __str__(self) -> str:
        stream = f"found in {self.stream}" if self.stream else f"not found in torch {torch.__version__}"
        driver = "none" if self.driver is None else _dotted(self.driver)
        return (
            f"stream: {stream}; CUDA runtime {_dotted(self.runtime)}, driver {driver}; "
            f"architectures {', '.join(self.architectures)}"
        )

    def holds(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability can run the kernels. Code runs on devices of its own major
        version, from its minor version on; code with +PTX is compiled anew on all later devices.
        """

        def runs(architecture: str) -> bool:
            major, minor, letter, later = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", architecture).groups()
            own = int(major), int(minor)
            if letter:  # 9.0a: for this capability alone
                return own == capability
            return own <= capability and (own[0] == capability[0] or later is not None)

        return any(map(runs, self.architectures))

    def reason(self) -> str | None:
        """None where its operators can run with this torch and driver, else why not."""
        if self.stream is None:
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            return f"torch's current CUDA stream was not found: torch {torch.__version__} was built {built}"
        if self.driver is None:
            return "no CUDA driver was found"
        if self.driver[0] < self.runtime[0]:
            return (
                f"the driver knows CUDA {_dotted(self.driver)}, and the library was built with {_dotted(self.runtime)};"
                " update the driver, or reinstall aia_kernels with the toolkit of that version"
            )
        if self.gate_blocks == 0:
            return "AIA_KERNELS_GATE_BLOCKS must be a number from 3 on: a launch has a block for each of three maps"
        return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _text(name: str) -> str | None:
    function = getattr(ctypes.CDLL(str(LIBRARY)), f"aia_kernels_{name}")
    function.restype = ctypes.c_char_p
    found = function()
    return None if found is None else found.decode()


def _number(name: str) -> int:
    return getattr(ctypes.CDLL(str(LIBRARY)), f"aia_kernels_{name}")()


def _version(name: str) -> tuple[int, int] | None:
    number = _number(f"cuda_{name}")
    return (number // 1000, number % 1000 // 10) if number else None


@functools.cache
def without_cuda() -> str | None:
    """None when the library holds the CUDA kernels, else why it does not."""
    if (reason := load()) is not None:
        return reason
    text = _text("without_cuda")
    return None if text is None else f"the C++ extension has no CUDA part: {text}"


def has_cuda() -> bool:
    """Whether the library holds the CUDA kernels (not whether a GPU is there to run them)."""
    return without_cuda() is None


@functools.cache
def cuda() -> Cuda:
    """What the CUDA part found; the library must hold it."""
    architectures = tuple(_text("cuda_architectures").replace(";", " ").replace(",", " ").split())
    return Cuda(_text("stream"), _version("runtime"), _version("driver"), architectures, _number("gate_blocks"))


@functools.cache
def cuda_reason(index: int | None = None) -> str | None:
    """None when the CUDA kernels can run with this torch, driver and device, or any device without an index, else why
    not."""
    if (reason := without_cuda() or cuda().reason()) is not None:
        return reason
    devices = [i for i in range(torch.cuda.device_count()) if index in (None, i)]
    capabilities = [torch.cuda.get_device_capability(i) for i in devices]
    if capabilities and not any(map(cuda().holds, capabilities)):
        listed = ", ".join(sorted(set(map(_dotted, capabilities))))
        return (
            f"the library has kernels for {', '.join(cuda().architectures)}, and the device is of {listed};"
            f" reinstall aia_kernels with TORCH_CUDA_ARCH_LIST={_dotted(min(capabilities))}"
        )
    return None
