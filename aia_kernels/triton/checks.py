"""What the passes check of their arguments before a launch: a kernel reads and writes wherever it is told to.

The C++ operators check the same in the same order and say the same (csrc/register/checks.h and beside it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algorithms.external_attention_passes import Attention, DoubleNorm, Dropout
from ..common import maps
from ..common.dtypes import accumulate_dtype
from .columns import row_count

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_operand(name: str, t: Tensor | None, first: Tensor) -> None:
    """t is a tensor on the device of the first one, and its elements lie inside its storage, which may have been shrunk
    since, as they are and at addresses that their type allows."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} must be a tensor, got {t}")
    if t.device != first.device:
        raise ValueError(f"{name} must be on the device of the first argument, {first.device}, got {t.device}")
    if not t.numel():
        return
    itemsize, stored = t.element_size(), t.untyped_storage().nbytes()
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    if last >= stored // itemsize:
        raise ValueError(
            f"{name} must lie inside its storage of {stored} bytes, got {described(t)} from element "
            f"{t.storage_offset()} on"
        )
    if t.is_neg():
        raise ValueError(f"{name} must hold its own values, got a view of their negatives; call resolve_neg")
    if t.data_ptr() % itemsize:
        raise ValueError(f"{name} must begin at an address that is a multiple of its {itemsize} bytes per element")


def check_sizes(name: str, t: Tensor | None, sizes: Sequence[int], dtype: torch.dtype, first: Tensor) -> None:
    """An operand of these sizes and this type, with any strides."""
    check_operand(name, t, first)
    if tuple(t.shape) != tuple(sizes) or t.dtype != dtype:
        raise ValueError(f"{name} must be {_name_of(dtype)} {list(sizes)}, got {described(t)}")


def check_contiguous(name: str, t: Tensor | None, sizes: Sequence[int], dtype: torch.dtype, first: Tensor) -> None:
    """An operand that is contiguous, of these sizes and this type."""
    check_operand(name, t, first)
    if tuple(t.shape) != tuple(sizes) or t.dtype != dtype or not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous {_name_of(dtype)} {list(sizes)}, got {described(t)}")


def check_same(name: str, t: Tensor | None, other: Tensor, other_name: str) -> None:
    """An operand that is stored as another one: its type, sizes, and the strides that matter."""
    check_operand(name, t, other)
    same = (t.shape, t.dtype) == (other.shape, other.dtype)
    if same and t.numel():
        same = all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), other.stride(), strict=True))
    if not same:
        raise ValueError(
            f"{name} and {other_name} must agree in shape, strides and dtype, got {described(t)} and {described(other)}"
        )


def check_apart(name: str, written: Tensor, **others: Tensor | None) -> None:
    """What is written, which is dense, shares no memory with other dense operands."""
    if written.is_meta:  # without memory
        return
    begin = written.data_ptr()
    for other_name, other in others.items():
        if other is not None and begin < other.data_ptr() + other.nbytes and other.data_ptr() < begin + written.nbytes:
            raise ValueError(f"{name} is written, and must share no memory with {other_name}")


def check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {_name_of(t.dtype)}")


def check_eps(eps: float) -> None:
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must not be negative, infinite or NaN, got {eps:g}")


def check_activation(name: str, x: Tensor) -> None:
    """x is [B, T, C, H, W], not empty, and stored in an order of maps.ORDERS."""
    check_operand(name, x, x)
    if x.ndim != 5:
        raise ValueError(f"{name} must be [B, T, C, H, W], got {described(x)}")
    if not x.numel():
        raise ValueError(f"{name} must not be empty, got {described(x)}")
    # Kernels count along an axis in 32 bits, with room for a block beyond its end.
    if max(x.shape[1:]) >= 2**30:
        raise ValueError(f"{name} must have axes shorter than 2^30, got {described(x)}")
    check_floating(name, x)
    if maps.storage_order(x) is None:
        raise ValueError(f"{name} must be stored densely in an order of maps.ORDERS, got {described(x)}")


