"""A fresh process: the import is light, and the package works with Triton blocked and with nothing compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aia_kernels.backends import extension
from benchmarks.offline import environment_without_interpreter

STEP = """
x = torch.randn(4, 3, 4, 5, requires_grad=True)
aia_kernels.STinC(2)(x).sum().backward()
assert x.grad is not None
"""
BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"
NOTHING_COMPILED = """
from pathlib import Path
from aia_kernels.backends import extension
extension.LIBRARY = Path("there/is/no/such/library.so")
"""


def run(code: str, **environment: str) -> str:
    environment = environment_without_interpreter() | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_little_beside_that_of_torch():
    """It imports no other package, of torch nothing that takes long, and no network; all of it is within reach."""
    code = """
import sys, torch
before = set(sys.modules)
import aia_kernels
found = set(sys.modules) - before
found -= {m for m in found if m.split(".")[0] in sys.stdlib_module_names}
print(*(m for m in found if m.split(".")[0] not in ("torch", "aia_kernels")))
print(*(m for m in found if m.startswith(("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed."))))
print(*(m for m in found if m.startswith("aia_kernels.models.") or m.startswith("aia_kernels.triton")))
aia_kernels.models.aia_resnet50, aia_kernels.functional.CinST, aia_kernels.modules.CinST, aia_kernels.reference.UNITS
"""
    assert run(code).split() == []


def test_without_triton():
    reasons = "reasons = aia_kernels.available_backends(); assert 'not installed' in reasons['triton'], reasons"
    run(f"{BLOCK_TRITON}import torch, aia_kernels\n{STEP}\n{reasons}", TRITON_INTERPRET="1")


def test_with_nothing_compiled():
    reasons = "reasons = aia_kernels.available_backends(); assert 'not built' in reasons['cpu'], reasons"
    chosen = "assert aia_kernels.backends.select('cpu', torch.float32, 'attention_in_attention') == 'reference'"
    run(f"{BLOCK_TRITON}import torch, aia_kernels\n{NOTHING_COMPILED}\n{STEP}\n{reasons}\n{chosen}")


def test_the_reference_alone():
    """It needs the maps' bookkeeping and torch, and none of the machinery."""
    code = """
import sys, types, importlib.util
from pathlib import Path
root = Path(importlib.util.find_spec("aia_kernels").origin).parent
package = types.ModuleType("aia_kernels")
package.__path__ = [str(root)]
sys.modules["aia_kernels"] = package
import aia_kernels.reference
mine = {m for m in sys.modules if m.startswith("aia_kernels")}
print(*sorted(m for m in mine if not m.startswith("aia_kernels.reference")))
"""
    common = "aia_kernels.common"
    assert run(code).split() == ["aia_kernels", common, f"{common}.dtypes", f"{common}.maps"]


def test_command_line():
    """Without Triton, which takes long in the interpreter and has tests of its own."""
    text = run(f"{BLOCK_TRITON}from aia_kernels.__main__ import main; raise SystemExit(main())")
    for word in ("aia_kernels", "torch", "backend in force", "reference  can run; right", "triton     cannot:"):
        assert word in text


def test_command_line_with_an_unknown_backend():
    one = "m.LAYERS = {family: dict([*layers.items()][:1]) for family, layers in m.LAYERS.items()}"
    code = f"{BLOCK_TRITON}import aia_kernels.__main__ as m\n{one}\nprint('ended with', m.main())"
    text = run(code, AIA_KERNELS_BACKEND="tpu")
    for word in ("backend in force: none: unknown backend 'tpu'", "reference  can run; right", "ended with 1"):
        assert word in text


@pytest.mark.skipif(extension.load() is not None, reason="needs the C++ extension")
@pytest.mark.skipif(not extension.SOURCES.is_dir(), reason="the sources are not here, only the package")
@pytest.mark.parametrize("sources", ["the same", "changed", "unknown to the library"])
def test_a_library_of_other_sources_does_not_run(tmp_path, sources):
    """After a pull without a build: the passes would take and give maps in other orders, and say nothing."""
    csrc = tmp_path / "csrc"
    shutil.copytree(extension.SOURCES, csrc)
    (csrc / "note.txt").touch()  # no source
    library = extension.LIBRARY
    if sources == "changed":
        with (csrc / "cpu" / "pool.cpp").open("a") as source:
            source.write("// changed\n")
    elif sources == "unknown to the library":  # as every library before it was asked for them
        library = Path(torch.__file__).parent / "lib" / "libc10.so"
    code = f"""
import warnings, torch, aia_kernels
from pathlib import Path
from aia_kernels.backends import extension
extension.LIBRARY, extension.SOURCES = Path({str(library)!r}), Path({str(csrc)!r})
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    {STEP.strip().replace(chr(10), chr(10) + "    ")}
print(aia_kernels.backends.select("cpu", torch.float32, "attention_in_attention"))
print(aia_kernels.available_backends()["cpu"])
print(*(warning.message for warning in seen))
"""
    chosen, reason, *told = run(code).splitlines()
    if sources == "the same":
        assert (chosen, reason, told) == ("cpu", "None", [""])
    else:
        assert chosen == "reference"
        assert "other sources than" in reason and str(csrc) in reason
        assert reason in told[0] and len(told) == 1


def test_with_a_library_that_does_not_load(tmp_path):
    (tmp_path / "_C.so").write_text("no library")
    broken = NOTHING_COMPILED.replace("there/is/no/such/library.so", str(tmp_path / "_C.so"))
    reason = run(f"import torch, aia_kernels\n{broken}\n{STEP}\nprint(aia_kernels.available_backends()['cpu'])")
    assert "file too short" in reason  # the linker's own words, which name a missing symbol or library too
    assert "reinstall" in reason
