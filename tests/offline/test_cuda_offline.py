"""csrc/cuda compiled and read without a GPU: nothing spills, and x moves in 16-byte loads and stores.

A library that holds CUDA is read as a whole. Where none does, as after make install without a GPU, and nvcc is there,
every source is compiled without optimization, which is fast, and some as they would be in the library.
"""

from __future__ import annotations

import collections
import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMPILED_SOURCES, ROOT, nvcc, some_of

from aia_kernels.backends import extension
from benchmarks.offline import machine_code, sass
from benchmarks.offline.machine_code import BALANCE, COLUMNS, main, markdown

HOST, DEVICE = sorted(ROOT.glob("csrc/register/cuda_*.cpp")), sorted(ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
BYTES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2, "t": 2, "j": 4, "m": 8}
_TYPE = "|".join(BYTES)

#: The kernels that come in a version for aligned inputs and one for the others, with the type and the width of what
#: they move, and those that come in one version.
WIDTHS = (
    rf"(elementwise_kernel|evaluate_kernel|(?<=\d)gate_kernel|(?<=\d)backward_kernel|backward_reduce_kernel|double_norm_kernel|"
    rf"dots_kernel|double_norm_backward_kernel|map_kernel|temporal_shift_kernel)I({_TYPE})Li(\d+)E",
    rf"(reduce_over_channels|reduce_over_channels_of_run|reduce_over_spacetime)INS0_\d+(?:Plain|Product)I({_TYPE})"
    r"EELi(\d+)E",
    rf"(reduce_columns)ILi\d+ENS0_\S*?(?:StatisticsOp|RowGradientOp|TokenOp|ColumnOp|ReduceOp)I({_TYPE})Li(\d+)E",
    rf"(reduce_rows)INS0_\S*?RowOpI({_TYPE})Li(\d+)E",
    rf"(elements_kernel)ILi\d+ENS\d_\S*?OpI({_TYPE})Li(\d+)E",
)
#: And those that are told whether a lane's tokens are neighbours: then they move 16 bytes at a time.
BY_TOKENS = re.compile(
    r"(?<=\d)(keys_kernel|keys_backward_kernel|queries_kernel|queries_backward_kernel|statistics_kernel|softmax_kernel|"
    rf"reduced_kernel|softmax_backward_kernel)I(?:LNS_7FeatureE\dE)?Lb([01])E({_TYPE})"
)
#: Those that store as they load.
STORING = (
    *("elementwise_kernel", "evaluate_kernel", "gate_kernel", "double_norm_kernel", "double_norm_backward_kernel"),
    *("temporal_shift_kernel", "elements_kernel", "keys_kernel", "keys_backward_kernel", "queries_kernel"),
    *("queries_backward_kernel", "softmax_kernel", "softmax_backward_kernel"),
)
SINGLE = re.compile(
    r"(?<=\d)(known_gate_kernel|move_statistics_kernel|residual_relu_kernel|unpool_kernel|staged_kernel|"
    r"join_kernel|\w*_strips_kernel)|"
    r"reduce_columnsILi1E\S*Join"
)


def width_of(name: str) -> tuple[str, int] | None:
    """The kernel's name and the bytes that it moves at a time, or None for a kernel in one version."""
    for pattern in WIDTHS:
        if match := re.search(pattern, name):
            return match[1], int(match[3]) * BYTES[match[2]]
    if match := BY_TOKENS.search(name):
        return match[1], 16 if match[2] == "1" else BYTES[match[3]]
    assert SINGLE.search(name), f"this test does not know the kernel {name}"
    return None


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    if (found := machine_code.cuobjdump()) is None:
        pytest.skip(machine_code.NO_DISASSEMBLER)
    return found


def resources(cuobjdump: str, binary: Path) -> dict[tuple[str, str], int]:
    """Bytes of stack and local memory by (architecture, mangled name)."""
    found, architecture, name = {}, "", ""
    for line in run(cuobjdump, "--dump-resource-usage", binary):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"STACK:(\d+).* LOCAL:(\d+)", line):
            found[architecture, name] = int(match[1]) + int(match[2])
    return found


