"""The machine code of the compiled kernels, read without a GPU: python -m benchmarks.offline.machine_code

One row for each kernel and architecture: what nvcc built of csrc/cuda, and what Triton compiles of its passes on one
input (--shape). How the hot path is found, and what of it is in flight, is told in sass.py. The columns:

* load_bits, store_bits: the widest access to global memory. local_bytes: what a thread has in local memory; spilt.
* blocks_per_sm, warps_per_sm: how many fit on a multiprocessor, by registers, shared memory and threads.
* in_flight_kib_per_sm: bytes of x outstanding in a thread on the hot path, times the threads that fit.
* hot_instructions, hot_elements: of a thread on the hot path, those executed and those of x loaded. What the path takes
  once for several elements (index arithmetic, maps) is shared by them.
* per_element: their quotient. shared_per_element: the same for the dearest innermost loop that reads shared memory,
  by element read there; per_element counts such a loop as passed once.
* per_byte: hot_instructions by the bytes of x loaded and the bytes stored on the path.

A kernel whose x is not known here (X) counts every load, and has no pass.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import records
from . import ROOT, environment_without_interpreter, sass

NO_DISASSEMBLER = "neither nvcc nor triton brings cuobjdump here"
FILE = records.RESULTS / "machine_code.csv"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- table: machine code -->\n", "\n<!-- end of table -->")

COLUMNS = [
    *("backend", "pass", "kernel", "variant", "dtype", "access", "architecture", "load_bits", "store_bits"),
    *("registers", "shared_bytes", "local_bytes", "threads", "blocks_per_sm", "warps_per_sm", "in_flight_kib_per_sm"),
    *("instructions", "hot_path", "hot_instructions", "hot_elements", "per_element", "shared_per_element", "per_byte"),
]

DTYPES = {
    "__nv_bfloat16": ("bf16", 2),
    "__half": ("fp16", 2),
    "double": ("fp64", 8),
    "float": ("fp32", 4),
    "unsigned short": ("16 bits", 2),
    "unsigned int": ("32 bits", 4),
    "unsigned long": ("64 bits", 8),
}

#: The x-sized passes of csrc/cuda: what tells their kernels, and where these keep their pointers to x-sized inputs (the
#: parameter, its first byte and its last).
X = (
    ("elementwise_kernel<.*RecalibrateOp", "recalibrate", [(1, 0, 8)]),
    ("elementwise_kernel<.*UnpoolOp|^unpool_kernel|^staged_kernel", "unpool", [(1, 0, 8)]),
    ("reduce_over_.*Plain.*PoolOp", "pool", [(1, 0, 8)]),
    ("reduce_over_.*Plain.*UnpooledField", "unpool_reduce", [(1, 0, 8)]),
    ("reduce_over_.*Product", "recalibrate_reduce", [(1, 0, 16)]),
    ("temporal_shift_kernel", "temporal_shift", [(1, 0, 8)]),
    ("residual_relu_kernel", "residual_relu_", [(1, 0, 8), (2, 0, 8)]),
    ("reduce_columns<.*TokenOp", "residual_relu_backward", [(0, 0, 8)]),
    ("map_kernel", "residual_relu_backward", [(2, 0, 8)]),
    ("reduce_columns<.*StatisticsOp", "column_statistics", [(0, 0, 8)]),
    ("double_norm_kernel", "double_norm_", [(1, 0, 8)]),
    ("reduce_columns<.*RowGradientOp", "double_norm_backward_reduce", [(0, 0, 16)]),
    ("dots_kernel", "double_norm_backward_reduce", [(1, 0, 8), (2, 0, 8)]),
    ("double_norm_backward_kernel", "double_norm_backward_", [(1, 0, 8), (2, 0, 8)]),
    ("reduce_rows<.*PoolRowOp|reduce_columns<.*PoolColumnOp", "cbam_pool", [(0, 0, 8)]),
    ("elements_kernel<.*RecalibrateOp", "cbam_recalibrate", [(0, 0, 8)]),
    ("reduce_columns<.*ReduceOp.*false", "cbam_recalibrate_reduce", [(0, 0, 16)]),
    ("reduce_columns<.*ReduceOp.*true", "cbam_recalibrate_reduce", [(0, 0, 24)]),
    ("reduce_rows<.*UnpoolRowOp|reduce_columns<.*UnpoolColumnOp", "cbam_unpool_reduce", [(0, 0, 8)]),
    ("elements_kernel<.*UnpoolOp.*false", "cbam_unpool", [(0, 0, 8)]),
    ("elements_kernel<.*UnpoolOp.*true", "cbam_unpool", [(0, 0, 16)]),
)
#: The same for Triton's kernels, by parameters.
TRITON_X = {"x_ptr", "grad_y_ptr"}

#: KiB of shared memory of a multiprocessor ("Technical Specifications per Compute Capability", CUDA C++ Programming
#: Guide). All three have 64 K registers, 64 warps and 32 blocks.
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}

#: Instructions that the threads of an H200 issue while it moves a byte: 132 multiprocessors x 4 schedulers x 32 lanes
#: at 1.7 GHz, and 4.3 TB/s.
BALANCE = 132 * 4 * 32 * 1.7e9 / 4.3e12
TARGET_KIB = 48


def cuobjdump() -> str | None:
    """cuobjdump, next to nvcc or inside triton; nvdisasm, which it calls, lies beside it."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    if spec := importlib.util.find_spec("triton"):
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    folders.append(Path("/usr/local/cuda/bin"))
    for folder in folders:
        if os.access(folder / "cuobjdump", os.X_OK) and os.access(folder / "nvdisasm", os.X_OK):
            return str(folder / "cuobjdump")
    return None


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> tuple[int, int]:
    """(blocks, warps) that fit on a multiprocessor, as cuda_occupancy.h of the toolkit counts them.

    A warp has its registers in units of 256, in one of four parts of the file; a block its shared memory in units of
    128 bytes, and 1 KiB of it that the system keeps.
    """
    warps = -(-threads // 32)
    fitting = 4 * (65536 // 4 // (-(-registers // 8) * 8 * 32))
    taken = -(-(shared + 1024) // 128) * 128
    blocks = min(32, 64 // warps, fitting // warps, SHARED_KIB[architecture] * 1024 // taken)
    return blocks, blocks * warps


def demangled(names: list[str]) -> dict[str, str]:
    """Names of kernels with their template arguments, without namespaces; as they are where nothing demangles them."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [re.sub(r"\(anonymous namespace\)::|\w+::", "", line) for line in done.stdout.splitlines()]
    return {name: line.split("(")[0].removeprefix("void ").strip() for name, line in zip(names, plain, strict=True)}


def split_name(name: str) -> tuple[str, str]:
    """The kernel and its template arguments. A mangled name ends in the kernel's, preceded by its length."""
    if not name.startswith("_Z"):
        kernel, _, arguments = name.partition("<")
        return kernel, arguments.removesuffix(">").strip()
    match = re.search(r"\d([a-z_]+_(?:kernel|columns|rows|channels|run|spacetime))I(.*)", name)
    return (match[1], match[2]) if match else (name, "")


class Source(NamedTuple):
    """What is known of a kernel beside its machine code. pointers as in X; size: bytes of an element of x."""

    backend: str
    passed: str
    kernel: str
    variant: str
    dtype: str
    size: int
    access: str
    pointers: list[tuple[int, int, int]] | None


def row(kernel: sass.Kernel, source: Source) -> dict:
    flow = sass.Flow(kernel)
    hot = sass.hot_path(kernel, flow, source.pointers)
    architecture = kernel.architecture.rstrip("a")  # sm_90a: with the instructions that sm_90 alone has
    blocks, warps = occupancy(architecture, kernel.registers, kernel.shared, kernel.threads)
    elements, moved = hot.loaded / source.size, hot.loaded + hot.stored
    return {
        "backend": source.backend,
        "pass": source.passed,
        "kernel": source.kernel,
        "variant": source.variant,
        "dtype": source.dtype,
        "access": source.access,
        "architecture": architecture,
        "load_bits": kernel.widest("LDG", "LDGSTS"),
        "store_bits": kernel.widest("STG"),
        "registers": kernel.registers,
        "shared_bytes": kernel.shared,
        "local_bytes": kernel.local,
        "threads": kernel.threads,
        "blocks_per_sm": blocks,
        "warps_per_sm": warps,
        "in_flight_kib_per_sm": f"{hot.in_flight * kernel.threads * blocks / 1024:.1f}",
        "instructions": len(kernel.instructions),
        "hot_path": "loop" if hot.in_loop else "kernel",
        "hot_instructions": len(hot.instructions),
        "hot_elements": f"{elements:g}",
        "per_element": f"{len(hot.instructions) / elements:.2f}" if elements else "",
        "shared_per_element": f"{found:.2f}" if (found := sass.shared_loop(flow, hot, max(4, source.size))) else "",
        "per_byte": f"{len(hot.instructions) / moved:.2f}" if moved else "",
    }


def cuda_source(name: str) -> Source:
    kernel, variant = split_name(name)
    types = [found for written, found in DTYPES.items() if re.search(rf"\b{written}\b", variant)]
    dtype, size = types[0] if types else ("", 4)
    passed, pointers = next(((passed, at) for told, passed, at in X if re.search(told, name)), ("", None))
    width = re.search(r"(?<![\w.])\d+", variant)
    access = "" if not width else "element by element" if width[0] == "1" else f"vectors of {width[0]}"
    if width and width[0] in ("7", "14"):  # strips of a gate
        access = f"rows of {width[0]}"
    if kernel == "reduce_over_channels" and access:
        access += ", channels innermost" if ", true," in variant else ", positions innermost"
    if kernel == "residual_relu_kernel":
        access = "vectors of 8" if "true" in variant else "element by element"
    return Source("cuda", passed, kernel, variant, dtype, size, access, pointers)


def cuda_rows(tool: str, architectures: list[str]) -> Iterator[dict]:
    from aia_kernels.backends import extension

    for architecture in architectures:
        kernels = sass.read(tool, str(extension.LIBRARY), architecture)
        names = demangled([kernel.name for kernel in kernels])
        for kernel in sorted(kernels, key=lambda kernel: names[kernel.name]):
            yield row(kernel, cuda_source(names[kernel.name]))


def triton_rows(tool: str, architectures: list[str], shape: tuple[int, ...]) -> Iterator[dict]:
    """Of the passes of both arrangements and of the shift. In this process Triton must compile, and not interpret."""
    import torch

    from aia_kernels.triton import shift, tiles

    from . import triton_compile

    for dtype, (label, size) in ((torch.float32, DTYPES["float"]), (torch.bfloat16, DTYPES["__nv_bfloat16"])):
        for order in ("TCHW", "THWC"):
            x = triton_compile.activation(order, dtype, shape)
            with triton_compile.recorded(tiles) as launches:
                triton_compile.x_passes(x)
                shift.temporal_shift(x, shape[2] // 8, False)
            for launch, architecture in itertools.product(launches, architectures):
                source = triton_source(launch, triton_compile.parameters(launch), label, size, order)
                compiled = triton_compile.compiled(launch, int(architecture.removeprefix("sm_")))
                with triton_compile.cubin(compiled) as path:
                    (kernel,) = sass.read(tool, path)
                kernel.shared = max(kernel.shared, compiled.metadata.shared)  # it is asked for at the launch
                yield row(kernel, source)


def triton_source(launch, parameters: list[str], dtype: str, size: int, order: str) -> Source:
    kernel, constants = launch.kernel.fn.__name__, launch.constants
    passed = {"pool_over": "pool", "product_sum": "unpool_reduce", "product_sum_over": "unpool_reduce"}
    passed = passed.get(kernel.removesuffix("_kernel"), kernel.removesuffix("_kernel"))
    pointers = [(k, 0, 8) for k, name in enumerate(parameters) if name in TRITON_X]
    if constants.get("FACTOR") == 0:  # the other factor is an activation too
        passed = "recalibrate_reduce"
        pointers.append((parameters.index("factor_ptr"), 0, 8))
    told = ("CONTEXT", "AXIS", "GATE", "FACTOR", "INNER_GATE", "INNER")
    variant = ", ".join(f"{name}={constants[name]}" for name in told if name in constants)
    return Source("triton", passed, kernel, variant, dtype, size, order, pointers)


def triton_rows_apart(architectures: list[str], shape: tuple[int, ...]) -> list[dict]:
    """The rows of a process in which nothing is interpreted."""
    command = [sys.executable, "-m", "benchmarks.offline.machine_code", "--json", "--backend", "triton"]
    command += ["--shape", *map(str, shape), "--architecture", *architectures]
    done = subprocess.run(command, env=environment_without_interpreter(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"Triton's kernels did not compile:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _elements(access: str) -> int:
    """Of the vectors that a kernel moves x in."""
    return int(found[1]) if (found := re.search(r"vectors of (\d+)", access)) else 1


def markdown(rows: list[dict], architecture: str = "sm_90") -> list[str]:
    """The x-sized passes for one architecture, met in vectors; numbers for fp32 and, after a stroke, bf16.

    Types of one size share the shift. Triton's rows are those of contiguous frames.
    """
    header = ["pass", "kernel", "registers", "warps", "KiB in flight", "instructions per element", "issue / memory"]
    found: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        shown = row["architecture"] == architecture and row["pass"] and row["dtype"] not in ("fp16", "fp64", "64 bits")
        if shown and int(row["load_bits"]) >= 128 and row["access"] not in ("element by element", "THWC"):
            variant = (
                row["variant"] if row["backend"] == "triton" else re.sub(r"\b(true|false)\b|.", r"\1", row["variant"])
            )
            found.setdefault((row["pass"], row["kernel"], row["backend"], variant), []).append(row)
    table = [header, ["---"] * len(header)]
    for (passed, kernel, backend, variant), every in sorted(found.items()):
        widest: dict[str, dict] = {}  # of each type, the version with the widest vectors
        for row in sorted(every, key=lambda row: (row["dtype"] in ("bf16", "16 bits"), _elements(row["access"]))):
            widest[row["dtype"]] = row
        both = list(widest.values())
        inside = [float(row["in_flight_kib_per_sm"]) for row in both]
        detail = both[0]["access"].partition(", ")[2] if backend == "cuda" else variant
        if kernel.startswith("double_norm"):
            detail = "rows held" if variant == "true" else "rows read again"
        if passed.startswith("cbam") and variant == "true":
            detail = "with a confounder"
        told = ", ".join(filter(None, (backend, detail)))
        cells = [
            [row["registers"] for row in both],
            [row["warps_per_sm"] for row in both],
            [f"**{kib:.0f}**" if kib < TARGET_KIB else f"{kib:.0f}" for kib in inside],
            [f"{float(row['per_element']):.1f}" for row in both],
            [f"{float(row['per_byte']) / BALANCE:.2f}" for row in both],
        ]
        table.append([passed, f"{kernel} ({told})", *(" / ".join(map(str, cell)) for cell in cells)])
    return [f"| {' | '.join(line)} |" for line in table]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    name = "python -m benchmarks.offline.machine_code"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), help="one only (default: both)")
    parser.add_argument("--architecture", nargs="+", choices=tuple(SHARED_KIB), default=list(SHARED_KIB), metavar="SM")
    parser.add_argument(
        *("--shape",), nargs=5, type=int, default=(8, 8, 256, 56, 56), metavar=tuple("BTCHW"), help="for Triton"
    )
    parser.add_argument("--output", type=Path, default=FILE, metavar="CSV")
    parser.add_argument("--json", action="store_true", help="print a line for each row and write nothing")
    parser.add_argument("--markdown", action="store_true", help="write no rows: put those of the CSV into the page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.markdown:
        with options.output.open(newline="") as opened:
            text = "\n".join(markdown(list(csv.DictReader(opened))))
        before, rest = PAGE.read_text().split(MARKS[0], 1)
        PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1], 1)[1])
        return 0
    if (tool := cuobjdump()) is None:
        print(NO_DISASSEMBLER, file=sys.stderr)
        return 2
    rows: list[dict] = []
    if options.backend != "triton":
        from aia_kernels.backends import extension

        if (reason := extension.without_cuda()) is not None:
            print(reason, file=sys.stderr)
            return 2
        rows += cuda_rows(tool, options.architecture)
    if options.backend != "cuda":
        apart = options.json and options.backend == "triton"
        rows += (
            triton_rows(tool, options.architecture, tuple(options.shape))
            if apart
            else triton_rows_apart(options.architecture, tuple(options.shape))
        )
    if options.json:
        for found in rows:
            print(json.dumps(found))
        return 0
    with options.output.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
