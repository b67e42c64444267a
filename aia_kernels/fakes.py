"""The fake of each pass: results of the right shape, type and strides, without values. schemas.py registers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .common import maps
from .common.dtypes import accumulate_dtype

#: By the name of the pass.
FAKES: dict[str, Callable] = {}


def packed_like(x: Tensor, context: int, *lead: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized packed maps [B, *lead, M] of x."""
    size = maps.packed_size(x.shape, context)
    return x.new_empty((x.shape[0], *lead, size), dtype=dtype or accumulate_dtype(x.dtype))


def kept_bytes(sizes: Sequence[int], dtype: torch.dtype, inner: int, outer: int, with_maps: bool = True) -> int:
    """The bytes of what a unit on x [B, T, C, H, W] of a type keeps: the numbers of its gates, and of each context the
    pooled features and the indices, each part a multiple of 64 bytes."""
    itemsize = accumulate_dtype(dtype).itemsize
    parts = [7 * (inner + outer) * itemsize]
    for context in filter(None, (inner, outer) if with_maps else ()):
        elements = sizes[0] * maps.packed_size(sizes, context)
        parts += 2 * elements * itemsize, elements * maps.index_dtype(sizes, context).itemsize
    return sum((part + 63) // 64 * 64 for part in parts)


def _fake(name: str) -> Callable[[Callable], Callable]:
    """The fake of a pass is the function below."""

    def keep(function: Callable) -> Callable:
        FAKES[name] = function
        return function

    return keep


@_fake("pool")
def _(x, context, gate, gate_context):
    return packed_like(x, context, 2), packed_like(x, context, dtype=maps.index_dtype(x.shape, context))


@_fake("unpool")
def _(
    grad_y,
    gate,
    grad_pooled,
    argmax,
    context,
    inner_gate,
    inner_gate_context,
    inner_grad_pooled,
    inner_argmax,
    inner_context,
):
    return torch.empty_like(grad_y)


@_fake("unpool_reduce")
def _(x, grad_pooled, argmax, context, gate_context):
    return packed_like(x, gate_context)


@_fake("gate")
def _(pooled, weight, scale, shift, mean, var, eps, batch, dims):
    n = len(weight)
    gate = pooled.new_empty((pooled.shape[0], pooled.shape[2]))
    return gate, pooled.new_empty((n, 4)), pooled.new_empty((n, 3))


@_fake("gate_again")
def _(pooled, weight, norm, dims):
    gate = pooled.new_empty((pooled.shape[0], pooled.shape[2]))
    return gate, torch.empty_like(gate)


@_fake("gate_backward_reduce")
def _(grad_gate, z, norm, dims):
    return norm.new_empty((norm.shape[0], 2))


@_fake("gate_backward")
def _(grad_gate, z, norm, sums, statistics, pooled, weight, dims):
    return torch.empty_like(pooled), [torch.empty_like(w) for w in weight], weight[0].new_empty((norm.shape[0], 2))


@_fake("recalibrate")
def _(x, gate, context):
    return torch.empty_like(x)


@_fake("recalibrate_reduce")
def _(grad_y, x, context):
    return packed_like(x, context)


@_fake("move_statistics_")
def _(mean, var, tracked, statistics, momentum):
    return None


@_fake("evaluate")
def _(x, weight, scale, shift, mean, var, eps, inner, outer):
    return torch.empty_like(x)


@_fake("average_gate")
def _(gate, sizes, order):
    return gate.new_empty((gate.shape[0], maps.packed_size((0, *sizes), maps.CHANNEL)))


@_fake("average_gate_back")
def _(grad, sizes, order):
    return grad.new_empty((grad.shape[0], maps.packed_size((0, *sizes), maps.SPACETIME)))


@_fake("propagate")
def _(x, weight, scale, shift, mean, var, eps, batch, inner, outer):
    kept = []
    for context in filter(None, (inner, outer)):
        numbers = (x.new_empty((context, k), dtype=accumulate_dtype(x.dtype)) for k in (4, 3))
        index = maps.index_dtype(x.shape, context)
        kept += packed_like(x, context, 2), packed_like(x, context, dtype=index), *numbers
    return [torch.empty_like(x), *kept]


@_fake("propagate_back")
def _(grad_y, x, weight, kept, inner, outer, needs_x):
    affine = [weight[0].new_empty((context, 2)) for context in sorted(filter(None, (inner, outer)))]
    return [*map(torch.empty_like, weight), *affine, *([torch.empty_like(x)] if needs_x else [])]


@_fake("unit_propagate_")
def _(x, frames, parameters, fixed, running, eps, batch, momentum, inner, outer, averaged, keep):
    b, *sizes = x.shape
    sizes = (b // frames, frames, *sizes) if x.ndim == 4 else (b, sizes[1], sizes[0], *sizes[2:])
    kept = kept_bytes(sizes, x.dtype, inner, outer, keep) if keep or any(batch) else 0
    return torch.empty_like(x), x.new_empty((kept,), dtype=torch.uint8)


@_fake("unit_propagate_back")
def _(grad_y, x, frames, parameters, kept, inner, outer, averaged, needs):
    return [torch.empty_like(p) for p, needed in zip((*parameters, x), needs, strict=True) if needed]


@_fake("column_statistics")
def _(logits, padding):
    b, _, m = logits.shape
    statistics = logits.new_empty((b, 2, m), dtype=accumulate_dtype(logits.dtype))
    return statistics, statistics.new_empty((b, m))


@_fake("double_norm_")
def _(logits, lse, group, eps, padding):
    b, n, m = logits.shape
    return lse.new_empty((b, n, m // group))


@_fake("double_norm_backward_reduce")
def _(grad, attention, group):
    return grad.new_empty((grad.shape[0], grad.shape[2]), dtype=accumulate_dtype(grad.dtype))


@_fake("double_norm_backward_")
def _(grad, attention, mass, reduced, group):
    return None


@_fake("double_normalize")
def _(logits, eps):
    heads = logits.shape[2] if logits.ndim == 4 else 1
    return torch.empty_like(logits), logits.new_empty((*logits.shape[:2], heads), dtype=accumulate_dtype(logits.dtype))


@_fake("double_normalize_back")
def _(grad, attention, mass):
    return torch.empty_like(attention)


@_fake("residual_relu_")
def _(z, x, shift):
    return z.new_empty(((z.numel() + 7) // 8,), dtype=torch.uint8)


@_fake("residual_relu_backward")
def _(grad_y, signs):
    return torch.empty_like(grad_y), grad_y.new_empty(grad_y.shape[2], dtype=accumulate_dtype(grad_y.dtype))


@_fake("fold")
def _(value, weight, bias, of_batch, count, fixed, eps):
    c, m = value.shape
    wide = value.new_empty((c, 3), dtype=accumulate_dtype(value.dtype))
    return torch.empty_like(value), wide.new_empty(c), wide, wide.new_empty(m if of_batch else 0)


@_fake("fold_sums")
def _(value, product, sums, statistics, off, eps):
    return product.new_empty((2, value.shape[0])), torch.empty_like(sums)


@_fake("fold_back")
def _(value, weight, product, joint, center, statistics, of_batch, eps):
    m = value.shape[1] if of_batch else 0
    return torch.empty_like(value), torch.empty_like(value), product.new_empty((m, m)), product.new_empty(m)


@_fake("temporal_shift")
def _(x, fold, reverse):
    return torch.empty_like(x)


@_fake("cbam_pool_positions")
def _(x):
    b, c, _, _ = x.shape
    return x.new_empty((b, 2, c), dtype=accumulate_dtype(x.dtype)), x.new_empty((b, c), dtype=torch.int32)


@_fake("cbam_pool_channels")
def _(x, channel):
    b, _, h, w = x.shape
    return x.new_empty((b, 2, h, w), dtype=accumulate_dtype(x.dtype)), x.new_empty((b, h, w), dtype=torch.int32)


@_fake("cbam_recalibrate")
def _(x, channel, spatial, confounder):
    return [torch.empty_like(x) for _ in range(2 if confounder else 1)]


@_fake("cbam_recalibrate_reduce")
def _(grad_y, grad_confounder, x, channel, spatial):
    b, c, h, w = x.shape
    grad_channel = x.new_empty((b, c), dtype=accumulate_dtype(x.dtype))
    return grad_channel, grad_channel.new_empty((b, 1, h, w))


@_fake("cbam_unpool_reduce")
def _(x, grad_spatial, spatial_argmax):
    return x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


@_fake("cbam_unpool")
def _(grad_y, grad_confounder, channel, grad_channel, channel_argmax, spatial, grad_spatial, spatial_argmax):
    return torch.empty_like(grad_y)


@_fake("cbam_convolve")
def _(pooled, weight):
    return torch.empty_like(pooled[:, :1], memory_format=torch.contiguous_format)


@_fake("cbam_convolve_backward")
def _(grad_z, pooled, weight):
    return torch.empty_like(pooled), torch.empty_like(weight)


@_fake("cbam_spatial_gate")
def _(z, scale, shift, mean, var, eps, batch):
    return torch.empty_like(z), z.new_empty((1, 3))


@_fake("cbam_spatial_gate_backward")
def _(grad, z, spatial, statistics, scale, eps):
    return torch.empty_like(z), z.new_empty(1), z.new_empty(1)


@_fake("cbam_channel_gate")
def _(pooled, weight_1, bias_1, weight_2, bias_2):
    b, pools, c = pooled.shape
    return pooled.new_empty((b, pools, len(weight_1))), pooled.new_empty((b, c))


@_fake("cbam_channel_gate_backward")
def _(grad_channel, pooled, hidden, channel, weight_1, weight_2):
    biases = (pooled.new_empty(len(weight)) for weight in (weight_1, weight_2))
    of_1, of_2 = zip(map(torch.empty_like, (weight_1, weight_2)), biases, strict=True)
    return torch.empty_like(pooled), *of_1, *of_2


def cbam_kept_bytes(x: Tensor, parameters) -> int:
    """The bytes that cbam_propagate_ keeps."""
    b, c, h, w = x.shape
    itemsize, first, conv = accumulate_dtype(x.dtype).itemsize, parameters[0], parameters[4]
    parts = [7 * itemsize]
    if first is not None:
        parts += b * 2 * c * itemsize, b * c * 4, b * 2 * first.shape[0] * itemsize, b * c * itemsize
    if conv is not None:
        parts += b * 2 * h * w * itemsize, b * h * w * 4, b * h * w * itemsize, b * h * w * itemsize
    return sum((part + 63) // 64 * 64 for part in parts)


@_fake("cbam_propagate_")
def _(x, parameters, fixed, running, eps, batch, momentum, confounder, keep):
    short = 0 if parameters[4] is None else 7 * accumulate_dtype(x.dtype).itemsize
    kept = x.new_empty((cbam_kept_bytes(x, parameters) if keep else short,), dtype=torch.uint8)
    return [*(torch.empty_like(x) for _ in range(2 if confounder else 1)), kept]


@_fake("cbam_propagate_back")
def _(grad_y, grad_confounder, x, parameters, kept, needs):
    dtype = accumulate_dtype(x.dtype)
    wanted = (p for p, needed in zip(parameters, needs, strict=False) if needed and p is not None)
    found = [x.new_empty(p.shape, dtype=dtype) for p in wanted]
    return found + ([torch.empty_like(x)] if needs[-1] else [])


def _memory_rows(logits: Tensor, feature: int, heads: int) -> int:
    """H R."""
    return logits.shape[1] // 2 + (heads if feature == 0 else 0)


def _dtype_of_memory_rows(logits: Tensor) -> torch.dtype:
    narrow = logits.dtype == torch.bfloat16 and logits.device.type != "cpu"
    return logits.dtype if narrow else accumulate_dtype(logits.dtype)


@_fake("memory_keys")
def _(logits, feature, heads, padding, statistics, gradients):
    b, columns, n = logits.shape
    rows, dtype = _memory_rows(logits, feature, heads), accumulate_dtype(logits.dtype)
    shape = b, rows + (columns if gradients else 0), n
    return logits.new_empty(shape, dtype=_dtype_of_memory_rows(logits)), logits.new_empty((b, rows), dtype=dtype)


@_fake("memory_queries")
def _(logits, feature, heads, padding, sums, gamma, eps):
    b, _, n = logits.shape
    return logits.new_empty((b, _memory_rows(logits, feature, heads), n), dtype=_dtype_of_memory_rows(logits))


@_fake("memory_queries_backward_")
def _(rows, logits, feature, heads, padding, sums, gamma, eps, reached):
    return rows.new_empty(reached.shape), torch.empty_like(sums), sums.new_empty(1)


@_fake("memory_keys_backward_")
def _(rows, logits, feature, heads, padding, reached, grad_sums, reduced):
    return None


@_fake("memory_propagate")
def _(x, weights, feature, eps, residual):
    b, n, c = x.shape
    columns = weights[0].shape[0]
    rows = columns // 2 + (weights[2].shape[0] if feature == 0 else 0)
    return [torch.empty_like(x), *(x.new_empty(shape) for shape in ((b, columns, n), (b, rows, c), (b, rows)))]


@_fake("memory_propagate_back")
def _(grad, x, weights, kept, feature, eps, residual, needs_x):
    *others, _ = (x.new_empty(0) if w is None else torch.empty_like(w) for w in weights)
    return [torch.empty_like(x) if needs_x else x.new_empty(0), *others, x.new_empty(1)]


@_fake("external_propagate_")
def _(x, weights, norm, running, heads, eps, fold, batch, norm_eps, momentum):
    first, key, value, _, last, *_ = weights
    on_maps = x.ndim == 4
    c, (slots, k), v = x.shape[1 if on_maps else 2], key.shape[:2], value.shape[0]
    b, rows, outputs = x.shape[0], x.numel() // c, (value if last is None else last).shape[0]
    of_h = slots * c if fold else 0 if first is None else rows * heads * k
    of_u = 0 if last is None else outputs * slots if fold else rows * heads * v
    of_block = (rows * outputs, 3 * outputs) if norm else ()
    parts = rows * heads * slots, rows * heads, of_h, of_u, *of_block
    y = torch.empty_like(x) if on_maps else x.new_empty((b, rows // b, outputs))
    count = sum((part + 15) // 16 * 16 for part in parts)
    return y, x.new_empty((count,), dtype=accumulate_dtype(x.dtype))


@_fake("external_propagate_back")
def _(grad, x, y, weights, norm, kept, heads, fold, norm_eps, needs):
    *of_weights, of_scale, of_shift, of_x = needs
    found = [torch.empty_like(w) for w, needed in zip(weights, of_weights, strict=True) if needed]
    found += [x.new_empty((x.shape[1],)) for _ in range(of_scale + of_shift)]
    return found + ([torch.empty_like(x)] if of_x else [])
