"""External attention of ordinary calls on a CPU: the layers in as few operators of PyTorch as there can be.

Where there is too little to fuse, a call is what its operators and the Python around them take. So these are not the
published sequences but shorter ones, of the same numbers. They check nothing, and are for plain tensors of one type in
eager mode: they may look at sizes and values. The type is float32 or float64; in an ordinary call of a layer bfloat16
and float16 too, which are normalized in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..algorithms import few_slots, safe_normalization
from ..algorithms.double_normalization import NormalizeFunction
from ..backends.choices import FEW_SLOTS
from ..common.tracing import is_statically, is_symbolic, needs_reference
from ..operators import external_attention as operators
from ..reference import Norm
from ..reference.norm import updates, uses_batch
from .sharded import PLAIN

FAMILY = "external_attention"

#: torch takes softmaxes over few elements that lie side by side row by row, each as long as one over a vector of them.
#: So with fewer slots than FEW_SLOTS two softmaxes are slow from so many rows on; eight times as many where a backward
#: follows, as what takes their place has a longer one. Without one they are not slow up to so many elements either.
_FEW_ROWS, _FEW_ROWS_FOLLOWED, _FEW_ELEMENTS = 32, 256, 400
#: Elements of a map beyond which one operator costs less than those of PyTorch: where no backward follows, and in 16
#: bits, with a Function around it, where one does. Time by PyTorch's over time by the operator, of whole layers on an
#: AMD EPYC with AVX-512: an evaluation 0.88 to 0.99 at up to 4096 elements, 1.03 to 1.2 from 6272 on; a step in
#: bfloat16 0.93 at 12,544, 1.0 at 50,000, 1.03 at 100,000. And of a map that is rather overwritten than made anew.
_SMALL_MAP, _SMALL_NARROW_STEP, _MAP_IN_CACHE = 4096, 32768, 2**20
#: Elements of a map of 16 bits up to which a compiler's own loops cost less than two calls of the package's operators.
_SMALL_COMPILED_MAP = 65536
#: The same as safe_normalization.SMALL_MAP for 16 bits: a division takes a conversion more, as it works in place.
_SMALL_NARROW_MAP = 32768
#: The same for tokens of so many slots: a softmax along long rows costs little beside its exponentials.
_MANY_SLOTS, _MAP_OF_MANY_SLOTS = 256, 65536
#: Tokens of one slot from which a softmax over them is faster where they are the last axis.
_MANY_TOKENS = 4096

#: The types whose sums are accumulated in themselves; and those too that are normalized in float32.
WIDE = frozenset((torch.float32, torch.float64))
FLOATING = WIDE | {torch.bfloat16, torch.float16}


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether operators of PyTorch compute a layer of x on a CPU and lose nothing: plain tensors of one type in which
    sums are exact enough, and a call that is not recorded, transformed or cast."""
    # This runs in every call, so nothing here is a call that need not be one.
    dtype = x.dtype
    if dtype not in WIDE or x.layout is not torch.strided or x.is_nested:
        return False
    for t in (x, *parameters):
        if t is not None and (type(t) not in PLAIN or t.dtype is not dtype or not t.is_cpu):
            return False
    return not (torch.is_autocast_enabled("cpu") or is_symbolic() or needs_reference())


