"""The CUDA passes of csrc/cuda, compiled for the host and run with the sanitizers on, as passes on CPU tensors."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
_SCALARS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PERMUTATIONS = {"TCHW": (0, 1, 2, 3, 4), "THWC": (0, 1, 3, 4, 2), "CTHW": (0, 2, 1, 3, 4)}


def build(folder: Path) -> Path:
    """Compile the extension module with ninja; done again only where a source has changed.

    Processes that want it at once wait for the first.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    # Without optimization: it compiles three times as fast as with -O1, which is more than the tests run slower.
    flags = "-std=c++20 -O0 -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -DAIA_EMULATOR"
    includes = f'-I"{_HERE}" -I"{pybind11.get_include()}" -I"{sysconfig.get_path("include")}"'
    lines = [f"rule cxx\n  command = g++ {flags} $watched {includes} -MMD -MF $out.d -x c++ -c $in -o $out"]
    lines += ["  deps = gcc\n  depfile = $out.d"]
    lines += [f"rule link\n  command = g++ {flags} {_SANITIZERS} -shared $in -o $out"]
    objects = []
    # The binding is not watched, which would take long; last, as of equal functions the linker takes the first.
    for source in (*sorted(_ROOT.glob("csrc/cuda/*.cu")), _HERE / "module.cpp"):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {os.path.relpath(source, folder)}")
        lines.append(f"  watched = {_SANITIZERS if source.suffix == '.cu' else ''}")
    lines.append(f"build aia_emulator.so: link {' '.join(objects)}\n")
    command = [sys.executable, "-m", "ninja", "-C", folder]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{result.stdout}{result.stderr}")
    return folder / "aia_emulator.so"


def _compiler_library(name: str) -> str:
    """Where the compiler finds a library."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _array(tensor: Tensor | None):
    """A flat numpy array of the storage, bfloat16 as its bits."""
    if tensor is None:
        return None
    if tensor.ndim == 5:
        tensor = tensor.permute(_PERMUTATIONS[maps.storage_order(tensor)])
    if tensor.ndim == 4 and not tensor.is_contiguous():  # channels_last
        tensor = tensor.permute(0, 2, 3, 1)
    assert tensor.is_contiguous()
    flat = tensor.flatten()
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _number(tensor: Tensor | None):
    """The storage of a parameter, dense in any order of axes, and its scalar."""
    if tensor is None:
        return None, 0
    return _array(tensor.as_strided((tensor.numel(),), (1,))), _SCALARS.index(tensor.dtype)


def _weights(weights):
    """Each weight with its strides."""
    return [(_number(w), w.stride()[1:]) for w in weights]


def _norms(*lists):
    """The numbers of each gate, from a list of each kind."""
    return [[_number(number) for number in of] for of in zip(*lists, strict=True)]


def _copy(tensor: Tensor, array) -> None:
    """Write what a call made of a parameter's storage into it."""
    tensor.as_strided((tensor.numel(),), (1,)).copy_(torch.from_numpy(array).view(tensor.dtype))


def _dtype_of_rows(logits: Tensor) -> torch.dtype:
    """That of phi in the passes of attention by a memory per sample."""
    return logits.dtype if logits.dtype == torch.bfloat16 else accumulate_dtype(logits.dtype)


def _poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or with an index that no axis has, so that an element left unwritten shows."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


