"""The raw passes of a backend on one input, each as a call with real arguments: what run --passes measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aia_kernels import backends, maps
from aia_kernels.attention_in_attention import as_clips

CONTEXTS = {"channel": maps.CHANNEL, "spacetime": maps.SPACETIME}


def calls(backend: str, x: Tensor, grad_y: Tensor, num_segments: int) -> dict[str, Callable[[], object]]:
    """Name ("pool channel", ...) -> call, for both contexts; where a pass takes a second context it is the other one.

    x and grad_y are [B * T, C, H, W] or [B, C, T, H, W], stored alike.
    """
    passes = backends.passes(backend)
    x, grad_y = as_clips(x, num_segments), as_clips(grad_y, num_segments)
    order = passes.map_order(maps.storage_order(x))
    sizes, like = x.shape, {"device": x.device, "dtype": maps.accumulate_dtype(x.dtype)}
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**like)

    state = {}
    for name, context in CONTEXTS.items():
        pooled, argmax = passes.pool(x, context, None, maps.NONE)
        count = context  # the value of a context is the number of its maps
        dims = [length for lengths in maps.map_dims(sizes, context, order) for length in lengths]
        weight = normal(count, 2, 3, 3, 3)
        z, moments = passes.gate_conv(pooled, weight, dims)
        ones, zeros = torch.ones(count, 1, **like), torch.zeros(count, 1, **like)
        norm = torch.cat((moments[:, :1], (moments[:, 1:] + 1e-5).rsqrt(), ones, zeros), 1)
        gate = passes.gate_activate(z, norm, dims)
        state[name] = (context, pooled, argmax, dims, weight, z, norm, gate, normal(*gate.shape), normal(*pooled.shape))

    found: dict[str, Callable[[], object]] = {}
    for name, other in (("channel", "spacetime"), ("spacetime", "channel")):
        context, pooled, argmax, dims, weight, z, norm, gate, grad_gate, grad_pooled = state[name]
        inner, _, inner_argmax, _, _, _, _, inner_gate, _, inner_grad_pooled = state[other]
        correction = torch.zeros(context, 2, **like)
        back_through_inner = inner_gate, inner, inner_grad_pooled, inner_argmax, inner
        arguments = {
            "pool": (x, context, None, maps.NONE),
            "pool gated": (x, context, inner_gate, inner),
            "unpool": (grad_y, gate, grad_pooled, argmax, context, *back_through_inner),
            "unpool_reduce": (x, grad_pooled, argmax, context, inner),
            "recalibrate": (x, gate, context),
            "recalibrate_reduce": (grad_y, x, context),
            "gate_conv": (pooled, weight, dims),
            "gate_activate": (z, norm, dims),
            "gate_backward_reduce": (grad_gate, z, norm, dims),
            "gate_backward": (grad_gate, z, norm, correction, pooled, weight, dims),
        }
        for label, given in arguments.items():
            call = getattr(passes, label.split()[0])
            found[f"{label} {name}"] = lambda call=call, given=given: call(*given)
    return found
