"""EANet: semantic segmentation with a block of external attention between trunk and classifier, as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ExternalAttention2d
from .dilated_resnet import DilatedResNet


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x))) with a 3x3 convolution. x: [B, c_in, H, W]; the result: [B, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, momentum: float = 0.1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, momentum=momentum)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class EANet(nn.Module):
    """The published segmentation network: trunk, 3x3 convolution, external attention, 3x3 convolution, classifier.

    It takes img [B, 3, H, W] and returns scores [B, n_classes, H, W]. They are resized bilinearly from the trunk's
    resolution, with corners aligned, to img's or to size (h, w) where that is given. In training with labels lbl [B, H,
    W] (int64) it returns instead the loss of each image [B]: the cross entropy averaged over all pixels, where those
    labelled 255 count as 0.

    A DilatedResNet is laid out as the published extractor, so ImageNet weights loaded into it beforehand stay where
    they are. State dict, as published: extractor.* (the modules of the ResNet by their number), fc0, linu (the block),
    fc1, fc2.

    Args:
        n_classes: The number of classes.
        backbone: The depth of a ResNet, 50, 101 or 152, or a module that returns maps: a tensor [B, channels, h, w], or
            a list or mapping of which the last is taken (what torchvision's and timm's feature extractors return).
        stride: How many times smaller than the images the maps of such a ResNet are: 8, 16 or 32.
        channels: Those of the maps of a backbone; required where it is another module than a DilatedResNet.
        width: The channels in the attention block (512 as published); after it there are half as many.
        k: The slots of the block.
        momentum: That of the batch norms; the published settings hold 0.1 and name 3e-4 as their default.

    Raises:
        ValueError: A size is below 1, the depth or stride is unknown, or channels is missing.
    """

    def __init__(
        self,
        n_classes: int = 21,
        backbone: int | nn.Module = 101,
        *,
        stride: int = 8,
        channels: int | None = None,
        width: int = 512,
        k: int = 64,
        momentum: float = 0.1,
    ):
        super().__init__()
        if n_classes < 1:
            raise ValueError(f"n_classes: got {n_classes}, expected at least 1")
        if isinstance(backbone, int):
            backbone = DilatedResNet(backbone, stride, momentum=momentum)
        if isinstance(backbone, DilatedResNet):
            channels = channels or backbone.channels[-1]
            modules = (backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool, *backbone.stages())
            backbone = nn.Sequential(*modules)
        if channels is None:
            raise ValueError("channels: got None, expected the number of channels of the maps of the given backbone")
        self.extractor = backbone
        self.fc0 = ConvBNReLU(channels, width, momentum)
        self.linu = ExternalAttention2d(width, k)
        self.linu.conv2[1].momentum = momentum
        self.fc1 = nn.Sequential(ConvBNReLU(width, width // 2, momentum), nn.Dropout2d(0.1))
        self.fc2 = nn.Conv2d(width // 2, n_classes, 1)

    def forward(self, img: Tensor, lbl: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        maps = _last(self.extractor(img))
        scores = self.fc2(self.fc1(self.linu(self.fc0(maps))))
        size = tuple(img.shape[2:] if size is None else size)
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
        if lbl is None or not self.training:
            return scores
        return F.cross_entropy(scores, lbl, ignore_index=255, reduction="none").mean((1, 2))


def _last(maps: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    if isinstance(maps, Mapping):
        maps = list(maps.values())
    return maps if isinstance(maps, Tensor) else maps[-1]
