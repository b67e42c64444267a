"""External attention in yet other wordings: softmaxes written out, numbers made of sizes, sums guarded otherwise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fuse_cases import ATTEND, MAPS, NORMALIZE, TOKENS
from fuse_variants import Matrices, Memories, normalize
from torch import nn


class SquareMaps(nn.Module):
    """Tokens of a square map, which is put together again for its convolutions."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Conv2d(c, slots, 1), nn.Conv2d(slots, c, 1, bias=False)

    def forward(self, tokens):
        b, n, c = tokens.shape
        side = int(math.sqrt(n))
        maps = tokens.transpose(1, 2).reshape(b, c, side, side)
        attn = normalize(self.mk(maps).flatten(2), 2, 1)
        return self.mv(attn.view(b, -1, side, round(n**0.5))).flatten(2).transpose(1, 2)


class ALoopOverParts(nn.Module):
    """Heads as layers of their own, as many as the features make."""

    def __init__(self, c=6, heads=2, slots=5):
        super().__init__()
        self.width = c // heads
        self.mk = nn.ModuleList(nn.Linear(self.width, slots) for _ in range(heads))
        self.mv = nn.ModuleList(nn.Linear(slots, self.width) for _ in range(heads))

    def forward(self, x):
        outs = []
        for i in range(x.shape[-1] // self.width):
            part = x[:, :, i * self.width : (i + 1) * self.width]
            outs.append(self.mv[i](normalize(self.mk[i](part))))
        return torch.cat(outs, dim=-1)


class EpsOfTheType(Memories):
    def forward(self, x):
        attn = F.softmax(self.mk(x), dim=1)
        return self.mv(attn / (attn.sum(-1, keepdim=True) + torch.finfo(attn.dtype).eps))


class LeastOfTheType(Memories):
    def forward(self, x):
        attn = F.softmax(self.mk(x), dim=1)
        return self.mv(attn / attn.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)) + x


class LeastOfNormalize(Memories):
    def forward(self, x):
        attn = F.softmax(self.mk(x), dim=1)
        return self.mv(F.normalize(attn, p=1, dim=-1, eps=torch.finfo(attn.dtype).tiny))


class WrittenOut(Memories):
    """The softmax is written out, its maximum taken away first."""

    def forward(self, x):
        logits = self.mk(x)
        e = torch.exp(logits - logits.max(dim=1, keepdim=True)[0])
        attn = e / e.sum(dim=1, keepdim=True)
        return self.mv(attn / (1e-9 + attn.sum(dim=2, keepdim=True)))


class WrittenOutAgain(Memories):
    """The same with another maximum, which no gradient flows to."""

    def forward(self, x):
        logits = self.mk(x)
        e = (logits - logits.detach().amax(1, True)).exp()
        attn = e * e.sum(1, True).reciprocal()
        return self.mv(F.normalize(attn, p=1, dim=-1))


class WithoutMaximum(Memories):
    def forward(self, x):
        e = self.mk(x).exp()
        attn = torch.div(e, torch.sum(e, 1, keepdim=True))
        return self.mv(attn / attn.sum(2, keepdim=True))


class ByLogSumExp(Memories):
    def forward(self, x):
        logits = self.mk(x)
        return self.mv(F.normalize((logits - logits.logsumexp(1, keepdim=True)).exp(), 1, 2))


class ByLogSoftmax(Memories):
    def forward(self, x):
        attn = F.log_softmax(self.mk(x), 1).exp()
        return self.mv(attn / attn.sum(2, True))


class TwoSoftmaxes(Memories):
    """The softmax is called twice, for the numerator and for the sum."""

    def forward(self, x):
        logits = self.mk(x[:])
        return self.mv(logits.softmax(1) / (logits.softmax(1).sum(2, keepdim=True) + 1e-9))


class InPlace(Memories):
    """The sum is changed in place."""

    def forward(self, x):
        attn = self.mk(x).softmax(dim=1)
        return self.mv(attn.div(attn.sum(dim=2, keepdim=True).add_(1e-9)))


class SamplesJoined(Memories):
    """All tokens of all samples go through the products as rows."""

    def forward(self, x):
        b, n, c = x.size()
        attn = normalize(self.mk(x.reshape(-1, c)).view(b, n, -1))
        return self.mv(attn.view(b * n, -1)).view(*x.shape[:2], -1)


class Embedded(nn.Module):
    """The memories are tables of embeddings."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.keys, self.values = nn.Embedding(slots, c), nn.Embedding(slots, c)

    def forward(self, x):
        return normalize(x @ self.keys.weight.t()) @ self.values.weight


class TensorDot(Matrices):
    def forward(self, x):
        attn = normalize(torch.tensordot(x, self.k, dims=([2], [1])))
        return torch.tensordot(attn, self.v, dims=1)


class AddMM(Matrices):
    """Biases are added by the products."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        b, n, _ = x.shape
        attn = normalize(torch.addmm(self.b, x.flatten(0, 1), self.k.t()).view(b, n, 5))
        return torch.addmm(self.c, attn.reshape(b * n, 5), self.v).view(b, n, -1)


