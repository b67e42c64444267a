"""examples/distributed.py in its quick form: two processes train fused and reference, and one draws."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks.offline import ROOT, environment_without_interpreter

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and (dist.is_gloo_available() or torch.cuda.is_available())),
    reason="this torch has no process groups for the devices here",
)


def test_quick(tmp_path):
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package, reason="pip install 'aia_kernels[demo]'")
    picture = tmp_path / "distributed.png"
    environment = environment_without_interpreter() | {"OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
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
