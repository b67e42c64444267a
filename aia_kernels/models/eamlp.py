"""EAMLP: image classification by external attention alone (arXiv 2105.02358), as published.

Tokens come from two T2T stages (Tokens-to-Token ViT, arXiv 2101.11986), whose attention is external too; a class token
and a fixed sinusoid of positions follow, then blocks of multi-head external attention and an MLP. Names, shapes and
values of the state dict are those of the published T2t_vit_7, T2t_vit_14 and T2t_vit_19, so checkpoints pass freely.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import MultiHeadExternalAttention, TokenExternalAttention

#: The kernel, stride and padding of the three soft splits: each turns the patches around a position into one token.
SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
#: What becomes of the final tokens: the class token alone, or the mean or the maximum of all.
POOLS = {
    "token": lambda tokens: tokens[:, 0],
    "avg": lambda tokens: tokens.mean(1),
    "max": lambda tokens: tokens.amax(1),
}
#: How many pixels a final token is wide and high.
PATCH = math.prod(stride for _kernel, stride, _padding in SOFT_SPLITS)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), with dropout after both. x: [..., features]; the result is shaped as x."""

    def __init__(self, features: int, hidden_features: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden_features)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Leaves out the whole branch of a sample with probability p in training, and scales the others to make up for it.

    x: [B, ...]; the result is shaped as x. Stochastic depth, arXiv 1603.09382.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p: got {p}, expected a probability from 0 to below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        stays = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.p)
        return x * (stays / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class TokenStage(nn.Module):
    """One T2T stage: x + mlp(norm2(x)) of x = attn(norm1(tokens)). tokens: [B, N, dim]; y: [B, N, in_dim]."""

    def __init__(self, dim: int, in_dim: int, attn_drop: float = 0.1, proj_drop: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenExternalAttention(dim, in_dim, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, in_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attn(self.norm1(tokens))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """The T2T stem: three soft splits with a stage of external attention after the first two, then a projection.

    images: [B, in_chans, H, W], H and W multiples of 16; tokens: [B, H / 16 * W / 16, embed_dim].
    """

    def __init__(self, in_chans: int = 3, embed_dim: int = 256, token_dim: int = 64):
        super().__init__()
        self.soft_split0, self.soft_split1, self.soft_split2 = (
            nn.Unfold(kernel, stride=stride, padding=padding) for kernel, stride, padding in SOFT_SPLITS
        )
        patches = [kernel * kernel for kernel, _stride, _padding in SOFT_SPLITS]
        self.attention1 = TokenStage(in_chans * patches[0], token_dim)
        self.attention2 = TokenStage(token_dim * patches[1], token_dim)
        self.project = nn.Linear(token_dim * patches[2], embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2] // SOFT_SPLITS[0][1], images.shape[3] // SOFT_SPLITS[0][1]
        tokens = self.attention1(self.soft_split0(images).mT)
        tokens = self.soft_split1(tokens.mT.unflatten(2, (height, width))).mT
        tokens = self.attention2(tokens)
        height, width = height // SOFT_SPLITS[1][1], width // SOFT_SPLITS[1][1]
        return self.project(self.soft_split2(tokens.mT.unflatten(2, (height, width))).mT)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). x: [B, N, dim]; the result is shaped as x."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MultiHeadExternalAttention(dim, num_heads, attn_drop=attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sinusoid(positions: int, features: int) -> Tensor:
    """The table [1, positions, features] of sines (even features) and cosines (odd) of arXiv 1706.03762, in float32.

    Angles are computed in float64 and the table rounded once, as in the published networks: their pos_embed is this.
    """
    feature = torch.arange(features)
    wavelengths = 10000.0 ** (2 * (feature // 2).double() / features)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / wavelengths
    return torch.where(feature % 2 == 0, angles.sin(), angles.cos()).float().unsqueeze(0)


class EAMLP(nn.Module):
    """The published T2T_ViT with external attention (arXiv 2105.02358): images to logits.

    It takes images [B, in_chans, H, W] and returns logits [B, num_classes]. Where num_classes is 0 it returns what the
    classifier would see, [B, embed_dim].

    External attention tells a token of the others only by what each slot sums up over the tokens. So the class token
    learns late; on small data the mean of all tokens learns at once (global_pool).

    pos_embed is a parameter that is not trained: the table of ``sinusoid``. Its length depends on img_size; nothing
    else in the state dict does.

    Args:
        img_size: (H, W) in pixels, an integer or a pair of multiples of 16.
        in_chans: The channels of the images.
        num_classes: 0: no classifier.
        embed_dim: The features of a token in the blocks.
        depth: The number of blocks.
        num_heads: A quarter of the heads of each block, as published.
        mlp_ratio: The hidden features of each MLP, as a multiple of embed_dim.
        drop_rate: The probability of dropout on tokens, in MLPs and after attention.
        attn_drop_rate: The probability of dropout on the attention maps of the blocks.
        drop_path_rate: The probability that a sample leaves out the branches of the last block; it grows linearly from
            0 in the first.
        token_dim: The features of a token in the T2T stages.
        global_pool: What the classifier sees: the class token as published ("token"), or the mean ("avg") or the
            maximum ("max") of all tokens.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        token_dim: int = 64,
        global_pool: str = "token",
    ):
        super().__init__()
        if global_pool not in POOLS:
            raise ValueError(f"global_pool: got {global_pool!r}, expected one of {', '.join(map(repr, POOLS))}")
        self.global_pool = global_pool
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(self.img_size) != 2 or any(side < PATCH or side % PATCH for side in self.img_size):
            raise ValueError(f"img_size: got {img_size}, expected a multiple of {PATCH}, or a pair of such")
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.tokens_to_token = TokensToToken(in_chans, embed_dim, token_dim)
        tokens = math.prod(side // PATCH for side in self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sinusoid(tokens + 1, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = self._new_head()
        self._initialize()

    def _new_head(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def _initialize(self) -> None:
        """Normal weights with a deviation of 0.02, truncated, biases 0, and memories of the T2T stages equal."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, TokenExternalAttention):
                module.tie()

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that an optimizer should not decay.

        Returns:
            Their names, as timm asks for them.
        """
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        """Get the classifier.

        Returns:
            The linear layer ``head``, or an Identity where num_classes is 0.
        """
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in place of the old, of the type and on the device of the network.

        Args:
            num_classes: 0: no classifier.
        """
        self.num_classes = num_classes
        self.head = self._new_head().to(self.cls_token)

    def forward_features(self, images: Tensor) -> Tensor:
        """Run all but the classifier.

        Args:
            images: [B, in_chans, H, W] with (H, W) = img_size.

        Returns:
            What the classifier sees, [B, embed_dim].

        Raises:
            ValueError: The images have another size.
        """
        if images.ndim != 4 or tuple(images.shape[2:]) != self.img_size:
            height, width = self.img_size
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected [B, channels, {height}, {width}]")
        tokens = self.tokens_to_token(images)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), tokens), dim=1)
        tokens = self.pos_drop(tokens + self.pos_embed)
        for block in self.blocks:
            tokens = block(tokens)
        return POOLS[self.global_pool](self.norm(tokens))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))


def eamlp_7(**settings: Any) -> EAMLP:
    """EAMLP of 7 blocks, 256 features, 4 heads (T2t_vit_7), 5.9 million parameters.

    Args:
        **settings: Arguments of EAMLP, which take the place of these.

    Returns:
        The network, with new weights.
    """
    return EAMLP(**{"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0, **settings})


def eamlp_14(**settings: Any) -> EAMLP:
    """EAMLP of 14 blocks, 384 features, 6 heads (T2t_vit_14), 29.9 million parameters.

    Args:
        **settings: Arguments of EAMLP, which take the place of these.

    Returns:
        The network, with new weights.
    """
    return EAMLP(**{"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0, **settings})


def eamlp_19(**settings: Any) -> EAMLP:
    """EAMLP of 19 blocks, 448 features, 7 heads (T2t_vit_19), 54.6 million parameters.

    Args:
        **settings: Arguments of EAMLP, which take the place of these.

    Returns:
        The network, with new weights.
    """
    return EAMLP(**{"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0, **settings})
