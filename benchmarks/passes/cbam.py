"""The passes of CBAM on x, of both gates and their gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from aia_kernels import backends
from aia_kernels.common.dtypes import accumulate_dtype

from ..registry.cbam import GatesCase
from .raw import RawPass

#: x-sized reads and writes, as beside each schema in aia_kernels/schemas.py; a gate touches pooled features alone.
TRAFFIC = {
    "cbam_pool_positions": (1, 0),
    "cbam_pool_channels": (1, 0),
    "cbam_recalibrate": (1, 1),
    "cbam_recalibrate_reduce": (2, 0),
    "cbam_unpool_reduce": (1, 0),
    "cbam_unpool": (1, 1),
    "cbam_channel_gate": (0, 0),
    "cbam_channel_gate_backward": (0, 0),
    "cbam_convolve": (0, 0),
    "cbam_convolve_backward": (0, 0),
}


def calls(backend: str, case: GatesCase, x: Tensor, grad_y: Tensor) -> dict[str, RawPass]:
    """Name -> call, of those that the backend has."""
    passes, (b, c, h, w) = backends.passes(backend, "cbam"), x.shape
    like, generator = {"device": x.device, "dtype": accumulate_dtype(x.dtype)}, torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**like)

    channel, spatial, weight = normal(b, c).sigmoid(), normal(b, 1, h, w).sigmoid(), normal(1, 2, 7, 7)
    _, channel_argmax = passes.cbam_pool_positions(x)
    pooled, spatial_argmax = passes.cbam_pool_channels(x, channel)
    grad_channel, grad_spatial = normal(b, 2, c), normal(b, 2, h, w)
    # The MLP, with the published ratio.
    of_pools, hidden = normal(b, 2, c), normal(b, 2, max(1, c // 16)).relu()
    first, second = normal(hidden.shape[2], c), normal(c, hidden.shape[2])
    arguments = {
        "cbam_pool_positions": (x,),
        "cbam_pool_channels": (x, channel),
        "cbam_recalibrate": (x, channel, spatial, False),
        "cbam_recalibrate_reduce": (grad_y, None, x, channel, spatial),
        "cbam_unpool_reduce": (x, grad_spatial, spatial_argmax),
        "cbam_unpool": (grad_y, None, channel, grad_channel, channel_argmax, spatial, grad_spatial, spatial_argmax),
        "cbam_channel_gate": (of_pools, first, None, second, None),
        "cbam_channel_gate_backward": (normal(b, c), of_pools, hidden, channel, first, second),
        "cbam_convolve": (pooled, weight),
        "cbam_convolve_backward": (spatial, pooled, weight),
    }
    return {
        name: RawPass(partial(getattr(passes, name), *given), sum(TRAFFIC[name]) * case.x_bytes)
        for name, given in arguments.items()
        if hasattr(passes, name)
    }
