"""Small layers of external attention as one operator for each direction, where the CPU's passes have them.

For ordinary calls alone, as modules/submodules.read_at_once finds them, which "auto" leaves to plain PyTorch
(choices.fusing_pays): there the operators of a layer and the Python around each are what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms.external_layer import Buffers, ExternalLayerFunction, Plan, forward
from ..backends.choices import FEW_SLOTS
from ..common.functions import apply_of
from ..reference import Norm
from ..reference.norm import is_number_of_batches
from . import plain

_apply = apply_of(ExternalLayerFunction)

#: Elements of x and of the map beyond which operators of PyTorch, which share the work among threads, cost as little;
#: and slots as many as which fewer than FEW_SLOTS count.
MOST_ELEMENTS, _AS_MANY = 32768, 128
#: In 16 bits, which are converted to float32 here, beyond which that costs more than it saves: elements of all weights;
#: and of the plain and of the token form multiplications of a product, twice as many where a backward follows.
_MOST_WEIGHTS, _MOST_PRODUCTS = 2**18, 2**20
#: Multiplications up to which PyTorch has loops of its own for a product in 16 bits, which take 4 us (16^3, as ATen's
#: mkldnn_gemm_min_size); beyond, a call of oneDNN takes 20.
_FEW_PRODUCTS = 2**12


def by_heads(x: Tensor, heads: int, eps: float, *parameters: Tensor | None) -> Tensor:
    """EAMLP's layer on x [B, N, d] without dropouts, as plain.by_heads."""
    first, first_bias, key, key_bias, value, value_bias, last, last_bias = parameters
    rows = x.numel() // x.shape[2] * heads
    passes = _passes(x, rows, key.shape[0], parameters) if x.is_contiguous() else None
    if passes is None:
        return plain.by_heads(x, heads, eps, *parameters)
    layer = first, key, value, value_bias, last, last_bias, None, None, first_bias, key_bias
    return _called(x, Plan(passes, heads, eps), layer, Buffers())


def external_attention(
    x: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, value_bias: Tensor | None
) -> Tensor:
    """o [B, N, v] of x [B, N, d], as plain.external_attention. In float32 four operators of PyTorch cost less."""
    if x.dtype.itemsize < 4 and value.shape[0] == x.shape[2] and x.is_contiguous() and _is_small_in_16_bits(x, key):
        passes = _passes_for(x.dtype, (key, value, value_bias))
        if passes is not None:
            layer = None, key, value, value_bias, None, None, None, None, None, key_bias
            return _called(x, Plan(passes, 1, 0.0), layer, Buffers())
    return plain.external_attention(x, key, value, key_bias, value_bias)


def _is_small_in_16_bits(x: Tensor, key: Tensor) -> bool:
    """Whether plain external attention of 16 bits costs less in float32: what is converted, the map, and the products,
    which a large call has faster in 16 bits, where a call of one costs 20 us."""
    elements, rows = x.numel(), x.numel() // x.shape[2]
    if max(elements, rows * key.shape[0] // 2) > MOST_ELEMENTS:
        return False
    return _FEW_PRODUCTS < rows * key.numel() <= _most_products()


def _most_products() -> int:
    return _MOST_PRODUCTS * (2 if torch.is_grad_enabled() else 1)


def tokens(x: Tensor, eps: float, *parameters: Tensor | None) -> Tensor | None:
    """The layer of a T2T stage on x [B, N, d], h = q_linear(x) and y = h + proj(EA(h)), without dropouts, from the
    weight and the bias of each of its products; None where there is no such operator for it."""
    first, first_bias, key, key_bias, value, value_bias, last, last_bias = parameters
    rows = x.numel() // x.shape[2]
    products = rows * (first.numel() + 2 * key.numel() + last.numel())
    if not x.is_contiguous() or (x.dtype.itemsize < 4 and products > 2 * _most_products()):
        return None
    passes = _passes(x, rows, key.shape[0], parameters)
    if passes is None or last.shape[0] != first.shape[0]:
        return None
    layer = first, key, value, value_bias, last, last_bias, None, None, first_bias, key_bias
    return _called(x, Plan(passes, 1, eps, residual=True), layer, Buffers())


def values_of_maps(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], eps: float, fold: bool
) -> Tensor | None:
    """z = A V^T of EANet's block on x [B, C, H, W], stored as x, before any norm; else as block."""
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    passes = _passes(x, x.numel() // x.shape[1], weights[1].shape[0], weights)
    if passes is None:
        return None
    first, key, value, last = weights if len(weights) == 4 else (*weights, None)
    layer = first, key, value, None, last, None, None, None, *biases
    return _called(x, Plan(passes, 1, eps, fold), layer, Buffers())


def block(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norm: Norm, eps: float, fold: bool
) -> Tensor | None:
    """EANet's block on x [B, C, H, W], y = relu(BN(z) + x), None where there is no such operator for it.

    weights: of the pointwise convolutions, in the order in which they are applied, the last of which may be absent.
    biases: of the first two. norm: over more than one value in each channel. fold: whether the convolutions are folded
    into the memories. The running statistics are moved.
    """
    scale, shift, mean, var, tracked, training, momentum, norm_eps, *_ = norm
    if not plain.moves_at_once(norm) or (mean is not None and not mean.dtype is var.dtype is x.dtype):
        return None
    if training and tracked is not None and not is_number_of_batches(tracked):
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    passes = _passes(x, x.numel() // x.shape[1], weights[1].shape[0], (*weights, scale, shift, mean, var))
    if passes is None:
        return None
    first, key, value, last = weights if len(weights) == 4 else (*weights, None)
    layer = first, key, value, None, last, None, scale, shift, *biases
    if training:
        buffers = Buffers(running=(mean, var) if tracked is None else (mean, var, tracked))
    else:
        buffers = Buffers((mean, var))
    return _called(x, Plan(passes, 1, eps, fold, True, training, norm_eps, momentum or 0.0), layer, buffers)


def _passes(x: Tensor, rows: int, slots: int, tensors: Sequence[Tensor | None]) -> Any:
    """The passes of the CPU, where they have such operators and take a map of so many rows of slots, x and all tensors;
    else None."""
    # A vector is not filled by few slots, which cost as much as so many.
    if max(rows * (slots if slots >= FEW_SLOTS else _AS_MANY), x.numel()) > MOST_ELEMENTS:
        return None
    return _passes_for(x.dtype, tensors)


def _passes_for(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> Any:
    elements = 0
    for t in tensors:
        if t is not None:
            if not t.is_contiguous():
                return None
            elements += t.numel()
    return None if dtype.itemsize < 4 and elements > _MOST_WEIGHTS else plain.passes_of(dtype)


def _called(x: Tensor, plan: Plan, layer: Sequence[Tensor | None], buffers: Buffers) -> Tensor:
    """y, by way of autograd where somebody wants gradients."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in layer)):
        return _apply(x, plan, buffers, *layer)
    return forward(plan, x, layer, buffers)[0]