def check_context(name: str, context: int) -> None:
    if context not in (maps.CHANNEL, maps.SPACETIME):
        raise ValueError(f"{name} must be 1 (channel) or 3 (spacetime), got {context}")


def check_gate(name: str, gate: Tensor | None, context_name: str, context: int, x: Tensor) -> None:
    """A gate [B, M] of a context for x."""
    check_context(context_name, context)
    sizes = x.shape[0], maps.packed_size(x.shape, context)
    check_contiguous(name, gate, sizes, accumulate_dtype(x.dtype), x)


def check_optional_gate(name: str, gate: Tensor | None, context_name: str, context: int, x: Tensor) -> None:
    """The same, or no gate and context 0."""
    if gate is not None:
        check_gate(name, gate, context_name, context, x)
    elif context != maps.NONE:
        raise ValueError(f"{context_name} must be 0, as there is no {name}, got {context}")


def check_unpooled(prefix: str, grad: Tensor | None, argmax: Tensor | None, context: int, x: Tensor) -> None:
    """A gradient [B, 2, M] of pooled features of a context and the index [B, M] of the maximum."""
    check_context(f"{prefix}context", context)
    size = maps.packed_size(x.shape, context)
    check_contiguous(f"{prefix}grad_pooled", grad, (x.shape[0], 2, size), accumulate_dtype(x.dtype), x)
    check_contiguous(f"{prefix}argmax", argmax, (x.shape[0], size), maps.index_dtype(x.shape, context), x)


def check_optional_unpooled(prefix: str, grad: Tensor | None, argmax: Tensor | None, context: int, x: Tensor) -> None:
    """The same, or neither and context 0."""
    if (grad is None) != (argmax is None):
        raise ValueError(f"{prefix}grad_pooled and {prefix}argmax must come together")
    if grad is not None:
        check_unpooled(prefix, grad, argmax, context, x)
    elif context != maps.NONE:
        raise ValueError(f"{prefix}context must be 0, as there is no {prefix}grad_pooled, got {context}")


def check_maps(name: str, x: Tensor) -> None:
    """x is [B, C, H, W], not empty, and contiguous or channels_last."""
    check_operand(name, x, x)
    if x.ndim != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got {described(x)}")
    if not x.numel():
        raise ValueError(f"{name} must not be empty, got {described(x)}")
    # Indices of channels and of positions have 32 bits, with room for a block beyond their end.
    _, c, h, w = x.shape
    if max(c, h, w, h * w) >= 2**30:
        raise ValueError(f"{name} must have fewer than 2^30 channels and positions, got {described(x)}")
    check_floating(name, x)
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        raise ValueError(f"{name} must be contiguous or channels_last, got {described(x)}")


def check_map_gates(channel: Tensor | None, spatial: Tensor | None, x: Tensor) -> None:
    """The gate of the channels [B, C] and that of the positions [B, 1, H, W] of x, or None; one of them is there."""
    if channel is None and spatial is None:
        raise ValueError("channel or spatial must be a tensor, got None twice")
    b, c, h, w = x.shape
    for name, gate, sizes in (("channel", channel, (b, c)), ("spatial", spatial, (b, 1, h, w))):
        if gate is not None:
            check_contiguous(name, gate, sizes, accumulate_dtype(x.dtype), x)


def check_map_features(grad: Tensor | None, argmax: Tensor | None, x: Tensor, of_channels: bool) -> None:
    """A gradient of pooled features of the channels [B, 2, C] or positions [B, 2, H, W], and the index of each maximum
    [B, C] or [B, H, W]."""
    side, kept = ("channel", x.shape[1:2]) if of_channels else ("spatial", x.shape[2:])
    check_contiguous(f"grad_{side}", grad, (x.shape[0], 2, *kept), accumulate_dtype(x.dtype), x)
    check_contiguous(f"{side}_argmax", argmax, (x.shape[0], *kept), torch.int32, x)


def come_together(names: Sequence[str], operands: Sequence[Tensor | None]) -> bool:
    """Whether all three of a gate, its gradient and its indices are there; refused if some are."""
    there = [operand is not None for operand in operands]
    if any(there) != all(there):
        raise ValueError(f"{names[0]}, {names[1]} and {names[2]} must come together")
    return all(there)


