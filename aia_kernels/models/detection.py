"""A trunk for detectors and instance segmentation: ResNet, blocks of external attention, feature pyramid.

The paper (arXiv 2105.02358) adds its block to a ResNet and leaves the detector as it is. Outputs, ``out_channels`` and
the names of parameters are those that torchvision's detectors expect of a backbone:

    FasterRCNN(ExternalAttentionFPN(), num_classes=91)
    MaskRCNN(ExternalAttentionFPN(attention=(3, 4)), num_classes=91)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ExternalAttention2d
from .dilated_resnet import DilatedResNet


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, a top-down path and 3x3 convolutions (arXiv 1612.03144).

    It takes maps, a sequence of [B, channels[i], h_i, w_i] from fine to coarse, and returns a list of as many [B,
    out_channels, h_i, w_i]. At its end stands the coarsest once more at half its resolution, from which the region
    proposals of large objects come.

    Args:
        channels: Those of each map, from fine to coarse.
        out_channels: Those of every result.

    Raises:
        ValueError: In forward, the number of maps is another.
    """

    def __init__(self, channels: Sequence[int], out_channels: int = 256):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in channels
        )
        for block in (*self.inner_blocks, *self.layer_blocks):
            nn.init.kaiming_uniform_(block[0].weight, a=1)
            nn.init.zeros_(block[0].bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if len(maps) != len(self.inner_blocks):
            raise ValueError(f"maps: got {len(maps)} of them, expected {len(self.inner_blocks)}")
        down: Tensor | None = None
        pyramid: list[Tensor] = []
        for lateral, smooth, x in zip(self.inner_blocks[::-1], self.layer_blocks[::-1], maps[::-1], strict=True):
            x = lateral(x)
            down = x if down is None else x + F.interpolate(down, size=x.shape[2:], mode="nearest")
            pyramid.append(smooth(down))
        pyramid.reverse()
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


class ExternalAttentionFPN(nn.Module):
    """ResNet with EANet's block after some of its stages, and a feature pyramid over all four.

    It takes images [B, 3, H, W] and returns an OrderedDict of maps with out_channels each, at a quarter of the images'
    resolution ("0"), an eighth ("1"), a sixteenth ("2") and a thirty-second ("3"), and "pool" at half of that.

    State dict: body.* (the ResNet, without its classifier), attention.<stage>.* (ExternalAttention2d) and fpn.*
    (torchvision's FeaturePyramidNetwork).

    Args:
        trunk: The depth of a torchvision ResNet, 50, 101 or 152, or a DilatedResNet, into which ImageNet weights may
            have been loaded.
        attention: The stages, 1 to 4, that a block follows.
        out_channels: The channels of every map of the result.
        k: The slots of each block.

    Raises:
        ValueError: The depth is unknown, or attention names no stage.
    """

    def __init__(
        self,
        trunk: int | DilatedResNet = 50,
        attention: Sequence[int] = (4,),
        out_channels: int = 256,
        k: int = 64,
    ):
        super().__init__()
        self.body = DilatedResNet(trunk, stride=32, deep_stem=False) if isinstance(trunk, int) else trunk
        channels = self.body.channels
        if not set(attention) <= set(range(1, len(channels) + 1)):
            raise ValueError(f"attention: got {tuple(attention)}, expected stages from 1 to {len(channels)}")
        self.attention = nn.ModuleDict(
            {str(stage): ExternalAttention2d(channels[stage - 1], k) for stage in sorted(set(attention))}
        )
        self.fpn = FeaturePyramid(channels, out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        x = self.body.stem(images)
        maps = []
        for number, stage in enumerate(self.body.stages(), start=1):
            x = stage(x)
            if str(number) in self.attention:
                x = self.attention[str(number)](x)
            maps.append(x)
        *pyramid, pool = self.fpn(maps)
        return OrderedDict([*((str(i), x) for i, x in enumerate(pyramid)), ("pool", pool)])
