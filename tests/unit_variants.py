"""Attention in Attention as networks may write it: other names, other arrangements, and what stands around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def two(x, axis):
    """Maximum and mean over an axis, side by side in its place."""
    return torch.cat((torch.max(x, axis)[0].unsqueeze(axis), torch.mean(x, axis).unsqueeze(axis)), dim=axis)


def gate_layers(bias=False):
    return nn.Sequential(nn.Conv3d(2, 1, 3, padding=1, bias=bias), nn.BatchNorm3d(1))


class ChannelInSpacetime(nn.Module):
    """Everything in one forward, each map brought to [B, 2, ...] and back; the guided x is made anew for each gate."""

    def __init__(self, frames=4):
        super().__init__()
        self.frames = frames
        self.over_c, self.over_t, self.over_h, self.over_w = (gate_layers() for _ in range(4))

    def forward(self, x):
        nt, c, h, w = x.size()
        clip = x.view(nt // self.frames, self.frames, c, h, w)
        guide = torch.sigmoid(self.over_c(two(clip, 2).permute(0, 2, 1, 3, 4).contiguous()))
        guide = guide.permute(0, 2, 1, 3, 4).contiguous().expand_as(clip)
        t = self.over_t(two(clip * guide, 1)).sigmoid()
        rows = self.over_h(two(clip * guide, 3).transpose(1, 3)).sigmoid().transpose(1, 3)
        columns = self.over_w(two(clip * guide, 4).permute(0, 4, 1, 2, 3)).sigmoid().permute(0, 2, 3, 4, 1)
        y = 1 / 3 * clip * (t.expand_as(clip) + rows.expand_as(clip) + columns.expand_as(clip))
        return y.view(nt, c, h, w)


class Pool(nn.Module):
    """Mean first, then the maximum."""

    def forward(self, x):
        return torch.stack([x.mean(1), x.max(1).values], dim=1)


class GateOfAxis(nn.Module):
    """A gate of the second axis, [B, 1, ...]."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv, self.norm, self.act = (
            *(Pool(), nn.Conv3d(2, 1, 3, 1, "same", bias=False), nn.BatchNorm3d(1, momentum=0.2)),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.act(self.norm(self.conv(self.pool(x))))


