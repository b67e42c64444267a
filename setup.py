"""Build of aia_kernels: one shared library, aia_kernels/_C.so, made from csrc/ by ninja.

C++ is built where torch and a compiler are found, CUDA C++ where nvcc is; without them it installs and says so aloud.
Environment: CXX, CUDA_HOME, MAX_JOBS; TORCH_CUDA_ARCH_LIST (default "8.0;9.0;10.0+PTX"); FORCE_CUDA (1: no CUDA is an
error; 0: leave CUDA out; auto, which make install says: leave it out where torch sees no CUDA device).
"""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "ninja"
CXX = os.environ.get("CXX") or "g++"
FORCE_CUDA = os.environ.get("FORCE_CUDA")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").strip()

# 2.10: the first release whose stable ABI has parallel_for.
REGISTER_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000"
CPU_FLAGS = "-std=c++20 -O3 -fno-math-errno -fno-trapping-math -fPIC -Wno-psabi -fvisibility=hidden"
CPU_LEVELS = {"base": ""}
if platform.machine() == "x86_64":
    REGISTER_FLAGS += " -DAIA_CPU_X86"
    CPU_FLAGS += " -DAIA_CPU_X86"
    CPU_LEVELS |= {"v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}
# Compressed, the machine code and its line numbers take a quarter.
CUDA_FLAGS = (
    "-std=c++20 -O3 -lineinfo --threads 3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills,-Werror "
    "-Xfatbin -compress-all"
)


class BuildError(Exception):
    """One sentence: what is missing or failed, and what to do about it."""


def find_torch():
    if (spec := importlib.util.find_spec("torch")) is None:
        raise BuildError("torch is not importable here; install torch>=2.10, then build with --no-build-isolation")
    return Path(spec.origin).parent


def find_nvcc():
    """(nvcc, None), or (None, why the CUDA part is left out)."""
    if FORCE_CUDA == "0":
        return None, "it was built with FORCE_CUDA=0"
    if FORCE_CUDA == "auto" and not importlib.import_module("torch").cuda.is_available():
        return None, "torch saw no CUDA device when it was built; make install FORCE_CUDA=1 builds it all the same"
    for home in (os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"):
        if nvcc := shutil.which(Path(home, "bin", "nvcc") if home else "nvcc"):
            return nvcc, None
    if FORCE_CUDA == "1":
        raise BuildError("FORCE_CUDA=1, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    return None, "nvcc was not found when it was built; install the CUDA toolkit or set CUDA_HOME, then reinstall"


def gencode_flags():
    """For each architecture what nvcc compiles for and what it makes of it.

    From 9.0 on all are made of the code for 9.0, in one pass of the compiler's front end. That for 10.0 takes six times
    as long over the gates: it looks for pairs of operations for one instruction, of which the six largest sources have
    none.
    """
    flags: dict[str, list[str]] = {}
    for arch in re.split(r"[;, ]+", ARCHITECTURES):
        if not (match := re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", arch)):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST holds {arch!r}; write numbers such as 8.0;9.0;10.0+PTX")
        sm = match[1] + match[2]
        virtual = "90" if sm.isdigit() and int(sm) > 90 else sm
        made = [f"sm_{sm}", *([f"compute_{virtual}"] if match[3] else [])]
        flags[virtual] = flags.get(virtual, []) + made
    return " ".join(f"-gencode arch=compute_{of},code=[{','.join(made)}]" for of, made in flags.items())


def run_ninja(torch, nvcc, without_cuda):
    """Write build.ninja, and the one generated source by which the library says what it has and lacks; then build."""
    BUILD.mkdir(parents=True, exist_ok=True)
    info, text = BUILD / "build_info.cpp", ""
    sources = runpy.run_path(str(ROOT / "aia_kernels" / "backends" / "sources.py"))["digest"](ROOT / "csrc")
    for name, told in (
        ("sources", sources),
        ("without_cuda", without_cuda),
        ("cuda_architectures", nvcc and ARCHITECTURES),
    ):
        value = f'"{told}"' if told else "nullptr"
        text += f'extern "C" [[gnu::visibility("default")]] const char* aia_kernels_{name}() {{ return {value}; }}\n'
    if not info.exists() or info.read_text() != text:
        info.write_text(text)

    lines, objects = [], []
    for rule, compiler in (("cxx", CXX), ("nvcc", f"{nvcc} -ccbin {CXX} {CUDA_FLAGS}")):
        lines += [f"rule {rule}", f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out"]
        lines += ["  deps = gcc", "  depfile = $out.d"]
    linker = f"{nvcc} -ccbin {CXX} -cudart static -nodlink" if nvcc else CXX  # nvcc knows where its runtime lies
    # No symbol may stay unknown until it is called. Apple's linker has that rule by itself, and not the option.
    linker += "" if sys.platform == "darwin" else " -Xlinker -z -Xlinker defs"
    linker += f' -shared $in -o $out "-L{torch}/lib" -ltorch_cpu'
    lines += ["rule link", f"  command = {linker}"]

    def compile(rule, source, flags, suffix=".o"):
        objects.append(source.stem + suffix)  # sources as seen from BUILD, so that the root may hold spaces
        lines.extend([f"build {objects[-1]}: {rule} {os.path.relpath(source, BUILD)}", f"  flags = {flags}"])

    compile("cxx", info, REGISTER_FLAGS)
    for source in sorted(s for s in ROOT.glob("csrc/register/*.cpp") if nvcc or not s.stem.startswith("cuda_")):
        compile("cxx", source, f'{REGISTER_FLAGS} -isystem "{torch}/include"')
    for level, march in CPU_LEVELS.items():  # base first: the linker keeps the first copy of a shared inline function
        for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            compile("cxx", source, f"{CPU_FLAGS} -DAIA_CPU_LEVEL={level} {march}", f".{level}.o")
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else ():
        compile("nvcc", source, gencode_flags(), ".cuda.o")
    (BUILD / "build.ninja").write_text("\n".join([*lines, f"build _C.so: link {' '.join(objects)}\n"]))

    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    return subprocess.run([*ninja, "-C", BUILD, *jobs]).returncode == 0


def build_library():
    """Bring the library up to date and return its path."""
    torch = find_torch()
    if not shutil.which(CXX.split()[0]):
        raise BuildError(f"no C++ compiler ({CXX}) was found; install one (apt install g++) and reinstall")
    if not shutil.which("ninja") and not importlib.util.find_spec("ninja"):
        raise BuildError("ninja was not found; install it (pip install ninja) and reinstall")
    nvcc, without_cuda = find_nvcc()
    cuda = f"CUDA with {nvcc}" if nvcc else f"no CUDA: {without_cuda}"
    print(f"aia_kernels: building C++ ({', '.join(CPU_LEVELS)}), {cuda}", flush=True)
    if run_ninja(torch, nvcc, without_cuda):
        return BUILD / "_C.so"
    if nvcc and FORCE_CUDA != "1":
        print("aia_kernels: the build failed; building once more without the CUDA part")
        if run_ninja(torch, None, f"it did not compile with {nvcc}; the output of the build says why"):
            return BUILD / "_C.so"
    raise BuildError(f"{CXX} could not compile it; C++20 is needed (apt install g++, 11 or later), then reinstall")


class BuildLibrary(build_ext):
    """Puts the library where setuptools expects an extension module of that name."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def copy_file(self, infile, outfile, *_, **__):  # whole or not at all: half a library, loaded, ends the program
        os.replace(shutil.copy2(infile, f"{outfile}.part"), outfile)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.copy_file(build_library(), target)
        except BuildError as error:
            if FORCE_CUDA == "1":
                raise SystemExit(f"aia_kernels: {error}") from None
            for stale in (target, ROOT / "aia_kernels" / "_C.so"):
                stale.unlink(missing_ok=True)
            print(f"aia_kernels: INSTALLED WITHOUT COMPILED KERNELS: {error}", flush=True)


COMMANDS = {"build_ext": BuildLibrary}
if importlib.util.find_spec("setuptools.command.bdist_wheel"):  # not in the old setuptools that make gpu may meet
    from setuptools.command.bdist_wheel import bdist_wheel

    class TagWheel(bdist_wheel):
        """Tags a wheel for every Python 3 on its platform: the library has no symbol of Python."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    COMMANDS["bdist_wheel"] = TagWheel

setup(ext_modules=[Extension("aia_kernels._C", [], optional=True)], cmdclass=COMMANDS)
