"""python -m rehearsal [pytest's arguments]: build, run every test that needs a GPU on the cuda backend, report.

From the project's root, with a torch that is built for CUDA and PYTHONPATH=tests; make rehearse-cuda does it.
"""

from __future__ import annotations

import subprocess
import sys

from . import faults
from .build import ROOT, build

REPORT = """
What passed here proves, with real CUDA tensors of torch and an H100's limits:
  - operators are registered, find torch's current stream, and make the device of their tensors the current one;
  - kernels get the right arguments, write nowhere else, leave no memory behind and wait for nothing;
  - grids, blocks, cooperative grids, clusters and shared memory are what an H100 takes, in networks' sizes too, if a
    kernel needs no more than 64 registers and no shared memory beside the dynamic kind;
  - layers compute what they should on it, from Python to the kernel, in eager and in captured graphs that are replayed.
It does not prove:
  - that nvcc compiles the kernels, or what of its registers and shared memory they need (test_cuda_offline.py);
  - anything of the driver and of the hardware: real parallel blocks and warps, memory order, rounding of intrinsics;
  - real CUDA graphs, real streams at the same time, several processes, pinned memory; speed;
  - Triton's kernels, and what Inductor makes with them: they were not run;
  - what kernels compute in grids of full size: where they ran, gates had 12 blocks and clusters' blocks 64 threads.
"""


def main(arguments: list[str]) -> int:
    build(faults.write())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "rehearsal.plugin"]
    status = subprocess.run([*command, *(arguments or ["-n", "auto", "--dist", "loadfile"])], cwd=ROOT).returncode
    print(REPORT)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
