"""External attention's functional forms as modules with parameters, for the tests that hold every form to a promise."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aia_kernels import functional, testing
from aia_kernels.modules.submodules import norm_of


class Sizes(NamedTuple):
    """B samples of N tokens (the block: H x W of them) with d features, S slots, and v features of o per head."""

    b: int
    h: int
    w: int
    d: int
    s: int
    v: int = 5

    @property
    def n(self) -> int:
        return self.h * self.w


class Normalize(nn.Module):
    """double_normalize of logits [B, N, S], in groups of slots."""

    def __init__(self, sizes: Sizes, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, logits: Tensor) -> Tensor:
        return functional.double_normalize(logits, **self.settings)


class Attention(nn.Module):
    """external_attention with parameters for everything; dropout draws the same mask in every call."""

    def __init__(self, sizes: Sizes, heads: int = 1, shared: bool = True, **settings):
        super().__init__()
        lead = () if shared else (heads,)
        self.memory_key = nn.Parameter(torch.empty(*lead, sizes.s, sizes.d // heads))
        self.memory_value = nn.Parameter(torch.empty(*lead, sizes.v, sizes.s))
        self.value_bias = nn.Parameter(torch.empty(*lead, sizes.v))
        self.settings = settings | {"heads": heads}

    def forward(self, x: Tensor) -> Tensor:
        if self.settings.get("dropout"):
            torch.manual_seed(0)
        parameters = self.memory_key, self.memory_value
        return functional.external_attention(x, *parameters, value_bias=self.value_bias, **self.settings)


class Block(nn.Module):
    """external_attention_block with its two matrices and a batch norm."""

    def __init__(self, sizes: Sizes, eps: float = 1e-9):
        super().__init__()
        self.key = nn.Parameter(torch.empty(sizes.s, sizes.d))
        self.value = nn.Parameter(torch.empty(sizes.d, sizes.s))
        self.bn = nn.BatchNorm2d(sizes.d)
        self.eps, self.activation = eps, "relu"

    def forward(self, x: Tensor) -> Tensor:
        settings = {"eps": self.eps, "activation": self.activation}
        return functional.external_attention_block(x, self.key, self.value, norm_of(self.bn), **settings)


#: Every form: its module and settings. d and S are even in all sizes.
FORMS = {
    "normalize": (Normalize, {}),
    "normalize in groups": (Normalize, {"eps": 1e-6, "group": 2}),
    "plain": (Attention, {}),
    "eps": (Attention, {"eps": 1e-9}),
    "groups": (Attention, {"eps": 1e-6, "group": 2}),
    "shared heads": (Attention, {"heads": 2, "eps": 1e-9}),
    "own heads": (Attention, {"heads": 2, "shared": False, "group": 2}),
    "dropout": (Attention, {"dropout": 0.4, "heads": 2}),
    "block": (Block, {}),
}

#: Named sizes: odd, prime and degenerate beside small cuts of a real network's.
SIZES = {
    "small": Sizes(2, 3, 4, 6, 4),
    "prime": Sizes(3, 1, 13, 14, 22),
    "one sample": Sizes(1, 7, 7, 32, 64, 32),
    "one token": Sizes(3, 1, 1, 6, 4),
    "two features": Sizes(2, 5, 3, 2, 8),
    "wide": Sizes(2, 2, 3, 96, 10, 96),
    "long": Sizes(1, 20, 31, 8, 6),
}


def make(form: str, sizes: Sizes, dtype=torch.float64, device="cpu") -> nn.Module:
    kind, settings = FORMS[form]
    return testing.randomise(kind(sizes, **settings)).to(device, dtype)


def make_input(form: str, sizes: Sizes, dtype=torch.float64, seed=0, device="cpu", transposed=False) -> Tensor:
    """x of a form. transposed: tokens made of maps; for the block, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    width = sizes.s if form.startswith("normalize") else sizes.d
    tokens = torch.randn(sizes.b, sizes.n, width, generator=generator, dtype=torch.float64).to(device, dtype)
    maps = tokens.mT.unflatten(2, (sizes.h, sizes.w))
    if form == "block":
        return maps.contiguous(memory_format=torch.channels_last if transposed else torch.contiguous_format)
    return maps.contiguous().flatten(2).mT if transposed else tokens


def make_grad(form: str, sizes: Sizes, dtype=torch.float64, device="cpu") -> Tensor:
    """A gradient of the output of a form."""
    if not isinstance(make(form, sizes), Attention):
        return make_input(form, sizes, dtype, 1, device)
    heads = FORMS[form][1].get("heads", 1)
    shape = sizes.b, sizes.n, heads * sizes.v
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)


def functional_call(form: str, train=True, device="cpu", masked=False):
    """A form as a function of x and its parameters, with random float64 inputs for it."""
    sizes = Sizes(2, 2, 2, 4, 4, 2)
    module = make(form, sizes, device=device).train(train)
    if masked:
        module.settings["padding_mask"] = padding(sizes, device)
    parameters = dict(module.named_parameters())
    inputs = [p.detach().requires_grad_() for p in (make_input(form, sizes, device=device), *parameters.values())]

    def call(x, *tensors):
        state = dict(module.named_buffers()) | dict(zip(parameters, tensors, strict=True))
        return torch.func.functional_call(module, state, (x,))

    return call, inputs


def padding(sizes: Sizes, device="cpu") -> torch.Tensor:
    """The last tokens of the first sample, none of the others."""
    mask = torch.zeros(sizes.b, sizes.n, dtype=torch.bool, device=device)
    mask[0, -(sizes.n // 2) :] = True
    return mask


def published(logits, group, eps):
    """The double normalization as published code writes it."""
    p = F.softmax(logits, -2).unflatten(-1, (-1, group))
    return (p / (eps + p.sum(-1, keepdim=True))).flatten(-2)
