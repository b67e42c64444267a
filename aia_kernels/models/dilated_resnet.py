"""ResNets that keep their maps large: the trunk of segmentation (published EANet) and of detection.

Bottlenecks with the stride in the 3x3 convolution. Names of parameters are those of ImageNet's checkpoints:
torchvision's where the stem is one convolution, the published segmentation networks' where it is three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Blocks in each of the four stages, by depth.
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: By how much a trunk shrinks its images: (stride, dilation) of the last two stages.
STRIDES = {8: ((1, 2), (1, 4)), 16: ((2, 1), (1, 2)), 32: ((2, 1), (2, 1))}
#: How the blocks of the last stage multiply its dilation, where it has one.
GRID = (1, 2, 4)
#: Maps of a block are this many times as deep as its 3x3 convolution.
EXPANSION = 4


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 and 1x1 convolutions.

    x: [B, inplanes, H, W]; the result: [B, 4 * planes, H / stride, W / stride]. The shortcut is x itself where shapes
    allow, or else a 1x1 convolution with batch norm (downsample).
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, dilation: int = 1, momentum: float = 0.1):
        super().__init__()
        outplanes = planes * EXPANSION
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, momentum=momentum)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, momentum=momentum)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes, momentum=momentum)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes, momentum=momentum)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class DilatedResNet(nn.Module):
    """ResNet-50, 101 or 152 whose last maps are 8, 16 or 32 times smaller than the images.

    It takes images [B, 3, H, W] and returns the maps of the four stages as a list: [B, 256, H / 4, W / 4], then 512,
    1024 and 2048 channels at H / 8, H / 16 and H / 32. Where stride stops that, strides become dilations. The blocks of
    the last stage then have 1, 2 and 4 times its dilation, as in the published network (arXiv 1706.05587 has the
    scheme).

    The attribute channels holds those of the four maps. load_imagenet fills the network from a local file.

    Args:
        depth: 50, 101 or 152.
        stride: 8, 16 or 32: how many times smaller than the images the last maps are.
        deep_stem: Three 3x3 convolutions (64, 64, 128), as the published segmentation networks and their ImageNet
            checkpoints have; False: one 7x7 (64), as torchvision's.
        momentum: That of the batch norms.
        width: Takes the place of 64, and all channels with it.

    Raises:
        ValueError: depth or stride is not in these lists, or width is below 1.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, depth: int = 50, stride: int = 8, deep_stem: bool = True, momentum: float = 0.1, width: int = 64
    ):
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth: got {depth}, expected one of {', '.join(map(str, STAGES))}")
        if stride not in STRIDES:
            raise ValueError(f"stride: got {stride}, expected one of {', '.join(map(str, STRIDES))}")
        if width < 1:
            raise ValueError(f"width: got {width}, expected at least 1")
        self.depth, self.stride = depth, stride
        self.inplanes = 2 * width if deep_stem else width
        self.conv1 = self._deep_stem(width, momentum) if deep_stem else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes, momentum=momentum)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = ((1, 1), (2, 1), *STRIDES[stride])
        for i, (blocks, (step, dilation)) in enumerate(zip(STAGES[depth], stages, strict=True)):
            grid = GRID if i == len(stages) - 1 and dilation > 1 else (1,) * blocks
            setattr(self, f"layer{i + 1}", self._stage(width << i, step, dilation, grid, momentum))
        self.channels = tuple((width << i) * EXPANSION for i in range(len(stages)))
        self._initialize()

    @staticmethod
    def _deep_stem(width: int, momentum: float) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False),
        )

    def _stage(self, planes: int, stride: int, dilation: int, grid: tuple[int, ...], momentum: float) -> nn.Sequential:
        # The first block still sees the maps of the stage before, whose dilation is half as wide.
        blocks = [Bottleneck(self.inplanes, planes, stride, max(dilation // 2, 1), momentum)]
        self.inplanes = planes * EXPANSION
        blocks += [Bottleneck(self.inplanes, planes, 1, dilation * g, momentum) for g in grid[1:]]
        return nn.Sequential(*blocks)

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                module.weight.normal_(0, math.sqrt(2 / fan_out))

    def stem(self, images: Tensor) -> Tensor:
        """Run what stands before the first stage.

        Args:
            images: [B, 3, H, W].

        Returns:
            The maps [B, channels, H / 4, W / 4] that the first stage takes.
        """
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def stages(self) -> list[nn.Sequential]:
        """List the stages.

        Returns:
            The four stages, in order.
        """
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages():
            maps.append(stage(maps[-1]))
        return maps[1:]
