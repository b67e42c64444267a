"""Builds the stand-in for the CUDA runtime and driver, and the library with csrc/cuda compiled for the host against it.

All of it lies in one folder: libcudart.so.13, libcuda.so.1 and _C.so, beside the objects.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "rehearsal"
RUNTIME, DRIVER, LIBRARY = "libcudart.so.13", "libcuda.so.1", "_C.so"
#: The library with the numbers of blocks and threads of a GPU.
FULL_SIZE = OUT / "full_size" / LIBRARY
CXX = "g++ -std=c++20 -g1 -fPIC -fvisibility=hidden -w"


def torch_folder() -> Path:
    """Where this Python's torch lies, which must be built for the CUDA that is stood in for."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        raise SystemExit(f"a rehearsal needs a torch that is built for CUDA 13, and {folder} is not")
    return folder


def toolkit_headers() -> Path:
    """The folder of the CUDA toolkit's headers."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (folder / "cuda_runtime_api.h").exists():
        raise SystemExit(f"a rehearsal needs the CUDA toolkit's headers, and {folder} has none; set CUDA_HOME")
    return folder


def _symbols(library: Path, option: str) -> set[str]:
    found = subprocess.run(["nm", "-D", option, library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in found.splitlines()}


def _wanted(torch: Path, name: str) -> set[str]:
    """The functions of the runtime or of the driver that torch asks for."""
    if name == DRIVER:  # by symbols without a version, which one library of torch links
        return {s for s in _symbols(torch / "lib" / "libcaffe2_nvrtc.so", "--undefined-only") if re.match("cu[A-Z]", s)}
    asked = set().union(*(_symbols(library, "--undefined-only") for library in (torch / "lib").glob("*.so")))
    return {symbol.split("@")[0] for symbol in asked if symbol.endswith(f"@{RUNTIME}")}


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _write_missing(torch: Path, name: str, sources: list[Path]) -> Path:
    """The functions that torch may call and that are not stood in for: they end the program, and say their name."""
    defined = set(re.findall(r"\b(cu\w+|__cuda\w+)\(", "".join(source.read_text() for source in sources)))
    lines = ["#include <cstdio>", "#include <cstdlib>", 'extern "C" {']
    for symbol in sorted(_wanted(torch, name) - defined):
        said = f"the rehearsal has no {symbol}"
        lines.append(f'void {symbol}() {{ std::fprintf(stderr, "{said}\\n"); std::abort(); }}')
    missing = OUT / f"missing_{name.split('.')[0]}.cpp"
    _write(missing, "\n".join([*lines, "}", ""]))
    return missing


class Ninja:
    """A build file: rules, and the steps that are added to it."""

    def __init__(self, torch: Path):
        self._torch = torch
        self._toolkit = f'-isystem "{toolkit_headers()}"'
        self._lines = [f"rule cxx\n  command = {CXX} $flags -MMD -MF $out.d -x c++ -c $in -o $out"]
        self._lines += ["  deps = gcc\n  depfile = $out.d", "rule link\n  command = g++ -shared $in $flags -o $out"]

    def compile(self, source: Path, out: str, flags: str) -> str:
        self._lines.append(f"build {out}: cxx {os.path.relpath(source, OUT)}\n  flags = {flags}")
        return out

    def link(self, out: str, objects: list[str], flags: str, after: str = "") -> None:
        self._lines.append(f"build {out}: link {' '.join(objects)} | {after}\n  flags = {flags}")

    def stand_in(self, name: str, sources: list[Path]) -> None:
        """A library that shows the functions of one of NVIDIA's."""
        everything = [*sources, _write_missing(self._torch, name, sources)]
        objects = [self.compile(s, f"{s.stem}.o", f"-O2 -fvisibility=default {self._toolkit}") for s in everything]
        script, node = OUT / f"{name}.map", name if name == RUNTIME else ""  # the driver's symbols have no version
        _write(script, f"{node} {{ global: cu*; __cuda*; rehearsal_*; local: *; }};\n")
        self.link(name, objects, f'-ldl -Wl,-soname,{name} -Wl,--version-script="{script}"', script.name)
        self._lines.append(f"build {script.name}: phony")

    def add_library(
        self, csrc: Path = ROOT / "csrc", out: str = LIBRARY, only: tuple[str, ...] = (), small: bool = True
    ) -> None:
        """The library from a copy of csrc. only: names of sources to compile; others are as they are in csrc.

        small: with the emulator's numbers of blocks and threads, else with those of a GPU.
        """
        constants = "-DAIA_EMULATOR" if small else ""
        folder = Path(out).parent
        objects = []
        for source in (
            HERE / "build_info.cpp",
            *sorted(csrc.glob("register/cuda_*.cpp")),
            *sorted(csrc.glob("cuda/*.cu")),
        ):
            if only and source.name not in only:
                objects.append(f"{source.name}.o")
                continue
            if source.suffix == ".cu":
                flags = f'-O1 {constants} -DAIA_REHEARSAL -I"{HERE}" {self._toolkit}'
            else:
                flags = f'-O1 {constants} -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "{self._torch}/include"'
            objects.append(self.compile(source, str(folder / f"{source.name}.o"), flags))
        flags = f'-Wl,-z,defs "-L{self._torch}/lib" -ltorch_cpu {RUNTIME}'
        self.link(out, objects, flags, RUNTIME)

    def run(self) -> None:
        _write(OUT / "build.ninja", "\n".join([*self._lines, ""]))
        result = subprocess.run([sys.executable, "-m", "ninja", "-C", OUT], capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"the rehearsal does not compile:\n{result.stdout}{result.stderr}")


def build(faults: dict[str, tuple[Path, tuple[str, ...]]]) -> None:
    """Bring the stand-ins, the library, that of full size and one for each fault up to date.

    faults: by name, the changed copy of csrc and the sources that its change concerns.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    ninja = Ninja(torch_folder())
    ninja.stand_in(RUNTIME, [HERE / f"{name}.cpp" for name in ("device", "memory", "streams", "launches")])
    ninja.stand_in(DRIVER, [HERE / "driver.cpp"])
    ninja.add_library()
    ninja.add_library(out="full_size/" + LIBRARY, small=False)
    for name, (csrc, only) in faults.items():
        ninja.add_library(csrc, f"faults/{name}/{LIBRARY}", only)
    ninja.run()
