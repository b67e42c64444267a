"""External attention's passes in plain PyTorch: the oracle that every backend's passes are held against.

Each method computes its schema in aia_kernels/schemas.py line by line, with whole tensors and no regard for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aia_kernels.common.dtypes import accumulate_dtype


class PlainDoubleNorm:
    """The passes of DOUBLE_NORM_PASSES and RESIDUAL_PASSES, in any floating-point type."""

    def column_statistics(self, logits: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        shown = _wide(logits)
        if padding is not None:
            shown = shown.masked_fill(padding.unsqueeze(-1), -torch.inf)
        maximum = shown.amax(1)
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0).unsqueeze(1)
        total = (shown - shift).exp().sum(1)
        return torch.stack((maximum, total), 1), maximum + total.log()

    def double_norm_(self, logits: Tensor, lse: Tensor, group: int, eps: float, padding: Tensor | None) -> Tensor:
        log_p = (_wide(logits) - lse.unsqueeze(1)).unflatten(-1, (-1, group))
        if padding is not None:
            log_p = log_p.masked_fill(padding[:, :, None, None], -torch.inf)
        mass = log_p.exp().sum(-1) + eps
        largest = log_p.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        scaled = (log_p - largest).exp()
        attention = scaled / (scaled.sum(-1, keepdim=True) + (eps * (-largest).exp() if eps else 0.0))
        if padding is not None:
            attention = attention.masked_fill(padding[:, :, None, None], 0.0)
        logits.copy_(attention.flatten(-2))
        return mass

    def _row_gradient(self, grad: Tensor, attention: Tensor, group: int) -> Tensor:
        """Q: the gradient of log P with the normalization over tokens held fixed, [B, N, M / group, group]."""
        grad, attention = (_wide(t).unflatten(-1, (-1, group)) for t in (grad, attention))
        return attention * (grad - (grad * attention).sum(-1, keepdim=True))

    def double_norm_backward_reduce(self, grad: Tensor, attention: Tensor, group: int) -> Tensor:
        return self._row_gradient(grad, attention, group).flatten(-2).sum(1)

    def double_norm_backward_(self, grad: Tensor, attention: Tensor, mass: Tensor, reduced: Tensor, group: int) -> None:
        p = (_wide(attention).unflatten(-1, (-1, group)) * mass.unsqueeze(-1)).flatten(-2)
        grad.copy_(self._row_gradient(grad, attention, group).flatten(-2) - p * reduced.unsqueeze(1))

    def residual_relu_(self, z: Tensor, x: Tensor, shift: Tensor | None) -> Tensor:
        total = _wide(z) + (0.0 if shift is None else shift) + _wide(x)
        shown = ~(total <= 0)
        z.copy_(total.where(shown, 0.0))
        return pack_signs(_in_storage(shown, z))

    def residual_relu_backward(self, grad_y: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        shown = torch.empty_like(grad_y, dtype=torch.bool)
        _in_storage(shown, grad_y).copy_(unpack_signs(signs, grad_y.numel()))
        grad = torch.empty_like(grad_y).copy_(grad_y.where(shown, 0.0))
        return grad, _wide(grad).sum((0, 1))


def pack_signs(bits: Tensor) -> Tensor:
    """One bit per element of a flat boolean tensor, lowest bit first."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, count: int) -> Tensor:
    return (signs.unsqueeze(1) >> torch.arange(8, device=signs.device) & 1).bool().flatten()[:count]


def _in_storage(t: Tensor, like: Tensor) -> Tensor:
    """The elements of a [B, N, C] in the order in which ``like`` is stored."""
    return (t if like.is_contiguous() else t.transpose(1, 2)).flatten()


def _wide(t: Tensor) -> Tensor:
    return t.to(accumulate_dtype(t.dtype))
