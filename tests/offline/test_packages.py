"""What make wheel writes: a source distribution with every file, and a wheel that runs away from the sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import aia_kernels
from aia_kernels.backends import extension

ROOT = Path(__file__).parents[2]

#: Compiles nothing, and links by copying the library that is there: what is tested is the package around it.
COMPILER = f"""#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o|-MF) shift; out=$1; : > "$out" ;; esac
  shift
done
case "$out" in *.so) cp "{extension.LIBRARY}" "$out" ;; esac
"""

USE = """
import sys
import torch
import aia_kernels

assert aia_kernels.__file__.startswith(sys.prefix), aia_kernels.__file__
x = torch.randn(8, 16, 6, 6)
with aia_kernels.use_backend("cpu"):
    unit = aia_kernels.CinST(num_segments=8)
    y = unit(x)
    y.sum().backward()
assert y.shape == x.shape and unit.C_conv.weight.grad is not None
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS")}
    result = subprocess.run(
        command, cwd=cwd, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def files_of_the_sources() -> set[str]:
    """What git has, and what it would take."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the sources are not here with their history")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """make wheel in a copy of the sources."""
    for module in ("build", "auditwheel", "setuptools.command.bdist_wheel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"make wheel needs {module}")
    if (reason := extension.load()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("packages")
    sources = folder / "sources"
    for name in files_of_the_sources():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    (sources / "aia_kernels" / "_C.so").touch()  # what a checkout may have, and no package takes from there
    (sources / "tests" / "left.pyc").touch()
    compiler = folder / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = folder / "environment"  # make cannot be given a path that holds a space
    environment.symlink_to(sys.prefix)
    tools = [f"BIN={environment / 'bin'}", "INSTALLED=", "TOOLS="]
    run("make", "wheel", *tools, cwd=sources, CXX=str(compiler), FORCE_CUDA="0")
    return sources / "dist"


def test_the_source_distribution_has_every_file_of_the_sources(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        found = {member.name.split("/", 1)[1] for member in tar if member.isfile()}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert found - made == files_of_the_sources()


def test_the_wheel_is_of_every_python_3_and_of_its_platform(dist):
    (wheel,) = dist.glob("*.whl")
    version, python, abi, platform = wheel.stem.split("-")[1:]
    assert (version, python, abi) == (aia_kernels.__version__, "py3", "none")
    assert all(tag.startswith("manylinux_") and tag.endswith(os.uname().machine) for tag in platform.split("."))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {
        "aia_kernels/_C.so",
        "aia_kernels/py.typed",
        "aia_kernels/backends/choices.csv",
        "aia_kernels/models/__init__.pyi",
    } <= set(names)
    assert not [name for name in names if name.endswith(".so") and name != "aia_kernels/_C.so"], "torch brings its own"
    assert {name.split("/")[0] for name in names} == {"aia_kernels", f"{wheel.name.rsplit('-py3', 1)[0]}.dist-info"}
    assert "License-Expression: BSD-3-Clause" in metadata


def test_the_wheel_runs_in_a_fresh_environment(dist, tmp_path):
    """One that finds torch where this one does, but neither the sources nor the package that is installed here."""
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(packages, "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    run(python, "-c", USE, cwd=tmp_path)
