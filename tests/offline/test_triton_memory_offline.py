"""Triton's kernels of attention by a memory per sample compiled for sm_90 without a GPU: no spills, divisions and roots
rounded to the nearest, and 16 bytes at a time where the tokens of a row are as many."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import some_of

from benchmarks.offline import environment_without_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

#: Samples, heads, features of a head, tokens, and the type.
CASES = {
    "fp32": (8, 1, 64, 4096, torch.float32),
    "bf16": (1, 1, 8, 4096, torch.bfloat16),
    "fp64": (2, 8, 32, 1024, torch.float64),
    "fp16, ragged": (1, 1, 200, 3001, torch.float16),
}
KERNELS = {
    "l2": ["keys_kernel", "join_kernel", "queries_kernel", "queries_backward_kernel", "join_kernel"],
    "softmax": [
        *("statistics_kernel", "softmax_kernel", "queries_kernel", "queries_backward_kernel", "join_kernel"),
        *("reduced_kernel", "softmax_backward_kernel"),
    ],
}
KERNELS["l2"] += ["keys_backward_kernel"]
KERNELS["softplus"] = KERNELS["l2"]


@some_of("case", CASES, "fp32")
def test_machine_code(case):
    command = [sys.executable, __file__, case]
    done = subprocess.run(command, env=environment_without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for name, kernels in KERNELS.items():
        assert [row["kernel"] for row in rows if row["feature"] == name] == kernels
    for row in rows:
        assert row["spills"] == 0 and row["local"] == 0, row
        assert case == "fp64" or row["approximate"] == 0, row
        assert case == "fp16, ragged" or row["wide"] > 0 or row["kernel"] == "join_kernel", row


def main(case: str) -> None:
    """The rows that test_machine_code reads."""
    from aia_kernels import triton as passes
    from aia_kernels.common.dtypes import accumulate_dtype
    from aia_kernels.reference.linear_attention import FEATURES
    from aia_kernels.triton import tiles
    from benchmarks.offline import triton_compile

    b, heads, d, n, dtype = CASES[case]
    for feature, name in enumerate(FEATURES):
        rows = heads * (d + (name == "l2"))
        logits, reached = (torch.empty(b, count, n, device="meta", dtype=dtype) for count in (2 * heads * d, rows))
        sums = torch.empty(b, rows, device="meta", dtype=accumulate_dtype(dtype))
        gamma, of = torch.empty(1, device="meta", dtype=dtype), (feature, heads, None)
        with triton_compile.recorded(tiles) as launches:
            made, _ = passes.memory_keys(logits, *of, None, True)
            passes.memory_queries(logits, *of, sums, gamma, 1e-6)
            passes.memory_queries_backward_(made, logits, *of, sums, gamma, 1e-6, reached)
            passes.memory_keys_backward_(made, logits, *of, reached, sums, None)
        for launch in launches:
            code = triton_compile.machine_code(launch, 90)
            counts = {"wide": code.count("LDG", "STG", wide=True), "spills": code.count("LDL", "STL")}
            told = {"feature": name, "kernel": launch.kernel.fn.__name__}
            numbers = {"local": code.local, "approximate": code.approximate, "registers": code.registers}
            print(json.dumps(told | numbers | counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
