"""What the passes ask of their arguments before a launch: a kernel reads wherever it is told to, in silence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import maps


def check_dense(name: str, x: Tensor) -> None:
    """x is [B, T, C, H, W], not empty, and stored in an order of maps.ORDERS."""
    if x.ndim != 5 or x.numel() == 0 or maps.storage_order(x) is None:
        raise ValueError(
            f"{name} is {tuple(x.shape)} with strides {x.stride()}; "
            f"expected [B, T, C, H, W], not empty, stored densely in an order of {', '.join(maps.ORDERS)}"
        )


def check_like(name: str, given: Tensor, x: Tensor) -> None:
    """given has the shape, type, device and storage order of x."""
    if (
        (given.shape, given.dtype, given.device) != (x.shape, x.dtype, x.device)
        or maps.storage_order(given) is None
        or maps.storage_order(given) != maps.storage_order(x)
    ):
        raise ValueError(
            f"{name} is {given.dtype} {tuple(given.shape)} with strides {given.stride()} on {given.device}; "
            f"expected {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def check_numbers(name: str, given: Tensor | None, sizes: Sequence[int], dtype: torch.dtype, of: Tensor) -> None:
    """given is absent, or contiguous, of these sizes and this type, on the device of another tensor."""
    if given is None:
        return
    found = tuple(given.shape), given.dtype, given.device
    if found != (tuple(sizes), dtype, of.device):
        raise ValueError(
            f"{name} is {given.dtype} {found[0]} on {given.device}; expected {dtype} {tuple(sizes)} on {of.device}"
        )
    if not given.is_contiguous():
        raise ValueError(f"{name} has strides {given.stride()}; expected a contiguous tensor")


def check_context(name: str, context: int, absent: bool = False) -> None:
    if context not in (maps.CHANNEL, maps.SPACETIME) and not (absent and context == maps.NONE):
        raise ValueError(f"{name} is {context}; expected {maps.CHANNEL} (channel) or {maps.SPACETIME} (spacetime)")


def check_gate(name: str, gate: Tensor | None, context: int, x: Tensor) -> None:
    """gate is the packed maps [B, M] of its context, or both are absent."""
    check_context(f"the context of {name}", context, absent=gate is None)
    if (gate is None) != (context == maps.NONE):
        raise ValueError(f"{name} is absent, but its context is {context}; expected both or neither")
    size = maps.packed_size(x.shape, context)
    check_numbers(name, gate, (x.shape[0], size), maps.accumulate_dtype(x.dtype), x)


def check_unpooled(name: str, grad: Tensor | None, argmax: Tensor | None, context: int, x: Tensor) -> None:
    """The gradient [B, 2, M] of pooled features of a context and the index [B, M] of the maximum, or none of them."""
    if (grad is None) != (argmax is None):
        raise ValueError(f"{name}grad_pooled and {name}argmax come together or not at all")
    check_context(f"the context of {name}grad_pooled", context, absent=grad is None)
    if (grad is None) != (context == maps.NONE):
        raise ValueError(f"{name}grad_pooled is absent, but its context is {context}; expected both or neither")
    if grad is not None:
        sizes = x.shape[0], maps.packed_size(x.shape, context)
        check_numbers(f"{name}grad_pooled", grad, (sizes[0], 2, sizes[1]), maps.accumulate_dtype(x.dtype), x)
        check_numbers(f"{name}argmax", argmax, sizes, maps.index_dtype(x.shape, context), x)


def check_packed(name: str, packed: Tensor, dims: Sequence[int], features: int = 0) -> int:
    """packed is [B, M], or [B, 2, M] for features, of the one or three maps whose lengths dims hold; returns how many
    maps there are."""
    n = len(dims) // 3
    if n not in (1, 3) or len(dims) != 3 * n or min(dims) < 1:
        raise ValueError(f"dims are {list(dims)}; expected three positive lengths for each of 1 or 3 maps")
    size = sum(dims[i] * dims[i + 1] * dims[i + 2] for i in range(0, 3 * n, 3))
    if packed.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {packed.dtype}; expected float32 or float64, as packed maps are")
    lead = packed.shape[:1] if packed.ndim else (0,)
    check_numbers(name, packed, (*lead, *((features,) if features else ()), size), packed.dtype, packed)
    return n


def check_columns(name: str, logits: Tensor, group: int = 1) -> None:
    """logits [B, N, M] are contiguous, and the group divides their columns."""
    if logits.ndim != 3 or not logits.is_contiguous() or logits.shape[2] < 1:
        raise ValueError(
            f"{name} is {tuple(logits.shape)} with strides {logits.stride()}; expected contiguous [B, N, M]"
        )
    if group < 1 or logits.shape[2] % group:
        raise ValueError(f"group is {group}; expected a divisor of the {logits.shape[2]} columns of {name}")


def check_padding(padding: Tensor | None, logits: Tensor) -> None:
    check_numbers("padding", padding, logits.shape[:2], torch.bool, logits)


def check_tokens(name: str, tokens: Tensor, sizes: Sequence[int], of: Tensor) -> None:
    """tokens are [B, N, d] of these sizes, in the type and on the device of another tensor; with any strides."""
    if (tuple(tokens.shape), tokens.dtype, tokens.device) != (tuple(sizes), of.dtype, of.device):
        raise ValueError(
            f"{name} is {tokens.dtype} {tuple(tokens.shape)} on {tokens.device}; "
            f"expected {of.dtype} {tuple(sizes)} on {of.device}"
        )


def check_memory(name: str, memory: Tensor, of: Tensor) -> None:
    if memory.ndim != 3 or (memory.dtype, memory.device) != (of.dtype, of.device):
        raise ValueError(
            f"{name} is {memory.dtype} {tuple(memory.shape)} on {memory.device}; "
            f"expected three axes, {of.dtype}, on {of.device}"
        )


def check_kept(attention: tuple[Tensor, Tensor], heads: int, width: int, keep: Tensor | None) -> None:
    """The kept logits [B, N, heads * width], and dropout's mask of the same sizes or None."""
    logits = attention[0]
    check_columns("the attention", logits)
    if logits.shape[2] != heads * width:
        raise ValueError(f"the attention has {logits.shape[2]} columns; expected {heads} heads of {width}")
    check_numbers("keep", keep, logits.shape, torch.uint8, logits)
