"""External attention of small inputs: the layers in as few operators of PyTorch as there can be.

Where there is too little to fuse, a call is what its operators and the Python around them take. So these are not the
published sequences but shorter ones, of the same numbers. They check nothing, and are for plain tensors of one type,
float32 or float64, in eager mode: they may look at sizes and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import Norm

#: Below this sum a term of it may have been too small to be a normal number.
_SAFE_MASS = {torch.float32: 2.0**-60, torch.float64: 2.0**-512}
#: torch takes softmaxes over few elements that lie side by side row by row, each as long as one over a vector of them.
#: With fewer slots than these, and more rows, it is faster to have the tokens side by side.
_FEW_SLOTS, _FEW_ROWS = 16, 32
#: Elements of a map beyond which a second softmax costs more than to look at the sums, where no backward follows.
_SMALL_MAP = 16384


def double_normalize(logits: Tensor, eps: float = 0.0, tokens: int = -2, slots: int = -1) -> Tensor:
    """A of functional.double_normalize, without padding and groups.

    Without eps A is a softmax over slots of the logarithm of P: two operators forward and two backward, where a
    softmax, a sum and a division are three and some ten. Where no backward follows that saves little, and a division is
    faster than an exponential; where few slots lie side by side a softmax over them is slow. The sums are then looked
    at, and A made of logarithms if one is too small to divide by.

    Args:
        logits: float32 or float64.
        eps: Added to the sum over slots.
        tokens: The axis of the tokens.
        slots: The axis of the slots.

    Returns:
        A, in the shape and type of the logits.
    """
    followed = torch.is_grad_enabled() and logits.requires_grad
    count, last = logits.shape[slots], slots in (-1, logits.ndim - 1)
    slow = last and count < _FEW_SLOTS and logits.numel() > _FEW_ROWS * count
    if not (eps or slow) and (followed or logits.numel() <= _SMALL_MAP):
        return logits.log_softmax(tokens).softmax(slots)
    p = logits.softmax(tokens)
    mass = p.sum(slots, keepdim=True)
    if eps:
        mass.add_(eps)
    elif not mass.amin().item() >= _SAFE_MASS[logits.dtype]:
        return logits.log_softmax(tokens).softmax(slots)
    return p / mass if followed else p.div_(mass)


def external_attention(
    x: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, value_bias: Tensor | None, eps: float = 0.0
) -> Tensor:
    """o [B, N, v] of x [B, N, d], key [S, d] and value [v, S], as functional.external_attention."""
    b, n, _ = x.shape
    if eps or key_bias is not None or not 1 < key.shape[0] < _FEW_SLOTS or b * n <= _FEW_ROWS:
        return F.linear(double_normalize(F.linear(x, key, key_bias), eps), value, value_bias)
    if b == 1:  # products of matrices, and no axis to expand and to sum over
        o = (double_normalize(key @ x[0].mT, tokens=1, slots=0).mT @ value.mT).unsqueeze(0)
    else:
        attention = double_normalize(torch.bmm(key.expand(b, -1, -1), x.mT), tokens=2, slots=1)
        o = torch.bmm(attention.mT, value.mT.expand(b, -1, -1))
    return o if value_bias is None else o + value_bias


def by_heads(x: Tensor, heads: int, eps: float, *parameters: Tensor | None) -> Tensor:
    """EAMLP's layer on x [B, N, d] without dropouts, from the weight and the bias of each of its products: to all
    heads, the memories that these share, and back. The heads are an axis behind the tokens, so nothing is turned."""
    b, n, _ = x.shape
    first, first_bias, key, key_bias, value, value_bias, last, last_bias = parameters
    rows = F.linear(x, first, first_bias).view(b, n, heads, -1)
    attention = double_normalize(F.linear(rows, key, key_bias), eps, tokens=1, slots=3)
    return F.linear(F.linear(attention, value, value_bias).view(b, n, -1), last, last_bias)


def values_of_maps(x: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """A V^T as maps [B, v, ...] of maps x [B, C, ...], key [S, C] and value [v, S]."""
    b, channels, *sizes = x.shape
    if b == 1 and x.is_contiguous():  # a product of matrices, and no axis to expand and to sum over
        attention = double_normalize(key @ x.view(channels, -1), eps, tokens=1, slots=0)
        return (value @ attention).view(1, -1, *sizes)
    attention = double_normalize(torch.bmm(key.expand(b, -1, -1), x.flatten(2)), eps, tokens=2, slots=1)
    return torch.bmm(value.expand(b, -1, -1), attention).view(b, -1, *sizes)


def values_by_convolutions(
    x: Tensor, weights: Sequence[Tensor], biases: tuple[Tensor | None, Tensor | None], eps: float
) -> Tensor:
    """The same of maps x [B, C, H, W] by the convolutions of which K and V would be folded: two with their biases to
    the logits, and one or two behind."""
    first, second, value, *last = weights
    logits = F.conv1d(F.conv2d(x, _of_rank(first, 4), biases[0]).flatten(2), _of_rank(second, 3), biases[1])
    z = F.conv1d(double_normalize(logits, eps, tokens=2, slots=1), _of_rank(value, 3))
    maps = z.reshape(*z.shape[:2], *x.shape[2:])
    return F.conv2d(maps, _of_rank(last[0], 4)) if last else maps


def _of_rank(weight: Tensor, rank: int) -> Tensor:
    """The weight of a pointwise convolution, of another rank."""
    return weight if weight.ndim == rank else weight.reshape(*weight.shape[:2], *(1,) * (rank - 2))


def batch_norm(z: Tensor, norm: Norm) -> Tensor:
    """BN of z [B, C, ...] by fixed statistics."""
    weight, bias, mean, var, *_ = norm
    return torch.batch_norm(z, weight, bias, mean, var, False, 0.0, norm.eps, False)