def check_packed(name: str, packed: Tensor, dims: Sequence[int], features: int = 0) -> int:
    """packed is [B, M], or [B, 2, M] for features, of the one or three maps whose lengths dims hold, and not empty;
    returns how many maps there are."""
    check_operand(name, packed, packed)
    n = len(dims) // 3
    if n not in (1, 3) or len(dims) != 3 * n:
        raise ValueError(f"dims must hold three lengths for each of 1 or 3 maps, got {len(dims)} numbers")
    if packed.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, as packed maps are, got {_name_of(packed.dtype)}")
    if packed.ndim != (3 if features else 2) or not packed.shape[0]:
        raise ValueError(
            f"{name} must be a packed {'[B, 2, M]' if features else '[B, M]'} with B > 0, got {described(packed)}"
        )
    size = sum(math.prod(dims[i : i + 3]) for i in range(0, 3 * n, 3))
    if min(dims) < 1 or size >= 2**63:
        raise ValueError(f"dims must be positive lengths of maps of fewer than 2^63 elements, got {list(dims)}")
    if size != packed.shape[-1]:
        raise ValueError(f"dims must make up the {packed.shape[-1]} elements of {name}, got {list(dims)}")
    check_contiguous(name, packed, (packed.shape[0], *([features] if features else []), size), packed.dtype, packed)
    return n


def check_weights(weight: Sequence[Tensor], n: int, first: Tensor) -> None:
    """The weights of n gates, each [1, 2, 3, 3, 3] with any strides."""
    if len(weight) != n:
        raise ValueError(f"weight must hold a tensor for each of {n} maps, got {len(weight)}")
    for w in weight:
        check_operand("weight", w, first)
        check_floating("weight", w)
        if w.shape != (1, 2, 3, 3, 3):
            raise ValueError(f"each weight must be [1, 2, 3, 3, 3], got {described(w)}")


def check_norms(
    n: int, numbers: dict[str, Sequence[Tensor | None]], eps: Sequence[float], batch: Sequence[bool], first: Tensor
) -> None:
    """What n gates are normalized by: lists of n numbers, which may be absent, and of n eps and flags."""
    for name, entries in (("eps", eps), ("batch", batch)):
        _check_entries(name, entries, n)
    for i in range(n):
        check_eps(eps[i])
        for name, entries in numbers.items():
            _check_entries(name, entries, n)
            if (number := entries[i]) is None:
                continue
            check_operand(name, number, first)
            check_floating(name, number)
            if number.numel() != 1:
                raise ValueError(f"{name} must hold one number for each map, got {described(number)}")


def _check_entries(name: str, entries: Sequence, n: int) -> None:
    if len(entries) != n:
        raise ValueError(f"{name} must hold an entry for each of {n} maps, got {len(entries)}")


def check_logits(name: str, logits: Tensor, group: int, padding: Tensor | None = None) -> None:
    """Logits [B, N, M], their attention or its gradient, contiguous, the M columns in groups; padding is [B, N]."""
    check_operand(name, logits, logits)
    if logits.ndim != 3 or not logits.is_contiguous() or not logits.shape[2]:
        raise ValueError(f"{name} must be contiguous [B, N, M] with M > 0, got {described(logits)}")
    check_group(name, group, logits.shape[2])
    check_floating(name, logits)
    if padding is not None:
        check_contiguous("padding", padding, logits.shape[:2], torch.bool, logits)


def check_group(name: str, group: int, columns: int) -> None:
    if group < 1 or columns % group:
        raise ValueError(f"group must divide the {columns} columns of {name}, got {group}")


def check_tokens(name: str, tokens: Tensor) -> None:
    """Tokens [B, N, d] with any strides."""
    check_operand(name, tokens, tokens)
    if tokens.ndim != 3:
        raise ValueError(f"{name} must be [B, N, d], got {described(tokens)}")
    check_floating(name, tokens)


