"""The fused passes of external attention on memories of a layer's size; see
aia_kernels/algorithms/external_attention_passes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from aia_kernels import backends
from aia_kernels.algorithms.external_attention_passes import DoubleNorm
from aia_kernels.common.dtypes import accumulate_dtype
from aia_kernels.common.layouts import as_tokens

from ..registry.external_attention import LayerCase
from .raw import RawPass


def calls(backend: str, case: LayerCase, x: Tensor, grad_y: Tensor) -> dict[str, RawPass]:
    """Name -> call. A pass that overwrites what another made is timed together with that one ("a + b").

    The bytes are those of x, of o and of the attention map, each read or written once a pass.
    """
    passes = backends.passes(backend, "external_attention")
    block = x.ndim == 4
    tokens, grad = (as_tokens(x), as_tokens(grad_y)) if block else (x, grad_y)
    columns, group = case.slots
    norm = DoubleNorm(group, 1e-9, None)
    width, like = tokens.shape[2], {"device": x.device, "dtype": accumulate_dtype(x.dtype)}
    generator = torch.Generator().manual_seed(2)
    key = (torch.randn(1, columns, width, generator=generator) / width**0.5).to(x)
    value = (torch.randn(1, width, columns, generator=generator) / columns**0.5).to(x)
    shift, residual = torch.zeros(width, **like), tokens if block else None

    def attend() -> tuple[Tensor, Tensor]:
        logits, _, lse = passes.logits(tokens, key, padding=None)
        return passes.normalize(logits, lse, norm=norm)

    def values() -> tuple[Tensor, Tensor | None]:
        return passes.values(attention, value, norm=norm, bias=shift, residual=residual)

    def value_gradient() -> tuple[Tensor, Tensor | None]:
        return passes.value_gradient(grad, attention, shape=value.shape, norm=norm, origin=origin, needs_sums=True)

    def gradient() -> tuple[object, Tensor]:
        return passes.attention_gradient(grad, attention, value=value, norm=norm)

    def back() -> tuple[Tensor, Tensor]:
        made, _ = gradient()
        return passes.logits_gradient(made, attention, reduced=reduced, x=tokens, key=key, norm=norm, needs_x=True)

    attention = attend()
    reduced = gradient()[1]
    origin = torch.zeros(columns, **like) if block else None
    # Beside each call how often it meets x or o, and how often the attention map.
    found = {
        "logits": (lambda: passes.logits(tokens, key, padding=None), 1, 1),
        "logits + normalize": (attend, 1, 3),
        "values": (values, 1 + block, 1),
        "value_gradient": (value_gradient, 1, 1),
        "attention_gradient": (gradient, 1, 2),
        "attention_gradient + logits_gradient": (back, 3, 4),
    }
    if block:
        _, signs = values()
        found["moments"] = (lambda: passes.moments(attention, norm=norm), 0, 2)
        found["signed"] = (lambda: passes.signed(grad, signs), 2, 0)
    map_bytes = case.x_bytes * columns // width
    return {
        name: RawPass(call, met * case.x_bytes + maps_met * map_bytes) for name, (call, met, maps_met) in found.items()
    }
