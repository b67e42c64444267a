"""examples/distributed.py in its quick form: two processes train fused and reference, and one draws."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and (dist.is_gloo_available() or torch.cuda.is_available())),
    reason="this torch has no process groups for the devices here",
)


def test_quick(tmp_path):
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason="pip install 'aia_kernels[demo]'")
    picture = tmp_path / "distributed.png"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / "distributed.py", "--quick", "--output", picture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    members = re.search(r"(\d+) process(?:es)? .* apart: (\S+)", done.stdout)
    assert int(members[1]) == (torch.cuda.device_count() or 2)
    assert float(members[2]) == 0
    # Three steps of float32 in two orders of summation.
    assert float(re.search(r"losses apart: at most (\S+)", done.stdout)[1]) < 1e-4
    assert done.stdout.count("picture:") == 1
    assert picture.stat().st_size > 10_000
    assert "100%|" not in done.stderr  # no terminal is there
