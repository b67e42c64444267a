"""A ResNet whose bottlenecks end with CBAM (arXiv 1807.06521), for images.

Names, shapes, initialization and the order of parameters are those of the published network
(Jongchan/attention-module), so that its checkpoints load. What one would not guess about it: the batch norm of each
spatial gate starts with a weight of 0, and so each such gate with 1 / 2; every bias starts at 0, those of the channel
gates too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional.checks import check_integer
from ..modules import CBAM


class CBAMBottleneck(nn.Module):
    """y = relu(x + cbam(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))); x [B, inplanes, H, W].

    ``downsample`` takes the place of x on the other branch. ``cbam`` has 4 * planes channels.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        reduction_ratio: int = 16,
    ):
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.cbam = CBAM(outplanes, reduction_ratio)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.cbam(self.bn3(self.conv3(out)))
        out += residual
        return self.relu(out)


class CBAMResNet(nn.Module):
    """A ResNet of bottlenecks with CBAM.

    It takes x [B, 3, H, W] and returns logits [B, num_classes]. Any H and W will do: where the published network
    averages over 7x7 positions, this one averages over all.

    Args:
        layers: The number of blocks in each stage; each stage but the first halves H and W.
        num_classes: The number of classes.
        reduction_ratio: That of each channel gate.
        width: The channels of the stem and of the first stage's bottlenecks, 64 in the published networks.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(self, layers: Sequence[int], num_classes: int = 1000, reduction_ratio: int = 16, width: int = 64):
        super().__init__()
        for name, value in {"num_classes": num_classes, "reduction_ratio": reduction_ratio, "width": width}.items():
            if check_integer(name, value) < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least 1")
        if not layers or min(layers) < 1:
            raise ValueError(f"layers: got {layers!r}, expected the number of blocks in each of one stage or more")
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes, self.stages = width, []
        for i, blocks in enumerate(layers):
            planes = width * 2**i
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], _make_stage(inplanes, planes, blocks, 1 if i == 0 else 2, reduction_ratio))
            inplanes = planes * CBAMBottleneck.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, num_classes)
        _initialize(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _make_stage(inplanes: int, planes: int, blocks: int, stride: int, reduction_ratio: int) -> nn.Sequential:
    made, outplanes = [], planes * CBAMBottleneck.expansion
    for i in range(blocks):
        downsample = None
        if i == 0 and (stride != 1 or inplanes != outplanes):
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
            )
        made.append(CBAMBottleneck(inplanes, planes, stride if i == 0 else 1, downsample, reduction_ratio))
        inplanes = outplanes
    return nn.Sequential(*made)


def _initialize(network: CBAMResNet, classifier: nn.Linear) -> None:
    """As published: the classifier first, then all in the order of the state dict."""
    nn.init.kaiming_normal_(classifier.weight)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0 if "SpatialGate" in name else 1)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def cbam_resnet50(num_classes: int = 1000, reduction_ratio: int = 16) -> CBAMResNet:
    """CBAMResNet with the stages of ResNet-50: 3, 4, 6 and 3 blocks.

    Args:
        num_classes: As of CBAMResNet.
        reduction_ratio: As of CBAMResNet.

    Returns:
        The network, with new weights.

    Raises:
        TypeError, ValueError: As CBAMResNet.
    """
    return CBAMResNet((3, 4, 6, 3), num_classes, reduction_ratio)
