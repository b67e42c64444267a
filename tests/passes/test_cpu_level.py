"""The instruction level that AIA_KERNELS_CPU_LEVEL names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_an_unknown_level_is_refused_aloud():
    """Never is the best level taken in its place: who names one wants to know what that one does."""
    x = "aia_kernels.functional.temporal_shift(torch.ones(8, 4, 2, 2), 4)"
    environment = os.environ | {"AIA_KERNELS_CPU_LEVEL": "avx2", "AIA_KERNELS_BACKEND": "cpu"}
    code = f"import torch, aia_kernels; {x}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1  # an exception, not an abort
    assert "RuntimeError: AIA_KERNELS_CPU_LEVEL must be a level that this processor has (base" in done.stderr
    assert "got avx2" in done.stderr


NARROW = """
import torch
from aia_kernels import backends
from aia_kernels.common import maps

assert backends.select("cpu", torch.float32, "attention_in_attention") == "cpu"
passes = backends.passes("cpu", "attention_in_attention")
for h, w in ((700, 7), (2000, 3), (1500, 5), (3000, 2), (600, 13)):
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 2, 6, h, w)
    over_c, over_thw = (maps.packed_size(x.shape, context) for context in (1, 3))
    of_c, of_thw = torch.rand(1, over_c), torch.rand(1, over_thw)
    first, grad = None, torch.randn(1, 2, over_thw)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        pooled, argmax = passes.pool(x, 3, of_c, 1)
        grad_c, argmax_c = passes.pool(x, 1, of_thw, 3)
        found = [pooled, argmax, grad_c, argmax_c, passes.recalibrate(x, of_thw, 3)]
        found += [passes.recalibrate_reduce(x, y, context) for context in (1, 3)]
        found += [passes.unpool_reduce(x, grad, argmax, 3, 1), passes.unpool_reduce(x, grad_c, argmax_c, 1, 3)]
        found.append(passes.unpool(y, of_thw, grad, argmax, 3, of_c, 1, grad_c, argmax_c, 1))
        first = first or found
        for one, several in zip(first, found):
            assert torch.equal(one, several), (h, w, threads)
"""


@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_narrow_planes_give_the_same_bits_on_any_number_of_threads(level):
    """A row that is shorter than a vector is stored with what follows it: not where another thread has the next row."""
    environment = os.environ | {"AIA_KERNELS_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", NARROW], env=environment, capture_output=True, text=True)
    if "must be a level that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr
