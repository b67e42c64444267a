"""Faults that a rehearsal must see: a change in csrc each, and the test of test_rehearsal.py that then fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from .build import OUT, ROOT


class Fault(NamedTuple):
    """In a file of csrc the text `right`, which is there once, becomes `wrong`; the sources that see it are compiled.

    test: what fails, as pytest's -k takes it, and says these words.
    """

    file: str
    right: str
    wrong: str
    sources: tuple[str, ...]
    test: str
    words: str

    def text(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / "csrc" / self.file).read_text()
        assert text.count(self.right) == 1, f"{self.file} holds {self.right!r} {text.count(self.right)} times"
        return text.replace(self.right, self.wrong)


_REGISTER, _GATE, _EVALUATE = ("cuda_attention_in_attention.cpp",), ("gate.cu",), ("evaluate.cu",)

FAULTS = {
    "launch on the default stream": Fault(
        *("register/cuda.h", "stream_of(x.get_device_index(), &stream_)", "0", _REGISTER),
        *("test_where and CinST and side", "launches on another stream or device"),
    ),
    "device guard of another device": Fault(
        *("register/cuda.h", "guard_(device_of(x))", "guard_(0)", _REGISTER),
        *("test_where and CinST and current", "the stream is of device 1"),
    ),
    "arguments in another order": Fault(
        "register/cuda_attention_in_attention.cpp",
        "norm.const_data_ptr(), gate.mutable_data_ptr(), z.mutable_data_ptr(),",
        "norm.const_data_ptr(), z.mutable_data_ptr(), gate.mutable_data_ptr(),",
        *(_REGISTER, "test_where and CinST and default", "not those of the reference"),
    ),
    "output that is too short": Fault(
        "register/cuda_attention_in_attention.cpp",
        "new_empty(x, {a.B, a.packed(context)}, index_type(a, context))",
        "new_empty(x, {a.B, a.packed(context) - 1}, index_type(a, context))",
        *(_REGISTER, "test_guards", "allocated ones was written"),
    ),
    "tensor that is kept": Fault(
        "register/cuda_attention_in_attention.cpp",
        *("Tensor y = new_like(x);", "Tensor y = new_like(x);\n  new Tensor(y);", _REGISTER),
        *("test_memory and CinST", "bytes more after"),
    ),
    "wait for the device": Fault(
        "cuda/launch.cuh",
        "return queue_blocks(cudaLaunchKernel, kernel,",
        "cudaDeviceSynchronize();\n  return queue_blocks(cudaLaunchKernel, kernel,",
        *(_GATE, "test_nothing_waits and CinST", "launches wait"),
    ),
    "more blocks than fit together": Fault(
        *(
            "cuda/gate.cu",
            "launch_together(gate_kernel<A, kForm, straight.value>, maps.blocks(),",
            "launch_together(gate_kernel<A, kForm, straight.value>, maps.blocks() + 2000,",
        ),
        *(_GATE, "test_where and CinST and default", "blocks fit together"),
    ),
    "shared memory that was not asked for": Fault(
        "cuda/launch.cuh",
        "return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);",
        "return cudaSuccess;",
        *(_EVALUATE, "test_clusters", "shared memory"),
    ),
    "more shared memory than there is": Fault(
        "cuda/evaluate.cu",
        "launch_clusters(kernel, shape.B * cluster, cluster, kClusterThreads, plan.bytes,",
        "launch_clusters(kernel, shape.B * cluster, cluster, kClusterThreads, plan.bytes + (200 << 10),",
        *(_EVALUATE, "test_clusters", "bytes of shared memory asked for"),
    ),
}


def folder_of(name: str) -> Path:
    """Where the library with a fault is built."""
    return OUT / "faults" / name.replace(" ", "_")


def write() -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Write a copy of csrc for each fault: by folder of the library, the copy and the sources to compile."""
    found = {}
    for name, fault in FAULTS.items():
        csrc = folder_of(name) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc, dirs_exist_ok=True)  # with the times of the files
        (csrc / fault.file).write_text(fault.text())
        found[folder_of(name).name] = csrc, fault.sources
    return found
