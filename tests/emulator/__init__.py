"""The CUDA passes of csrc/cuda, compiled for the host and run with the sanitizers on, as passes on CPU tensors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from aia_kernels import maps

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_SCALARS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PERMUTATIONS = {"TCHW": (0, 1, 2, 3, 4), "THWC": (0, 1, 3, 4, 2), "CTHW": (0, 2, 1, 3, 4)}


def build(folder: Path) -> Path:
    """Compile the extension module with ninja; done again only when a source has changed."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    flags = "-std=c++20 -O1 -g -fPIC -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    flags += " -Wall -Wextra -Wno-unknown-pragmas -DAIA_EMULATOR"
    includes = f'-I"{_HERE}" -I"{pybind11.get_include()}" -I"{sysconfig.get_path("include")}"'
    (folder / "build.ninja").write_text(
        f"rule module\n  command = g++ {flags} {includes} -MMD -MF $out.d -shared $in -o $out\n"
        f"  deps = gcc\n  depfile = $out.d\n"
        f"build aia_emulator.so: module {os.path.relpath(_HERE / 'module.cpp', folder)}\n"
    )
    command = [sys.executable, "-m", "ninja", "-C", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{result.stdout}{result.stderr}")
    return folder / "aia_emulator.so"


def _array(tensor: Tensor | None):
    """A flat numpy array of the storage, bfloat16 as its bits."""
    if tensor is None:
        return None
    if tensor.ndim == 5:
        tensor = tensor.permute(_PERMUTATIONS[maps.storage_order(tensor)])
    assert tensor.is_contiguous()
    flat = tensor.flatten()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or with an index that no axis has, so that an element left unwritten shows."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


class Emulator:
    """The passes of the CUDA backend, with the signatures of aia_kernels/ops.py, for CPU tensors."""

    def __init__(self, library: Path):
        asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = os.environ | {
            "LD_PRELOAD": asan.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker runs)
        self._worker = subprocess.Popen(
            [sys.executable, _HERE / "worker.py", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait()
        self._worker.stdout.close()
        self._log.close()

    def call(self, name: str, *arguments):
        """(result, arguments as they are afterwards) of a function of the module."""
        try:
            pickle.dump((name, arguments), self._worker.stdin)
            self._worker.stdin.flush()
            ok, answer = pickle.load(self._worker.stdout)
        except (EOFError, BrokenPipeError):
            self._log.seek(0)
            raise RuntimeError(f"the emulator died:\n{self._log.read().decode()}") from None
        if not ok:
            raise RuntimeError(answer)
        return answer

    def barriers(self) -> set[str]:
        """The barriers met so far, as file:line."""
        return self.call("barriers")[0]

    def schedule(self, backward: bool = False, dropped: str = "") -> None:
        """Choose the order in which the threads of a block run, and a barrier that they pass without waiting."""
        self.call("schedule", backward, dropped)

    def _launch(self, name: str, x: Tensor, arguments, outputs: list[Tensor]) -> None:
        order, scalar = maps.ORDERS.index(maps.storage_order(x)), _SCALARS.index(x.dtype)
        arrays = [_array(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
        after = self.call(name, tuple(x.shape), order, scalar, *arrays, *map(_array, outputs))[1]
        for output, array in zip(outputs, after[-len(outputs) :], strict=True):
            flat = torch.from_numpy(array).view(output.dtype)
            if output.ndim == 5:
                axes = _PERMUTATIONS[maps.storage_order(output)]
                output.permute(axes).copy_(flat.view([output.shape[axis] for axis in axes]))
            else:
                output.copy_(flat.view(output.shape))

    def pool(self, x, context, gate, gate_context):
        batch, packed = x.shape[0], maps.packed_size(x.shape, context)
        pooled = _poison(torch.empty((batch, 2, packed), dtype=maps.accumulate_dtype(x.dtype)))
        argmax = _poison(torch.empty((batch, packed), dtype=maps.index_dtype(x.shape, context)))
        self._launch("pool", x, (x, context, gate, gate_context), [pooled, argmax])
        return pooled, argmax

    def unpool(self, grad_y, *arguments):
        grad_x = _poison(torch.empty_like(grad_y))
        self._launch("unpool", grad_y, (grad_y, *arguments), [grad_x])
        return grad_x

    def unpool_reduce(self, x, grad_pooled, argmax, context, gate_context):
        shape = x.shape[0], maps.packed_size(x.shape, gate_context)
        grad_gate = _poison(torch.empty(shape, dtype=maps.accumulate_dtype(x.dtype)))
        self._launch("unpool_reduce", x, (x, grad_pooled, argmax, context, gate_context), [grad_gate])
        return grad_gate
