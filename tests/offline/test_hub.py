"""What make hub writes: the layout that Hugging Face's kernels loads, in which each variant runs by itself."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aia_kernels.backends import extension

ROOT = Path(__file__).parents[2]
COMPILED = f"torch-stable-abi210-cpu-{platform.machine()}-linux"
UNIVERSAL = "torch-universal"

#: How kernels imports a variant: by its path, under the id of its metadata.
BY_PATH = """
import importlib.util, json, pathlib, sys

def load(variant):
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

kernel = load(pathlib.Path(sys.argv[1]) / "build" / sys.argv[2])
"""
BY_KERNELS = """
import pathlib, sys
from kernels import get_local_kernel

kernel = get_local_kernel(pathlib.Path(sys.argv[1]))
"""
USE = """
import torch

x = torch.randn(8, 16, 6, 6)
unit = kernel.CinST(num_segments=8)
unit(x).sum().backward()
assert unit.C_conv.weight.grad is not None
assert kernel.models.EAMLP.__module__ == "aia_kernels.models.eamlp"
print(pathlib.Path(kernel.__file__).parent.name, kernel.backends.select("cpu", x.dtype, "attention_in_attention"))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    if not (ROOT / ".ci" / "hub.py").exists():
        pytest.skip("the sources are not here, only the package")
    if (reason := extension.load()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / ".ci" / "hub.py", folder], check=True)
    return folder


def run(program: str, folder: Path, *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AIA_KERNELS")}
    result = subprocess.run(
        [sys.executable, "-c", program, folder, *arguments],
        cwd=folder,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()[-1]


def test_a_variant_has_the_package_and_tells_its_digests(hub):
    assert {path.name for path in (hub / "build").iterdir()} == {COMPILED, UNIVERSAL}
    for variant in (hub / "build").iterdir():
        digests = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
        files = {str(path.relative_to(variant)) for path in variant.rglob("*") if path.is_file()}
        assert digests.keys() == files - {"metadata.json"}
        assert ("_C.so" in files) == (variant.name == COMPILED)
        assert {"__init__.py", "backends/choices.csv", "triton/__init__.py"} <= files
        for name, digest in digests.items():
            assert base64.b64decode(digest) == hashlib.sha256((variant / name).read_bytes()).digest(), name


@pytest.mark.parametrize("variant, backend", [(COMPILED, "cpu"), (UNIVERSAL, "reference")])
def test_a_variant_runs_where_it_lies(hub, variant, backend):
    assert run(BY_PATH + USE, hub, variant) == f"{variant} {backend}"


def test_kernels_takes_the_compiled_variant_on_a_cpu(hub):
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed; pip install kernels")
    if torch.cuda.is_available():
        pytest.skip("on a GPU kernels takes the universal variant")
    assert run(BY_KERNELS + USE, hub) == f"{COMPILED} cpu"
