"""The compiled part of the package: loads aia_kernels/_C.so, or says in one sentence why it cannot."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")


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
    return None


@functools.cache
def cuda_reason() -> str | None:
    """None when the library holds the CUDA kernels, else why it does not."""
    if (reason := load()) is not None:
        return reason
    without_cuda = ctypes.CDLL(str(LIBRARY)).aia_kernels_without_cuda
    without_cuda.restype = ctypes.c_char_p
    text = without_cuda()
    return None if text is None else f"the C++ extension has no CUDA part: {text.decode()}"


def has_cuda() -> bool:
    """Whether the library holds the CUDA kernels (not whether a GPU is there to run them)."""
    return cuda_reason() is None
