"""The published eager flow of the five units: the baseline whose cost the fused units are measured against.

Written after the authors' code of arXiv 2204.09303 (nets/block_zoo.py) with its sequence of eager operations kept
whole: the concatenation of maximum and mean, each permute with its copy, the gates expanded to the size of x, and in
CinST the product x * g_C formed three times, once for each of T, H and W. Parameters carry the published names and
initialization, so state dicts pass freely between these units and those of ``aia_kernels``.

Shapes in comments are those of tensors as they are stored: B clips, T segments, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def pool(x: Tensor, axis: int) -> Tensor:
    """cat[max, mean] over an axis, which keeps its place with length 2."""
    return torch.cat((torch.max(x, axis)[0].unsqueeze(axis), torch.mean(x, axis).unsqueeze(axis)), dim=axis)


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


class Unit(nn.Module):
    """A gate per letter of ``initializers``: conv3d 2 -> 1, 3x3x3 without bias, BatchNorm3d(1), sigmoid.

    x and y are [B * T, C, H, W]; 5-D input [B, C, T, H, W] is brought into that form and back, as a user would.
    """

    #: Gate letters, each with the initialization of its convolution (None: the default of Conv3d).
    initializers: tuple[tuple[str, Callable[[Tensor], None] | None], ...] = ()

    def __init__(self, num_segments: int = 8, use_BN: bool = True):
        super().__init__()
        self.num_segments, self.use_BN = num_segments, use_BN
        for letter, initialize in self.initializers:
            conv = nn.Conv3d(2, 1, kernel_size=3, padding=1, bias=False)
            if initialize is not None:
                initialize(conv.weight)
            self.add_module(f"{letter}_conv", conv)
            if use_BN:
                self.add_module(f"{letter}_bn", nn.BatchNorm3d(1))

    def gate(self, letter: str, features: Tensor) -> Tensor:
        """sigmoid(BN(conv3d(features))): [B, 2, ...] -> [B, 1, ...]."""
        z = getattr(self, f"{letter}_conv")(features)
        if self.use_BN:
            z = getattr(self, f"{letter}_bn")(z)
        return torch.sigmoid(z)

    def spacetime(self, source: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [B, 1, C, H, W], [B, T, C, 1, W] and [B, T, C, H, 1]; ``source`` is called for each of them."""
        t = self.gate("T", pool(source(), 1))
        h = self.gate("H", pool(source(), 3).permute(0, 3, 1, 2, 4).contiguous())  # [B, 1, T, C, W]
        h = h.permute(0, 2, 3, 1, 4).contiguous()
        w = self.gate("W", pool(source(), 4).permute(0, 4, 1, 3, 2).contiguous())  # [B, 1, T, H, C]
        w = w.permute(0, 2, 4, 3, 1).contiguous()
        return t, h, w

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            b, c, t, h, w = x.shape
            y = self.flow(x.transpose(1, 2).reshape(b, t, c, h, w))
            return y.transpose(1, 2)
        frames, c, h, w = x.shape
        return self.flow(x.view(frames // self.num_segments, self.num_segments, c, h, w)).view(frames, c, h, w)

    def flow(self, x: Tensor) -> Tensor:
        """The unit on x [B, T, C, H, W]."""
        raise NotImplementedError


class C(Unit):
    """y = x * g_C(x)."""

    initializers = (("C", _kaiming),)

    def flow(self, x: Tensor) -> Tensor:
        c = self.gate("C", pool(x, 2).permute(0, 2, 1, 3, 4).contiguous())  # [B, 1, T, H, W]
        return x * c.permute(0, 2, 1, 3, 4).contiguous().expand_as(x)


class ST(Unit):
    """y = x * (g_T(x) + g_H(x) + g_W(x)) / 3."""

    initializers = (("T", _kaiming), ("H", _kaiming), ("W", _kaiming))

    def flow(self, x: Tensor) -> Tensor:
        t, h, w = self.spacetime(lambda: x)
        return x * 1 / 3 * (t.expand_as(x) + h.expand_as(x) + w.expand_as(x))


class CinST(Unit):
    """y = x * G_ST(x * g_C(x)). The published code initializes H twice and W never; so does this."""

    initializers = (("C", _kaiming), ("T", nn.init.xavier_normal_), ("H", nn.init.xavier_normal_), ("W", None))

    def flow(self, x: Tensor) -> Tensor:
        c = self.gate("C", pool(x, 2).permute(0, 2, 1, 3, 4).contiguous())
        c = c.permute(0, 2, 1, 3, 4).contiguous().expand(x.shape)
        t, h, w = self.spacetime(lambda: x * c)
        return 1 / 3 * x * (t.expand_as(x) + h.expand_as(x) + w.expand_as(x))


class STinC(Unit):
    """y = x * g_C(x * G_ST(x))."""

    initializers = (("C", nn.init.xavier_normal_), ("T", _kaiming), ("H", _kaiming), ("W", _kaiming))

    def guide(self, x: Tensor) -> Tensor:
        """x * G_inner(x), stored as [B, C, T, H, W]."""
        t, h, w = self.spacetime(lambda: x)
        return (x * 1 / 3 * (t.expand_as(x) + h.expand_as(x) + w.expand_as(x))).permute(0, 2, 1, 3, 4).contiguous()

    def flow(self, x: Tensor) -> Tensor:
        c = self.gate("C", pool(self.guide(x), 1))  # [B, 1, T, H, W]
        return x * c.permute(0, 2, 1, 3, 4).contiguous().expand_as(x)


class STinC2(STinC):
    """STinC with every inner gate averaged over C after its sigmoid."""

    def guide(self, x: Tensor) -> Tensor:
        b, t, _, h, w = x.shape
        shape = (b, 1, t, h, w)
        # Average over C where that axis stands, then bring the two axes of length one to where they belong.
        gt = self.gate("T", pool(x, 1)).mean(dim=2).unsqueeze(2)
        gt = gt.permute(0, 2, 1, 3, 4).contiguous().expand(shape)
        gh = self.gate("H", pool(x, 3).permute(0, 3, 1, 2, 4).contiguous()).mean(dim=3).unsqueeze(3)
        gh = gh.permute(0, 3, 2, 1, 4).contiguous().expand(shape)
        gw = self.gate("W", pool(x, 4).permute(0, 4, 1, 3, 2).contiguous()).mean(dim=4).unsqueeze(4)
        gw = gw.permute(0, 4, 2, 3, 1).contiguous().expand(shape)
        return x.permute(0, 2, 1, 3, 4).contiguous() * 1 / 3 * (gt + gh + gw)


UNITS = {unit.__name__: unit for unit in (C, ST, CinST, STinC, STinC2)}