def double_normalize(logits: Tensor, eps: float = 0.0, tokens: int = -2, slots: int = -1) -> Tensor:
    """A of functional.double_normalize, without padding and groups.

    Without eps A is a softmax over slots of the logarithm of P: two operators forward and two backward, where a
    softmax, a sum and a division are three and some ten. Where no backward follows that saves little, and a division is
    faster than an exponential; where few slots lie side by side a softmax over them is slow. The sums are then looked
    at, and A made of logarithms if one is too small to divide by.

    Args:
        logits: Of any floating-point type; those of 16 bits are normalized in float32.
        eps: Added to the sum over slots.
        tokens: The axis of the tokens.
        slots: The axis of the slots.

    Returns:
        A, in the shape and type of the logits.
    """
    followed = torch.is_grad_enabled() and logits.requires_grad
    count, last = logits.shape[slots], slots in (-1, logits.ndim - 1)
    narrow = logits.dtype.itemsize < 4
    slow = last and count < FEW_SLOTS and not _are_few(logits.numel() // count, count, followed)
    small = _SMALL_NARROW_MAP if narrow else safe_normalization.SMALL_MAP
    small = _MAP_OF_MANY_SLOTS if last and count >= _MANY_SLOTS else small
    if count == 1 and not eps and (slow or narrow):
        # A P that is rounded to one would have a gradient, where a backward follows.
        wide = logits.float() if narrow and followed else logits
        attention = _of_one_slot(wide, tokens % logits.ndim, slots % logits.ndim)
    elif not (eps or slow) and (followed or logits.numel() <= small):
        attention = safe_normalization.by_two_softmaxes(logits, tokens, slots)
    else:
        attention, _mass = safe_normalization.by_sums(logits, tokens, slots, eps, kept=followed)
    return attention.to(logits.dtype) if narrow else attention


def _are_few(rows: int, slots: int, followed: bool) -> bool:
    if followed:
        return rows <= _FEW_ROWS_FOLLOWED
    return rows <= _FEW_ROWS or rows * slots <= _FEW_ELEMENTS


def _of_one_slot(logits: Tensor, tokens: int, slots: int) -> Tensor:
    """P / P: one, or NaN. As a bound on P it needs no sum, divides no zero by zero, and has the gradient zero."""
    if logits.numel() < _MANY_TOKENS:
        return logits.softmax(tokens).clamp_min(1)
    return logits.squeeze(slots).softmax(tokens - (tokens > slots)).clamp_min(1).unsqueeze(slots)


def _normalized(logits: Tensor, eps: float) -> Tensor:
    """A of logits [B, N, S] or [B, N, heads, S], which it may overwrite."""
    slots, followed = logits.shape[-1], torch.is_grad_enabled() and logits.requires_grad
    elements, narrow = logits.numel(), logits.dtype.itemsize < 4
    if narrow:
        few = slots < FEW_SLOTS and not _are_few(elements // slots, slots, True)
        by_torch = slots == 1 or (followed and not few and elements <= _SMALL_NARROW_STEP)
    else:
        by_torch = followed or slots < FEW_SLOTS or elements <= _SMALL_MAP
    if by_torch or (passes := passes_of(logits.dtype)) is None:
        return double_normalize(logits, eps, tokens=1)
    if followed:
        return NormalizeFunction.apply(logits.contiguous(), passes, eps)
    if narrow or elements <= _MAP_IN_CACHE:
        with torch._C._AutoDispatchBelowAutograd():
            return passes.double_normalize(logits.contiguous(), eps)[0]
    rows = logits.view(*logits.shape[:2], -1)
    _, lse = passes.column_statistics(rows, None)
    passes.double_norm_(rows, lse, slots, eps, None)
    return logits


@functools.cache
def passes_of(dtype: torch.dtype) -> Any:
    """The passes that "auto" takes on a CPU for a type; None where it has none."""
    return None if backends.why_not("cpu", "cpu", dtype, FAMILY) else backends.passes("cpu", FAMILY)


def external_attention(
    x: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, value_bias: Tensor | None, eps: float = 0.0
) -> Tensor:
    """o [B, N, v] of x [B, N, d], key [S, d] and value [v, S], as functional.external_attention."""
    if not 1 < key.shape[0] < FEW_SLOTS or key_bias is not None or x.dtype not in WIDE:
        return F.linear(_normalized(F.linear(x, key, key_bias), eps), value, value_bias)
    followed = torch.is_grad_enabled() and (
        x.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (value_bias is not None and value_bias.requires_grad)
    )
    if _are_few(x.shape[0] * x.shape[1], key.shape[0], followed):
        return F.linear(double_normalize(F.linear(x, key), eps), value, value_bias)
    if followed:
        return few_slots.FewSlotsFunction.apply(x, key, value, value_bias, eps)
    return few_slots.forward(x, key, value, value_bias, eps)


def for_a_compiler(x: Tensor, key: Tensor, value: Tensor, value_bias: Tensor | None, eps: float, heads: int) -> Tensor:
    """The same as a program that is compiled; of several heads that share both memories, value_bias [heads * v]. It has
    no argument by default, as torch.compile guards one in every call."""
    if heads > 1:
        rows = x.unflatten(2, (heads, -1))
        o = F.linear(_normalized_by_a_compiler(F.linear(rows, key), eps), value).flatten(2)
        return o if value_bias is None else o + value_bias
    if key.shape[0] < FEW_SLOTS and x.dtype.itemsize > 2 and not torch.is_grad_enabled():
        return few_slots.forward(x, key, value, value_bias, eps)
    return F.linear(_normalized_by_a_compiler(F.linear(x, key), eps), value, value_bias)


def _normalized_by_a_compiler(logits: Tensor, eps: float) -> Tensor:
    """A of logits [B, N, S] or [B, N, heads, S]."""
    if logits.dtype.itemsize > 2:  # a size of a type needs no guard
        return safe_normalization.for_a_compiler(logits, 1, -1, eps)
    large = is_statically(logits.numel() > _SMALL_COMPILED_MAP)
    if large and backends.select(logits.device, logits.dtype, FAMILY) == "cpu":
        return operators.double_normalize(logits.contiguous(), eps)[0]
    return safe_normalization.for_a_compiler(logits.float(), 1, -1, eps).to(logits.dtype)


def by_heads(x: Tensor, heads: int, eps: float, *parameters: Tensor | None) -> Tensor:
    """EAMLP's layer on x [B, N, d] without dropouts, from the weight and the bias of each of its products: to all
    heads, the memories that these share, and back. The heads are an axis behind the tokens, so nothing is turned."""
    b, n, _ = x.shape
    first, first_bias, key, key_bias, value, value_bias, last, last_bias = parameters
    rows = F.linear(x, first, first_bias).view(b, n, heads, -1)
    normalize = _normalized_by_a_compiler if torch.compiler.is_compiling() else _normalized
    attention = normalize(F.linear(rows, key, key_bias), eps)
    return F.linear(F.linear(attention, value, value_bias).view(b, n, -1), last, last_bias)


def values_of_maps(x: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """A V^T as maps [B, v, ...] of maps x [B, C, ...], key [S, C] and value [v, S]."""
    b, channels, *sizes = x.shape
    if b == 1 and _is_dense(x):  # products of matrices, and no axis to expand and to sum over
        attention = double_normalize(key @ x.view(channels, -1), eps, tokens=1, slots=0)
        return _as_maps(_stored_as(x, value, attention), sizes)
    attention = double_normalize(torch.bmm(key.expand(b, -1, -1), x.flatten(2)), eps, tokens=2, slots=1)
    return _stored_as(x, value.expand(b, -1, -1), attention).unflatten(2, sizes)


def values_unfolded(
    x: Tensor, weights: Sequence[Tensor], biases: tuple[Tensor | None, Tensor | None], eps: float
) -> Tensor:
    """The same of maps x [B, C, H, W] by the pointwise convolutions of which K and V would be folded: two with their
    biases to the logits, and one or two behind."""
    b, channels, *sizes = x.shape
    # A convolution costs more than a product of matrices; but a compiler knows how to make the best of it.
    if b == 1 and not torch.compiler.is_compiling() and _is_dense(x):
        first, second, value, *last = (weight.view(weight.shape[0], -1) for weight in weights)
        logits = _with_bias(second, _with_bias(first, x.view(channels, -1), biases[0]), biases[1])
        z = _stored_as(x, value, double_normalize(logits, eps, tokens=1, slots=0))
        return _as_maps(_stored_as(x, last[0], z) if last else z, sizes)
    first, second, value, *last = weights
    logits = F.conv1d(F.conv2d(x, _of_rank(first, 4), biases[0]).flatten(2), _of_rank(second, 3), biases[1])
    z = F.conv1d(double_normalize(logits, eps, tokens=2, slots=1), _of_rank(value, 3))
    maps = z.reshape(*z.shape[:2], *sizes)
    return F.conv2d(maps, _of_rank(last[0], 4)) if last else maps


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _stored_as(x: Tensor, matrix: Tensor, t: Tensor) -> Tensor:
    """matrix @ t, its columns side by side if x is in channels_last: what is added to x needs no other order then."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return matrix @ t
    return (t.mT @ matrix.mT).mT


def _as_maps(z: Tensor, sizes: Sequence[int]) -> Tensor:
    """z [v, N] of one sample as maps [1, v, ...], with the strides that these have in either order."""
    return z.view(1, -1, *sizes) if z.is_contiguous() else z.mT.view(1, *sizes, -1).movedim(-1, 1)


def _with_bias(matrix: Tensor, t: Tensor, bias: Tensor | None) -> Tensor:
    return matrix @ t if bias is None else torch.addmm(bias.unsqueeze(1), matrix, t)


def _of_rank(weight: Tensor, rank: int) -> Tensor:
    """The weight of a pointwise convolution, of another rank."""
    return weight if weight.ndim == rank else weight.reshape(*weight.shape[:2], *(1,) * (rank - 2))


def batch_norm(z: Tensor, norm: Norm) -> Tensor:
    """BN of z [B, C, ...] by fixed statistics; or by those of the batch, of more than one value in each channel, with
    the running ones moved by a momentum that is a number (moves_at_once)."""
    weight, bias, mean, var, tracked, training, momentum, eps, *_ = norm
    if training and tracked is not None:
        tracked.add_(1)
    return torch.batch_norm(z, weight, bias, mean, var, training, momentum or 0.0, eps, False)


def moves_at_once(norm: Norm) -> bool:
    """Whether batch_norm serves BN as it is set."""
    fixed = not uses_batch(norm)
    return fixed or (updates(norm) and norm.momentum is not None and norm.process_group is None)
