"""The machine code of the CUDA kernels that are built here, read without a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

NO_DISASSEMBLER = "neither nvcc nor triton brings cuobjdump here"


def cuobjdump() -> str | None:
    """cuobjdump, next to nvcc or inside triton; nvdisasm, which it calls, lies beside it."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    if spec := importlib.util.find_spec("triton"):
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    folders.append(Path("/usr/local/cuda/bin"))
    for folder in folders:
        if os.access(folder / "cuobjdump", os.X_OK) and os.access(folder / "nvdisasm", os.X_OK):
            return str(folder / "cuobjdump")
    return None
