"""A head for semantic segmentation with linear attention over positions and over channels, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ChannelLinearAttention, PositionLinearAttention
from .eanet import ConvBNReLU


class LinearAttentionHead(nn.Module):
    """Scores from the maps of a trunk: 3x3 convolution, both linear attentions (arXiv 2007.14902), added, classifier.

    It takes maps [B, channels, h, w] of any trunk and returns scores [B, n_classes, h, w], resized bilinearly, with
    corners aligned, to size (H, W) where that is given. Both attentions start as the identity, as their gamma is 0.
    Time and memory are linear in h w, so the maps may be large.

    Args:
        channels: Those of the maps.
        n_classes: The number of classes.
        width: The channels in the attention.
        scale: Keys and queries of the attention over positions have width // scale features.

    Raises:
        ValueError: A size is below 1, or width below scale.
    """

    def __init__(self, channels: int, n_classes: int, width: int = 128, scale: int = 8):
        super().__init__()
        for name, size in (("channels", channels), ("n_classes", n_classes)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        self.conv = ConvBNReLU(channels, width)
        self.position = PositionLinearAttention(width, scale)
        self.channel = ChannelLinearAttention()
        self.classify = nn.Sequential(ConvBNReLU(width, width), nn.Dropout2d(0.1), nn.Conv2d(width, n_classes, 1))

    def forward(self, maps: Tensor, size: Sequence[int] | None = None) -> Tensor:
        x = self.conv(maps)
        scores = self.classify(self.position(x) + self.channel(x))
        if size is None:
            return scores
        return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=True)
