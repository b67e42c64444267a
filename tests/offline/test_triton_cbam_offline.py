"""CBAM's Triton kernels compiled for sm_90 without a GPU: no spills, and 16 bytes at a time where rows allow it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.offline import environment_without_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

#: Sizes, type, whether channels_last, and whether rows are multiples of 16 bytes.
CASES = [
    ((8, 256, 56, 56), torch.float32, False, True),
    ((8, 1024, 14, 14), torch.bfloat16, True, True),
    ((8, 2048, 7, 7), torch.float32, False, False),
]


def test_machine_code():
    done = subprocess.run(
        [sys.executable, __file__], env=environment_without_interpreter(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 6 * len(CASES)
    for row in rows:
        assert row["spills"] == 0 and row["local"] == 0, row
        assert not row["aligned"] or row["wide"] > 0, row


def main() -> None:
    """The rows that test_machine_code reads."""
    from aia_kernels.common.dtypes import accumulate_dtype
    from aia_kernels.triton import cbam, tiles
    from benchmarks.offline import triton_compile

    for sizes, dtype, channels_last, aligned in CASES:
        b, c, h, w = sizes
        x = torch.empty(sizes, device="meta", dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

        def numbers(*shape: int, of: torch.dtype | None = None, wide=accumulate_dtype(dtype)) -> torch.Tensor:  # noqa: B008
            return torch.empty(shape, device="meta", dtype=of or wide)

        gates = numbers(b, c), numbers(b, 1, h, w)
        of_channels = numbers(b, 2, c), numbers(b, c, of=torch.int32)
        of_positions = numbers(b, 2, h, w), numbers(b, h, w, of=torch.int32)
        with triton_compile.recorded(tiles) as launches:
            cbam.cbam_pool_positions(x)
            cbam.cbam_pool_channels(x, gates[0])
            cbam.cbam_recalibrate(x, *gates, True)
            cbam.cbam_recalibrate_reduce(x, None, x, *gates)
            cbam.cbam_unpool_reduce(x, *of_positions)
            cbam.cbam_unpool(x, None, gates[0], *of_channels, gates[1], *of_positions)
        for launch in launches:
            code = triton_compile.machine_code(launch, 90)
            counts = {"wide": code.count("LDG", "STG", wide=True), "spills": code.count("LDL", "STL")}
            told = {"kernel": launch.kernel.__name__, "sizes": sizes, "aligned": aligned, "local": code.local}
            print(json.dumps(told | counts))


if __name__ == "__main__":
    main()
