"""What can be known of the GPU kernels without a GPU: their machine code, and the bytes and launches of every layer."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment_without_interpreter() -> dict[str, str]:
    """Of a process in which Triton compiles, and which finds the project and what its tests share."""
    found = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(found)}