def check_memory(name: str, memory: Tensor, like: Tensor) -> None:
    """A memory of heads, [H, M', k] or [H, v, M'], or of all, first axis of length one, in the type of another tensor,
    with any strides; not empty."""
    check_operand(name, memory, like)
    if memory.ndim != 3 or not memory.numel() or memory.dtype != like.dtype:
        raise ValueError(f"{name} must be {_name_of(like.dtype)} with three axes, not empty, got {described(memory)}")


def check_attention(attention: Attention, norm: DoubleNorm) -> None:
    """What is kept of the attention (products.py): the logits [B, N, M], M columns in groups, and the rows."""
    logits, rows = attention
    check_logits("the attention", logits, norm.group, norm.padding)
    b, n, m = logits.shape
    check_contiguous("rows", rows, (b, row_count(n, m, norm.group)), accumulate_dtype(logits.dtype), logits)
    check_eps(norm.eps)


def heads_of(memories: int, columns: int, width: int) -> int:
    """The heads of so many columns or features that memories of a width serve: one each, or one memory all of them."""
    return columns // width if memories == 1 else memories


def check_heads(logits: Tensor, heads: int, width: int, group: int) -> None:
    """The columns of logits are those of heads, so many each, in groups."""
    if heads < 1 or logits.shape[2] != heads * width:
        raise ValueError(f"the attention must have {heads} x {width} columns, got {described(logits)}")
    check_group("a head", group, width)


def check_attended(attention: Attention, name: str, memory: Tensor, columns: int, norm: DoubleNorm) -> int:
    """The attention, and a memory that meets it, whose axis ``columns`` holds a head's columns; returns how many heads
    there are."""
    check_attention(attention, norm)
    logits, _ = attention
    check_memory(name, memory, logits)
    width = memory.shape[columns]
    heads = heads_of(memory.shape[0], logits.shape[2], width)
    check_heads(logits, heads, width, norm.group)
    return heads


def check_memory_logits(logits: Tensor, feature: int, heads: int, padding: Tensor | None) -> None:
    """Logits [B, 2 H d, N], keys and queries of the heads, tokens contiguous, not empty; padding is [B, N] or None."""
    check_operand("logits", logits, logits)
    if logits.ndim != 3 or not logits.numel():
        raise ValueError(f"logits must be [B, 2 H d, N] and not empty, got {described(logits)}")
    check_contiguous("logits", logits, logits.shape, logits.dtype, logits)
    b, columns, n = logits.shape
    if n >= 2**30:
        raise ValueError(f"logits must have fewer than 2^30 tokens, got {described(logits)}")
    if not 0 <= feature <= 2:
        raise ValueError(f"feature must be 0 (l2), 1 (softplus) or 2 (softmax), got {feature}")
    if heads < 1 or columns % 2 or columns // 2 % heads:
        raise ValueError(f"heads must divide half of the {columns} rows of logits, got {heads}")
    if padding is not None:
        check_contiguous("padding", padding, (b, n), torch.bool, logits)
    check_floating("logits", logits)


def check_memory_rows(rows: Tensor, logits: Tensor, count: int) -> None:
    """So many rows of phi(k), and behind them those of the gradients of keys and queries, which are written; bfloat16
    ones where logits are, too."""
    b, columns, n = logits.shape
    check_operand("rows", rows, logits)
    narrow = logits.dtype == rows.dtype == torch.bfloat16
    check_contiguous(
        "rows", rows, (b, count + columns, n), rows.dtype if narrow else accumulate_dtype(logits.dtype), logits
    )
    check_apart("rows", rows, logits=logits)


def check_memory_reached(reached: Tensor, logits: Tensor, count: int) -> None:
    """The gradient of so many rows of phi by way of a memory."""
    check_contiguous("reached", reached, (logits.shape[0], count, logits.shape[2]), logits.dtype, logits)


def check_dropout(dropout: Dropout | None, logits: Tensor) -> None:
    """Dropout's mask, if there is one."""
    if dropout is not None:
        check_contiguous("keep", dropout.keep, logits.shape, torch.uint8, logits)


def described(t: Tensor) -> str:
    """What came, for a message."""
    return f"{_name_of(t.dtype)} {list(t.shape)} with strides {list(t.stride())}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