class Emulator:
    """The passes of the CUDA backend, with the signatures of aia_kernels/schemas.py, for CPU tensors.

    misaligned: the kernels get their arrays between vectors. blocks: of a gate pass that wait for one another, six at
    most.
    """

    misaligned = False
    blocks = 6

    def __init__(self, library: Path):
        # The C++ library too: exceptions cannot be thrown where the sanitizer did not find it.
        environment = os.environ | {
            "LD_PRELOAD": " ".join(map(_compiler_library, ("libasan.so", "libstdc++.so"))),
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

    def map_order(self, order: str) -> str:
        return order

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait()
        self._worker.stdout.close()
        self._log.close()

    def call(self, name: str, *arguments):
        """(result, arguments as they are afterwards) of a function of the module."""
        try:
            pickle.dump((name, arguments, self.misaligned), self._worker.stdin)
            self._worker.stdin.flush()
            ok, answer = pickle.load(self._worker.stdout)
        except (EOFError, BrokenPipeError):
            self._log.seek(0)
            raise RuntimeError(f"the emulator died:\n{self._log.read().decode()}") from None
        if not ok:
            raise RuntimeError(answer)
        return answer

    def barriers(self) -> set[str]:
        """The barriers met since the last call of schedule, as file:line."""
        return self.call("barriers")[0]

    def launches(self) -> int:
        """The launches since the last call of schedule."""
        return self.call("launches")[0]

    def schedule(self, backward: bool = False, dropped: str = "") -> None:
        """Choose the order in which the threads of a block run, and a barrier that they pass without waiting."""
        self.call("schedule", backward, dropped)

    def _run(self, name: str, leading, arguments, outputs: list[Tensor]) -> None:
        arrays = [_array(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
        after = self.call(name, *leading, *arrays, *map(_array, outputs))[1]
        for output, array in zip(outputs, after[-len(outputs) :], strict=True):
            flat = torch.from_numpy(array).view(output.dtype)
            if output.ndim == 5:
                axes = _PERMUTATIONS[maps.storage_order(output)]
                output.permute(axes).copy_(flat.view([output.shape[axis] for axis in axes]))
            elif output.ndim == 4 and not output.is_contiguous():
                output.permute(0, 2, 3, 1).copy_(flat.view(output.permute(0, 2, 3, 1).shape))
            else:
                output.copy_(flat.view(output.shape))

    def _launch(self, name: str, x: Tensor, arguments, outputs: list[Tensor]) -> None:
        order, scalar = maps.ORDERS.index(maps.storage_order(x)), _SCALARS.index(x.dtype)
        self._run(name, (tuple(x.shape), order, scalar), arguments, outputs)

    def _launch_gate(self, name: str, dims, first: Tensor, arguments: list, outputs: list[Tensor]) -> None:
        self._run(name, (first.shape[0], list(dims), _SCALARS.index(first.dtype)), arguments, outputs)

    def pool(self, x, context, gate, gate_context):
        batch, packed = x.shape[0], maps.packed_size(x.shape, context)
        pooled = _poison(torch.empty((batch, 2, packed), dtype=accumulate_dtype(x.dtype)))
        argmax = _poison(torch.empty((batch, packed), dtype=maps.index_dtype(x.shape, context)))
        self._launch("pool", x, (x, context, gate, gate_context), [pooled, argmax])
        return pooled, argmax

    def unpool(self, grad_y, *arguments):
        grad_x = _poison(torch.empty_like(grad_y))
        self._launch("unpool", grad_y, (grad_y, *arguments), [grad_x])
        return grad_x

    def unpool_reduce(self, x, grad_pooled, argmax, context, gate_context):
        shape = x.shape[0], maps.packed_size(x.shape, gate_context)
        grad_gate = _poison(torch.empty(shape, dtype=accumulate_dtype(x.dtype)))
        self._launch("unpool_reduce", x, (x, grad_pooled, argmax, context, gate_context), [grad_gate])
        return grad_gate

    def recalibrate(self, x, gate, context):
        y = _poison(torch.empty_like(x))
        self._launch("recalibrate", x, (x, gate, context), [y])
        return y

    def recalibrate_reduce(self, grad_y, x, context):
        shape = x.shape[0], maps.packed_size(x.shape, context)
        grad_gate = _poison(torch.empty(shape, dtype=accumulate_dtype(x.dtype)))
        self._launch("recalibrate_reduce", x, (grad_y, x, context), [grad_gate])
        return grad_gate

    def average_gate(self, gate, sizes, order):
        averaged = _poison(gate.new_empty((gate.shape[0], maps.packed_size((0, *sizes), maps.CHANNEL))))
        leading = (gate.shape[0], *sizes), order, _SCALARS.index(gate.dtype)
        self._run("average_gate", leading, [gate], [averaged])
        return averaged

    def average_gate_back(self, grad, sizes, order):
        spread = _poison(grad.new_empty((grad.shape[0], maps.packed_size((0, *sizes), maps.SPACETIME))))
        leading = (grad.shape[0], *sizes), order, _SCALARS.index(grad.dtype)
        self._run("average_gate_back", leading, [grad], [spread])
        return spread

    def temporal_shift(self, x, fold, reverse):
        y = _poison(torch.empty_like(x))
        self._launch("temporal_shift", x, (x, fold, reverse), [y])
        return y

    def gate(self, pooled, weight, scale, shift, mean, var, eps, batch, dims):
        n = len(weight)
        gate = _poison(pooled.new_empty((pooled.shape[0], pooled.shape[2])))
        norm, statistics = _poison(pooled.new_empty((n, 4))), _poison(pooled.new_empty((n, 3)))
        arguments = [self.blocks, pooled, _weights(weight), _norms(scale, shift, mean, var), list(eps), list(batch)]
        self._launch_gate("gate", dims, pooled, arguments, [gate, norm, statistics])
        return gate, norm, statistics

    def gate_again(self, pooled, weight, norm, dims):
        gate = _poison(pooled.new_empty((pooled.shape[0], pooled.shape[2])))
        z = _poison(torch.empty_like(gate))
        self._launch_gate("gate_again", dims, pooled, [pooled, _weights(weight), norm], [gate, z])
        return gate, z

    def gate_backward_reduce(self, grad_gate, z, norm, dims):
        sums = _poison(norm.new_empty((norm.shape[0], 2)))
        self._launch_gate("gate_backward_reduce", dims, z, [self.blocks, grad_gate, z, norm], [sums])
        return sums

    def gate_backward(self, grad_gate, z, norm, sums, statistics, pooled, weight, dims):
        grad_pooled, grad_weight = _poison(torch.empty_like(pooled)), [_poison(torch.empty_like(w)) for w in weight]
        grad_affine = _poison(weight[0].new_empty((norm.shape[0], 2)))
        leading = z.shape[0], list(dims), _SCALARS.index(z.dtype), self.blocks
        arrays = map(_array, (grad_gate, z, norm, sums, statistics, pooled))
        outputs = _weights(grad_weight), _number(grad_affine), _array(grad_pooled)
        *_, weights, (affine, _), after = self.call("gate_backward", *leading, *arrays, _weights(weight), *outputs)[1]
        for w, ((array, _), _) in zip(grad_weight, weights, strict=True):
            _copy(w, array)
        _copy(grad_affine, affine)
        _copy(grad_pooled, after)
        return grad_pooled, grad_weight, grad_affine

    def move_statistics_(self, mean, var, tracked, statistics, momentum):
        leading = _SCALARS.index(statistics[0].dtype), [m.numel() for m in mean], momentum
        lists = [
            [kind(t) for t in tensors]
            for kind, tensors in ((_number, mean), (_number, var), (_array, tracked), (_array, statistics))
        ]
        *_, means, variances, numbers, _ = self.call("move_statistics_", *leading, *lists)[1]
        for tensor, (array, _) in zip((*mean, *var), (*means, *variances), strict=True):
            _copy(tensor, array)
        for tensor, array in zip(tracked, numbers, strict=True):
            _copy(tensor, array)

    def cluster_size(self, x, inner, outer):
        order, scalar = maps.ORDERS.index(maps.storage_order(x)), _SCALARS.index(x.dtype)
        return self.call("cluster_size", tuple(x.shape), order, scalar, inner, outer)[0]

    def evaluate(self, x, weight, scale, shift, mean, var, eps, inner, outer, cluster=None, clips=1):
        """cluster: its blocks, 0 for groups of so many clips, None for the choice of the kernels."""
        y = _poison(torch.empty_like(x))
        cluster = self.cluster_size(x, inner, outer) if cluster is None else cluster
        norms = _norms(scale, shift, mean, var)
        arguments = [x, _weights(weight), norms, list(eps), inner, outer, cluster, clips]
        self._launch("evaluate", x, arguments, [y])
        return y

    def _launch_tokens(self, name: str, logits: Tensor, group: int, arguments, outputs: list[Tensor]) -> None:
        self._run(name, ((*logits.shape, group), _SCALARS.index(logits.dtype)), arguments, outputs)

    def column_statistics(self, logits, padding):
        b, _, m = logits.shape
        statistics = _poison(logits.new_empty((b, 2, m), dtype=accumulate_dtype(logits.dtype)))
        lse = _poison(statistics.new_empty((b, m)))
        self._launch_tokens("column_statistics", logits, 1, [logits, padding], [statistics, lse])
        return statistics, lse

    def double_norm_(self, logits, lse, group, eps, padding):
        b, n, m = logits.shape
        mass = _poison(lse.new_empty((b, n, m // group)))
        self._launch_tokens("double_norm_", logits, group, [lse, eps, padding], [logits, mass])
        return mass

    def double_norm_backward_reduce(self, grad, attention, group):
        b, _, m = grad.shape
        reduced = _poison(grad.new_empty((b, m), dtype=accumulate_dtype(grad.dtype)))
        self._launch_tokens("double_norm_backward_reduce", grad, group, [grad, attention], [reduced])
        return reduced

    def double_norm_backward_(self, grad, attention, mass, reduced, group):
        self._launch_tokens("double_norm_backward_", grad, group, [attention, mass, reduced], [grad])

    def fold(self, value, weight, bias, of_batch, count, fixed, eps):
        c, m = value.shape
        folded, wide = _poison(torch.empty_like(value)), accumulate_dtype(value.dtype)
        shapes = (c,), (c, 3), (m if of_batch else 0,)
        numbers = [_poison(value.new_empty(shape, dtype=wide)) for shape in shapes]
        sums = [_array(t) for t in (of_batch or (None,) * 3)]
        given = [_number(t) for t in (weight, bias, *(fixed or (None, None)))]
        arguments = [value, *given[:2], *sums, count, *given[2:]]
        self._run("fold", ((c, m), _SCALARS.index(value.dtype), eps), arguments, [folded, *numbers])
        return folded, *numbers

    def fold_sums(self, value, product, sums, statistics, off, eps):
        joint, center = _poison(product.new_empty((2, value.shape[0]))), _poison(torch.empty_like(sums))
        arguments = [value, product, sums, statistics, off]
        self._run("fold_sums", (tuple(value.shape), _SCALARS.index(value.dtype), eps), arguments, [joint, center])
        return joint, center

    def fold_back(self, value, weight, product, joint, center, statistics, of_batch, eps):
        m = value.shape[1] if of_batch else 0
        outputs = [torch.empty_like(value), torch.empty_like(value), product.new_empty((m, m)), product.new_empty(m)]
        arguments = [value, _number(weight), product, joint, center, statistics, *(of_batch or (None,) * 3)]
        leading = tuple(value.shape), _SCALARS.index(value.dtype), eps
        self._run("fold_back", leading, arguments, [_poison(t) for t in outputs])
        return tuple(outputs)

    def _launch_features(self, name: str, z: Tensor, arguments, outputs: list[Tensor]) -> None:
        by_maps = not z.is_contiguous()
        if by_maps:  # seen in the order of storage; outputs are written through their views
            arguments, outputs = ([_transposed(t) for t in tensors] for tensors in (arguments, outputs))
        self._run(name, (tuple(z.shape), by_maps, _SCALARS.index(z.dtype)), arguments, outputs)

    def residual_relu_(self, z, x, shift):
        signs = _poison(z.new_empty(((z.numel() + 7) // 8,), dtype=torch.uint8))
        self._launch_features("residual_relu_", z, [x, shift], [z, signs])
        return signs

    def residual_relu_backward(self, grad_y, signs):
        grad = _poison(torch.empty_like(grad_y))
        sums = _poison(grad_y.new_empty(grad_y.shape[2], dtype=accumulate_dtype(grad_y.dtype)))
        self._launch_features("residual_relu_backward", grad_y, [grad_y, signs], [grad, sums])
        return grad, sums

    def _launch_memory(self, name: str, of: tuple, settings: tuple, arguments, outputs: list[Tensor]) -> None:
        """of: logits, feature and heads."""
        logits, feature, heads = of
        b, columns, n = logits.shape
        sizes = b, heads, columns // 2 // heads, n, feature
        self._run(name, (sizes, _SCALARS.index(logits.dtype), *settings), [logits, *arguments], outputs)

    def memory_keys(self, logits, feature, heads, padding, statistics, gradients):
        (b, columns, n), dtype = logits.shape, accumulate_dtype(logits.dtype)
        features = columns // 2 + (heads if feature == 0 else 0)
        shape = b, features + (columns if gradients else 0), n
        rows = _poison(logits.new_empty(shape, dtype=_dtype_of_rows(logits)))
        sums = _poison(logits.new_empty((b, features), dtype=dtype))
        of = logits, feature, heads
        self._launch_memory("memory_keys", of, (shape[1],), [padding, statistics], [rows, sums])
        return rows, sums

    def memory_queries(self, logits, feature, heads, padding, sums, gamma, eps):
        shape = *sums.shape, logits.shape[2]
        query = _poison(logits.new_empty(shape, dtype=_dtype_of_rows(logits)))
        self._launch_memory("memory_queries", (logits, feature, heads), (eps,), [padding, sums, gamma], [query])
        return query

    def memory_queries_backward_(self, rows, logits, feature, heads, padding, sums, gamma, eps, reached):
        results = [_poison(t) for t in (rows.new_empty(reached.shape), torch.empty_like(sums), sums.new_empty(1))]
        arguments, of = [padding, sums, gamma, reached], (logits, feature, heads)
        self._launch_memory("memory_queries_backward_", of, (eps,), arguments, [rows, *results])
        return tuple(results)

    def memory_keys_backward_(self, rows, logits, feature, heads, padding, reached, grad_sums, reduced):
        arguments = [padding, reached, grad_sums, reduced]
        self._launch_memory("memory_keys_backward_", (logits, feature, heads), (), arguments, [rows])

    def _launch_matrix(self, name: str, x: Tensor, arguments, outputs: list[Tensor]) -> None:
        self._run(name, (_extents(x), _SCALARS.index(x.dtype)), arguments, outputs)

    def _cbam_pool(self, x: Tensor, over_columns: bool, gate: Tensor | None, *kept: int):
        pooled = _poison(x.new_empty((x.shape[0], 2, *kept), dtype=accumulate_dtype(x.dtype)))
        argmax = _poison(x.new_empty((x.shape[0], *kept), dtype=torch.int32))
        self._launch_matrix("cbam_pool", x, [over_columns, x, gate], [pooled, argmax])
        return pooled, argmax

    def cbam_pool_positions(self, x):
        return self._cbam_pool(x, x.is_contiguous(), None, x.shape[1])

    def cbam_pool_channels(self, x, channel):
        return self._cbam_pool(x, not x.is_contiguous(), channel, *x.shape[2:])

    def cbam_recalibrate(self, x, channel, spatial, confounder):
        results = [_poison(torch.empty_like(x)) for _ in range(2 if confounder else 1)]
        arguments = [x, *_by_axis(x, channel, spatial)]
        self._launch_matrix("cbam_recalibrate", x, arguments, results)
        return results

    def cbam_recalibrate_reduce(self, grad_y, grad_confounder, x, channel, spatial):
        b, c, h, w = x.shape
        grad_channel, grad_spatial = (
            _poison(x.new_empty(sizes, dtype=accumulate_dtype(x.dtype))) for sizes in ((b, c), (b, 1, h, w))
        )
        arguments = [grad_y, grad_confounder, x, *_by_axis(x, channel, spatial)]
        self._launch_matrix("cbam_recalibrate_reduce", x, arguments, _by_axis(x, grad_channel, grad_spatial))
        return grad_channel, grad_spatial

    def cbam_unpool_reduce(self, x, grad_spatial, spatial_argmax):
        sums = _poison(x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype)))
        self._launch_matrix("cbam_unpool_reduce", x, [x, grad_spatial, spatial_argmax], [sums])
        return sums

    def cbam_unpool(self, grad_y, grad_confounder, *sides):
        grad_x = _poison(torch.empty_like(grad_y))
        of_channels, of_positions = ([_array(t) for t in of] for of in (sides[:3], sides[3:]))
        arguments = [grad_y, grad_confounder, *_by_axis(grad_y, of_channels, of_positions)]
        self._launch_matrix("cbam_unpool", grad_y, arguments, [grad_x])
        return grad_x


def _extents(x: Tensor) -> tuple[int, int, int, bool]:
    """B, rows, columns, and whether rows are channels (csrc/common/matrix.h)."""
    b, c, h, w = x.shape
    return (b, c, h * w, True) if x.is_contiguous() else (b, h * w, c, False)


def _by_axis(x: Tensor, of_channels, of_positions) -> list:
    """What belongs to the rows of x, then what belongs to its columns."""
    return [of_channels, of_positions] if x.is_contiguous() else [of_positions, of_channels]


def _transposed(tensor: Tensor | None) -> Tensor | None:
    return tensor.mT if tensor is not None and tensor.ndim == 3 else tensor
