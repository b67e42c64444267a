"""External attention's Triton kernels, as they would be launched, compiled for sm_80, sm_90 and sm_100 without a GPU.

Held here: no spill (no LDL or STL, no local memory), tensor cores in every product of 16-bit and float64 numbers and
in those of float32 where torch allows TF32, 16-byte global accesses on the x-sized streams (loads of x, of the residual
and of the gradients, stores of o and grad_x), and shared memory that an SM of each kind has.

What to expect of the machine code (triton 3.9): products of 16-bit numbers take 64 to 240 registers of 128 threads,
with wgmma on sm_90 where a tile has at least 64 tokens; those of exact float32 run on FMA, and keep their operands in
registers, which limits their tiles. A float32 block whose one group is in pieces (more than 128 slots) spills in
attention_gradient; nothing published has one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from aia_kernels.algorithms.external_attention_passes import BatchTerm, DoubleNorm, Dropout
from aia_kernels.common.dtypes import accumulate_dtype
from benchmarks.offline import environment_without_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

ALL = (80, 90, 100)


class Case(NamedTuple):
    """As Case of test_triton_double_norm.py; the GPUs to compile for; whether torch allows TF32."""

    b: int
    n: int
    heads: int
    k: int
    width: int
    v: int
    group: int
    dtype: str
    by_feature: bool = False
    masked: bool = False
    block: bool = False
    capabilities: tuple[int, ...] = (90,)
    tf32: bool = False


CASES = {
    "block of maps, bf16": Case(4, 4096, 1, 512, 64, 512, 64, "bfloat16", True, block=True, capabilities=ALL),
    "block channels_last, bf16": Case(4, 4225, 1, 512, 64, 512, 64, "bfloat16", block=True),
    "block of maps, fp32": Case(1, 4096, 1, 512, 64, 512, 64, "float32", True, block=True, capabilities=ALL),
    "block channels_last, tf32": Case(1, 4225, 1, 512, 64, 512, 64, "float32", block=True, tf32=True),
    "folded heads, masked, bf16": Case(8, 577, 1, 256, 1024, 256, 64, "bfloat16", masked=True, capabilities=ALL),
    "folded heads, masked, fp32": Case(8, 577, 1, 256, 1024, 256, 64, "float32", masked=True),
    "T2T, fp16": Case(8, 3136, 1, 64, 128, 64, 128, "float16"),
    "own heads, groups of 8, bf16": Case(2, 4096, 8, 64, 64, 64, 8, "bfloat16"),
    "groups of 12, fp32": Case(8, 3136, 1, 64, 48, 64, 12, "float32"),
    "a group in pieces, bf16": Case(2, 4096, 1, 256, 1000, 256, 1000, "bfloat16", masked=True),
    "block, fp64": Case(2, 4096, 1, 64, 64, 64, 64, "float64", block=True),
    "a sample of 2^31 elements": Case(1, 1 << 23, 1, 256, 64, 256, 64, "bfloat16", True, block=True),
}

#: Of those, in every run: two GPUs and both layouts, with products of 16-bit numbers and exact ones.
FEW = {
    name: CASES[name]._replace(capabilities=(capability,))
    for name, capability in {
        "block of maps, fp32": 90,
        "folded heads, masked, bf16": 100,
    }.items()
}
TABLES = {"few": FEW, "all": CASES}

PRODUCTS = {"logits_kernel", "features_kernel", "token_sum_kernel", "attention_gradient_kernel", "moments_kernel"}
OF_BLOCK = {"attention_sums_kernel", "moments_kernel", "signed_kernel"}
IN_PIECES = {"normalizer_kernel", "backward_reduce_kernel"}
ELEMENTARY = {"column_statistics_kernel", "double_norm_kernel", "backward_reduce_kernel", "backward_kernel"}


def kernels(case: Case) -> set[str]:
    found = (PRODUCTS - OF_BLOCK) | {"join_statistics_kernel"} | (OF_BLOCK if case.block else ELEMENTARY)
    return found | (IN_PIECES if case.group > 128 else set())


class Compiled(NamedTuple):
    """Cases, and a row for each of their kernels and GPUs."""

    cases: dict[str, Case]
    rows: list[dict]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.sweep)])
def compiled(request) -> Compiled:
    """From processes in which Triton compiles instead of interpreting."""
    cases = TABLES[request.param]
    processes, names = os.cpu_count() or 1, list(cases)

    def compile_cases(first: int) -> list[dict]:
        command = [sys.executable, __file__, request.param, *names[first::processes]]
        done = subprocess.run(command, env=environment_without_interpreter(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(processes) as pool:
        found = pool.map(compile_cases, range(min(processes, len(names))))
        return Compiled(cases, [row for rows in found for row in rows])


def test_no_spills(compiled):
    for name, case in compiled.cases.items():
        rows = [row for row in compiled.rows if row["case"] == name]
        assert {row["kernel"] for row in rows} == kernels(case), name
        assert {row["capability"] for row in rows} == set(case.capabilities), name
    assert [row for row in compiled.rows if row["spills"] or row["local"]] == []
    # The least of the three, sm_80, has 163 KiB for a program.
    assert [row for row in compiled.rows if row["shared"] > 160 * 1024] == []


def test_tensor_cores(compiled):
    for row in compiled.rows:
        case = compiled.cases[row["case"]]
        if row["kernel"] in PRODUCTS and not row["only_sums"]:
            assert (row["tensor_cores"] > 0) != (case.dtype == "float32" and not case.tf32), row


def test_wide_accesses(compiled):
    for row in compiled.rows:
        assert row["wide_loads"] >= row["loads_of_x"], row
        assert row["wide_stores"] >= row["stores_of_x"], row


def call_passes(passes, case: Case) -> None:
    """Every pass that a training step of a case calls, on tensors without data."""
    dtype = getattr(torch, case.dtype)
    acc = accumulate_dtype(dtype)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(features, by_feature):
        return empty(case.b, features, case.n).mT if by_feature else empty(case.b, case.n, features)

    m = case.heads * case.width
    x, grad = tokens(case.heads * case.k, case.by_feature), tokens(case.heads * case.v, case.by_feature)
    key, value = empty(case.heads, case.width, case.k), empty(case.heads, case.v, case.width)
    bias, lse = empty(case.heads * case.v, dtype=acc), empty(case.b, m, dtype=acc)
    padding = dropout = batch_term = origin = residual = None
    if case.masked:
        padding = empty(case.b, case.n, dtype=torch.bool)
        dropout = Dropout(empty(case.b, case.n, m, dtype=torch.uint8), 1.25)
    if case.block:
        residual, origin = x, empty(m, dtype=acc)
        batch_term = BatchTerm(origin, empty(m, m, dtype=acc), empty(m, dtype=acc))
    norm = DoubleNorm(case.group, 1e-9, padding)
    logits, *_ = passes.logits(x, key, padding=padding)
    attention = passes.normalize(logits, lse, norm=norm)
    _, signs = passes.values(attention, value, norm=norm, bias=bias, dropout=dropout, residual=residual)
    if case.block:
        passes.moments(attention, norm=norm)
        passes.signed(grad, signs)
    given = {"norm": norm, "dropout": dropout}
    passes.value_gradient(grad, attention, shape=value.shape, origin=origin, needs_sums=True, **given)
    grad_a, reduced = passes.attention_gradient(grad, attention, value=value, batch_term=batch_term, **given)
    given = {"norm": norm, "residual_grad": residual, "needs_x": True}
    passes.logits_gradient(grad_a, attention, reduced=reduced, x=x, key=key, **given)
    if case.block:
        return
    passes.column_statistics(logits, padding)
    mass = passes.double_norm_(logits, lse, *norm)
    passes.double_norm_backward_reduce(logits, logits, case.group)
    passes.double_norm_backward_(logits, logits, mass, lse, case.group)


def accesses_of_x(launch) -> tuple[int, int]:
    """The 16-byte loads and stores that a thread needs for the x-sized streams of a launch."""
    kernel, constants, size = launch.kernel.fn.__name__, launch.constants, launch.arguments[0].element_size()
    by_name = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))

    def accesses(length):
        return constants["BT"] * constants[length] * size // (16 * 32 * constants["num_warps"])

    if kernel in ("logits_kernel", "attention_gradient_kernel"):
        return accesses("STEP"), 0
    if kernel == "token_sum_kernel":
        return accesses("BF"), 0
    if kernel == "features_kernel":
        return accesses("BF") if by_name["residual_ptr"] is not None else 0, accesses("BF")
    if kernel == "signed_kernel":
        return accesses("BF"), accesses("BF")
    return 0, 0


def row(name: str, launch, capability: int, code) -> dict:
    """What is held of one kernel of a case."""
    kernel = launch.kernel.fn.__name__
    loads, stores = accesses_of_x(launch)
    by_name = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    numbers = {name: value for name, value in dataclasses.asdict(code).items() if name != "instructions"}
    return {
        "case": name,
        "kernel": kernel,
        "capability": capability,
        "spills": code.count("LDL", "STL"),
        # The moments of A are taken about its mean, which a first launch finds.
        "only_sums": kernel == "moments_kernel" and by_name["origin_ptr"] is None,
        "tensor_cores": code.count("HMMA", "HGMMA", "UTCHMMA", "DMMA"),
        "loads_of_x": loads,
        "stores_of_x": stores,
        "wide_loads": code.count("LDG", "LDGSTS", wide=True),
        "wide_stores": code.count("STG", wide=True),
        **numbers,
    }


def main(table: str, *names: str) -> None:
    """Print a row of JSON for each kernel of the named cases of a table: runs in its own process."""
    from aia_kernels import triton as passes
    from aia_kernels.triton import tiles
    from benchmarks.offline import triton_compile

    for name in names:
        case = TABLES[table][name]
        torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
        with triton_compile.recorded(tiles) as launches:
            call_passes(passes, case)
        for capability in case.capabilities:
            for launch in launches:
                code = triton_compile.machine_code(launch, capability)
                print(json.dumps(row(name, launch, capability, code)))


if __name__ == "__main__":
    main(*sys.argv[1:])
