"""Write the package as Hugging Face's ``kernels`` loads it: python .ci/hub.py FOLDER.

FOLDER/build gets a folder for each variant of the package: one with the compiled library, for this kind of CPU and
torch 2.10 or newer; one without it for all else, where Triton runs on a GPU and plain PyTorch elsewhere. Tried with
kernels 0.17.2: kernels.get_local_kernel(Path(FOLDER)).

A process runs one version of the package, the one that it imports first, however it is loaded: the operators have one
name, torch.ops.aia_kernels. So every variant has that name as its id, though kernels would have each build differ.
The Hub takes libraries whose symbols are no newer than manylinux_2_28: build on such a system before you upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aia_kernels"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
LIBRARY = "_C.so"

#: By the name that kernels chooses a variant by: the backend that its metadata tells.
VARIANTS = {f"torch-stable-abi210-cpu-{platform.machine()}-linux": "cpu", "torch-universal": "cuda"}


def write_variant(folder: Path, backend: str) -> None:
    """Copy the package into a folder, with metadata.json beside its __init__.py."""
    left_out = ["__pycache__", "*.part"] + ([LIBRARY] if backend != "cpu" else [])
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns(*left_out))
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()) for name, path in files.items()}
    metadata = {
        "name": "aia-kernels",
        # The name of the module, and, as kernels asks for, that under which its operators are registered.
        "id": "aia_kernels",
        "version": int(VERSION.split(".")[0]),
        "license": "bsd-3-clause",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: digest.decode() for name, digest in digests.items()}},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(folder: Path) -> None:
    if not (PACKAGE / LIBRARY).exists():
        sys.exit(f"{PACKAGE / LIBRARY} is not there; make install builds it")
    build = folder / "build"
    shutil.rmtree(build, ignore_errors=True)
    for name, backend in VARIANTS.items():
        write_variant(build / name, backend)
        print(build / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
