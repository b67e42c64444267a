"""CBAM as networks write it: kinds that have not the published names, with what fuse calls in their places and the
shapes of the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PooledOneByOne(nn.Module):
    """Gates of their own classes that return a gate, shared 1x1 convolutions, and pools that are modules."""

    class OfChannels(nn.Module):
        def __init__(self, c, hidden):
            super().__init__()
            self.largest, self.average = nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1)
            self.shared = nn.Sequential(
                nn.Conv2d(c, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, c, 1, bias=False)
            )
            self.squash = nn.Sigmoid()

        def forward(self, x):
            return self.squash(self.shared(self.largest(x)) + self.shared(self.average(x)))

    class OfPositions(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, kernel_size=k, padding=k // 2)
            self.squash = nn.Sigmoid()

        def forward(self, x):
            highest, _ = torch.max(x, dim=1, keepdim=True)
            return self.squash(self.conv(torch.cat([highest, torch.mean(x, dim=1, keepdim=True)], 1)))

    def __init__(self, c=6, hidden=3, k=5):
        super().__init__()
        self.ca, self.sa = self.OfChannels(c, hidden), self.OfPositions(k)

    def forward(self, x):
        out = x * self.ca(x)
        out = out * self.sa(out)
        return out + x


class ReducedOverBothAxes(nn.Module):
    """Layers one by one, reductions over two axes at once, the mean before the maximum, then a norm."""

    class OfChannels(nn.Module):
        def __init__(self, c, hidden):
            super().__init__()
            self.down, self.act = nn.Conv2d(c, hidden, 1, bias=False), nn.ReLU(inplace=True)
            self.up = nn.Conv2d(hidden, c, 1, bias=False)
            self.gate = nn.Sigmoid()

        def forward(self, x):
            of_mean = self.up(self.act(self.down(x.mean((2, 3), keepdim=True))))
            of_largest = self.up(self.act(self.down(x.amax((2, 3), keepdim=True))))
            return x * self.gate(of_mean + of_largest)

    class OfPositions(nn.Module):
        def __init__(self, features=2):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(features, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)

        def forward(self, x):
            both = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
            return x * self.bn(self.conv(both)).sigmoid()

    def __init__(self, c=8, hidden=2):
        super().__init__()
        self.channel, self.spatial = self.OfChannels(c, hidden), self.OfPositions()

    def forward(self, x):
        return self.spatial(self.channel(x))


class Light(ReducedOverBothAxes):
    """Both pools are averaged before each gate."""

    class OfChannels(ReducedOverBothAxes.OfChannels):
        def forward(self, x):
            pooled = 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True)
            return x * F.sigmoid(self.up(self.act(self.down(pooled))))

    class OfPositions(ReducedOverBothAxes.OfPositions):
        def __init__(self):
            super().__init__(features=1)

        def forward(self, x):
            pooled = 0.5 * x.mean(dim=1, keepdim=True) + 0.5 * x.amax(dim=1, keepdim=True)
            return x * torch.sigmoid(self.bn(self.conv(pooled)))


class InOneForward(nn.Module):
    """Linear layers with biases on flattened maps, everything in one forward, a 3x3 kernel, the gates on the left."""

    def __init__(self, c=6, hidden=2):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def mlp(self, pooled):
        return self.fc2(F.relu(self.fc1(pooled)))

    def forward(self, x):
        b, c, _, _ = x.shape
        flat = x.view(b, c, -1)
        scale = torch.sigmoid(self.mlp(flat.mean(-1)) + self.mlp(flat.max(-1)[0]))
        x = scale.view(b, c, 1, 1).expand_as(x) * x
        pooled = torch.stack((x.max(1).values, x.mean(1)), dim=1)
        return torch.sigmoid(self.conv(pooled)) * x


class AfterThePublished(nn.Module):
    """As the published code has it: pools as large as the map, a sum that begins with nothing, gates in classes with
    other names."""

    class Squeeze(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(c, c // 2), nn.ReLU(), nn.Linear(c // 2, c))

        def forward(self, x):
            total = None
            for pool in (F.avg_pool2d, F.max_pool2d):
                plane = x.size(2), x.size(3)
                raw = self.layers(pool(x, plane, stride=plane))
                total = raw if total is None else total + raw
            return x * F.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)

    class Compress(nn.Module):
        def forward(self, x):
            return torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)

    def __init__(self, c=6):
        super().__init__()
        self.squeeze, self.compress = self.Squeeze(c), self.Compress()
        self.conv, self.norm = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x):
        x = self.squeeze(x)
        return x * F.sigmoid(self.norm(self.conv(self.compress(x))))


class ReducedOneAfterTheOther(nn.Module):
    """A channel gate alone, whose pools go over one axis after the other."""

    def __init__(self, c=5, hidden=3):
        super().__init__()
        self.first, self.second = nn.Linear(c, hidden), nn.Linear(hidden, c, bias=False)

    def forward(self, x):
        pools = x.mean(3).mean(2), x.amax(3).amax(2)
        return x * sum(self.second(self.first(pool).relu()) for pool in pools).sigmoid()[:, :, None, None]


class PoolsOfRows(nn.Module):
    """Every pool as one over the last axis of a matrix: positions for the channel gate, channels for the spatial one,
    whose map is repeated for all channels before its sigmoid."""

    def __init__(self, c=6):
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool1d(1), nn.AdaptiveMaxPool1d(1)
        self.down, self.up = nn.Linear(c, 2), nn.Linear(2, c)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        b, c, h, w = x.size()
        of_channels = (self.up(F.relu(self.down(pool(x.flatten(2)).squeeze(2)))) for pool in self.squeeze)
        x = torch.sigmoid(sum(of_channels)).view(b, c, 1, 1).repeat(1, 1, h, w) * x
        by_position = x.view(b, c, h * w).transpose(1, 2)
        pools = (pool(by_position, c).transpose(1, 2).view(b, 1, h, w) for pool in (F.max_pool1d, F.avg_pool1d))
        return self.conv(torch.cat([*pools], dim=1)).repeat(1, c, 1, 1).sigmoid() * x


class PositionsAlone(nn.Module):
    """A spatial gate alone, with a bias and a norm, inside of a network."""

    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(4, 5, 3, padding=1)
        self.conv = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, x):
        x = F.relu(self.before(x))
        pooled = torch.cat([torch.mean(x, 1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
        return torch.mul(x, torch.sigmoid(self.conv(pooled))) + 1


class Branches(nn.Module):
    """Triplet attention: spatial gates of x with the channels in the place of the rows, and of the columns."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 5, padding=2, bias=False)
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
            return x * torch.sigmoid(self.norm(self.conv(pooled)))

    def __init__(self):
        super().__init__()
        self.rows, self.columns, self.positions = self.Gate(), self.Gate(), self.Gate()

    def forward(self, x):
        rows = self.rows(x.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        columns = self.columns(x.transpose(1, 3).contiguous()).transpose(1, 3).contiguous()
        return (self.positions(x) + rows + columns) / 3


class InABottleneck(nn.Module):
    """Between the last convolution of a block and its residual."""

    def __init__(self, c=6):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.ca, self.sa = PooledOneByOne.OfChannels(c, 3), PooledOneByOne.OfPositions(7)

    def forward(self, x):
        out = self.bn(self.conv(x))
        out = self.ca(out) * out
        out = self.sa(out) * out
        return F.relu(out + x)


MAPS = (2, 6, 4, 5)
#: Every kind: what is called in its place, and the shape of an input.
KINDS = {
    PooledOneByOne: (["CBAM"], MAPS),
    ReducedOverBothAxes: (["CBAM"], (2, 8, 4, 5)),
    Light: (["CBAM"], (2, 8, 4, 5)),
    InOneForward: (["CBAM"], MAPS),
    AfterThePublished: (["CBAM"], MAPS),
    ReducedOneAfterTheOther: (["ChannelGate"], (2, 5, 4, 6)),
    PoolsOfRows: (["CBAM"], MAPS),
    PositionsAlone: (["SpatialGate"], (2, 4, 5, 6)),
    InABottleneck: (["CBAM"], MAPS),
}
