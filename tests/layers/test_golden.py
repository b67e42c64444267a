"""Both families against vectors stored from the published code: values, gradients, running statistics in float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import aia_kernels

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("aia_*.npz"))
EXTERNAL = sorted((Path(__file__).parents[1] / "golden").glob("ea_*.npz"))
# The stored numbers and ours are the same sums in another order: 1e-9 leaves five digits for that in float64.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def external_module(path: Path, arrays: dict[str, torch.Tensor]) -> torch.nn.Module:
    form, width = path.stem.split("_")[1], arrays["x"].shape
    if form == "eanet":
        return aia_kernels.ExternalAttention2d(width[1])
    if form == "eamlp":
        return aia_kernels.MultiHeadExternalAttention(width[2], num_heads=int(re.search(r"heads(\d+)", path.stem)[1]))
    return aia_kernels.ExternalAttention(width[2], S=arrays["state.mk.weight"].shape[0])


def load(path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    arrays = {name: torch.from_numpy(np.array(value)) for name, value in np.load(path).items()}
    if path in EXTERNAL:
        module = external_module(path, arrays).double()
    else:
        unit, segments = re.match(r"aia_([A-Za-z0-9]+)_T(\d+)_", path.name).groups()
        module = getattr(aia_kernels, unit)(int(segments), use_BN="nobn" not in path.stem).double()
    module.train("_train" in path.stem)
    module.load_state_dict({name[6:]: a for name, a in arrays.items() if name.startswith("state.")}, strict=True)
    return module, arrays


def test_all_units_are_stored():
    assert len(GOLDEN) == 30
    assert {path.name.split("_")[1] for path in GOLDEN} == {"C", "ST", "CinST", "STinC", "STinC2"}
    assert [path.name.split("_")[1] for path in EXTERNAL] == ["eamlp", "eanet", "eanet", "fightingcv"]


def assert_as_stored(module, arrays: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One step on x; returns y."""
    x.requires_grad_()
    y = module(x)
    y.backward(arrays["grad_y"].to(x.device))
    found = {"y": y.detach(), "grad_x": x.grad}
    found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
    found |= {f"after.{name}": b for name, b in module.named_buffers() if f"after.{name}" in arrays}
    assert set(found) == {name for name in arrays if not name.startswith("state.") and name not in ("x", "grad_y")}
    for name, value in found.items():
        torch.testing.assert_close(value.cpu(), arrays[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    return y


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, channels_last, backend_on):
    module, arrays = load(path)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = arrays["x"].to(backend_on[1], memory_format=layout)
    assert assert_as_stored(module.to(x.device), arrays, x).stride() == x.stride()


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("path", EXTERNAL, ids=lambda path: path.stem)
def test_golden_external_attention(path, transposed, external_on):
    """transposed: maps in channels_last, tokens made of maps."""
    module, arrays = load(path)
    x = arrays["x"].to(external_on[1])
    if transposed:
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT
    y = assert_as_stored(module.to(x.device), arrays, x)
    assert x.ndim == 3 or y.stride() == x.stride()