class SpacetimeInChannel(nn.Module):
    """Clips [B, C, T, H, W], and a module for each gate."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleDict({name: GateOfAxis() for name in ("chn", "tmp", "row", "col")})

    def forward(self, x):
        parts = []
        for axis, name in ((2, "tmp"), (3, "row"), (4, "col")):
            parts.append(x * self.gates[name](x.movedim(axis, 1)).movedim(1, axis))
        guided = sum(parts) / len(parts)
        return x * self.gates["chn"](guided)


class GateInPlace(GateOfAxis):
    """A gate that recalibrates what it is given."""

    def forward(self, x):
        return x * super().forward(x)


class SpacetimeOfModules(nn.Module):
    """Each gate is a module that recalibrates x with its axis in the second place; the mean of all three."""

    def __init__(self):
        super().__init__()
        self.t, self.h, self.w = GateInPlace(), GateInPlace(), GateInPlace()

    def forward(self, x):
        clip = x.unflatten(0, (-1, 8))
        t = self.t(clip)
        h = self.h(clip.transpose(1, 3)).transpose(1, 3).contiguous()
        w = self.w(clip.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1).contiguous()
        return torch.stack((t, h, w)).mean(0).flatten(0, 1)


class AveragedGates(nn.Module):
    """The spacetime gates of the guide are averaged over C."""

    def __init__(self):
        super().__init__()
        self.n_segment = 3
        self.ct, self.ch, self.cw, self.cc = (nn.Conv3d(2, 1, (3, 3, 3), padding=(1, 1, 1), bias=False) for _ in "THWC")
        self.bt, self.bh, self.bw, self.bc = (nn.BatchNorm3d(1) for _ in "THWC")

    def forward(self, x):
        n = x.shape[0] // self.n_segment
        v = x.reshape((n, self.n_segment, *tuple(x.shape[1:])))
        gt = self.bt(self.ct(two(v, 1))).sigmoid().mean(2, keepdim=True)  # [B, 1, 1, H, W]
        gh = self.bh(self.ch(two(v, 3).permute(0, 3, 1, 2, 4))).sigmoid().mean(3).unsqueeze(3)  # [B, 1, T, 1, W]
        gw = self.bw(self.cw(two(v, 4).permute(0, 4, 1, 3, 2))).sigmoid().mean(4, True)  # [B, 1, T, H, 1]
        gh, gw = gh.transpose(1, 2).transpose(3, 1).transpose(1, 3), gw
        guide = (gt + gh.permute(0, 1, 3, 2, 4) + gw.permute(0, 2, 4, 3, 1)) / 3
        guided = (v * guide).transpose(1, 2)
        return (v * self.bc(self.cc(two(guided, 1))).sigmoid().transpose(1, 2)).flatten(0, 1)


class InABottleneck(nn.Module):
    """Between the convolutions of a residual block, with the length of clips as an argument, no batch norms."""

    def __init__(self, c=6):
        super().__init__()
        self.reduce, self.expand, self.bn = nn.Conv2d(c, 5, 1), nn.Conv2d(5, c, 1), nn.BatchNorm2d(5)
        self.w = nn.ParameterList([nn.Parameter(torch.randn(1, 2, 3, 3, 3) / 5) for _ in range(3)])

    def gates(self, v):
        keep = (v.amax(1, keepdim=True), v.mean(1, keepdim=True))
        t = F.conv3d(torch.cat(keep, 1), self.w[0], padding=1).sigmoid()
        h = torch.stack((v.amax(3), v.mean(3)), 1)
        h = F.conv3d(h, self.w[1], None, 1, 1).sigmoid().squeeze(1).unsqueeze(3)
        w = torch.stack((v.amax(-1), v.mean(-1)), 1)
        return t + h + F.conv3d(w, self.w[2], stride=1, padding=(1, 1, 1)).sigmoid()[:, 0, ..., None]

    def forward(self, x, num_segments):
        out = F.relu(self.bn(self.reduce(x)))
        b, c, h, w = out.shape
        v = out.view(-1, num_segments, c, h, w)
        out = (v * self.gates(v)).view(b, c, h, w)
        return F.relu(self.expand(out) + x)


class WithBias(nn.Module):
    """A lone gate over C with a bias in its convolution, and x times one plus the gate."""

    def __init__(self):
        super().__init__()
        self.layers = gate_layers(bias=True)
        self.layers[1].momentum = None

    def forward(self, x):
        v = x.view(-1, 8, *x.shape[1:])
        pooled = torch.cat([v.mean(2, keepdim=True), v.max(2, keepdim=True)[0]], 2)
        gate = self.layers(pooled.permute(0, 2, 3, 1, 4)).sigmoid().permute(0, 3, 1, 2, 4)
        return (v * (1 + gate)).reshape(x.shape)


class OneAfterTheOther(nn.Module):
    """C, then ST of what it gives, in one forward, with a residual; features last."""

    def __init__(self):
        super().__init__()
        self.c, self.t, self.h, self.w = (gate_layers() for _ in range(4))

    def forward(self, x):  # [B, T, H, W, C]
        a = x * self.c(two(x, 4).permute(0, 4, 1, 2, 3)).sigmoid().permute(0, 2, 3, 4, 1)
        t = self.t(two(a, 1)).sigmoid()
        h = self.h(two(a, 2).transpose(1, 2)).sigmoid().transpose(1, 2)
        w = self.w(two(a, 3).permute(0, 3, 1, 2, 4)).sigmoid().permute(0, 2, 3, 1, 4)
        return a * t / 3 + a * h / 3 + a * w / 3 + x


class SummedGuide(nn.Module):
    """The gates of the guide are added, not averaged; one convolution for all, no batch norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = (nn.Conv3d(2, 1, 3, padding=1, bias=False) for _ in range(2))

    def gate(self, x, axis):
        features = torch.stack((x.max(dim=axis)[0], x.mean(dim=axis)), dim=1)
        return torch.sigmoid(self.conv(features)[:, 0]).unsqueeze(axis)

    def forward(self, x):  # [B, C, T, H, W]
        guided = x * (self.gate(x, 2) + self.gate(x, 3) + self.gate(x, 4))
        return x * torch.sigmoid(self.last(torch.stack((guided.max(dim=1)[0], guided.mean(dim=1)), dim=1)))


#: By kind, the calls that are put in, and the inputs: shapes, and numbers.
UNITS = {
    ChannelInSpacetime: (["CinST"], (8, 5, 6, 7)),
    SpacetimeInChannel: (["STinC"], (2, 5, 4, 6, 7)),
    SpacetimeOfModules: (["ST"], (16, 5, 6, 7)),
    AveragedGates: (["STinC2"], (6, 5, 4, 7)),
    InABottleneck: (["ST"], (8, 6, 5, 7), 4),
    WithBias: (["C"], (16, 3, 5, 7)),
    OneAfterTheOther: (["ST", "C"], (2, 4, 5, 7, 6)),
    SummedGuide: (["STinC"], (2, 5, 4, 6, 7)),
}