class MapsByEinsum(Matrices):
    def forward(self, x):
        logits = torch.einsum("bchw,sc->bshw", x, self.k)
        attn = normalize(logits.flatten(2), 2, 1).view_as(logits)
        return torch.einsum("bshw,sc->bchw", attn, self.v)


class WeightsOfLinears(Memories):
    """On maps, by convolutions with the weights of linear layers."""

    def forward(self, x):
        attn = normalize(F.conv1d(x.flatten(2), self.mk.weight[..., None]), 2, 1)
        return F.conv1d(attn, self.mv.weight.unsqueeze(-1)).view(x.shape) + x


class Tempered(Memories):
    """The logits are multiplied with a parameter."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.mv(normalize(self.mk(x) * self.temperature))


class GroupsOfConvolutions(nn.Module):
    """Heads by convolutions in groups."""

    def __init__(self, c=6, heads=2, slots=4):
        super().__init__()
        self.heads = heads
        self.mk = nn.Conv1d(c, heads * slots, 1, groups=heads, bias=False)
        self.mv = nn.Conv1d(heads * slots, c, 1, groups=heads, bias=False)

    def forward(self, x):
        b, c, h, w = x.shape
        attn = self.mk(x.flatten(2)).view(b, self.heads, -1, h * w)
        return self.mv(normalize(attn, 3, 2).flatten(1, 2)).view(b, c, h, w)


class Windows(Memories):
    """Inside windows of a map with the features last, with a norm before and a scale of each feature behind."""

    def __init__(self):
        super().__init__()
        self.norm, self.gamma = nn.LayerNorm(6), nn.Parameter(torch.full((6,), 0.1))

    def forward(self, x):  # [B, H, W, C]
        b, h, w, c = x.shape
        parts = self.norm(x).view(b, h, w, c).unflatten(1, (h, 1)).permute(0, 1, 3, 2, 4).reshape(-1, w, c)
        return x + self.gamma * self.mv(normalize(self.mk(parts))).reshape(b, h, w, c)


class GuardedSum(Memories):
    """Nothing is divided by zero."""

    def forward(self, x):
        attn = self.mk(x).softmax(1)
        total = attn.sum(2, keepdim=True)
        return self.mv(attn / total.masked_fill(total == 0, 1.0))


class SoftmaxMadeThere(Memories):
    """A module of no parameters is made as the forward runs."""

    def forward(self, x):
        attn = nn.Softmax(dim=1)(self.mk(x))
        return nn.ReLU()(self.mv(attn / (1e-9 + attn.sum(dim=2, keepdim=True))) + x)


class ALoopOverPieces(Memories):
    """As many heads as split makes pieces."""

    def __init__(self, c=6, heads=2, slots=5):
        super().__init__(c // heads, slots)
        self.width = c // heads

    def forward(self, x):
        return torch.cat([self.mv(normalize(self.mk(piece))) for piece in x.split(self.width, dim=-1)], dim=-1)


class ALoopOverSamples(Memories):
    def forward(self, x):
        return torch.stack([self.mv(normalize(self.mk(sample), 0, 1)) for sample in x.unbind(0)])


#: As fuse_cases.KINDS.
WORDINGS = {
    SquareMaps: (ATTEND, (2, 25, 6)),
    ALoopOverParts: (ATTEND, TOKENS),
    EpsOfTheType: (ATTEND, TOKENS),
    LeastOfTheType: (ATTEND, TOKENS),
    LeastOfNormalize: (ATTEND, TOKENS),
    WrittenOut: (ATTEND, TOKENS),
    WrittenOutAgain: (ATTEND, TOKENS),
    WithoutMaximum: (ATTEND, TOKENS),
    ByLogSumExp: (ATTEND, TOKENS),
    ByLogSoftmax: (ATTEND, TOKENS),
    TwoSoftmaxes: (ATTEND, TOKENS),
    InPlace: (ATTEND, TOKENS),
    SamplesJoined: (ATTEND, TOKENS),
    Embedded: (ATTEND, TOKENS),
    TensorDot: (ATTEND, TOKENS),
    AddMM: (ATTEND, TOKENS),
    MapsByEinsum: (ATTEND, MAPS),
    WeightsOfLinears: (ATTEND, MAPS),
    Tempered: (NORMALIZE, TOKENS),
    GroupsOfConvolutions: (NORMALIZE, MAPS),
    Windows: (ATTEND, (2, 4, 5, 6)),
    GuardedSum: (ATTEND, TOKENS),
    SoftmaxMadeThere: (ATTEND, TOKENS),
    ALoopOverPieces: (ATTEND, TOKENS),
    ALoopOverSamples: (ATTEND, TOKENS),
}
