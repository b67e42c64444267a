"""The passes in plain PyTorch: the oracle that every backend's passes are held against.

Each method computes its schema in aia_kernels/schemas.py line by line, with whole tensors and no regard for speed. The
maps are packed in any order, so one oracle serves every backend: ``PlainPasses(passes.map_order)`` packs them as the
passes of a backend do, ``PlainPasses()`` as x is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.common.running_statistics import move_statistics_

_AXIS = {"T": 1, "C": 2, "H": 3, "W": 4}


def _natural(packed: Tensor, sizes, context: int, order: str) -> list[tuple[int, Tensor]]:
    """The maps of a packed [B, M], each with its pooled axis of x and kept there with length one."""
    found = []
    for pooled, m in zip(maps.POOLED_AXES[context], maps.unpack(packed, sizes, context, order), strict=True):
        axes, paper = "TCHW".replace(pooled, ""), maps.GATE_AXES[pooled]
        found.append((_AXIS[pooled], m.permute(0, *(1 + paper.index(a) for a in axes)).unsqueeze(_AXIS[pooled])))
    return found


def _pack(natural: list[Tensor], context: int, order: str) -> Tensor:
    """The inverse: one [B, T, C, H, W] with the pooled axis dropped per map, into a packed [B, M]."""
    paper = []
    for pooled, m in zip(maps.POOLED_AXES[context], natural, strict=True):
        axes = "TCHW".replace(pooled, "")
        paper.append(m.permute(0, *(1 + axes.index(a) for a in maps.GATE_AXES[pooled])))
    return maps.pack(paper, context, order)


class PlainPasses:
    """The passes; map_order gives the order in which maps are packed, from the storage order of x."""

    def __init__(self, map_order: Callable[[str], str] = lambda order: order):
        self.map_order = map_order

    def _order_of(self, x: Tensor) -> str:
        return self.map_order(maps.storage_order(x))

    def field(self, gate: Tensor, x: Tensor, context: int) -> Tensor:
        """G: the mean of the maps of a gate, broadcast to the shape of x."""
        gates = [m for _, m in _natural(gate, x.shape, context, self._order_of(x))]
        return (sum(gates) / len(gates)).expand(x.shape)

    def unpooled_field(self, grad_pooled: Tensor, argmax: Tensor, x: Tensor, context: int) -> Tensor:
        """U: the gradient of pooled features, handed back to every element that was pooled."""
        order = self._order_of(x)
        total = grad_pooled.new_zeros(x.shape)
        grad_max = _natural(grad_pooled[:, 0], x.shape, context, order)
        grad_mean = _natural(grad_pooled[:, 1], x.shape, context, order)
        index = _natural(argmax, x.shape, context, order)
        for (axis, at_max), (_, at_all), (_, position) in zip(grad_max, grad_mean, index, strict=True):
            total += at_all / x.shape[axis]
            total.scatter_add_(axis, position.long(), at_max.contiguous())
        return total

    def _reduce(self, product: Tensor, x: Tensor, context: int) -> Tensor:
        """The gradient of each map of a gate from that of its field."""
        axes = [_AXIS[a] for a in maps.POOLED_AXES[context]]
        return _pack([product.sum(axis) / len(axes) for axis in axes], context, self._order_of(x))

    def pool(self, x: Tensor, context: int, gate: Tensor | None, gate_context: int) -> tuple[Tensor, Tensor]:
        a = x.to(accumulate_dtype(x.dtype))
        if gate is not None:
            a = a * self.field(gate, x, gate_context)
        order = self._order_of(x)
        largest, mean, index = [], [], []
        for letter in maps.POOLED_AXES[context]:
            values, indices = a.max(_AXIS[letter])
            largest.append(values)
            index.append(indices)
            mean.append(a.mean(_AXIS[letter]))
        pooled = torch.stack((_pack(largest, context, order), _pack(mean, context, order)), 1)
        return pooled, _pack(index, context, order).to(maps.index_dtype(x.shape, context))

    def unpool(
        self,
        grad_y: Tensor,
        gate: Tensor,
        grad_pooled: Tensor,
        argmax: Tensor,
        context: int,
        inner_gate: Tensor | None,
        inner_gate_context: int,
        inner_grad_pooled: Tensor | None,
        inner_argmax: Tensor | None,
        inner_context: int,
    ) -> Tensor:
        grad_a = self.unpooled_field(grad_pooled, argmax, grad_y, context)
        if inner_gate is not None:
            grad_a = grad_a * self.field(inner_gate, grad_y, inner_gate_context)
        grad_x = grad_y * self.field(gate, grad_y, context) + grad_a
        if inner_grad_pooled is not None:
            grad_x = grad_x + self.unpooled_field(inner_grad_pooled, inner_argmax, grad_y, inner_context)
        return torch.empty_like(grad_y).copy_(grad_x)

    def unpool_reduce(self, x: Tensor, grad_pooled: Tensor, argmax: Tensor, context: int, gate_context: int) -> Tensor:
        return self._reduce(x * self.unpooled_field(grad_pooled, argmax, x, context), x, gate_context)

    def _segments(self, packed: Tensor, dims) -> list[Tensor]:
        """The maps of a packed [B, M] or [B, 2, M] in stored axes: [B, 1 or 2, *dims]."""
        shapes = [tuple(dims[i : i + 3]) for i in range(0, len(dims), 3)]
        channels = 2 if packed.ndim == 3 else 1
        parts = packed.split([a * b * c for a, b, c in shapes], -1)
        return [part.reshape(part.shape[0], channels, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def conv(self, pooled: Tensor, weight: Sequence[Tensor], dims) -> Tensor:
        """z [B, M] of each map."""
        z = [F.conv3d(m, w.to(m.dtype), padding=1) for m, w in zip(self._segments(pooled, dims), weight, strict=True)]
        return torch.cat([m.flatten(1) for m in z], 1)

    def gate(self, pooled, weight, scale, shift, mean, var, eps, batch, dims) -> tuple[Tensor, Tensor, Tensor]:
        segments = self._segments(self.conv(pooled, weight, dims), dims)
        norm, statistics = pooled.new_empty(len(segments), 4), pooled.new_empty(len(segments), 3)
        for i, z in enumerate(segments):
            fixed = [default if p is None else p.item() for p, default in ((mean[i], 0.0), (var[i], 1.0))]
            of_batch = z.mean().item(), z.var(correction=0).item(), 1 / z.numel()
            statistics[i] = pooled.new_tensor(of_batch if batch[i] else (*fixed, 0.0))
            affine = [default if p is None else p.item() for p, default in ((scale[i], 1.0), (shift[i], 0.0))]
            norm[i] = pooled.new_tensor((statistics[i, 0].item(), (statistics[i, 1] + eps[i]).rsqrt().item(), *affine))
        return self.gate_again(pooled, weight, norm, dims)[0], norm, statistics

    def gate_again(self, pooled: Tensor, weight: Sequence[Tensor], norm: Tensor, dims) -> tuple[Tensor, Tensor]:
        z = self.conv(pooled, weight, dims)
        return self.activate(z, norm, dims), z

    def activate(self, z: Tensor, norm: Tensor, dims) -> Tensor:
        """sigmoid(scale * (z - mean) * rstd + shift)."""
        gates = [
            torch.sigmoid(scale * ((m - mean) * rstd) + shift)
            for m, (mean, rstd, scale, shift) in zip(self._segments(z, dims), norm, strict=True)
        ]
        return torch.cat([m.flatten(1) for m in gates], 1)

    def _pre_activation(self, grad_gate: Tensor, z: Tensor, norm: Tensor, dims) -> list[tuple[Tensor, Tensor]]:
        """du, the gradient of the sigmoid's argument, and xhat, per map."""
        found = []
        for grad, m, (mean, rstd, weight, bias) in zip(
            self._segments(grad_gate, dims), self._segments(z, dims), norm, strict=True
        ):
            xhat = (m - mean) * rstd
            g = torch.sigmoid(weight * xhat + bias)
            found.append((grad * g * (1 - g), xhat))
        return found

    def gate_backward_reduce(self, grad_gate: Tensor, z: Tensor, norm: Tensor, dims) -> Tensor:
        terms = self._pre_activation(grad_gate, z, norm, dims)
        return torch.stack([torch.stack((du.sum(), (du * xhat).sum())) for du, xhat in terms])

    def gate_backward(
        self, grad_gate, z, norm, sums, statistics, pooled, weight, dims
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        if sums is None:
            sums = self.gate_backward_reduce(grad_gate, z, norm, dims)
        terms = self._pre_activation(grad_gate, z, norm, dims)
        grad_pooled, grad_weight = [], []
        for i, ((du, xhat), m) in enumerate(zip(terms, self._segments(pooled, dims), strict=True)):
            mean_du, mean_du_xhat = sums[i] * statistics[i, 2]
            dz = norm[i, 2] * norm[i, 1] * (du - mean_du - xhat * mean_du_xhat)
            grad_pooled.append(torch.nn.grad.conv3d_input(m.shape, weight[i], dz, padding=1).flatten(2))
            grad_weight.append(torch.nn.grad.conv3d_weight(m, (1, 2, 3, 3, 3), dz, padding=1))
        return torch.cat(grad_pooled, 2), grad_weight, sums

    move_statistics_ = staticmethod(move_statistics_)

    def recalibrate(self, x: Tensor, gate: Tensor, context: int) -> Tensor:
        return torch.empty_like(x).copy_(x * self.field(gate, x, context))

    def recalibrate_reduce(self, grad_y: Tensor, x: Tensor, context: int) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        return self._reduce(grad_y.to(dtype) * x.to(dtype), x, context)
