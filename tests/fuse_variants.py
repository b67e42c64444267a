"""External attention in further wordings: other functions, other arrangements, and what stands around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fuse_cases import ATTEND, BLOCK, MAPS, NORMALIZE, TOKENS
from torch import nn
from torch.utils.checkpoint import checkpoint


def normalize(logits, tokens=1, slots=2):
    attn = logits.softmax(tokens)
    return attn / (1e-9 + attn.sum(slots, keepdim=True))


class Memories(nn.Module):
    """Two linear memories."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, slots, bias=False), nn.Linear(slots, c, bias=False)


class Matrices(nn.Module):
    """Two memories as parameters [slots, c]."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(slots, c)), nn.Parameter(torch.randn(slots, c))


class EinsumWithDots(Matrices):
    def forward(self, x):
        return torch.einsum("...ns,sc->...nc", normalize(torch.einsum("...nc,sc->...ns", x, self.k)), self.v)


class EinsumThatMoves(Matrices):
    """The product puts the features where maps have them."""

    def forward(self, x):
        b, c, h, w = x.shape
        attn = normalize(torch.einsum("b c n, s c -> b n s", x.reshape(b, c, -1), self.k))
        return torch.einsum("b n s, s c -> b c n", attn, self.v).reshape(b, c, h, w)


class EinsumOfHeads(Matrices):
    """Heads are moved by the products themselves."""

    def __init__(self):
        super().__init__(3)
        self.q, self.o = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        b, n, c = x.shape
        attn = torch.einsum("bnhd,sd->bhns", self.q(x).view(b, n, 2, 3), self.k)
        return self.o(torch.einsum("bhns,sd->bnhd", normalize(attn, 2, 3), self.v).reshape(b, n, c))


class RepeatedMemories(nn.Module):
    """The memories are repeated for each sample, and one of them transposed then."""

    def __init__(self, c=6, slots=5):
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(1, slots, c)), nn.Parameter(torch.randn(1, slots, c))

    def forward(self, x):
        b = x.size(0)
        return torch.bmm(normalize(torch.bmm(x, self.k.expand(b, -1, -1).transpose(1, 2))), self.v.repeat(b, 1, 1))


class PartOfTheFeatures(Memories):
    """Half of the features are passed on."""

    def __init__(self):
        super().__init__(3)

    def forward(self, x):
        seen, kept = torch.split(x, 3, dim=-1)
        return torch.cat([self.mv(normalize(self.mk(seen))), kept], -1)


class PartsOfTheSlots(nn.Module):
    """The slots are split into parts, each normalized alone."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.v(torch.cat([normalize(part) for part in self.k(x).chunk(2, dim=-1)], -1))


class Checks(Memories):
    """Sizes are checked, and decide."""

    def forward(self, x):
        assert x.ndim == 3 and x.size(-1) == self.mk.in_features
        _, n, _ = x.shape
        if n > 2:
            x = x + 1
        with torch.autocast("cpu", enabled=False):
            return self.mv(normalize(self.mk(x)))


class FeaturesLast(Memories):
    """Maps whose axes are moved first; the sizes of what that gives are asked at the end."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        return self.mv(normalize(self.mk(x).reshape(b, h * w, -1))).reshape(b, h, w, c).permute(0, 3, 1, 2) + 1


class InMethods(Memories):
    """The softmax stands in a static method."""

    @staticmethod
    def normalized(attn):
        return F.normalize(F.softmax(attn, dim=1), p=1, dim=2)

    def attend(self, x):
        return self.mv(InMethods.normalized(self.mk(x)))

    def forward(self, x):
        return x + self.attend(x)


class Keywords(Memories):
    def forward(self, x):
        attn = F.softmax(input=self.mk(input=x), dim=1)
        return self.mv(input=torch.div(input=attn, other=torch.sum(input=attn, dim=2, keepdim=True) + 1e-9))


class OneMemory(Memories):
    """The value memory is the key memory, transposed."""

    def __init__(self):
        super().__init__()
        del self.mv

    def forward(self, x):
        return F.linear(normalize(self.mk(x)), self.mk.weight.t())


class FunctionalConvolutions(nn.Module):
    """One parameter for both memories of a block on maps."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        attn = normalize(F.conv1d(x.view(b, c, -1), self.w), -1, 1)
        return F.relu(F.conv1d(attn, self.w.permute(1, 0, 2)).view(b, c, h, w) + x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class OwnLayers(Memories):
    """Linear layers of one's own."""

    def __init__(self):
        super().__init__()
        self.mk = OwnLinear(6, 5)

    def forward(self, x):
        return self.mv(normalize(self.mk(x)))


class InSequences(nn.Module):
    """Nested sequences, with dropouts that are off."""

    def __init__(self):
        super().__init__()
        self.to_map = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), nn.Softmax(dim=1))
        self.back = nn.Sequential(nn.Dropout(0.0), nn.Linear(5, 6), nn.Dropout(0.0))

    def forward(self, x):
        attn = self.to_map(x)
        return self.back(attn / (attn.sum(-1, keepdim=True) + 1e-9))


class Checkpointed(Memories):
    def body(self, x):
        return self.mv(normalize(self.mk(x)))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class TokensFirst(Memories):
    """[N, B, C] inside."""

    def forward(self, x):
        return self.mv(normalize(self.mk(x.transpose(0, 1)), 0, 2)).transpose(0, 1)


class InADictionary(Memories):
    """Further results, by names."""

    def forward(self, x):
        attn = normalize(self.mk(x))
        return {"out": self.mv(attn) + x, "attn": attn}


class Normed(Memories):
    """A weight that is computed anew for each call."""

    def __init__(self):
        super().__init__()
        self.mk = torch.nn.utils.parametrizations.weight_norm(self.mk)

    def forward(self, x):
        return self.mv(normalize(self.mk(x)))


#: As fuse_cases.KINDS.
VARIANTS = {
    EinsumWithDots: (ATTEND, TOKENS),
    EinsumThatMoves: (ATTEND, MAPS),
    EinsumOfHeads: (ATTEND, TOKENS),
    RepeatedMemories: (ATTEND, TOKENS),
    PartOfTheFeatures: (ATTEND, TOKENS),
    PartsOfTheSlots: (NORMALIZE, TOKENS),
    Checks: (ATTEND, TOKENS),
    FeaturesLast: (ATTEND, MAPS),
    InMethods: (ATTEND, TOKENS),
    Keywords: (ATTEND, TOKENS),
    OneMemory: (ATTEND, TOKENS),
    FunctionalConvolutions: (BLOCK, MAPS),
    OwnLayers: (ATTEND, TOKENS),
    InSequences: (ATTEND, TOKENS),
    Checkpointed: (ATTEND, TOKENS),
    TokensFirst: (ATTEND, TOKENS),
    InADictionary: (NORMALIZE, TOKENS),
    Normed: (ATTEND, TOKENS),
}
