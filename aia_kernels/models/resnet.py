"""ResNets for video whose bottlenecks hold units of Attention in Attention (arXiv 2204.09303) and temporal shifts.

Names, shapes, initialization and the order of parameters are those of the published networks (nets/ in
haoyanbin918/Attention-in-Attention), so that their checkpoints load, and those of their optimizers too. What one would
not guess about these networks:

* In a stage of 23 blocks or more only the even ones, counted from 0, have a unit, and only the even ones shift. A
  network with a unit and a shift therefore leaves the other blocks without either.
* "plus" is the mean of both units' outputs, and "2" between two names one unit after the other.
* The temporal shift stands on the residual branch, before conv1. The published TSN networks are called C2D.
* Parameters of a unit come before those of ``downsample`` in a TSN network and after them in a TSM network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..functional.checks import check_integer
from ..modules import ST, C, CinST, STinC, TemporalShift

#: Units of each kind of bottleneck, in the order of its attributes: eft, or eft1 and eft2.
UNITS = {
    None: (),
    "C": (C,),
    "ST": (ST,),
    "CinST": (CinST,),
    "STinC": (STinC,),
    "C2ST": (C, ST),
    "ST2C": (ST, C),
    "CplusST": (C, ST),
    "CinST2STinC": (CinST, STinC),
    "STinC2CinST": (STinC, CinST),
    "STinCplusCinST": (STinC, CinST),
}
TEMPORAL = ("tsn", "tsm")

#: Stages of so many blocks have units and shifts in every second block only.
DEEP_STAGE = 23


class Bottleneck(nn.Module):
    """y = relu(x + conv3(relu(unit(conv2(relu(conv1(shift(x))))))), each convolution with its BN; x [B * T, C, H, W].

    unit and temporal as in AIAResNet. The submodules of the unit are ``eft`` or ``eft1`` and ``eft2``; that of the
    shift, ``shift``, has no parameters.
    """

    expansion = 4
    eft1: nn.Module
    eft2: nn.Module

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        num_segments: int = 8,
        unit: str | None = None,
        temporal: str = "tsn",
        fold_div: int = 8,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        units = [kind(num_segments) for kind in UNITS[unit]]
        self.units = ("eft",) if len(units) == 1 else ("eft1", "eft2")[: len(units)]
        self.averaged = unit is not None and "plus" in unit
        self.shift = TemporalShift(num_segments, fold_div) if temporal == "tsm" else None
        if temporal == "tsm":
            self.downsample = downsample
        for name, module in zip(self.units, units, strict=True):
            self.add_module(name, module)
        if temporal != "tsm":
            self.downsample = downsample

    def attend(self, x: Tensor) -> Tensor:
        """The unit or units on x, both outputs averaged or one after the other."""
        if self.averaged:
            return self.eft1(x) * 0.5 + self.eft2(x) * 0.5
        for name in self.units:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = x if self.shift is None else self.shift(x)
        out = self.relu(self.bn1(self.conv1(out)))
        out = self.relu(self.attend(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += residual
        return self.relu(out)


class AIAResNet(nn.Module):
    """A ResNet of bottlenecks on frames.

    It takes x [B * num_segments, 3, H, W] and returns logits [B * num_segments, num_classes]. Any H and W will do:
    where the published network averages over 7x7 positions, this one averages over all.

    Args:
        layers: The number of blocks in each stage; each stage but the first halves H and W.
        num_classes: The number of classes.
        num_segments: T, the frames of a clip.
        unit: None, or a name in UNITS: what stands between bn2 and the ReLU of each block.
        temporal: "tsn": every frame for itself but for the units. "tsm": with a temporal shift before conv1.
        fold_div: The shift moves 1 / fold_div of the channels each way.
        width: The channels of the stem and of the first stage's bottlenecks, 64 in the published networks.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        num_segments: int = 8,
        unit: str | None = None,
        temporal: str = "tsn",
        fold_div: int = 8,
        width: int = 64,
    ):
        super().__init__()
        _check("unit", unit, UNITS)
        _check("temporal", temporal, TEMPORAL)
        sizes = {"num_segments": num_segments, "num_classes": num_classes, "fold_div": fold_div, "width": width}
        for name, value in sizes.items():
            if check_integer(name, value) < 1:
                raise ValueError(f"{name}: got {value!r}, expected a whole number, at least 1")
        if not layers or min(layers) < 1:
            raise ValueError(f"layers: got {layers!r}, expected the number of blocks in each of one stage or more")
        self.num_segments, self.unit, self.temporal = num_segments, unit, temporal
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes, self.stages = width, []
        for i, blocks in enumerate(layers):
            planes = width * 2**i
            stage = _make_stage(inplanes, planes, blocks, 1 if i == 0 else 2, num_segments, unit, temporal, fold_div)
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], stage)
            inplanes = planes * Bottleneck.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(inplanes, num_classes)
        for module in self.modules():  # the units have Conv3d and BatchNorm3d, and an initialization of their own
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _make_stage(
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int,
    num_segments: int,
    unit: str | None,
    temporal: str,
    fold_div: int,
) -> nn.Sequential:
    made, outplanes = [], planes * Bottleneck.expansion
    for i in range(blocks):
        downsample = None
        if i == 0 and (stride != 1 or inplanes != outplanes):
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
            )
        kind = (unit, temporal) if blocks < DEEP_STAGE or i % 2 == 0 else (None, "tsn")
        made.append(Bottleneck(inplanes, planes, stride if i == 0 else 1, downsample, num_segments, *kind, fold_div))
        inplanes = outplanes
    return nn.Sequential(*made)


def _check(argument: str, value: object, known: Iterable[object]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, known))}")


def aia_resnet50(
    num_classes: int = 1000, num_segments: int = 8, unit: str | None = None, temporal: str = "tsn", fold_div: int = 8
) -> AIAResNet:
    """AIAResNet with the stages of ResNet-50: 3, 4, 6 and 3 blocks.

    Args:
        num_classes: As of AIAResNet.
        num_segments: As of AIAResNet.
        unit: As of AIAResNet.
        temporal: As of AIAResNet.
        fold_div: As of AIAResNet.

    Returns:
        The network, with new weights.

    Raises:
        TypeError, ValueError: As AIAResNet.
    """
    return AIAResNet((3, 4, 6, 3), num_classes, num_segments, unit, temporal, fold_div)


def aia_resnet101(
    num_classes: int = 1000, num_segments: int = 8, unit: str | None = None, temporal: str = "tsn", fold_div: int = 8
) -> AIAResNet:
    """AIAResNet with the stages of ResNet-101: 3, 4, 23 and 3 blocks, every second one of the 23 with a unit.

    Args:
        num_classes: As of AIAResNet.
        num_segments: As of AIAResNet.
        unit: As of AIAResNet.
        temporal: As of AIAResNet.
        fold_div: As of AIAResNet.

    Returns:
        The network, with new weights.

    Raises:
        TypeError, ValueError: As AIAResNet.
    """
    return AIAResNet((3, 4, 23, 3), num_classes, num_segments, unit, temporal, fold_div)
