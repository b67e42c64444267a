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
#: By how much results may differ from what is stored, in units of the largest: the roundings of another machine's order
#: of additions. About a hundred layers add up to 4608 products for a number, half a million roundings of 1.1e-16 along
#: one path: 8e-14 if they add up at random, with a dozen times that to spare. No layer grows it, as each keeps the size
#: of what it adds to; other instructions, libraries and numbers of threads moved it by 7e-15 at most.
BOUND = 1e-12


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
    if name.endswith("bn3.weight"):  # the last norm of a bottleneck: the stream beside it stays of order one
        return 0.1 * (1 + 0.1 * r)
    if len(shape) == 1:
        return 1 + 0.1 * r
    if len(shape) == 5:
        return 0.4 * r
    return r * math.sqrt(2 / math.prod(shape[1:]))


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Fill a float64 network by the names in its state dict, and put it in evaluation."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and name != "pos_embed":
            tensor.copy_(value(name, tuple(tensor.shape)))
    return network.eval()


def error(found: Tensor, expected: list) -> float:
    """The largest difference from what is stored, in units of the largest number stored.

    Below BOUND for a network that is right, on any machine.
    """
    stored = torch.tensor(expected, dtype=torch.float64)
    return ((found.cpu() - stored).abs().max() / stored.abs().max()).item()


def keys_digest(network: nn.Module) -> str:
    """One string for all names and shapes in a state dict, in order."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
