"""The passes of Attention in Attention over x and its maps, for both contexts."""

from __future__ import annotations

import torch
from torch import Tensor

from aia_kernels import backends
from aia_kernels.common import maps
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.common.layouts import as_clips

from ..registry.attention_in_attention import UnitCase
from .raw import RawPass

CONTEXTS = {"channel": maps.CHANNEL, "spacetime": maps.SPACETIME}

#: x-sized reads and writes, as beside each schema in aia_kernels/schemas.py; the gate passes touch maps alone.
TRAFFIC = {
    "pool": (1, 0),
    "unpool": (1, 1),
    "unpool_reduce": (1, 0),
    "recalibrate": (1, 1),
    "recalibrate_reduce": (2, 0),
    "gate": (0, 0),
    "gate_again": (0, 0),
    "gate_backward_reduce": (0, 0),
    "gate_backward": (0, 0),
}


def calls(backend: str, case: UnitCase, x: Tensor, grad_y: Tensor) -> dict[str, RawPass]:
    """Name ("pool channel", ...) -> call; where a pass takes a second context it is the other one.

    x and grad_y are [B * T, C, H, W] or [B, C, T, H, W], stored alike.
    """
    passes = backends.passes(backend, "attention_in_attention")
    x, grad_y = as_clips(x, case.segments), as_clips(grad_y, case.segments)
    order = passes.map_order(maps.storage_order(x))
    sizes, like = x.shape, {"device": x.device, "dtype": accumulate_dtype(x.dtype)}
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**like)

    state = {}
    for name, context in CONTEXTS.items():
        pooled, argmax = passes.pool(x, context, None, maps.NONE)
        count = context  # the value of a context is the number of its maps
        dims = [length for lengths in maps.map_dims(sizes, context, order) for length in lengths]
        weight, none = [normal(1, 2, 3, 3, 3) for _ in range(count)], [None] * count
        gated = pooled, weight, none, none, none, none, [1e-5] * count, [True] * count, dims
        _, norm, statistics = passes.gate(*gated)
        gate, z = passes.gate_again(pooled, weight, norm, dims)
        through = normal(*gate.shape), z, norm, None, statistics, pooled, weight, dims
        state[name] = context, pooled, argmax, gate, normal(*pooled.shape), gated, norm, through

    found: dict[str, RawPass] = {}
    for name, other in (("channel", "spacetime"), ("spacetime", "channel")):
        context, pooled, argmax, gate, grad_pooled, gated, norm, through = state[name]
        inner, _, inner_argmax, inner_gate, inner_grad_pooled, *_ = state[other]
        weight, dims = through[-2:]
        back_through_inner = inner_gate, inner, inner_grad_pooled, inner_argmax, inner
        arguments = {
            "pool": (x, context, None, maps.NONE),
            "pool gated": (x, context, inner_gate, inner),
            "unpool": (grad_y, gate, grad_pooled, argmax, context, *back_through_inner),
            "unpool_reduce": (x, grad_pooled, argmax, context, inner),
            "recalibrate": (x, gate, context),
            "recalibrate_reduce": (grad_y, x, context),
            "gate": gated,
            "gate_again": (pooled, weight, norm, dims),
            "gate_backward_reduce": (*through[:3], dims),
            "gate_backward": through,
        }
        for label, given in arguments.items():
            call, moved = getattr(passes, label.split()[0]), sum(TRAFFIC[label.split()[0]]) * case.x_bytes
            found[f"{label} {name}"] = RawPass(lambda call=call, given=given: call(*given), moved)
    return found
