"""What setup.py decides: run on a copy of the sources, with stand-ins for the compilers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGED = Path("csrc", "register", "cpu_attention_in_attention.cpp")

COMPILER = """#!/bin/sh
# Takes any source, and leaves empty outputs and dependency files.
while [ $# -gt 0 ]; do
  case "$1" in -o|-MF) shift; : > "$1" ;; esac
  shift
done
"""


class Build:
    """A copy of what setup.py needs, and what it says and makes there."""

    def __init__(self, folder: Path):
        if not (ROOT / "setup.py").exists():
            pytest.skip("the sources are not here, only the package")
        self.folder = folder / "sources with a space"
        self.folder.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(ROOT / "csrc", self.folder / "csrc")
        (self.folder / "aia_kernels").mkdir()
        (self.folder / "aia_kernels" / "__init__.py").touch()
        (self.folder / "aia_kernels" / "backends").mkdir()
        shutil.copy(ROOT / "aia_kernels" / "backends" / "sources.py", self.folder / "aia_kernels" / "backends")
        self.library = self.folder / "aia_kernels" / "_C.so"
        self.compiler = self.script("g++", COMPILER)

    def script(self, name: str, text: str) -> Path:
        path = self.folder.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def __call__(self, expect: int = 0, **environment) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")}
        result = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.folder,
            env=clean | {"CXX": str(self.compiler), "FORCE_CUDA": "0"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == expect, result.stdout
        return result.stdout


@pytest.fixture
def build(tmp_path) -> Build:
    return Build(tmp_path)


def test_it_rebuilds_only_what_changed(build):
    assert "building C++" in build()
    assert build.library.exists()
    assert "no work to do" in build()
    with (build.folder / CHANGED).open("a") as source:
        source.write("// changed\n")
    output = build()
    assert "[3/3]" in output  # and build_info.cpp, which tells the sources
    assert "cpu_attention_in_attention.o" in output


@pytest.mark.parametrize("compiler, sentence", [("no-such-g++", "no C++ compiler"), ("false", "could not compile")])
def test_without_a_compiler_it_installs_and_says_what_to_do(build, compiler, sentence):
    build()
    (build.folder / CHANGED).write_text("// changed, so that it must be compiled\n")
    output = build(CXX=compiler)
    assert "INSTALLED WITHOUT COMPILED KERNELS" in output
    assert sentence in output
    assert "apt install g++" in output
    assert not build.library.exists(), "a library of older sources must not stay"


def test_a_process_killed_while_it_installs_leaves_the_library_of_before(build):
    """Half a library is worse than none: the dynamic linker ends the program that loads it."""
    build()
    build.library.write_text("before")
    build.script(
        "killed/sitecustomize.py",
        "import os, signal\nos.utime = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    build(expect=-9, PYTHONPATH=str(build.folder.parent / "killed"))
    assert build.library.read_text() == "before"
    build()
    assert build.library.read_text() == ""
    assert not list(build.library.parent.glob("*.part"))


def test_a_cuda_compiler_that_fails_costs_only_the_cuda_part(build):
    build.script("cuda/bin/nvcc", "#!/bin/sh\nexit 1\n")
    output = build(CUDA_HOME=str(build.folder.parent / "cuda"), FORCE_CUDA="")
    assert "building once more without the CUDA part" in output
    assert build.library.exists()
    assert "did not compile" in (build.folder / "build" / "ninja" / "build_info.cpp").read_text()


def test_without_a_device_the_cuda_part_is_made_on_demand(build):
    """As make install asks. An install without make may be for another machine: there nvcc alone decides."""
    build.script("cuda/bin/nvcc", COMPILER)
    environment = {"CUDA_HOME": str(build.folder.parent / "cuda"), "CUDA_VISIBLE_DEVICES": ""}
    output = build(**environment, FORCE_CUDA="auto")
    assert "no CUDA: torch saw no CUDA device" in output and "make install FORCE_CUDA=1" in output
    info = build.folder / "build" / "ninja" / "build_info.cpp"
    assert "torch saw no CUDA device" in info.read_text()
    for asked in ("", "1"):
        assert "CUDA with" in build(**environment, FORCE_CUDA=asked)
        assert "nullptr" in info.read_text()


def test_cuda_that_is_demanded_and_fails_is_an_error(build):
    build.script("cuda/bin/nvcc", "#!/bin/sh\nexit 1\n")
    build(expect=1, CUDA_HOME=str(build.folder.parent / "cuda"), FORCE_CUDA="1")


def test_architectures_follow_the_variable(build):
    build.script("cuda/bin/nvcc", COMPILER)
    environment = {"CUDA_HOME": str(build.folder.parent / "cuda"), "FORCE_CUDA": "1"}
    build(**environment, TORCH_CUDA_ARCH_LIST="8.6 9.0a+PTX")
    ninja = (build.folder / "build" / "ninja" / "build.ninja").read_text()
    assert "-gencode arch=compute_86,code=[sm_86] -gencode arch=compute_90a,code=[sm_90a,compute_90a]" in ninja
    build(**environment, TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX")
    ninja = (build.folder / "build" / "ninja" / "build.ninja").read_text()
    shared = "-gencode arch=compute_90,code=[sm_90,sm_100,compute_90]"  # one pass of the front end
    assert f"-gencode arch=compute_80,code=[sm_80] {shared}" in ninja
    assert "write numbers" in build(expect=1, **environment, TORCH_CUDA_ARCH_LIST="Hopper")
