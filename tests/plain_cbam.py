"""CBAM's passes in plain PyTorch: the oracle that every backend's passes are held against.

Each method computes its schema in aia_kernels/schemas.py line by line, with whole tensors and no regard for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aia_kernels.common.dtypes import accumulate_dtype


class PlainCbam:
    """The passes of schemas.CBAM_PASSES as methods."""

    def cbam_pool_positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.to(accumulate_dtype(x.dtype)).flatten(2)
        maximum, argmax = flat.max(2)
        return torch.stack((maximum, flat.mean(2)), 1), argmax.int()

    def cbam_pool_channels(self, x: Tensor, channel: Tensor | None) -> tuple[Tensor, Tensor]:
        product = x.to(accumulate_dtype(x.dtype)) * of_channels(channel)
        maximum, argmax = product.max(1)
        return torch.stack((maximum, product.mean(1)), 1), argmax.int()

    def cbam_recalibrate(
        self, x: Tensor, channel: Tensor | None, spatial: Tensor | None, confounder: bool
    ) -> list[Tensor]:
        wide = x.to(accumulate_dtype(x.dtype))
        y = wide * of_channels(channel) * (1 if spatial is None else spatial)
        return [y.to(x.dtype), (wide - y).to(x.dtype)] if confounder else [y.to(x.dtype)]

    def cbam_recalibrate_reduce(
        self,
        grad_y: Tensor,
        grad_confounder: Tensor | None,
        x: Tensor,
        channel: Tensor | None,
        spatial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(x.dtype)
        q = (grad_y.to(dtype) - (0 if grad_confounder is None else grad_confounder.to(dtype))) * x.to(dtype)
        return (q * (1 if spatial is None else spatial)).sum((2, 3)), (q * of_channels(channel)).sum(1, keepdim=True)

    def cbam_unpool_reduce(self, x: Tensor, grad_spatial: Tensor, spatial_argmax: Tensor) -> Tensor:
        return (x.to(accumulate_dtype(x.dtype)) * self.unpooled_channels(x, grad_spatial, spatial_argmax)).sum((2, 3))

    def cbam_unpool(
        self,
        grad_y: Tensor,
        grad_confounder: Tensor | None,
        channel: Tensor | None,
        grad_channel: Tensor | None,
        channel_argmax: Tensor | None,
        spatial: Tensor | None,
        grad_spatial: Tensor | None,
        spatial_argmax: Tensor | None,
    ) -> Tensor:
        rest = 0 if grad_confounder is None else grad_confounder.to(accumulate_dtype(grad_y.dtype))
        guided = grad_y.to(accumulate_dtype(grad_y.dtype)) - rest
        if spatial is not None:
            guided = guided * spatial + self.unpooled_channels(grad_y, grad_spatial, spatial_argmax)
        if channel is not None:
            guided = guided * of_channels(channel) + self.unpooled_positions(grad_y, grad_channel, channel_argmax)
        return (guided + rest).to(grad_y.dtype)

    def cbam_channel_gate(
        self, pooled: Tensor, weight_1: Tensor, bias_1: Tensor | None, weight_2: Tensor, bias_2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden = (pooled @ weight_1.mT + (0 if bias_1 is None else bias_1)).relu()
        return hidden, (hidden @ weight_2.mT + (0 if bias_2 is None else bias_2)).sum(1).sigmoid()

    def cbam_channel_gate_backward(
        self, grad_channel: Tensor, pooled: Tensor, hidden: Tensor, channel: Tensor, weight_1: Tensor, weight_2: Tensor
    ) -> tuple[Tensor, ...]:
        grad = grad_channel * channel * (1 - channel)
        of_hidden = torch.where(hidden <= 0, 0.0, (grad @ weight_2).unsqueeze(1))
        of_weight_1 = (of_hidden.mT @ pooled).sum(0)
        of_weight_2 = grad.mT @ hidden.sum(1)
        of_biases = of_hidden.sum((0, 1)), grad.sum(0) * hidden.shape[1]
        return of_hidden @ weight_1, of_weight_1, of_biases[0], of_weight_2, of_biases[1]

    @staticmethod
    def unpooled_channels(x: Tensor, grad: Tensor, argmax: Tensor) -> Tensor:
        """U of the spatial features [B, 2, H, W]: [B, C, H, W]."""
        here = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1) == argmax.unsqueeze(1)
        return grad[:, 1:] / x.shape[1] + here * grad[:, :1]

    @staticmethod
    def unpooled_positions(x: Tensor, grad: Tensor, argmax: Tensor) -> Tensor:
        """U of the channel features [B, 2, C]: [B, C, H, W]."""
        positions = x.shape[2] * x.shape[3]
        here = torch.arange(positions, device=x.device) == argmax.unsqueeze(2)
        return (grad[:, 1].unsqueeze(2) / positions + here * grad[:, 0].unsqueeze(2)).view(x.shape)


def of_channels(channel: Tensor | None) -> Tensor | int:
    return 1 if channel is None else channel[:, :, None, None]
