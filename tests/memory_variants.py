"""Linear and efficient attention as networks write them: kinds that have not the published names, with what fuse calls
in their places and the shapes of the inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Projections(nn.Module):
    def __init__(self, c=6, keys=4, values=None, layer=lambda i, o: nn.Conv2d(i, o, 1)):
        super().__init__()
        self.to_q, self.to_k, self.to_v = layer(c, keys), layer(c, keys), layer(c, values or c)


class UnitVectors(_Projections):
    """Linear attention by matmul, with F.normalize, the constant 1 written as sums, and a factor that is learned."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, c, h, w = x.size()
        q = F.normalize(self.to_q(x).flatten(2), dim=1)
        k = F.normalize(self.to_k(x).flatten(2), dim=1)
        v = self.to_v(x).flatten(2)
        above = v.sum(2, keepdim=True) + torch.matmul(torch.matmul(v, k.transpose(1, 2)), q)
        below = h * w + torch.matmul((k.sum(2) + 1e-6).unsqueeze(1), q)
        return self.weight * (above / below).view(b, c, h, w) + x


class UnitVectorsOfTokens(_Projections):
    """On tokens [B, N, C], by einsum with other letters, without a residual."""

    def __init__(self):
        super().__init__(layer=nn.Linear)

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        memory = torch.einsum("bnd,bnv->bdv", k, v)
        below = x.shape[1] + torch.einsum("bnd,bd->bn", q, k.sum(1) + 1e-5)
        return (v.sum(1, keepdim=True) + torch.einsum("bnd,bdv->bnv", q, memory)) / below.unsqueeze(-1)


class Softplus(_Projections):
    """MANet's kernel by matmul."""

    def __init__(self):
        super().__init__(keys=3)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k = F.softplus(self.to_q(x).flatten(2)), F.softplus(self.to_k(x).flatten(2))
        v = self.to_v(x).flatten(2)
        share = 1 / (q.transpose(1, 2) @ (k.sum(-1, keepdim=True) + 1e-6))
        o = (v @ k.transpose(1, 2) @ q) * share.transpose(1, 2)
        return x + self.gamma * o.view_as(x)


class JoinedHeads(nn.Module):
    """Efficient attention as diffusion networks have it: one convolution for all three, heads as an axis, a factor on
    the queries, one convolution behind, and no residual."""

    def __init__(self, c=6, heads=2, each=4):
        super().__init__()
        self.heads, self.scale = heads, each**-0.5
        self.to_qkv = nn.Conv2d(c, 3 * heads * each, 1, bias=False)
        self.to_out = nn.Conv2d(heads * each, c, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.to_qkv(x).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in (q, k, v))
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        o = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(o.reshape(b, -1, h, w))


class HeadsInALoop(_Projections):
    """The published order of efficient attention under other names: one head after the other, joined by cat."""

    def __init__(self, c=6):
        super().__init__(c, keys=4, values=10)
        self.project = nn.Conv2d(10, c, 1)

    def forward(self, x):
        b, _, h, w = x.size()
        q, k, v = self.to_q(x).reshape(b, 4, -1), self.to_k(x).reshape(b, 4, -1), self.to_v(x).reshape(b, 10, -1)
        heads = []
        for i in range(2):
            key = F.softmax(k[:, 2 * i : 2 * i + 2], dim=2)
            query = F.softmax(q[:, 2 * i : 2 * i + 2], dim=1)
            heads.append(((key @ v[:, 5 * i : 5 * i + 5].transpose(1, 2)).transpose(1, 2) @ query).reshape(b, 5, h, w))
        return self.project(torch.cat(heads, dim=1)) + x


class TokensWithHeads(nn.Module):
    """Efficient attention of tokens: queries apart, keys and values joined."""

    def __init__(self, c=6, heads=3):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)

    def forward(self, x):
        b, n, c = x.shape
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (self.q(x), k, v))
        o = q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
        return self.proj(o.transpose(1, 2).reshape(b, n, c))


class DividedByTokens(JoinedHeads):
    """The values divided by the number of tokens, as diffusion networks have them too."""

    def forward(self, x):
        b, h, w = x.size(0), x.size(2), x.size(3)
        joined = self.to_qkv(x).reshape(b, 3, self.heads, 4, h * w)
        q, k, v = (joined.select(1, i) for i in range(3))
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v / (h * w))
        o = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2))
        return self.to_out(o.reshape(b, -1, h, w))


class ShapedBySizesOfBefore(_Projections):
    """A number of tokens that is used in the memory and again behind it, where the result gets its rows and columns in
    the order in which they were called."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, c, width, height = x.shape
        n = width * height
        q, k = (F.normalize(to(x).view(b, -1, n), dim=1) for to in (self.to_q, self.to_k))
        v = self.to_v(x).view(b, -1, n)
        above = torch.einsum("bcn->bc", v).unsqueeze(-1).expand(-1, c, n) + v @ k.mT @ q
        o = above / (n + (k.sum(-1) + 1e-6).unsqueeze(1) @ q)
        return self.gamma * o.view(b, c, height, width)


class OfSquareMaps(ShapedBySizesOfBefore):
    """With x added, it runs on square maps alone."""

    def forward(self, x):
        return x + super().forward(x)


class InANetwork(nn.Module):
    """Behind a convolution and before a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.attend = UnitVectors()

    def forward(self, x):
        return F.relu(self.norm(self.attend(self.stem(x))))


MAPS = (2, 6, 4, 5)
#: Every kind: what is called in its place, and the shape of an input.
KINDS = {
    UnitVectors: (["linear_attention"], MAPS),
    UnitVectorsOfTokens: (["linear_attention"], (2, 9, 6)),
    Softplus: (["linear_attention"], MAPS),
    ShapedBySizesOfBefore: (["linear_attention"], MAPS),
    OfSquareMaps: (["linear_attention"], (2, 6, 4, 4)),
    JoinedHeads: (["efficient_attention"], MAPS),
    DividedByTokens: (["efficient_attention"], MAPS),
    HeadsInALoop: (["efficient_attention"], MAPS),
    TokensWithHeads: (["efficient_attention"], (2, 9, 6)),
}
