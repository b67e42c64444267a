"""The CPU part of the library, built with sanitizers, and processes that run argument sets on it.

``address`` finds accesses outside of what was allocated, and what the language leaves undefined (ASan, UBSan);
``thread`` finds data races of two threads (TSan), which the work is split over for it: it does not see how torch's own
threads wait for each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aia_kernels.backends import extension

from .sets import Set

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]
BUILD = ROOT / "build" / "fuzz"

KINDS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread -DAIA_CPU_THREADS=2",
}
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0",
    "OMP_NUM_THREADS": "1",
}
#: TSan has no room for the addresses that Linux may choose at random.
STARTERS = {"address": [], "thread": ["setarch", platform.machine(), "-R"]}
MARCH = {"base": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}


def why_not(kind: str) -> str | None:
    """None if the compiler here has the sanitizer and its process can be started, else why not."""
    if shutil.which("g++") is None:
        return "the sanitizers need g++"
    if missing := [name for name in RUNTIMES[kind] if not Path(_runtime(name)).is_absolute()]:
        return f"g++ has no {missing[0]} here"
    if subprocess.run([*STARTERS[kind], "true"], capture_output=True).returncode != 0:
        return f"{' '.join(STARTERS[kind])} is not allowed here"
    return None


def _runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def build(kind: str, levels: Sequence[str] = ("base",), csrc: Path = ROOT / "csrc", folder: Path = BUILD) -> Path:
    """The library of a kind, with one instruction level or all of them, compiled by ninja where a source changed.

    Without a level: the operators alone that need none, the temporal shift.
    """
    folder = folder / f"{kind}-{len(levels)}"
    folder.mkdir(parents=True, exist_ok=True)
    torch = Path(importlib.util.find_spec("torch").origin).parent
    # Without optimization and inlining: most of the time goes into the compilation.
    common = f"-std=c++20 -O0 -g1 -fPIC -fvisibility=hidden -Wno-psabi -DAIA_INLINE=inline {KINDS[kind]}"
    if len(levels) > 1:
        common += " -DAIA_CPU_X86"
    lines = [f"rule cxx\n  command = g++ {common} $flags -MMD -MF $out.d -c $in -o $out\n  deps = gcc"]
    link = f'g++ {KINDS[kind]} -shared $in -o $out "-L{torch}/lib" -ltorch_cpu'
    lines += ["  depfile = $out.d", f"rule link\n  command = {link}"]
    objects = []

    def compile(source: Path, name: str, flags: str) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {objects[-1]}: cxx {os.path.relpath(source, folder)}\n  flags = {flags}")

    for source in sorted(csrc.glob("register/cpu_*.cpp" if levels else "register/cpu_temporal_shift.cpp")):
        compile(source, source.stem, f'-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "{torch}/include"')
    for level in levels:
        for source in sorted(csrc.glob("cpu/*.cpp")):
            compile(source, f"{source.stem}.{level}", f"-DAIA_CPU_LEVEL={level} {MARCH[level]}")
    lines.append(f"build aia_fuzz.so: link {' '.join(objects)}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the fuzz does not compile:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return folder / "aia_fuzz.so"


def run(kind: str, library: Path, seeds: range, level: str = "", operator: str = "") -> str | None:
    """Run the sets of some seeds, perhaps of one operator alone, in a process of their own.

    None if all is well, else the first set that is not, and what was found.
    """
    with tempfile.NamedTemporaryFile() as at:
        environment = os.environ | OPTIONS | {"LD_PRELOAD": " ".join(map(_runtime, RUNTIMES[kind]))}
        environment |= {"AIA_KERNELS_CPU_LEVEL": level, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, ROOT)))}
        command = [
            sys.executable,
            "-m",
            "fuzz.sanitized",
            library,
            at.name,
            str(seeds.start),
            str(seeds.stop),
            operator,
        ]
        done = subprocess.run([*STARTERS[kind], *command], env=environment, capture_output=True, text=True, cwd=ROOT)
        if done.returncode == 0:
            return None
        last = Path(at.name).read_text()
    extension.load()  # arguments of some are made by operators
    told = Set(int(last), operator) if last else "before the first set"
    return f"{kind}{level and f' at {level}'}: {told}\n{done.stdout}{done.stderr[:8000]}"


def main() -> None:
    """What run starts: the sets of seeds from a first to a last one on a library, each named in a file beforehand."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("at")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("operator")
    options = parser.parse_args()
    import torch

    import aia_kernels  # noqa: F401  (the schemas)

    torch.ops.load_library(options.library)
    with open(options.at, "w") as at:
        for seed in range(options.first, options.last):
            at.seek(0)
            at.write(str(seed).ljust(24))
            at.flush()
            Set(seed, options.operator).run()


if __name__ == "__main__":
    main()
