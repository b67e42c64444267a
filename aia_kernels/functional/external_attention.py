"""External attention as functions: check, choose a path, call.

The paths of a call that has something to compute are those of Attention in Attention:

1. where the call is recorded (torch.compile, torch.export, make_fx, selective checkpointing): the registered operators
   (operators/external_attention.py);
2. under a functorch transform (torch.func.grad, vmap), forward-mode differentiation or torch.jit.trace: the reference;
3. where gradients are wanted: the autograd Functions of algorithms/external_attention.py;
4. otherwise: the passes, keeping nothing.

The backend ``reference`` takes its own formula on all four; so does "auto" on a CPU where there is too little to fuse
(backends.plain_is_faster). A DTensor is taken shard by shard (sharded.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, reference
from ..algorithms import external_attention as algorithm
from ..algorithms.external_attention import Plan
from ..backends import choices
from ..common.autocast import autocast_dtype, no_autocast
from ..common.layouts import as_maps, as_tokens, contiguous, with_dense_maps, with_rows
from ..common.tracing import is_exporting, is_statically, is_symbolic, is_traced, needs_reference
from ..operators import external_attention as operators
from ..reference import Norm
from ..reference.norm import uses_batch
from . import plain, sharded
from .block import block, with_bias
from .checks import check_tensor
from .external_attention_checks import (
    check_block,
    check_dropout,
    check_eps,
    check_memories,
    check_parameter,
    check_slots,
    checked_dims,
    checked_group,
    checked_heads,
    checked_padding,
    refuse_an_empty_shard,
)
from .running_statistics import update_running_statistics

FAMILY = "external_attention"
#: What takes the place of a backend where there is too little to fuse.
UNFUSED = "unfused"


def double_normalize(
    logits: Tensor,
    *,
    dims: tuple[int, int] = (-2, -1),
    group: int | None = None,
    eps: float = 0.0,
    padding_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """A = P / (eps + the sum of P over slots), P = softmax over tokens of the logits (arXiv 2105.02358, equation 6).

    Args:
        logits: [..., N, M], N tokens by M slots; float32, bfloat16, float16 or float64, normalized in float32 or
            float64.
        dims: The axis of the softmax and that of the sum, the tokens and the slots where the logits are [..., N, M].
            Logits [B, M, N] have (-1, -2). The opposite order, a softmax over slots and then a sum over tokens, has
            (-1, -2) for [..., N, M].
        group: The slots are normalized in consecutive groups of this many (RTFormer); None means all M together.
        eps: Added to the sum over slots.
        padding_mask: Boolean, the shape of the logits [..., N, M] without M, or [B, N] with B the first of the leading
            axes. True where a token takes no part: it weighs nothing and its A is 0. A sample of such tokens alone
            gives zeros.
        process_group: Its members hold the tokens in shards, each at least one, and A is a shard of the whole's.

    Returns:
        A, in the shape and type of the logits. It is contiguous for the default dims; for others it may be a view of
        such a tensor with its axes moved.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    check_tensor("logits", logits)
    if logits.ndim < 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [..., N, M]")
    if (axes := checked_dims(dims, logits.ndim)) != (logits.ndim - 2, logits.ndim - 1):
        if group is None and padding_mask is None and process_group is None and _is_left_to_torch(logits):
            check_eps(eps)
            return plain.double_normalize(logits, eps, *axes)
        settings = {"group": group, "eps": eps, "padding_mask": padding_mask, "process_group": process_group}
        return double_normalize(logits.movedim(axes, (-2, -1)), **settings).movedim((-2, -1), axes)
    if sharded.is_distributed(logits):
        settings = {"group": group, "eps": eps}
        return sharded.double_normalize(double_normalize, logits, padding_mask, process_group, **settings)
    check_slots("logits", logits.shape[-1])
    group = checked_group(group, logits.shape[-1])
    check_eps(eps)
    padding = checked_padding(padding_mask, logits, logits.shape[:-1])
    _check_process_group(process_group)
    if logits.numel() == 0:
        refuse_an_empty_shard("logits", logits, process_group)
        return logits.contiguous() * 1.0
    backend, transformed = _path(logits, logits.dtype, logits.numel() // group, group, process_group)
    if backend == UNFUSED and padding is None and group == logits.shape[-1] and plain.serves(logits):
        return plain.double_normalize(logits, eps).contiguous()
    if backend in (UNFUSED, "reference") or transformed:
        return reference.double_normalize(logits, group, eps, padding, process_group)
    flat = logits.reshape(-1, *logits.shape[-2:])
    padding = None if padding is None else padding.reshape(flat.shape[:2])
    if is_traced():
        attention, _mass = operators.double_normalize_forward(
            flat, padding, group, eps, _group_name(process_group), backend
        )
    else:
        plan = Plan(backends.passes(backend, FAMILY), group, eps, _group_name(process_group))
        if torch.is_grad_enabled() and logits.requires_grad:
            attention = algorithm.DoubleNormalizeFunction.apply(flat, plan, padding)
        else:
            attention, _mass = algorithm.double_normalize_forward(plan, flat, padding)
    return attention.view(logits.shape)


def external_attention(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    heads: int = 1,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    eps: float = 0.0,
    group: int | None = None,
    dropout: float = 0.0,
    padding_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """o = A V^T + value_bias, A = double_normalize(x K^T): external attention (arXiv 2105.02358) on tokens.

    Args:
        x: [B, N, d], its features or (maps [B, d, H, W] as x.flatten(2).mT) its tokens contiguous; other strides cost a
            copy. float32, bfloat16, float16 or float64.
        memory_key: K, [S, d / heads] shared by the heads or [heads, S, d / heads]. Keys that are made from data, for
            each sample: [B, heads, S, d / heads], or [B, 1, S, d / heads] shared by the heads.
        memory_value: V, [v, S] shared by the heads or [heads, v, S]; for each sample [B, heads, v, S] or [B, 1, v, S].
            Where K or V is of each sample, the products are PyTorch's own and the normalization between is fused.
        heads: Each takes its d / heads consecutive features.
        key_bias: [S] or [heads, S]. Without effect, as it is a constant to the softmax over tokens; its gradient is
            zero.
        value_bias: [v] or [heads, v], added to o.
        eps: Added to the sum over slots, in float32 at least, so that 1e-9 is not lost in float16. EANet and EAMLP have
            1e-9, RTFormer 1e-6.
        group: Each head's slots are normalized in consecutive groups of this many, a divisor of S; None means all S.
        dropout: The probability with which an element of A is left out of the product with V; what is kept is scaled by
            1 / (1 - dropout). It is applied whenever it is above 0: pass 0 in evaluation. The mask is drawn by torch's
            generator of the device of x, the same on every backend for a seed.
        padding_mask: [B, N] boolean, True where a token takes no part, as key_padding_mask of
            torch.nn.MultiheadAttention. Such a token weighs nothing in the softmax over tokens, and its o is zero. A
            sample of such tokens alone gives zeros.
        process_group: Its members hold the tokens in shards, each at least one. Forward exchanges the maximum and sum
            of each column, backward one more sum, and the gradients of the memories are those of the shard.

    Returns:
        o, [B, N, heads * v], contiguous, in the type of x or, under autocast, of the autocast.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected, before anything runs.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    check_tensor("x", x)
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, N, d]")
    if sharded.is_distributed(x):
        memories = {"memory_key": memory_key, "memory_value": memory_value}
        parameters = memories | {"key_bias": key_bias, "value_bias": value_bias}
        settings = {"heads": heads, "eps": eps, "group": group}
        return sharded.external_attention(
            external_attention, x, parameters, padding_mask, process_group, dropout, **settings
        )
    heads = checked_heads(heads, x)
    slots = check_memories(x, memory_key, memory_value, heads)
    check_parameter("key_bias", key_bias, x, ((slots,), (heads, slots)))
    check_parameter("value_bias", value_bias, x, (memory_value.shape[-2:-1], (heads, memory_value.shape[-2])))
    group = checked_group(group, slots)
    check_eps(eps)
    check_dropout(dropout)
    padding = checked_padding(padding_mask, x, x.shape[:2])
    _check_process_group(process_group)
    dtype = autocast_dtype(x) or x.dtype
    x, key, value = x.to(dtype), _stacked(memory_key).to(dtype), _stacked(memory_value).to(dtype)
    bias = None if value_bias is None else value_bias.to(dtype)
    if bias is not None and (heads > 1 or bias.ndim > 1):
        bias = bias.expand(heads, -1).flatten()
    if key_bias is not None and key_bias.requires_grad:
        key = without_effect(key, key_bias)
    if x.numel() == 0 or value.numel() == 0:
        refuse_an_empty_shard("x", x, process_group)
        return _nothing(x.new_zeros((*x.shape[:2], heads * value.shape[-2])), x, key, value, bias)
    keep, scale = _dropout_mask((*x.shape[:2], heads * slots), dropout, x.device)
    memories, making = Memories(key, value, bias), Making(group, eps, padding, keep, scale, process_group)
    if key.ndim == 4 or value.ndim == 4:
        return _attend_by_sample(x, memories, making, heads)
    return _attend(x, memories, making)


class Memories(NamedTuple):
    """The parameters of a call, of one type: key [H or 1, S, k], value [H or 1, v, S], bias [H * v] or None. Of each
    sample: key [B, H or 1, S, k], value [B, H or 1, v, S]."""

    key: Tensor
    value: Tensor
    bias: Tensor | None


class Making(NamedTuple):
    """How the map of a call is made of its logits, and what becomes of it: field for field what
    reference.external_attention takes behind the memories."""

    group: int
    eps: float
    padding: Tensor | None
    keep: Tensor | None
    scale: float
    process_group: Any


def _attend_by_sample(x: Tensor, memories: Memories, making: Making, heads: int) -> Tensor:
    """o with a key or a value, or both, of each sample."""
    padding = making.padding
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
    settings = {"group": making.group, "eps": making.eps, "process_group": making.process_group}
    with no_autocast(x):
        attention = double_normalize(_heads_apart(x, heads) @ memories.key.mT, padding_mask=padding, **settings)
        if making.keep is not None:
            attention = attention * _heads_apart(making.keep, heads) * making.scale
        o = (attention @ memories.value.mT).transpose(1, 2).flatten(2)
        o = o if memories.bias is None else o + memories.bias
    return o if padding is None else o.masked_fill(padding.unsqueeze(-1), 0.0)


def _heads_apart(rows: Tensor, heads: int) -> Tensor:
    """[B, N, H * p] as [B, H, N, p]."""
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def without_effect(key: Tensor, *biases: Tensor | None) -> Tensor:
    """A key memory, joined to biases that have no effect, so that these get a gradient of zero.

    Zero and not none, so that DistributedDataParallel finds every parameter used. The sum of an empty slice is 0 and
    has no other gradient, whatever values the bias and the gradient of the key have. On a GPU that would be four
    launches. torch.jit.trace compares two records, of which only one has gradients: there the key stays alone.
    """
    differentiates = torch.is_grad_enabled() and not torch.jit.is_tracing()
    wanted = [b for b in biases if b is not None and b.requires_grad] if differentiates else []
    if wanted and not key.is_cpu and not is_traced() and not needs_reference() and all(map(sharded.is_plain, wanted)):
        return _WithoutEffect.apply(key, *wanted)
    for bias in wanted:
        flat = bias if bias.ndim == 1 else bias.flatten()
        key = key + flat.narrow(0, 0, 0).sum().to(key.dtype)
    return key


class _WithoutEffect(torch.autograd.Function):
    """The key as it is, from apply(key, *biases): the biases get a gradient of zero, by one launch each."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, *biases: Tensor) -> Tensor:
        ctx.biases = [(b.shape, b.dtype, b.device) for b in biases]
        ctx.set_materialize_grads(False)
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *(None for _ in ctx.biases)
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.biases)


def _attend(x: Tensor, memories: Memories, making: Making) -> Tensor:
    """o [B, N, H * v] by one of the paths, for x [B, N, H * k] in the type of the memories, and neither empty. Dropout:
    A * keep * scale takes the place of A, keep [B, N, H * S]."""
    group, eps, padding, keep, scale, process_group = making
    backend, transformed = _path(x, x.dtype, _map_elements(x, memories.key) // group, group, process_group)
    with no_autocast(x):
        if backend == UNFUSED and _is_ordinary(x, memories, making):
            key, value, bias = memories
            return plain.external_attention(x, key[0], value[0], None, bias, eps)
        if backend == UNFUSED and compiler_takes(x) and _is_of_shared_memories(memories, making):
            key, value, bias = memories
            return plain.for_a_compiler(x, key[0], value[0], bias, eps, x.shape[2] // key.shape[2])
        if backend in (UNFUSED, "reference") or transformed:
            return reference.external_attention(x, *memories, *making)
        x, parameters = with_rows(x), contiguous(*memories)
        if is_traced():
            if _is_of_one_head(x, memories, making) and process_group is None and operators.evaluates(backend):
                key, value, bias = memories
                return operators.external_attention_evaluate(x, key[0], value[0], bias, eps, backend)
            settings = group, eps, _group_name(process_group), scale
            return operators.external_attention_forward(x, *parameters, padding, keep, *settings, backend)[0]
        plan = Plan(backends.passes(backend, FAMILY), group, eps, _group_name(process_group), scale)
        if _wants_gradients(x, *parameters):
            return algorithm.ExternalAttentionFunction.apply(x, *parameters, plan, padding, keep)
        return algorithm.forward(plan, x, *parameters, padding, keep)[0]


def external_attention_block(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    norm: Norm | Callable[[Tensor], Tensor] | None = None,
    *,
    eps: float = 1e-9,
    value_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = "relu",
    residual: bool | Tensor = True,
) -> Tensor:
    """y = activation(norm(A V^T + value_bias) + residual), A = double_normalize(x K^T) per token of x: EANet's block
    with its convolutions folded, y = relu(BN(A V^T) + x), and its variants.

    EANet's own form, and that without BN, are written by one pass. In the others A is fused, BN joins V, and the rest
    is PyTorch's own.

    Under autocast K and V may be float32 or of the autocast's type. The products are in the autocast's type where x has
    it, and in float32 where the residual stream is float32.

    Args:
        x: [B, C, H, W], contiguous or channels_last (other strides cost a copy); float32, bfloat16, float16 or float64.
            Its H * W positions are the tokens. Points [B, C, N] and volumes [B, C, D, H, W] are taken alike.
        key: K, [S, C], one group of S slots.
        value: V, [C, S]; [v, S] where x is not the residual.
        norm: BN over the v channels, in training by the statistics of batch and positions; its running statistics are
            updated where it says so. Or any function of maps [B, v, ...], such as an nn.GroupNorm. None: no norm.
        eps: Added to the sum over slots.
        value_bias: [v], or None.
        activation: "relu", "gelu", "silu", a function, or None.
        residual: Whether x is added; or what is added in its place, [B, v, ...].

    Returns:
        y, [B, v, ...], stored as x.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected, before anything runs.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    check_tensor("x", x)
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, H, W], [B, C, N] or [B, C, D, H, W]")
    if sharded.is_distributed(x):
        settings = {"eps": eps, "activation": activation}
        tensors = {"value_bias": value_bias, "residual": residual}
        return sharded.external_attention_block(external_attention_block, x, key, value, norm, tensors, **settings)
    channels = check_block(x, key, value, norm, eps, value_bias, activation, residual)
    stream = residual if isinstance(residual, Tensor) else x if residual else None
    dtype = x.dtype if (autocast := autocast_dtype(x)) is None else autocast
    dtype = dtype if autocast is None or stream is None else torch.promote_types(stream.dtype, dtype)
    x, key, value = x.to(dtype), key.to(dtype), value.to(dtype)
    if x.numel() == 0:
        if isinstance(norm, Norm) and norm.training and norm.process_group is not None:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected a batch: BN shares its statistics with a group")
        empty = torch.empty_like(x) if channels == x.shape[1] else x.new_zeros((x.shape[0], channels, *x.shape[2:]))
        return _nothing(empty, x, key, value, value_bias, *(norm[:2] if isinstance(norm, Norm) else ()))
    of_bn, move = norm if isinstance(norm, Norm) else None, None
    if of_bn is not None and value_bias is not None:
        if uses_batch(of_bn):
            key = without_effect(key, value_bias)  # the batch norm takes it away again
        else:
            norm, value_bias = with_bias(of_bn, value_bias), None
    if (norm is None or of_bn is not None) and activation == "relu" and residual is True:
        if norm is None:
            norm = Norm(None, value_bias, x.new_zeros(channels), x.new_ones(channels), eps=0.0)
        backend = backends.select(x.device, x.dtype, FAMILY)
        y, statistics = _block(x, key, value, norm, eps, backend)
        if backend != "reference" and not is_traced():
            move = backends.passes(backend, FAMILY).move_statistics_
    else:
        bias = None if of_bn is not None else value_bias
        y, statistics = block(double_normalize, x, key, value, bias, norm, eps, activation, residual)
    if of_bn is not None:
        if value_bias is not None:
            statistics = statistics + torch.nn.functional.pad(value_bias.detach().unsqueeze(1), (0, 2))
        update_running_statistics([of_bn], [statistics], move)
    return y


def _block(x: Tensor, key: Tensor, value: Tensor, norm: Norm, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """relu(BN(A V^T) + x) and the statistics [C, 3], by any of the paths."""
    with no_autocast(x):
        if backend == "reference" or needs_reference():
            tokens, statistics = reference.external_attention_block(as_tokens(x), key, value, norm, eps)
            return as_maps(tokens, x), statistics
        return _block_through_passes(with_dense_maps(x), key, value, norm, eps, backend)


def _block_through_passes(
    x: Tensor, key: Tensor, value: Tensor, norm: Norm, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """y and the statistics [C, 3] by one of the paths 1, 3 and 4."""
    members = _group_name(norm.process_group if norm.training else None)
    parameters = contiguous(key, value, norm.weight, norm.bias)
    if is_traced():
        fixed = None if uses_batch(norm) else torch.stack((norm.running_mean, norm.running_var))
        settings = eps, uses_batch(norm), norm.eps, members, backend
        tokens, *_, statistics = operators.external_attention_block_forward(as_tokens(x), *parameters, fixed, *settings)
        return as_maps(tokens, x), statistics
    of_norm = () if uses_batch(norm) else contiguous(norm.running_mean.detach(), norm.running_var.detach())
    passes = backends.passes(backend, FAMILY)
    plan = Plan(passes, key.shape[0], eps, batch=uses_batch(norm), norm_eps=norm.eps, members=members)
    if _wants_gradients(x, *parameters):
        return algorithm.ExternalAttentionBlockFunction.apply(x, *parameters, plan, of_norm)
    result = algorithm.block_forward(plan, as_tokens(x), *parameters, of_norm)
    return as_maps(result.y, x), result.statistics


def _path(x: Tensor, dtype: torch.dtype, rows: int, slots: int, process_group: Any) -> tuple[str, bool]:
    """The backend, or UNFUSED, and whether the call needs the reference whatever it is.

    The size decides only where it is known and nobody shares the call: the members of a process group must exchange the
    same, and may hold different numbers of tokens.
    """
    backend, transformed = backends.select(x.device, dtype, FAMILY), needs_reference()
    if process_group is not None:
        return backend, transformed
    if is_symbolic():
        unfused = compiler_fuses(x, rows, slots, 0, COMPILED_CALLS)
    else:
        unfused = backends.plain_is_faster(x.device, rows, slots)
    backend = UNFUSED if unfused else backend
    return backend, transformed


def compiler_takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether torch.compile records a call on a CPU of tensors of one type to which autocast gives no other. A layer
    that asks first spares the guards of all checks of a function."""
    if not torch.compiler.is_compiling() or is_exporting():
        return False
    same = all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in parameters)
    # Of a set, torch.compile would guard the members in every call.
    floating = x.dtype.is_floating_point and x.dtype.itemsize > 1
    return same and x.device.type == "cpu" and floating and autocast_dtype(x) is None


def compiler_fuses(x: Tensor, rows: int, slots: int, products: int, calls: int) -> bool:
    """Whether torch.compile gets plain operators, which it fuses, and not one of this package: as "auto" counts on a
    CPU, where the sizes are known when the call is recorded. rows, slots, products and calls as of
    choices.fusing_pays."""
    if not torch.compiler.is_compiling() or is_exporting():
        return False
    if x.device.type != "cpu" or backends.chosen_backend() != "auto":
        return False
    return is_statically(choices.gain(rows, slots) + products <= calls * choices.CALL_COST)


#: Of attention on tokens, in choices.CALL_COST: what its passes must save behind torch.compile, which fuses the
#: specification.
COMPILED_CALLS = 4


def _is_of_shared_memories(memories: Memories, making: Making) -> bool:
    """Whether the heads of a call share both memories, each of one group, with all tokens in their places and nothing
    dropped."""
    key, value, _ = memories
    shared = key.shape[0] == value.shape[0] == 1 and key.shape[1] == making.group
    return shared and making.padding is None and making.keep is None


def _is_of_one_head(x: Tensor, memories: Memories, making: Making) -> bool:
    """Whether a call has one head and one group, all tokens in their places and nothing dropped."""
    return _is_of_shared_memories(memories, making) and memories.key.shape[2] == x.shape[2]


def _is_ordinary(x: Tensor, memories: Memories, making: Making) -> bool:
    """Whether plain PyTorch has shorter forms of a call than the specification."""
    return _is_of_one_head(x, memories, making) and plain.serves(x, *memories)


def _is_left_to_torch(logits: Tensor) -> bool:
    """Whether plain PyTorch normalizes logits whose slots lie apart, as "auto" has it on a CPU. The passes have their
    lanes along the slots, so they would be turned and turned back, which costs more than the passes save."""
    return (
        not sharded.is_distributed(logits)
        and not is_symbolic()
        and not needs_reference()
        and logits.dtype in (torch.float32, torch.float64)
        and logits.numel() > 0
        and backends.plain_is_faster(logits.device, rows=0, slots=1)
    )


def _map_elements(x: Tensor, key: Tensor) -> int:
    """The elements of the attention map of x [B, N, H * k] and key [H or 1, S, k]."""
    return x.numel() // key.shape[2] * key.shape[1]


def _dropout_mask(sizes: tuple[int, ...], dropout: float, device: torch.device) -> tuple[Tensor | None, float]:
    """keep, uint8 of these sizes, each 0 with the probability of dropout, and the scale of what is kept; None and 1
    without dropout.

    Not drawn in place: what is changed in place cannot be kept by selective checkpointing, nor drawn anew for each
    sample by vmap.
    """
    if not dropout > 0:
        return None, 1.0
    keep = torch.bernoulli(torch.empty(sizes, dtype=torch.uint8, device=device), 1.0 - dropout)
    return keep, 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_process_group(process_group: Any) -> None:
    if not (process_group is None or hasattr(process_group, "group_name")):
        raise TypeError(f"process_group: got {process_group!r}, expected a torch.distributed.ProcessGroup")


def _group_name(process_group: Any) -> str:
    return "" if process_group is None else process_group.group_name


def _stacked(memory: Tensor) -> Tensor:
    """A memory of each head, or, first axis of length one, that of all."""
    return memory.unsqueeze(0) if memory.ndim == 2 else memory


def _nothing(y: Tensor, *inputs: Tensor | None) -> Tensor:
    """y, empty or zero, with gradients of zero to every input."""
    return y + sum(a.flatten()[:0].sum() for a in inputs if a is not None).to(y.dtype)
