"""Every published layer as convert may meet it, an input for each, and what must not change between two models."""

from __future__ import annotations

import torch
from torch import nn

from aia_kernels import testing
from benchmarks.published import attention_in_attention as units
from benchmarks.published import cbam
from benchmarks.published import external_attention as external
from benchmarks.published import linear_attention as linear

# float64 sums in another order, some with projections multiplied first: values of order one to a hundred.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class TokenPerformer(nn.Module):
    """The published flow of EAMLP's attention in its default T2T stages."""

    names = ("linear_0", "linear_1")

    def __init__(self, dim=7, in_dim=5, k=6, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.q_linear = nn.Linear(dim, in_dim)
        self.add_module(self.names[0], nn.Linear(in_dim, k, bias=False))
        self.add_module(self.names[1], nn.Linear(k, in_dim))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        q = self.q_linear(x)
        attention = self.attn_drop(self.normalize(self.get_submodule(self.names[0])(q).softmax(dim=-2)))
        return q + self.proj_drop(self.proj(self.get_submodule(self.names[1])(attention)))

    def normalize(self, attention):
        return attention / (1e-9 + attention.sum(dim=-1, keepdim=True))


class TokenTransformer(TokenPerformer):
    """The same in the T2t_vit_t networks."""

    names = ("linear_1", "linear_2")


#: Every published layer: how to make it, the sizes of an input, and the fused layer.
LAYERS = {
    **{name: (lambda unit=unit: unit(4), (8, 3, 5, 6), name) for name, unit in units.UNITS.items()},
    "CinST without BN": (lambda: units.CinST(2, use_BN=False), (4, 3, 5, 6), "CinST"),
    "EANet": (lambda: external.ExternalAttention2d(6, 5), (3, 6, 3, 4), "ExternalAttention2d"),
    "EAMLP": (lambda: external.MultiHeadExternalAttention(6, 2), (2, 9, 6), "MultiHeadExternalAttention"),
    "two linear": (lambda: external.ExternalAttention(6, 5), (2, 9, 6), "ExternalAttention"),
    "CBAM": (lambda: cbam.CBAM(6, 2), (2, 6, 3, 4), "CBAM"),
    "CBAM of 3 x 3, other pools": (lambda: cbam.CBAM(6, 2, 3, ["lse", "max", "lp"]), (2, 6, 3, 4), "CBAM"),
    "linear attention": (lambda: linear.PositionLinearAttention(8, 4), (2, 8, 4, 4), "PositionLinearAttention"),
    "MANet": (lambda: linear.KernelAttention(8, 2), (2, 8, 4, 4), "KernelLinearAttention"),
    "linear attention, channels": (linear.ChannelLinearAttention, (2, 6, 4, 4), "ChannelLinearAttention"),
    "efficient attention": (lambda: linear.EfficientAttention(6, 4, 2, 8), (2, 6, 3, 4), "EfficientAttention"),
    "T2T performer": (TokenPerformer, (2, 9, 7), "TokenExternalAttention"),
    "T2T transformer": (TokenTransformer, (2, 9, 7), "TransformerTokenExternalAttention"),
}


def published(name: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return testing.randomise(LAYERS[name][0]()).to(dtype)


def make_input(name: str, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(LAYERS[name][1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same_objects(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = tensors(model)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


def assert_same_step(found: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers of one forward and backward of both."""
    ys = []
    for module in (found, expected):
        module.zero_grad()
        ys.append(module(x))
        ys[-1].sin().sum().backward()
    torch.testing.assert_close(*ys, **EXACT)
    # By the ends of their names: torch.fx has them in the order of their use, and wrappers put more before them.
    for kind in ("named_parameters", "named_buffers"):
        here, there = (
            sorted((name.split(".")[-2:], i, t) for i, (name, t) in enumerate(getattr(module, kind)()))
            for module in (found, expected)
        )
        for (name, _, t), (same, _, other) in zip(here, there, strict=True):
            assert name == same
            if kind == "named_parameters":
                if t.grad is other.grad is None:  # neither uses it
                    continue
                t, other = t.grad, torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(t, other, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