def accesses(cuobjdump: str, binary: Path) -> dict[str, collections.Counter]:
    """Counts of memory instructions by mangled name, for one architecture."""
    counts: dict[str, collections.Counter] = {}
    for line in run(cuobjdump, "-sass", "-arch", "sm_90", binary):
        if match := re.search(r"Function : (\S+)", line):
            current = counts.setdefault(match[1], collections.Counter())
        elif match := re.search(r"\b((?:LDG|STG)\b[.\w]*)", line):
            current[match[1]] += 1
    return counts


def run(*command) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    assert process.returncode == 0


@some_of("name", [s.stem for s in DEVICE if s.stem not in COMPILED_SOURCES], "gate_backward", "double_norm")
def test_nvcc_takes(name, tmp_path):
    """As the emulator's compiler does not tell a function of the host from one of the device."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    if extension.has_cuda():
        pytest.skip("it is compiled into the library")
    command = [nvcc(), "-std=c++20", "-G", "-arch=compute_90", "-ptx", source, "-o", tmp_path / "x.ptx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", HOST, ids=lambda path: path.name)
def test_the_compiler_takes(source):
    """The operators around the kernels, which only a library that holds CUDA has."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ is here")
    flags = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(["g++", *flags, "-isystem", include, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_is_there_for_every_architecture(cuobjdump):
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    names = collections.defaultdict(set)
    for architecture, name in resources(cuobjdump, extension.LIBRARY):
        width_of(name)
        names[architecture].add(name)
    assert set(names) >= ARCHITECTURES
    assert len({frozenset(found) for found in names.values()}) == 1


def test_the_library_is_small():
    """30 MB for each architecture, PTX counted as one."""
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    held = sum(1 + architecture.endswith("+PTX") for architecture in extension.cuda().architectures)
    assert extension.LIBRARY.stat().st_size <= 30e6 * held


def test_no_local_memory(cuobjdump, cuda_binaries):
    for binary in cuda_binaries:
        found = resources(cuobjdump, binary)
        assert found and not {key: used for key, used in found.items() if used}


def test_vectors_are_16_bytes(cuobjdump, cuda_binaries):
    """In the kernels for aligned inputs, and not in those for the others."""
    for binary in cuda_binaries:
        kernels = accesses(cuobjdump, binary)
        assert kernels
        for name, counts in kernels.items():
            if (found := width_of(name)) is None:
                continue
            kernel, width = found
            if width == 8 and "Li4E" in name:  # four elements of 16 bits, beside maps of 32
                continue
            aligned = width >= 16
            assert any(i.startswith("LDG.E.128") for i in counts) == aligned, name
            if kernel in STORING:
                assert any(i.startswith("STG.E.128") for i in counts) == aligned, name


def rows_of(binary: Path, output: Path) -> list[dict]:
    """The rows of the kernels in a binary, once through a file."""
    if machine_code.cuobjdump() is None:
        pytest.skip(machine_code.NO_DISASSEMBLER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "LIBRARY", binary)
        patch.setattr(extension, "without_cuda", lambda: None)
        assert main(["--backend", "cuda", "--architecture", "sm_90", "--output", str(output)]) == 0
    with output.open(newline="") as opened:
        found = list(csv.DictReader(opened))
    kernels = sass.names(machine_code.cuobjdump(), str(binary), "sm_90")
    assert len(found) == len(kernels) > 0 and list(found[0]) == COLUMNS
    assert len({(row["kernel"], row["variant"]) for row in found}) == len(found)
    return found


def test_every_kernel_has_a_row(cuda_binaries, tmp_path):
    """The last binary is the library, or holds the smallest kernels."""
    rows = rows_of(cuda_binaries[-1], tmp_path / "rows.csv")
    for row in rows:
        assert int(row["threads"]) > 0 and int(row["registers"]) > 0 and int(row["local_bytes"]) == 0, row
        assert 0 < int(row["warps_per_sm"]) <= 64, row
        if row["pass"]:
            assert float(row["in_flight_kib_per_sm"]) > 0 and float(row["per_element"]) > 0, row

    lines = markdown(rows)
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
    assert 6 < BALANCE < 7


@pytest.mark.sweep
def test_every_pass_has_rows(tmp_path):
    """Those of the whole library, which takes a minute to read: every x-sized pass is known by its kernels."""
    if (reason := extension.without_cuda()) is not None:
        pytest.skip(reason)
    rows = rows_of(extension.LIBRARY, tmp_path / "rows.csv")
    assert {row["pass"] for row in rows} == {passed for _, passed, _ in machine_code.X} | {""}
    assert len(markdown(rows)) > 20
