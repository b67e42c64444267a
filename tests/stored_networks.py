"""What networks are filled and fed with where their logits are stored: see golden/README.md."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("golden")


def stored(file: str) -> dict[str, dict]:
    return json.loads((GOLDEN / file).read_text())


def stored_input(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(7)).standard_normal(shape))


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a floating-point tensor of a state dict is filled with, in float64."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    r = torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape))
    if name.endswith("running_var"):
        return 0.5 + 0.3 * r.abs()
    if name.endswith(("running_mean", "bias")):
        return 0.1 * r
    if len(shape) == 1:
        return 1 + 0.1 * r
    if len(shape) == 5:
        return 0.4 * r
    return r * math.sqrt(2 / math.prod(shape[1:]))


@torch.no_grad()
def fill(network: nn.Module, quiet: str = "") -> nn.Module:
    """Fill a float64 network by the names in its state dict, and put it in evaluation.

    quiet: weights of norms whose names end with it are ten times smaller.
    """
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point() or name == "pos_embed":
            continue
        tensor.copy_(value(name, tuple(tensor.shape)) * (0.1 if quiet and name.endswith(quiet) else 1))
    return network.eval()


def keys_digest(network: nn.Module) -> str:
    """One string for all names and shapes in a state dict, in order."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
