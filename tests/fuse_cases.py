"""External attention as networks write it: kinds that no published layer has the names or the order of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class NormOfGroups(nn.Module):
    """On maps, with GroupNorm and GELU in the place of BN and ReLU, and four slots for each channel."""

    def __init__(self, c=4):
        super().__init__()
        self.before, self.after = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1, bias=False)
        self.keys, self.values = nn.Conv1d(c, 4 * c, 1, bias=False), nn.Conv1d(4 * c, c, 1, bias=False)
        self.norm = nn.GroupNorm(2, c)

    def forward(self, x):
        b, c, h, w = x.size()
        attn = torch.softmax(self.keys(self.before(x).view(b, c, h * w)), dim=-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return F.gelu(self.norm(self.after(self.values(attn).view(b, c, h, w))) + x)


class HeadsByOtherNames(nn.Module):
    """EAMLP's attention without its dropouts."""

    def __init__(self, dim=6, heads=3, slots=5):
        super().__init__()
        self.heads = heads
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.m_k, self.m_v = nn.Linear(2 * dim // heads, slots), nn.Linear(slots, 2 * dim // heads)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.widen(x).reshape(b, n, self.heads, -1).transpose(1, 2)
        attn = self.m_k(q).softmax(-2)
        attn = attn / (attn.sum(-1, keepdim=True) + 1e-9)
        return self.narrow(self.m_v(attn).transpose(1, 2).reshape(b, n, -1))


class HeadsWithDropout(HeadsByOtherNames):
    """The same with a dropout on the map."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.widen(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
        attn = F.softmax(self.m_k(q), dim=2)
        attn = self.drop(F.normalize(attn, p=1, dim=3))
        return self.narrow(self.m_v(attn).permute(0, 2, 1, 3).flatten(2))


class HeadsOnMaps(nn.Module):
    """Heads split off the channels of a map, by the names of torch's attention."""

    def __init__(self, dim=6, heads=2, slots=5):
        super().__init__()
        self.h = heads
        self.in_proj, self.out_proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.mk, self.mv = nn.Linear(dim // heads, slots, bias=False), nn.Linear(slots, dim // heads, bias=False)

    def forward(self, x):
        b, c, height, width = x.shape
        q = self.in_proj(x).view(b, self.h, c // self.h, height * width).transpose(2, 3)
        attn = nn.functional.softmax(self.mk(q), dim=-2)
        attn = torch.div(attn, attn.sum(dim=-1, keepdim=True))
        return self.out_proj(self.mv(attn).transpose(2, 3).reshape(b, c, height, width))


class LinearOnMaps(nn.Module):
    """Linear memories on maps made tokens, with residual and ReLU."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        b, c, h, w = x.size()
        attn = self.softmax(self.mk(x.flatten(2).permute(0, 2, 1)))
        out = self.mv(attn.div(attn.sum(2).unsqueeze(2) + 1e-9))
        return F.relu(out.permute(0, 2, 1).view(b, c, h, w) + x)


class ConvolutionsOnMaps(nn.Module):
    """The memories are convolutions of the map itself."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Conv2d(c, slots, 1), nn.Conv2d(slots, c, 1)

    def forward(self, x):
        logits = self.mk(x)
        attn = logits.flatten(2).softmax(2)
        attn = attn * (1 / (attn.sum(1, keepdim=True) + 1e-6))
        return self.mv(attn.view_as(logits)) + x


class OnPoints(nn.Module):
    """EANet's block on points [B, C, N]."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.q, self.mk = nn.Conv1d(c, c, 1), nn.Conv1d(c, slots, 1, bias=False)
        self.mv, self.bn, self.act = nn.Conv1d(slots, c, 1, bias=False), nn.BatchNorm1d(c), nn.ReLU()

    def forward(self, x):
        attn = torch.softmax(self.mk(self.q(x)), -1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdims=True))
        return self.act(self.bn(self.mv(attn)) + x)


class OtherOrder(nn.Module):
    """A softmax over slots, then L1 over tokens."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)

    def forward(self, x):
        attn = F.softmax(self.mk(x), dim=-1)
        return self.mv(attn / (attn.sum(dim=1, keepdim=True) + 1e-9))


class MemoriesAsParameters(nn.Module):
    """Norm first, memories as parameters, slots normalized in groups."""

    def __init__(self, c=6, slots=8, groups=2):
        super().__init__()
        self.norm, self.groups = nn.BatchNorm2d(c), groups
        self.k, self.v = nn.Parameter(torch.randn(slots, c, 1, 1)), nn.Parameter(torch.randn(c, slots, 1, 1))

    def normalize(self, x):
        b, s, h, w = x.shape
        x = x.view(b, self.groups, s // self.groups, h * w).softmax(-1)
        x = x / (x.sum(2, keepdim=True) + 1e-6)
        return x.view(b, s, h, w)

    def forward(self, x):
        x = self.norm(x)
        return F.conv2d(self.normalize(F.conv2d(x, self.k)), self.v)


class Products(nn.Module):
    """Memories as parameters in plain products, behind a LayerNorm."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Parameter(torch.randn(c, slots) / 2), nn.Parameter(torch.randn(slots, c) / 2)
        self.norm = nn.LayerNorm(c)

    def forward(self, x):
        attn = (self.norm(x) @ self.mk).softmax(dim=1)
        attn = attn / attn.norm(p=1, dim=2, keepdim=True)
        return x + torch.matmul(attn, self.mv)


class Einsum(nn.Module):
    def __init__(self, c=6, slots=5):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(slots, c) / 2)

    def forward(self, x):
        attn = torch.einsum("bnc,sc->bns", x, self.memory).softmax(1)
        attn = attn / (attn.sum(-1)[..., None] + 1e-9)
        return torch.einsum("bns,sc->bnc", attn, self.memory)


class NoActivation(nn.Module):
    """EANet's block without its last ReLU."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0, self.linear_1 = nn.Conv1d(c, slots, 1, bias=False), nn.Conv1d(slots, c, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def flow(self, x):
        b, c, h, w = x.size()
        z = self.conv1(x).view(b, c, h * w)
        attn = F.softmax(self.linear_0(z), dim=-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return self.conv2(self.linear_1(attn).view(b, c, h, w)) + x

    def forward(self, x):
        return self.flow(x)


class OtherActivation(NoActivation):
    """SiLU, no residual, and a bias before the batch norm, which takes it away again in training."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.SiLU(inplace=True))

    def forward(self, x):
        b, c, h, w = x.size()
        attn = F.softmax(self.linear_0(self.conv1(x).view(b, c, h * w)), dim=-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return self.conv2(self.linear_1(attn).view(b, c, h, w))


class OtherResidual(nn.Module):
    """Points ask, and the result is added to others, behind a batch norm of the tokens that are made of it."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Conv1d(c, slots, 1, bias=False), nn.Conv1d(slots, c, 1)
        self.bn = nn.BatchNorm1d(c)

    def forward(self, query, x):
        attn = self.mk(query).softmax(dim=2)
        attn = attn / attn.sum(dim=1, keepdim=True)
        return F.gelu(x + self.bn(self.mv(attn)))


class OwnSync(nn.BatchNorm2d):
    """A batch norm of one's own, as networks have that share its statistics in their own way."""

    def forward(self, x):
        return super().forward(x)


class WithOwnSync(NoActivation):
    """EANet's block with a batch norm of its own class."""

    def __init__(self):
        super().__init__()
        self.conv2[1] = OwnSync(6)

    def forward(self, x):
        return torch.relu(self.flow(x))


class NoOutput(nn.Module):
    """EANet's block without conv2 and BN."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.query, self.keys, self.values = nn.Conv2d(c, c, 1), nn.Conv1d(c, slots, 1), nn.Conv1d(slots, c, 1)

    def forward(self, x):
        q = self.query(x)
        attn = self.keys(q.flatten(start_dim=2)).softmax(dim=2)
        attn = attn / attn.sum(dim=1, keepdim=True)
        return F.relu(self.values(attn).reshape(q.shape) + x)


class OnVolumes(nn.Module):
    """Conv3d on volumes."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(c, c, 1), nn.Conv3d(c, c, 1, bias=False)
        self.mk, self.mv = nn.Conv1d(c, slots, 1, bias=False), nn.Conv1d(slots, c, 1, bias=False)
        self.bn = nn.BatchNorm3d(c)

    def forward(self, x):
        b, c, d, h, w = x.size()
        attn = F.softmax(self.mk(self.conv1(x).view(b, c, -1)), dim=-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return F.relu(self.bn(self.conv2(self.mv(attn).view(b, c, d, h, w))) + x)


class HeadsInSlots(nn.Module):
    """One product gives the slots of all heads, the heads innermost."""

    def __init__(self, c=6, slots=5, heads=2):
        super().__init__()
        self.heads, self.slots = heads, slots
        self.key, self.value = nn.Linear(c, slots * heads), nn.Linear(slots * heads, c)

    def forward(self, x):
        b, n, _ = x.shape
        attn = self.key(x).view(b, n, self.slots, self.heads).softmax(1)
        attn = attn / attn.sum(2, keepdim=True)
        return self.value(attn.view(b, n, -1))


class QueryFromElsewhere(nn.Module):
    """The tokens that ask come from one tensor, the residual from another."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.q = nn.Linear(c, c)
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)

    def forward(self, x, query):
        attn = self.mk(self.q(query)).softmax(-2)
        return x + self.mv(attn / (attn.sum(-1, keepdim=True) + 1e-9))


class MemoriesFromData(nn.Module):
    """Keys and values of each sample."""

    def __init__(self, c=6):
        super().__init__()
        self.k, self.v = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x, memory):
        attn = (x @ self.k(memory).transpose(1, 2)).softmax(1)
        return (attn / (attn.sum(2, keepdim=True) + 1e-9)) @ self.v(memory)


class Inline(nn.Module):
    """Somewhere in a larger module."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.mk, self.mv = nn.Conv1d(c, slots, 1, bias=False), nn.Conv1d(slots, c, 1, bias=False)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, c))

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        b, c, h, w = x.shape
        attn = self.mk(x.view(b, c, -1)).softmax(-1)
        attn = attn / (attn.sum(1, keepdim=True) + 1e-9)
        x = x + self.mv(attn).view(b, c, h, w)
        return self.mlp(x.mean((2, 3))) + math.pi


class InSinglePrecision(nn.Module):
    """The map is computed in float32 and cast back."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)

    def forward(self, x):
        attn = self.mk(x).float().softmax(1)
        return self.mv((attn / (attn.sum(2, keepdim=True) + 1e-9)).type_as(x))


class SinglePrecisionSoftmax(nn.Module):
    """The softmax itself casts to float32."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)

    def forward(self, x):
        attn = torch.softmax(self.mk(x), dim=1, dtype=torch.float32)
        attn = attn / torch.clamp(attn.sum(2, keepdim=True), min=1e-12)
        return self.mv(attn.to(x.dtype))


class NormsAround(nn.Module):
    """LayerNorm before and after."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.one, self.two = nn.LayerNorm(c), nn.LayerNorm(c)
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)
        self.proj = nn.Linear(c, c)

    def forward(self, x):
        attn = self.mk(self.one(x)).softmax(dim=1)
        attn = attn / (1e-9 + attn.sum(dim=2, keepdim=True))
        return self.two(self.proj(self.mv(attn)) + x)


class OwnNormalization(nn.Module):
    """A double normalization that is a module of its own."""

    def forward(self, attn):
        attn = attn.softmax(dim=1)
        return attn / (1e-9 + attn.sum(dim=2, keepdim=True))


class NormalizedByAModule(nn.Module):
    """The normalization stands in a submodule."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)
        self.normalization = OwnNormalization()

    def forward(self, x):
        return self.mv(self.normalization(self.mk(x)))


class Scaled(nn.Module):
    """The logits are scaled."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv, self.scale = nn.Linear(c, slots), nn.Linear(slots, c), c**-0.5

    def forward(self, x):
        attn = (self.mk(x / 2) * self.scale).softmax(1)
        return self.mv(attn / (attn.sum(2, keepdim=True) + 1e-9))


class MemoriesOfHeads(nn.Module):
    """Each head has memories of its own."""

    def __init__(self, heads=3, slots=5, d=2):
        super().__init__()
        self.heads = heads
        self.mk, self.mv = nn.Parameter(torch.randn(heads, slots, d)), nn.Parameter(torch.randn(heads, slots, d))

    def forward(self, x):
        q = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        attn = torch.einsum("bhnd,hsd->bhns", q, self.mk).softmax(2)
        attn = attn / attn.sum(-1, keepdim=True)
        return torch.einsum("bhns,hsd->bhnd", attn, self.mv).transpose(1, 2).flatten(2)


class ListOfHeads(nn.Module):
    """Each head is a layer of its own."""

    def __init__(self, heads=2, slots=5, d=3):
        super().__init__()
        self.mk = nn.ModuleList(nn.Linear(d, slots) for _ in range(heads))
        self.mv = nn.ModuleList(nn.Linear(slots, d) for _ in range(heads))

    def forward(self, x):
        results = []
        for part, mk, mv in zip(x.chunk(len(self.mk), -1), self.mk, self.mv, strict=True):
            attn = mk(part).softmax(1)
            results.append(mv(attn / (attn.sum(2, keepdim=True) + 1e-9)))
        return torch.cat(results, -1)


class ToldSizes(nn.Module):
    """Tokens, with the height and the width of their map."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots), nn.Linear(slots, c)

    def forward(self, x, H, W):
        attn = self.mk(x).softmax(1)
        attn = attn / (1e-9 + attn.sum(2, keepdim=True))
        return self.mv(attn).transpose(1, 2).reshape(x.shape[0], -1, H, W)


class ChangedInPlace(nn.Module):
    """x is written to after the memories have seen it."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots), nn.Linear(slots, c)

    def forward(self, x):
        x = x * 2
        attn = self.mk(x).softmax(1)
        x.mul_(3)
        return self.mv(attn / (attn.sum(2, keepdim=True) + 1e-9)) + x


class MapToo(nn.Module):
    """The map is returned as well."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)

    def forward(self, x):
        attn = torch.softmax(self.mk(x), dim=1)
        attn = attn / (1e-9 + attn.sum(dim=2, keepdim=True))
        return self.mv(attn), attn


class ResultAndMore(nn.Module):
    """Optional arguments, and a batch whose size is asked of the result of a product."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.q, self.mk, self.mv = nn.Conv2d(c, c, 1), nn.Conv1d(c, slots, 1), nn.Conv1d(slots, c, 1)

    def forward(self, x, mask=None, scale=1.0):
        assert x.dim() == 4 and len(x.shape) == 4
        q = self.q(x)
        attn = self.mk(q.view(q.size(0), q.size(1), -1)).softmax(-1)
        if mask is not None:
            attn = attn.masked_fill(mask, 0.0)
        attn = attn / (attn.sum(1, keepdim=True) + 1e-9)
        return scale * self.mv(attn).view(*q.shape[:2], *q.shape[2:])


MAPS, TOKENS, POINTS, VOLUMES = (3, 6, 4, 5), (3, 9, 6), (3, 6, 9), (2, 6, 3, 4, 5)
NORMALIZE, ATTEND, BLOCK = "double_normalize", "external_attention", "external_attention_block"

#: Each kind, the function that does its work when it is fused, and the sizes of its inputs.
KINDS = {
    NormOfGroups: (ATTEND, (3, 4, 4, 5)),
    HeadsByOtherNames: (ATTEND, TOKENS),
    HeadsWithDropout: (ATTEND, TOKENS),
    HeadsOnMaps: (ATTEND, MAPS),
    LinearOnMaps: (BLOCK, MAPS),
    ConvolutionsOnMaps: (ATTEND, MAPS),
    OnPoints: (BLOCK, POINTS),
    OtherOrder: (NORMALIZE, TOKENS),
    MemoriesAsParameters: (ATTEND, MAPS),
    Products: (ATTEND, TOKENS),
    Einsum: (ATTEND, TOKENS),
    NoActivation: (BLOCK, MAPS),
    OtherActivation: (BLOCK, MAPS),
    OtherResidual: (BLOCK, POINTS, POINTS),
    WithOwnSync: (ATTEND, MAPS),
    NoOutput: (BLOCK, MAPS),
    OnVolumes: (BLOCK, VOLUMES),
    HeadsInSlots: (ATTEND, TOKENS),
    QueryFromElsewhere: (ATTEND, TOKENS, TOKENS),
    MemoriesFromData: (NORMALIZE, TOKENS, (3, 7, 6)),
    Inline: (ATTEND, MAPS),
    InSinglePrecision: (NORMALIZE, TOKENS),
    SinglePrecisionSoftmax: (NORMALIZE, TOKENS),
    NormsAround: (ATTEND, TOKENS),
    NormalizedByAModule: (ATTEND, TOKENS),
    Scaled: (ATTEND, TOKENS),
    MemoriesOfHeads: (NORMALIZE, TOKENS),
    ListOfHeads: (ATTEND, TOKENS),
    ToldSizes: (ATTEND, TOKENS, 3, 3),
    MapToo: (NORMALIZE, TOKENS),
    ResultAndMore: (ATTEND, MAPS),
}
