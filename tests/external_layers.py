"""External attention's layers with inputs, for the tests of their forms, submodules, parameters and promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from aia_kernels import ExternalAttention, ExternalAttention2d, MultiHeadExternalAttention, testing

LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layer(NamedTuple):
    """A layer and the sizes of an input for it."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]


#: Odd, prime and degenerate sizes: one token, one slot, one head, one channel; more slots than tokens and fewer.
LAYERS = {
    "plain": Layer(lambda: ExternalAttention(7, S=5), (2, 11, 7)),
    "plain, one token": Layer(lambda: ExternalAttention(4, S=3), (3, 1, 4)),
    "plain, one slot": Layer(lambda: ExternalAttention(4, S=1), (2, 9, 4)),
    "plain, one feature": Layer(lambda: ExternalAttention(1, S=6), (2, 9, 1)),
    "block": Layer(lambda: ExternalAttention2d(6, k=5), (2, 6, 5, 3)),
    "block, many slots": Layer(lambda: ExternalAttention2d(3), (1, 3, 7, 5)),
    "block, one slot": Layer(lambda: ExternalAttention2d(6, k=1), (2, 6, 3, 3)),
    "block, one channel": Layer(lambda: ExternalAttention2d(1, k=4), (2, 1, 5, 3)),
    "block, one pixel": Layer(lambda: ExternalAttention2d(5, k=3), (4, 5, 1, 1)),
    "block, one row": Layer(lambda: ExternalAttention2d(5, k=3), (2, 5, 1, 9)),
    "block, points": Layer(lambda: ExternalAttention2d(6, k=5), (2, 6, 11)),
    "block, volumes, SiLU": Layer(lambda: ExternalAttention2d(6, k=5, activation="silu"), (2, 6, 3, 2, 3)),
    "block, GroupNorm, GELU": Layer(
        lambda: ExternalAttention2d(6, k=5, norm=partial(nn.GroupNorm, 2), activation="gelu"), (2, 6, 5, 3)
    ),
    "block, bare": Layer(
        lambda: ExternalAttention2d(6, k=5, norm=None, activation=None, residual=False, projection=False), (2, 6, 5, 3)
    ),
    "block, no residual": Layer(
        lambda: ExternalAttention2d(6, k=5, norm=nn.SyncBatchNorm, residual=False, projection=False), (2, 6, 5, 3)
    ),
    "multi-head": Layer(lambda: MultiHeadExternalAttention(6, num_heads=2), (2, 13, 6)),
    "multi-head, folded": Layer(lambda: MultiHeadExternalAttention(3, num_heads=1), (2, 33, 3)),
}
MAIN = ("plain", "block", "multi-head")
#: With one slot, or one token, the attention map is constant but for eps. Gradients through it cancel to nothing, and
#: BN in training multiplies their rounding by 316, one over the root of its eps: that says nothing about a backend.
CONSTANT = ("block, one slot", "block, one pixel")
#: Biases that the softmax over tokens does not see.
UNSEEN = ("conv1.bias", "trans_dims.bias", "linear_0.bias")


def layer(name: str, dtype=torch.float64, device="cpu") -> nn.Module:
    torch.manual_seed(0)
    return testing.randomise(LAYERS[name].make()).to(device, dtype)


def inputs(name: str, dtype=torch.float64, device="cpu", batch: int | None = None, seed: int = 0):
    """x and a gradient for y."""
    sizes = LAYERS[name].sizes
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch or sizes[0], *sizes[1:], generator=generator, dtype=torch.float64)
    return tuple(a.clone() for a in pair.to(dtype).to(device))


def see_calls(module: nn.Module) -> nn.Module:
    """The module in its published form: a hook on its first submodule wants to see the call."""
    next(module.children()).register_forward_hook(lambda *_: None)
    return module


def step(module: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, every gradient and the buffers after a forward and backward, of the module itself."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad_y)
    found = {"y": y.detach(), "grad x": x.grad} | {f"grad {key}": p.grad for key, p in module.named_parameters()}
    return found | {key: b.clone() for key, b in module.named_buffers() if b.is_floating_point()}
