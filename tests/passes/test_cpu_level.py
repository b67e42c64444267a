"""The instruction level that AIA_KERNELS_CPU_LEVEL names."""

from __future__ import annotations

import os
import subprocess
import sys


def test_an_unknown_level_is_refused_aloud():
    """Never is the best level taken in its place: who names one wants to know what that one does."""
    x = "aia_kernels.functional.temporal_shift(torch.ones(8, 4, 2, 2), 4)"
    environment = os.environ | {"AIA_KERNELS_CPU_LEVEL": "avx2", "AIA_KERNELS_BACKEND": "cpu"}
    code = f"import torch, aia_kernels; {x}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1  # an exception, not an abort
    assert "RuntimeError: AIA_KERNELS_CPU_LEVEL must be a level that this processor has (base" in done.stderr
    assert "got avx2" in done.stderr
