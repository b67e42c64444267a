"""The C++ passes where a tile is several blocks of channels wide, or a plane that is written as a whole.

How many blocks a reduction over space and time takes side by side depends on the number of threads
(csrc/register/cpu.h): on one thread several, on many one. The results must not.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import test_passes
import torch
from conftest import LEVELS, at_level
from pass_cases import Case
from plain_passes import PlainPasses

from aia_kernels import backends

CASES = {
    "groups of blocks, ragged": Case((4, 3, 75, 3, 5), "THWC"),
    "more blocks than a tile holds": Case((1, 2, 90, 2, 65), "THWC"),
    "rows longer than a tile": Case((1, 2, 18, 2, 300), "THWC"),
    "several rows": Case((2, 2, 20, 9, 3), "THWC"),
    "bf16": Case((4, 2, 40, 3, 4), "THWC", torch.bfloat16),
    "fp64": Case((2, 2, 70, 3, 4), "THWC", torch.float64),
    "a whole plane, ragged": Case((1, 2, 37, 9, 9)),
    "a whole plane, bf16": Case((1, 3, 16, 7, 7), "CTHW", torch.bfloat16),
    "a plane of several tiles": Case((1, 2, 17, 20, 20)),
}


@pytest.fixture(params=LEVELS)
def passes(request, monkeypatch):
    if (reason := backends.available_backends()["cpu"]) is not None:
        pytest.skip(reason)
    monkeypatch.setattr("pass_cases.DEVICE", "cpu")
    with at_level(request.param):
        yield backends.passes("cpu", "attention_in_attention")


@pytest.fixture
def plain() -> PlainPasses:
    return PlainPasses("THWC")


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[1, 16])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads", "uninitialised_memory_is_nan")
@pytest.mark.parametrize("context", [1, 3])
def test_reductions(passes, plain, case, context):
    test_passes.test_pool(passes, plain, case, context)
    test_passes.test_pool_gated(passes, plain, case, context, 4 - context)
    test_passes.test_unpool_reduce(passes, plain, case, context, 4 - context)


@pytest.mark.usefixtures("threads", "uninitialised_memory_is_nan")
def test_elementwise_passes(passes, plain, case):
    test_passes.test_recalibrate(passes, plain, case)
    for contexts in ((1, 0, 0), (3, 1, 1), (1, 3, 3)):
        test_passes.test_unpool(passes, plain, case, *contexts)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["ties", "nan"])
def test_special_values(passes, plain, case, kind):
    test_passes.test_pool_special_values(passes, plain, case, kind)


def test_an_unknown_level_is_refused_aloud():
    """Never is the best level taken in its place: who names one wants to know what that one does."""
    x = "aia_kernels.functional.temporal_shift(torch.ones(8, 4, 2, 2), 4)"
    environment = os.environ | {"AIA_KERNELS_CPU_LEVEL": "avx2", "AIA_KERNELS_BACKEND": "cpu"}
    code = f"import torch, aia_kernels; {x}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1  # an exception, not an abort
    assert "RuntimeError: AIA_KERNELS_CPU_LEVEL must be a level that this processor has (base" in done.stderr
    assert "got avx2" in done.stderr
