"""Every Triton kernel, as it would be launched, compiled for sm_80, sm_90 and sm_100 without a GPU.

Held here: no spill (no LDL or STL, no local memory), and 16-byte global accesses on the x-sized streams: loads (LDG,
or LDGSTS where a kernel walks and the next tiles are in flight) and stores (STG) of y and grad_x.

What to expect of the machine code (triton 3.9; 3.6 is alike): a thread holds 16 elements of x, so it reads them with 4
accesses in float32 and 2 in 16 bits. Registers of 256 threads: recalibrate 30 to 80, sums of grad_y * x 40 to 130, pool
over C 50 to 128, pool over T, H and W 80 to 160; of 512 threads: unpool and sums of x * U up to 128. Where channels
are innermost, pool over T, H and W at 56 x 56 takes 255: runs of 64 bytes (32 in 16 bits) ask for a tile of 8 x 16 x 64
there, 32 elements a thread. Shared memory stays under 72 KiB.

Rows of 14 elements and planes of 7 x 7 are not multiples of 16 bytes: there a tile is read as runs of planes (see
aia_kernels/triton/tiles.py). Narrow loads remain, outside the table, in the reductions over C of 28 x 28 in 16
bits, where whole planes would leave too few programs, and in those of CTHW order where a plane is not a multiple of 16
bytes, because the planes of a frame are not neighbours there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from benchmarks.offline import environment_without_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

#: Case -> order, dtype, [B, T, C, H, W], the GPUs to compile for.
CASES = {
    "56x56 fp32": ("TCHW", "float32", (8, 8, 64, 56, 56), (80, 90, 100)),
    "56x56 bf16 channels_last": ("THWC", "bfloat16", (8, 8, 64, 56, 56), (80, 90, 100)),
    "14x14 bf16": ("TCHW", "bfloat16", (8, 8, 256, 14, 14), (80, 90, 100)),
    "56x56 bf16": ("TCHW", "bfloat16", (8, 8, 64, 56, 56), (90,)),
    "56x56 fp32 channels_last": ("THWC", "float32", (8, 8, 64, 56, 56), (90,)),
    "14x14 fp32": ("TCHW", "float32", (8, 8, 256, 14, 14), (90,)),
    "7x7 bf16": ("TCHW", "bfloat16", (8, 8, 512, 7, 7), (90,)),
}

#: Of those, in every run: the one that takes most registers.
FEW = {"56x56 bf16 channels_last": (*CASES["56x56 bf16 channels_last"][:-1], (90,))}
TABLES = {"few": FEW, "all": CASES}

#: A clip of more than 2^31 elements, whose offsets take 64 bits; compiled, as no machine that tests this holds it.
WIDE = ("TCHW", "bfloat16", (1, 8, 64, 2112, 2112))

#: The kernels that a case compiles.
X_KERNELS = {
    "pool_kernel",
    "pool_over_kernel",
    "recalibrate_kernel",
    "unpool_kernel",
    "product_sum_kernel",
    "product_sum_over_kernel",
}
GATE_KERNELS = {
    "conv_kernel",
    "activate_kernel",
    "known_kernel",
    "fixed_kernel",
    "backward_reduce_kernel",
    "grad_z_kernel",
    "conv_backward_kernel",
}
OTHER_KERNELS = {"gates": GATE_KERNELS, "wide": {"pool_over_kernel", "recalibrate_kernel"}}


class Compiled(NamedTuple):
    """Cases, and a row for each of their kernels and GPUs."""

    cases: dict[str, tuple]
    rows: list[dict]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.sweep)])
def compiled(request) -> Compiled:
    """From a process in which Triton compiles instead of interpreting."""
    done = subprocess.run(
        [sys.executable, __file__, request.param], env=environment_without_interpreter(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Compiled(TABLES[request.param], [json.loads(line) for line in done.stdout.splitlines()])


def test_no_spills(compiled):
    for case, kernels in (dict.fromkeys(compiled.cases, X_KERNELS) | OTHER_KERNELS).items():
        assert {row["kernel"] for row in compiled.rows if row["case"] == case} == kernels, case
    assert [row for row in compiled.rows if row["spills"] or row["local"]] == []
    assert [row for row in compiled.rows if row["shared"] > 72 * 1024] == []


def test_norms_are_rounded_to_the_nearest(compiled):
    """As the interpreter and torch round them; a GPU's own division and root are approximations. One of these is the
    sigmoid's, of each element of a thread."""
    for kernel, elements in (("activate_kernel", 1024 // 128), ("fixed_kernel", 1)):
        norms = [row["approximate"] for row in compiled.rows if row["kernel"] == kernel]
        assert norms and max(norms) <= elements, kernel


def test_wide_accesses(compiled):
    for case, (*_, capabilities) in compiled.cases.items():
        assert {row["capability"] for row in compiled.rows if row["case"] == case} == set(capabilities), case
    for row in compiled.rows:
        if row["case"] not in compiled.cases:
            continue
        assert row["wide_loads"] >= row["loads_of_x"], row
        assert row["wide_stores"] >= row["stores_of_x"], row
        if row["stores_of_x"]:
            assert row["narrow_stores"] == 0, row
        if not row["reads_maps"]:
            assert row["narrow_loads"] == 0, row


def test_counts_do_not_compile_a_kernel_again():
    """Not for 1, and not for multiples of 16: batches of any size share what was compiled."""
    from triton.runtime.interpreter import InterpretedFunction

    from aia_kernels import triton

    counts, kernels = {"batch", "programs", "blocks"}, {}
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        found = vars(importlib.import_module(module.name))
        kernels |= {name: kernel for name, kernel in found.items() if name.endswith("_kernel")}
    assert {"conv_kernel", "pool_kernel", "features_kernel", "moments_kernel"} <= kernels.keys()
    for name, kernel in kernels.items():
        holder = kernel.kwargs if isinstance(kernel, InterpretedFunction) else vars(kernel)
        told = holder["do_not_specialize"]
        assert counts & set(kernel.arg_names) <= set(told or ()), name


def main(table: str) -> None:
    """Print a row of JSON for each kernel of a table: runs in its own process."""
    import torch

    from aia_kernels import triton as passes
    from aia_kernels.common import maps
    from aia_kernels.triton import tiles
    from benchmarks.offline import triton_compile
    from benchmarks.offline.triton_compile import activation, packed, x_passes

    def gate_passes(x):
        dims = [d for m in maps.map_dims(x.shape, maps.SPACETIME, "TCHW") for d in m]
        pooled, weight = packed(x, 3, 2), [x.new_empty(1, 2, 3, 3, 3) for _ in range(3)]
        one, nothing = [x.new_empty(1) for _ in range(3)], [None] * 3
        for uses_batch in (True, False):
            numbers = one, nothing, nothing, one, (1e-5,) * 3, (uses_batch,) * 3
            _, norm, statistics = passes.gate(pooled, weight, *numbers, dims)
        _, z = passes.gate_again(pooled, weight, norm, dims)
        passes.gate_backward_reduce(z, z, norm, dims)
        passes.gate_backward(z, z, norm, None, statistics, pooled, weight, dims)

    def wide_passes(x):
        passes.pool(x, 1, None, 0)
        passes.pool(x, 3, packed(x, 1), 1)
        passes.recalibrate(x, packed(x, 1), 1)

    def report(case, x, capabilities, call):
        with triton_compile.recorded(tiles) as launches:
            call(x)
        for launch in launches:
            for capability in capabilities:
                print(json.dumps(row(case, x, launch, capability)))

    def row(case, x, launch, capability):
        code = triton_compile.machine_code(launch, capability)
        kernel, found = launch.kernel.fn.__name__, {}
        if "TILE" in launch.constants:
            threads = 32 * launch.constants["num_warps"]
            accesses = math.prod(launch.constants["TILE"].block) * x.element_size() // (16 * threads)
            elementwise = kernel in ("recalibrate_kernel", "unpool_kernel")
            found = {
                "loads_of_x": accesses * (2 if launch.constants.get("FACTOR") == 0 else 1),
                "stores_of_x": accesses if elementwise else 0,
                "reads_maps": elementwise or launch.constants.get("GATE", 0) + launch.constants.get("FACTOR", 0) > 0,
                "wide_loads": code.count("LDG", "LDGSTS", wide=True),
                "narrow_loads": code.count("LDG", "LDGSTS", wide=False),
                "wide_stores": code.count("STG", wide=True),
                "narrow_stores": code.count("STG", wide=False),
            }
        spills = code.count("LDL", "STL")
        numbers = {name: value for name, value in dataclasses.asdict(code).items() if name != "instructions"}
        return {"case": case, "kernel": kernel, "capability": capability, "spills": spills, **numbers, **found}

    for case, (order, dtype, shape, capabilities) in TABLES[table].items():
        report(case, activation(order, getattr(torch, dtype), shape), capabilities, x_passes)
    capabilities = (90,) if table == "few" else (80, 90, 100)
    report("gates", activation("TCHW", torch.float32, (8, 8, 64, 56, 56)), capabilities, gate_passes)
    report("gates", activation("TCHW", torch.float64, (8, 8, 64, 56, 56)), (90,), gate_passes)
    order, dtype, shape = WIDE
    report("wide", activation(order, getattr(torch, dtype), shape), (90,), wide_passes)


if __name__ == "__main__":
    main(*sys.argv[1:])
