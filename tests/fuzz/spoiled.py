"""Ways to spoil arguments: what else a caller may hand to a raw operator, most of which must be refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int16, torch.int32, torch.bool)


def readable(t: Tensor) -> bool:
    """Whether the elements of t lie inside its storage."""
    if not t.numel():
        return True
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def sliced(r: random.Random, t: Tensor) -> Tensor:
    """The same sizes, cut out of a wider tensor that is stored alike."""
    if not t.ndim:
        return t
    axis = r.randrange(t.ndim)
    wider = torch.cat((t, t.narrow(axis, 0, min(1, t.shape[axis]))), axis)
    return wider.narrow(axis, 0, t.shape[axis])


def permuted(r: random.Random, t: Tensor) -> Tensor:
    return t.permute(r.sample(range(t.ndim), t.ndim))


def stored_otherwise(r: random.Random, t: Tensor) -> Tensor:
    """The same sizes and values in another order of storage."""
    axes = r.sample(range(t.ndim), t.ndim)
    return t.permute(axes).contiguous().permute([axes.index(axis) for axis in range(t.ndim)])


def expanded(r: random.Random, t: Tensor) -> Tensor:
    """Stride 0 along an axis."""
    if not t.numel() or not t.ndim:
        return t
    return t.narrow(r.randrange(t.ndim), 0, 1).expand(t.shape)


def overlapping(r: random.Random, t: Tensor) -> Tensor:
    return t.clone().as_strided(t.shape, [1] * t.ndim) if t.numel() else t


def of_another_type(r: random.Random, t: Tensor) -> Tensor:
    return t.to(r.choice(TYPES))


def shorter(r: random.Random, t: Tensor) -> Tensor:
    """One element less along an axis, perhaps none."""
    if not t.ndim:
        return t[None]
    axis = r.randrange(t.ndim)
    return t.narrow(axis, 0, max(0, t.shape[axis] - 1)).clone() if t.shape[axis] else t


def longer(r: random.Random, t: Tensor) -> Tensor:
    if not t.ndim:
        return t[None]
    axis = r.randrange(t.ndim)
    return torch.cat((t, t.narrow(axis, 0, min(1, t.shape[axis]))), axis)


def of_another_rank(r: random.Random, t: Tensor) -> Tensor:
    return r.choice((t.flatten, lambda: t.unsqueeze(0), lambda: t.unsqueeze(-1), lambda: t.sum()))()


def empty(r: random.Random, t: Tensor) -> Tensor:
    return t.narrow(r.randrange(t.ndim), 0, 0) if t.ndim else t


def misaligned(r: random.Random, t: Tensor) -> Tensor:
    """Between the addresses of its elements, as a tensor made from a buffer of bytes may begin."""
    if t.element_size() == 1 or not t.numel():
        return t
    buffer = bytearray(t.numel() * t.element_size() + 1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    buffer[1:] = bytes(t.contiguous().view(bits).flatten().numpy())
    return torch.frombuffer(buffer, dtype=t.dtype, offset=1).view(t.shape)


def shrunk(r: random.Random, t: Tensor) -> Tensor:
    """Its storage was given back, in part or whole: nobody may read it."""
    copy = t.clone()
    copy.untyped_storage().resize_(r.choice((0, copy.untyped_storage().nbytes() // 2)))
    return copy


def missing(r: random.Random, t: Tensor) -> None:
    return None


TENSOR_WAYS = (
    sliced,
    sliced,
    permuted,
    stored_otherwise,
    expanded,
    overlapping,
    of_another_type,
    shorter,
    longer,
    of_another_rank,
    empty,
    misaligned,
    shrunk,
    missing,
)
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 4, 5, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 2.5)


def spoil(r: random.Random, arguments: list) -> tuple[list, str]:
    """The arguments with one of them, or one in a list of them, spoiled, and in which way."""
    i = r.randrange(len(arguments))
    changed, way = _other(r, arguments[i], [t for t in arguments if isinstance(t, Tensor)])
    return [*arguments[:i], changed, *arguments[i + 1 :]], f"argument {i}: {way}"


def _other(r: random.Random, value: Any, tensors: list[Tensor]) -> tuple[Any, str]:
    if isinstance(value, bool):
        return not value, "flipped"
    if isinstance(value, int):
        return r.choice((*INTEGERS, value + 1, value - 1)), "another integer"
    if isinstance(value, float):
        return r.choice(NUMBERS), "another number"
    if isinstance(value, list):
        kind = r.random()
        if kind < 0.15:
            return value[:-1], "one entry less"
        if kind < 0.3 and value:
            return [*value, value[0]], "one entry more"
        if not value:
            return value, "as it was"
        j = r.randrange(len(value))
        changed, way = _other(r, value[j], [t for t in (*value, *tensors) if isinstance(t, Tensor)])
        return [*value[:j], changed, *value[j + 1 :]], f"entry {j}: {way}"
    if value is None:
        return (r.choice(tensors), "a tensor that is another argument") if tensors else (None, "as it was")
    if not readable(value):
        return value, "as it was"
    if tensors and r.random() < 0.1:
        return r.choice(tensors), "the tensor of another argument"
    way: Callable = r.choice(TENSOR_WAYS)
    return way(r, value), way.__name__
