"""The units against vectors stored from the published code: values, gradients and running statistics in float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import aia_kernels

GOLDEN = sorted(Path(__file__).with_name("golden").glob("aia_*.npz"))
# The stored numbers and ours are the same sums in another order: 1e-9 leaves five digits for that in float64.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def load(path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    unit, segments = re.match(r"aia_([A-Za-z0-9]+)_T(\d+)_", path.name).groups()
    arrays = {name: torch.from_numpy(np.array(value)) for name, value in np.load(path).items()}
    module = getattr(aia_kernels, unit)(int(segments), use_BN="nobn" not in path.stem).double()
    module.train("_train" in path.stem)
    module.load_state_dict({name[6:]: a for name, a in arrays.items() if name.startswith("state.")}, strict=True)
    return module, arrays


def test_all_units_are_stored():
    assert len(GOLDEN) == 30
    assert {path.name.split("_")[1] for path in GOLDEN} == {"C", "ST", "CinST", "STinC", "STinC2"}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, channels_last, backend_on):
    _, device = backend_on
    module, arrays = load(path)
    module.to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = arrays["x"].to(device, memory_format=layout).requires_grad_()
    y = module(x)
    y.backward(arrays["grad_y"].to(device))
    found = {"y": y.detach(), "grad_x": x.grad}
    found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    found |= {f"after.{name}": b for name, b in module.named_buffers() if f"after.{name}" in arrays}
    assert set(found) == {name for name in arrays if not name.startswith("state.") and name not in ("x", "grad_y")}
    for name, value in found.items():
        torch.testing.assert_close(value.cpu(), arrays[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    assert y.stride() == x.stride()
