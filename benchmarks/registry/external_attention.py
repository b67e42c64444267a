"""The layers of external attention where published networks have them, and a sweep over the number of tokens.

The bytes are the budget of the algorithm in units of |X|, the bytes of x; the attention map is not counted, which is
64 / C of x in EANet's block but four times x in EAMLP's layers, where products dominate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..published import external_attention as published
from ..published.self_attention import SelfAttention
from .case import Place, SizedCase, at_places, main_form


def _eanet(*sizes: int) -> Place:
    return Place("ExternalAttention2d", {"c": sizes[1], "k": 64}, sizes)


def _eamlp(dim: int, heads: int, tokens: int) -> Place:
    return Place("MultiHeadExternalAttention", {"dim": dim, "num_heads": heads}, (8, tokens, dim))


def _plain(batch: int, tokens: int, width: int, slots: int = 64) -> Place:
    return Place("ExternalAttention", {"d_model": width, "S": slots}, (batch, tokens, width))


#: EANet's crop of 513 at stride 8 and larger maps; EAMLP's blocks with 14 x 14 or 24 x 24 patches and the class token;
#: the two stages that make T2T's tokens, 56 x 56 and 28 x 28; point clouds.
PLACES = {
    "EANet 65x65": _eanet(1, 512, 65, 65),
    "EANet 128x128": _eanet(1, 512, 128, 128),
    "EANet 32x32": _eanet(4, 512, 32, 32),
    "EAMLP-7 224": _eamlp(256, 4, 197),
    "EAMLP-7 384": _eamlp(256, 4, 577),
    "EAMLP-14 224": _eamlp(384, 6, 197),
    "EAMLP-14 384": _eamlp(384, 6, 577),
    "EAMLP-19 224": _eamlp(448, 7, 197),
    "EAMLP-19 384": _eamlp(448, 7, 577),
    "plain 4225": _plain(2, 4225, 512),
    "T2T 3136": _plain(8, 3136, 64, 128),
    "T2T 784": _plain(8, 784, 64, 128),
    "points 1024": _plain(8, 1024, 128),
    "points 4096": _plain(8, 4096, 256),
    "points 16384": _plain(1, 16384, 128),
    "points 65536": _plain(1, 65536, 256),
}
SWEEP = (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000)
NAMES = ("ExternalAttention2d", "MultiHeadExternalAttention", "ExternalAttention")

#: Products of scaled dot products that a call may cost before self-attention no longer competes, by device: seconds.
PATIENCE = {"cpu": 1e11, "cuda": 3e12}


@dataclass(frozen=True)
class LayerCase(SizedCase):
    """One layer of external attention."""

    family: ClassVar = "external_attention"
    layers: ClassVar = published.LAYERS

    @property
    def where(self) -> str:
        """The network, and the sizes of x."""
        return f"{self.stage.split()[0]}, {'x'.join(map(str, self.sizes))}"

    def traffic(self, mode: str) -> int:
        """Forward: x, in the block once more as the residual, and o or y. Backward: the gradient of o or y for dA and
        dV together, in the block first for the sums of its batch norm and again for dx; x for dK; and dx."""
        forward, backward = (3, 5) if self.name == "ExternalAttention2d" else (2, 3)
        return forward if mode == "eval" else forward + backward

    def published(self) -> nn.Module:
        """With weights of which every product of a unit vector is about one: logits of a trained layer's size.

        The initialization of the plain form, with weights near zero, would leave the gradient of its keys near zero
        too, and a check of all gradients by the largest would not see them.
        """
        layer = super().published()
        with torch.no_grad():
            for p in layer.parameters():
                if p.ndim > 1:
                    p.normal_(0, p[0].numel() ** -0.5)
        return layer

    @property
    def compiled_on_cpu(self) -> bool:
        return self.stage in PLACES and self.dtype == "fp32" and self.layout == "contiguous"

    def alternatives(self, device: str) -> dict[str, Callable[[], nn.Module]]:
        """Self-attention on the same tokens, where its cost, quadratic in them, lets it finish."""
        batch, tokens, width = self.sizes if len(self.sizes) == 3 else self._as_tokens()
        if 2 * batch * tokens**2 * width > PATIENCE[device]:
            return {}
        heads = dict(self.arguments).get("num_heads", max(1, width // 64))
        return {"sdpa": lambda: SelfAttention(width, heads)}

    def _as_tokens(self) -> tuple[int, int, int]:
        batch, channels, height, width = self.sizes
        return batch, height * width, channels

    @property
    def slots(self) -> tuple[int, int]:
        """Columns of the attention map, of all heads, and how many of them are normalized together."""
        given = dict(self.arguments)
        if "num_heads" in given:
            return 4 * given["num_heads"] * 64, 64
        slots = given["k"] if "k" in given else given["S"]
        return slots, slots

    def gradient(self, x: Tensor) -> Tensor:
        grad_y = super().gradient(x)
        if self.name != "ExternalAttention2d":
            return grad_y
        torch.manual_seed(0)  # the parameters that every provider gets
        return decided(grad_y, self.published().to(x.device), x)


def decided(grad_y: Tensor, block: published.ExternalAttention2d, x: Tensor) -> Tensor:
    """The gradient of a block's y, zero where the sum before the ReLU is within 1e-4 of the largest from zero.

    Where that sum is within rounding of zero, float32 and float64 disagree about its sign and with it about a whole
    element of every gradient: among two million normal numbers about once, in the published flow too.
    """
    with torch.no_grad():
        before = copy.deepcopy(block).double().train().before_relu(x.double()).abs()
    return grad_y.clone().masked_fill_(before < 1e-4 * before.max(), 0.0)  # in place: it stays stored as it is


def cases() -> list[LayerCase]:
    """Every case, the main ones first, and the sweep over tokens."""
    return at_places(LayerCase, PLACES.items()) + sweep()


def sweep() -> list[LayerCase]:
    """The plain form with 64 slots on one cloud of 1,000 to 1,000,000 tokens of 64 features."""
    return [main_form(LayerCase, str(n), _plain(1, n, 64), kind="sweep") for n in SWEEP]


def quick_cases() -> list[LayerCase]:
    """One small case for each layer and one of the sweep: a smoke run."""
    small = {
        "32x9x7": Place("ExternalAttention2d", {"c": 32, "k": 16}, (2, 32, 9, 7)),
        "50x32": Place("MultiHeadExternalAttention", {"dim": 32, "num_heads": 2}, (2, 50, 32)),
        "60x24": _plain(2, 60, 24, 8),
    }
    found = [main_form(LayerCase, stage, place) for stage, place in small.items()]
    return [*found, *sweep()[:1]]


def pass_cases(chosen: list[LayerCase]) -> list[LayerCase]:
    """Those of the cases on which the raw passes are measured."""
    return [case for case in chosen if case.kind == "layer"]
