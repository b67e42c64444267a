"""What csrc/cuda/launch.cuh asks of a device and keeps: of each device for itself, and no error in silence."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "launches" / "launches.cpp"
BYTES = 200 << 10
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


class Answer(ctypes.Structure):
    _fields_ = (("error", ctypes.c_int), ("value", ctypes.c_int))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ is here")
    built = tmp_path_factory.mktemp("launches") / "launches.so"
    command = [
        "g++",
        "-std=c++20",
        "-Wall",
        "-shared",
        "-fPIC",
        "-fno-gnu-unique",
        f"-I{SOURCE.parent}",
        SOURCE,
        "-o",
        built,
    ]
    subprocess.run(command, check=True)
    return built


@pytest.fixture
def launches(library, tmp_path) -> Iterator[ctypes.CDLL]:
    """The launches, with nothing asked yet: a library of their own."""
    found = ctypes.CDLL(str(shutil.copy(library, tmp_path)))
    found.clusters_together.restype = Answer
    return found


def clusters(launches, cluster: int = 8, bytes: int = BYTES) -> tuple[int, int]:
    """(error, clusters at once)."""
    answer = launches.clusters_together(cluster, bytes)
    return answer.error, answer.value


def test_each_device_answers_for_itself(launches):
    for _ in range(2):
        for device, expected in ((0, (132, 50 << 20, (0, 16))), (1, (108, 40 << 20, (0, 0)))):
            launches.use_device(device)
            assert (launches.multiprocessors(), launches.cache_bytes(), clusters(launches)) == expected
    asked = launches.questions()
    launches.multiprocessors()
    clusters(launches)
    assert launches.questions() == asked  # a stream may be under capture, so that nothing is asked twice


def test_each_device_is_told_what_a_launch_needs(launches):
    for device in (0, 1):
        launches.use_device(device)
        assert launches.launch_clusters(8, BYTES) == 0


@pytest.mark.parametrize("cluster, bytes", [(16, BYTES), (8, (227 << 10) + 1)])
def test_clusters_that_do_not_fit(launches, cluster, bytes):
    assert clusters(launches, cluster, bytes) == (0, 0)


@pytest.mark.parametrize("function", ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute"])
def test_a_question_that_fails_is_an_error(launches, function):
    launches.fail(function.encode(), INVALID_VALUE)
    assert clusters(launches)[0] == INVALID_VALUE
    launches.fail(function.encode(), 0)
    assert clusters(launches) == (0, 16)


def test_a_kernel_without_its_attributes_is_an_error(launches):
    launches.be_deaf(True)
    assert clusters(launches)[0] == INVALID_CONFIGURATION
    assert launches.launch_clusters(8, BYTES) == INVALID_CONFIGURATION
    launches.be_deaf(False)
    assert clusters(launches) == (0, 16)


def test_a_launch_whose_attributes_fail_is_an_error(launches):
    launches.fail(b"cudaFuncSetAttribute", INVALID_VALUE)
    assert launches.launch_clusters(8, BYTES) == INVALID_VALUE
