"""The arguments of external attention's functions, held to what is expected before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.autocast import autocast_dtype
from ..reference import Norm
from ..reference.norm import uses_batch
from . import sharded
from .block import ACTIVATIONS
from .checks import check_integer, check_number, check_tensor


def check_block(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    norm: Norm | Callable[[Tensor], Tensor] | None,
    eps: float,
    value_bias: Tensor | None,
    activation: str | Callable[[Tensor], Tensor] | None,
    residual: bool | Tensor,
) -> int:
    """The channels of the block's result, after every argument but x was held to what is expected."""
    for name, memory in (("key", key), ("value", value)):
        check_tensor(name, memory)
        if memory.ndim != 2:
            raise ValueError(
                f"{name}: got shape {tuple(memory.shape)}, expected [{'S, C' if name == 'key' else 'C, S'}]"
            )
    check_parameter("key", key, x, ((key.shape[0], x.shape[1]),))
    check_slots("key", key.shape[0])
    channels = x.shape[1] if residual is True else value.shape[0]
    check_parameter("value", value, x, ((channels, key.shape[0]),))
    check_parameter("value_bias", value_bias, x, ((channels,),))
    _check_norm(norm, x, channels)
    _check_activation(activation)
    _check_residual(residual, x, channels)
    check_eps(eps)
    return channels


def check_parameter(name: str, p: Tensor | None, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """A parameter has one of the shapes, the device of x and its type; under autocast also float32."""
    if p is None or (_is_ordinary(p) and p.dtype == x.dtype and p.device == x.device and p.shape in shapes):
        return
    check_tensor(name, p)
    sharded.refuse_distributed(name, p)
    if p.device != x.device:
        raise ValueError(f"{name}: got device {p.device}, expected that of x, {x.device}")
    autocast = autocast_dtype(x)
    if p.dtype not in ((x.dtype,) if autocast is None else (x.dtype, torch.float32, autocast)):
        raise TypeError(f"{name}: got {p.dtype}, expected {x.dtype}, as x is")
    if all(tuple(p.shape) != tuple(shape) for shape in shapes):
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name}: got shape {tuple(p.shape)}, expected {expected}")


def _is_ordinary(t: Tensor) -> bool:
    """Whether check_tensor takes t as it would nearly all that come, told at a glance."""
    return sharded.is_plain(t) and t.layout == torch.strided and not t.is_nested


def checked_heads(heads: int, x: Tensor) -> int:
    """The number of heads, a divisor of the features of x [B, N, d], of which there is one at least."""
    heads = check_integer("heads", heads)
    if heads < 1:
        raise ValueError(f"heads: got {heads}, expected at least 1")
    d = x.shape[2]
    if d < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one feature")
    if d % heads:
        raise ValueError(f"x: got {d} features, expected a multiple of heads = {heads}")
    return heads


def checked_dims(dims: tuple[int, int], rank: int) -> tuple[int, int]:
    """The axes of the softmax and of the sum, counted from the first."""
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        raise ValueError(f"dims: got {dims!r}, expected the axis of the softmax and that of the sum")
    first, second = (check_integer("dims", dim) for dim in dims)
    if not all(-rank <= dim < rank for dim in (first, second)) or first % rank == second % rank:
        raise ValueError(f"dims: got {dims!r}, expected two axes of the {rank} of the logits")
    return first % rank, second % rank


def check_slots(name: str, slots: int) -> None:
    if slots < 1:
        raise ValueError(f"{name}: got {slots} slots, expected at least 1")


def check_memories(x: Tensor, key: Tensor, value: Tensor, heads: int) -> int:
    """The number of slots of memories that fit x and each other."""
    for name, memory in (("memory_key", key), ("memory_value", value)):
        check_tensor(name, memory)
        if memory.ndim not in (2, 3, 4):
            rest = "S, d / heads" if name == "memory_key" else "v, S"
            expected = f"[{rest}], [heads, {rest}] or [B, heads, {rest}]"
            raise ValueError(f"{name}: got shape {tuple(memory.shape)}, expected {expected}")
    slots, v, features = key.shape[-2], value.shape[-2], x.shape[2] // heads
    leading = (), (heads,), (x.shape[0], heads), (x.shape[0], 1)
    check_parameter("memory_key", key, x, tuple((*lead, slots, features) for lead in leading))
    check_slots("memory_key", slots)
    check_parameter("memory_value", value, x, tuple((*lead, v, slots) for lead in leading))
    return slots


def _check_norm(norm: Any, x: Tensor, channels: int) -> None:
    if norm is None or (callable(norm) and not isinstance(norm, Norm)):
        return
    if not isinstance(norm, Norm):
        raise TypeError(f"norm: got {type(norm).__name__}, expected a reference.Norm, a function or None")
    values = x.numel() // x.shape[1] if x.shape[1] else 0
    if uses_batch(norm) and not norm.process_group and values == 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected more than one value per channel for BN in training")
    for name, p in zip(Norm._fields[:4], norm[:4], strict=True):
        if p is None:
            continue
        sharded.refuse_distributed(f"{name} of norm", p)
        if p.device != x.device:
            raise ValueError(f"{name} of norm: got device {p.device}, expected that of x, {x.device}")
        if tuple(p.shape) != (channels,):
            raise ValueError(f"{name} of norm: got shape {tuple(p.shape)}, expected ({channels},), the channels of y")


def _check_activation(activation: Any) -> None:
    if not (activation is None or callable(activation) or (isinstance(activation, str) and activation in ACTIVATIONS)):
        expected = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: got {activation!r}, expected {expected}, a function or None")


def _check_residual(residual: Any, x: Tensor, channels: int) -> None:
    if isinstance(residual, bool):
        return
    check_tensor("residual", residual)
    sharded.refuse_distributed("residual", residual)
    if residual.device != x.device:
        raise ValueError(f"residual: got device {residual.device}, expected that of x, {x.device}")
    if tuple(residual.shape) != (expected := (x.shape[0], channels, *x.shape[2:])):
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {expected}")


def checked_group(group: int | None, slots: int) -> int:
    """The slots in a group of the normalization."""
    if group is None:
        return slots
    group = check_integer("group", group)
    if group < 1 or slots % group:
        raise ValueError(f"group: got {group}, expected a divisor of the {slots} slots")
    return group


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number, 0 or more")


def check_dropout(dropout: float) -> None:
    check_number("dropout", dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: got {dropout}, expected a probability from 0 to 1")


def checked_padding(mask: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The mask, checked, expanded over axes between the first and the tokens, and contiguous as the passes want it."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"padding_mask: got {type(mask).__name__}, expected a tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"padding_mask: got {mask.dtype}, expected torch.bool, True at padding")
    if mask.device != x.device:
        raise ValueError(f"padding_mask: got device {mask.device}, expected that of the tokens, {x.device}")
    shape = tuple(shape)
    accepted = (shape, (shape[0], shape[-1])) if len(shape) > 1 else (shape,)
    if tuple(mask.shape) not in accepted:
        expected = " or ".join(map(str, dict.fromkeys(accepted)))
        raise ValueError(f"padding_mask: got shape {tuple(mask.shape)}, expected {expected}")
    if tuple(mask.shape) != shape:
        mask = mask.view(shape[0], *(1,) * (len(shape) - 2), shape[-1])
    return mask.expand(shape).contiguous()


def refuse_an_empty_shard(name: str, x: Tensor, process_group: Any) -> None:
    if process_group is not None:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected a token on every member of process_group")
