"""What a rewritten graph calls in the place of what was found.

Each call takes the tensor that it is about first, and by keyword how its result is stored (as_stored).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.autocast import autocast_dtype, no_autocast
from ..common.maps import GATE_AXES
from ..common.tracing import is_for_any_sizes, is_traced, needs_reference
from ..functional import plain
from ..functional.attention_in_attention import attention_in_attention
from ..functional.block import ACTIVATIONS, with_bias
from ..functional.cbam import POOL_TYPES, cbam
from ..functional.external_attention import (
    compiler_takes,
    double_normalize,
    external_attention,
    external_attention_block,
    without_effect,
)
from ..functional.linear_attention import efficient_attention, linear_attention
from ..modules import counts
from ..modules.linear_attention import attended, efficient_flow_is_faster, linear_flow_is_faster
from ..modules.submodules import norm_of
from ..reference import MLP, UNITS, Gate, Norm
from ..reference.norm import updates, uses_batch
from .storage import Storage


class Form(NamedTuple):
    """How the axes of external attention are arranged in a network.

    batch, tokens, feature: the axes of x, whose features are those of all heads. heads: their number H. of: what makes
    the heads: "x", the first product ("inner") or the product with the keys ("key"). apart: whether the heads share the
    values, each has its own result. out: for each axis of the result, which of (*batch, *tokens, heads, feature) are
    joined in it; the heads stand there where they are apart and no product follows.
    """

    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    feature: int
    heads: int
    of: str
    apart: bool
    out: tuple[tuple[int, ...], ...]


def as_stored(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call whose result is stored as that of the network.

    storage: How it was seen to be. Without it the result is contiguous, or as the call leaves it for an x in
    channels_last. convolutions: The weights of those in whose place the call stands. stored_as: What the result was
    seen to follow in the place of x.
    """

    @functools.wraps(call)
    def stored(
        x: Tensor,
        *given: Any,
        storage: Storage | None = None,
        convolutions: Sequence[Tensor] = (),
        stored_as: Tensor | None = None,
    ) -> Tensor:
        y = call(x, *given)
        if storage is None:
            return y if _is_channels_last(x) else y.contiguous()
        return storage.store(y, x if stored_as is None else stored_as, convolutions)

    return stored


class NotAsRecorded(Exception):
    """A size is not what a recorded forward was recorded for."""


def expect(condition: bool, recorded: bool) -> None:
    """Raise NotAsRecorded unless a condition on sizes is what it was when a forward was recorded."""
    if bool(condition) is not recorded:
        raise NotAsRecorded


def expect_number(number: float, recorded: float) -> None:
    """Raise NotAsRecorded unless a number is what it was when a forward was recorded."""
    if number != recorded:
        raise NotAsRecorded


#: What a recorded forward calls to say where it holds.
CONDITIONS = (expect, expect_number)


def enter_autocast(device: str, dtype: torch.dtype | None, enabled: bool, cached: bool) -> torch.autocast:
    """What a with statement of a recorded forward is about: source_of writes one from here to exit_autocast."""
    return torch.autocast(device, dtype, enabled, cached)


def exit_autocast(entered: torch.autocast) -> None:
    """Marks the end of a with statement."""


def _eps_of(x: Tensor, eps: float | str) -> float:
    """A number, or what torch.finfo calls so for the type of the map that is made of x."""
    if not isinstance(eps, str):
        return eps
    dtype = x.dtype if autocast_dtype(x) is None else torch.promote_types(x.dtype, torch.float32)
    return getattr(torch.finfo(dtype), eps)


@as_stored
def normalize(logits: Tensor, tokens: int, slots: int, eps: float | str, dtype: torch.dtype | None = None) -> Tensor:
    """A softmax over one axis, divided by eps and its sum over another.

    Args:
        logits: Any shape, floating-point.
        tokens: The axis of the softmax.
        slots: The axis of the sum.
        eps: Added to the sum; or what torch.finfo calls so for the type of the map.
        dtype: The type to which the softmax casts the logits; None: their own or, under autocast, float32, as torch's.

    Returns:
        A, in the shape of the logits.
    """
    if dtype is None and autocast_dtype(logits) is not None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
    typed = logits if dtype is None else logits.to(dtype)
    return double_normalize(typed, dims=(tokens, slots), eps=_eps_of(typed, eps))


def matrix(weight: Tensor, sizes: tuple[int, int], transposed: bool, heads: int, rows: bool, columns: bool) -> Tensor:
    """A weight as the matrix [out, in], the heads outermost.

    Args:
        weight: Of these sizes, but for axes of length one.
        sizes: [out, in], or [in, out] where transposed.
        transposed: See sizes.
        heads: Their number.
        rows: Whether the heads are innermost in the rows now.
        columns: Whether they are in the columns.

    Returns:
        The matrix, a view where that is possible.
    """
    found = weight.reshape(sizes)
    found = found.mT if transposed else found
    if rows:
        found = found.unflatten(0, (-1, heads)).transpose(0, 1).flatten(0, 1)
    if columns:
        found = found.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1)
    return found


@as_stored
def attend(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    form: Form,
    eps: float | str,
    dropout: nn.Dropout | float | None = None,
) -> Tensor:
    """External attention with the products around it.

    Args:
        x: Any arrangement of samples, tokens and features.
        weights: Of the inner, key, value and outer product, [out, in] each, the heads outermost; inner and outer may be
            None.
        biases: Of the same, each may be None.
        form: The arrangement.
        eps: As of normalize.
        dropout: Of the attention map: a module, its probability, or None.

    Returns:
        o, arranged as the form says.
    """
    if isinstance(dropout, nn.Module):
        dropout = dropout.p if dropout.training else 0.0
    dropout, eps = dropout or 0.0, _eps_of(x, eps)
    sizes = [x.shape[i] for i in (*form.batch, *form.tokens)]
    samples, tokens = math.prod(sizes[: len(form.batch)]), math.prod(sizes[len(form.batch) :])
    rows = x.permute(*form.batch, *form.tokens, form.feature).reshape(samples, tokens, x.shape[form.feature])
    if not _folds(rows, weights, form):
        o = _by_heads(rows, weights, biases, form, eps, dropout)
        if weights[3] is None:
            sizes.append(form.heads)
        return _arranged(o.reshape(*sizes, -1), form)
    with no_autocast(x):
        key, value, bias = _folded(weights, biases, form)
    slots = weights[1].shape[0] // (form.heads if form.of == "key" else 1)
    if dropout or not _is_channels_first(x, form):
        o = external_attention(rows, key, value, value_bias=bias, eps=eps, group=slots, dropout=dropout)
        return _arranged(o.reshape(*sizes, -1), form)
    # The last product writes the features outermost, as its result is wanted: no copy turns it.
    attention = double_normalize(rows @ key.mT, eps=eps, group=slots)
    o = value @ attention.mT
    o = o if bias is None else o + bias.unsqueeze(1)
    return o.reshape([math.prod([(*sizes, o.shape[1])[i] for i in axis]) for axis in form.out])


def _by_heads(
    rows: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    form: Form,
    eps: float,
    dropout: float,
) -> Tensor:
    """o of tokens [B, N, d] with the products beside the memories as products of their own."""
    inner, key, value, outer = weights
    q = rows if inner is None else F.linear(rows, inner)
    settings = {"heads": form.heads, "value_bias": biases[2], "eps": eps, "dropout": dropout}
    o = external_attention(q, without_effect(key, *biases[:2]), value, **settings)
    return o if outer is None else F.linear(o, outer, biases[3])


def _arranged(o: Tensor, form: Form) -> Tensor:
    """o, [*batch, *tokens, ..., features], with the axes that the form says."""
    arranged = o.permute([i for axis in form.out for i in axis])
    return arranged.reshape([math.prod([o.shape[i] for i in axis]) for axis in form.out])


def _is_channels_first(x: Tensor, form: Form) -> bool:
    """Whether the result is wanted as [*batch, features, *tokens]."""
    count = len(form.batch)
    wanted, feature = [i for axis in form.out for i in axis], count + len(form.tokens)
    return wanted == [*range(count), feature, *range(count, feature)] and not _is_channels_last(x)


@as_stored
def block(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    norm: _BatchNorm | tuple | None,
    eps: float | str,
    activation: str | None,
    residual: bool | Tensor,
) -> Tensor:
    """activation(BN(o) + residual) on maps x [B, C, ...]: external attention with the products around it, one head.

    Args:
        x: [B, C, ...] with one to three axes of positions.
        weights: As of attend.
        biases: As of attend.
        norm: The batch norm; or running mean and variance, weight, bias, training, momentum and eps, as
            torch.nn.functional.batch_norm takes them; or None for none.
        eps: As of normalize.
        activation: "relu", "gelu", "silu" or None.
        residual: Whether x is added, or what is added in its place.

    Returns:
        y.
    """
    eps = _eps_of(x, eps)
    if eps and _compiler_takes_block(x, weights, biases, norm):
        z = _values_for_a_compiler(x, [w for w in weights if w is not None], biases, eps)
        if norm is not None:
            z = norm(z) if isinstance(norm, nn.Module) else F.batch_norm(z, *norm)
        if residual is not False:
            z = (x if residual is True else residual) + z  # stored as what comes first
        return z if activation is None else ACTIVATIONS[activation](z)
    with no_autocast(x):
        key, value, bias = _folded(weights, biases, Form((0,), (), 1, 1, "key", False, ()))
    settings = {"eps": eps, "value_bias": bias, "activation": activation, "residual": residual}
    return external_attention_block(x, key, value, _described(norm), **settings)


def _compiler_takes_block(
    x: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], norm: _BatchNorm | tuple | None
) -> bool:
    """Whether torch.compile makes more of the operators of a small block of the published form than of one of this
    package, as in modules/external_attention.py."""
    inner, key, *_ = weights
    if x.ndim != 4 or inner is None or biases[2] is not None or biases[3] is not None:
        return False
    if isinstance(norm, nn.SyncBatchNorm) or not compiler_takes(x, *weights):
        return False
    return counts.block_fusing_costs(x, key.shape[0], compiled=True)


def _values_for_a_compiler(x: Tensor, weights: list[Tensor], biases: Sequence[Tensor | None], eps: float) -> Tensor:
    """A V^T of maps x by the products of a block, folded where that pays."""
    if not counts.block_folding_pays(x, weights):
        return plain.values_unfolded(x, weights, (biases[0], biases[1]), eps)
    first, second, value, *last = weights
    key = without_effect(second @ first, *biases[:2])
    return plain.values_of_maps(x, key, last[0] @ value if last else value, eps)


def _described(norm: _BatchNorm | tuple | None) -> Norm | None:
    """A batch norm that is a module, or the arguments of one that is a function."""
    if norm is None or isinstance(norm, _BatchNorm):
        return None if norm is None else norm_of(norm)
    mean, var, gain, shift, training, momentum, eps = norm
    return Norm(gain, shift, mean, var, None, training, momentum, eps)


class ClipForm(NamedTuple):
    """How the axes of a unit of Attention in Attention are arranged in a network.

    batch: the axes of x that tell clips apart. clips: those that are T, C, H and W. out: for each axis of the result,
    the axes of x that are joined in it. unit: its name. factor: what y is multiplied with. residual: how much of x is
    added then.
    """

    batch: tuple[int, ...]
    clips: tuple[int, int, int, int]
    out: tuple[tuple[int, ...], ...]
    unit: str
    factor: float
    residual: float


class GateForm(NamedTuple):
    """How a gate is written in a network. order: the letters of the axes of its convolution. flipped: whether that
    takes the mean first. scale: of what is pooled, above 0."""

    order: str
    flipped: bool
    scale: float


@as_stored
def recalibrate(
    x: Tensor,
    form: ClipForm,
    gates: Sequence[tuple[GateForm, Tensor, Tensor | None, _BatchNorm | tuple | None]],
) -> Tensor:
    """A unit of Attention in Attention, factor * unit(x) + residual * x.

    Args:
        x: Any arrangement of clips, T, C, H and W.
        form: The arrangement.
        gates: In the order of the letters of the unit, each with the weight [1, 2, 3, 3, 3] and the bias [1] or None of
            its convolution, and its batch norm as of block.

    Returns:
        y, arranged as the form says.
    """
    order = (*form.batch, *form.clips)
    if order == (0, 2, 1, 3, 4):
        given, segments, order = x, x.shape[2], (0, 1, 2, 3, 4)
    else:
        sizes, segments = [x.shape[i] for i in order[-3:]], x.shape[form.clips[0]]
        given = x.permute(order).reshape(-1, *sizes)
    described = [_gate(letter, *gate) for letter, gate in zip(UNITS[form.unit].letters, gates, strict=True)]
    y = attention_in_attention(given, form.unit, described, segments)
    for (_, _, bias, _), (_, norm) in zip(gates, described, strict=True):
        _follow_bias(norm, bias)
    if form.factor != 1.0:
        y = y * form.factor
    if form.residual:
        y = y + (given if form.residual == 1.0 else given * form.residual)
    y = y.reshape([x.shape[i] for i in order]).permute([order.index(i) for axis in form.out for i in axis])
    return y.reshape([math.prod(x.shape[i] for i in axis) for axis in form.out])


def _gate(letter: str, form: GateForm, weight: Tensor, bias: Tensor | None, norm: _BatchNorm | tuple | None) -> Gate:
    """A gate as the functions take it: its weight in the published order, its bias in its norm."""
    if form.order != GATE_AXES[letter]:
        weight = weight.permute(0, 1, *(2 + form.order.index(axis) for axis in GATE_AXES[letter]))
    if form.flipped:
        weight = weight.flip(1)
    if form.scale != 1.0:
        weight = weight * form.scale
    return _with_norm(weight, bias, norm)


def _with_norm(weight: Tensor, bias: Tensor | None, norm: _BatchNorm | tuple | None) -> Gate:
    """A gate with the bias of its convolution in its norm."""
    of_bn = _described(norm)
    if bias is None:
        return Gate(weight, of_bn)
    if of_bn is None:
        return Gate(weight, Norm(None, bias, torch.zeros_like(bias), torch.ones_like(bias), eps=0.0))
    if uses_batch(of_bn):  # it takes the bias away again
        return Gate(without_effect(weight, bias), of_bn)
    return Gate(weight, with_bias(of_bn, bias))


@as_stored
def gates(x: Tensor, mlp: tuple | None, gate: tuple | None) -> Tensor:
    """CBAM, or one of its gates.

    Args:
        x: [B, C, H, W].
        mlp: Of the channel gate, weight and bias of both maps and the names of its pools (functional.cbam), or None.
        gate: Of the spatial gate, the weight and the bias or None of its convolution, its batch norm as of block, and
            how the maximum and the mean come to it: "max, mean", "mean, max", or "mix" for their mean; or None.

    Returns:
        y.
    """
    of_channels, pools = (None, POOL_TYPES) if mlp is None else (MLP(*mlp[:4]), mlp[4])
    if gate is None:
        return cbam(x, of_channels, None, pools)
    weight, bias, norm, order = gate
    if order == "mix":
        weight = (weight / 2).expand(-1, 2, -1, -1)
    described = _with_norm(weight.flip(1) if order == "mean, max" else weight, bias, norm)
    y = cbam(x, of_channels, described, pools)
    _follow_bias(described.norm, bias)
    return y


class MemoryForm(NamedTuple):
    """How attention by a memory per sample is written in a network.

    feature: the feature map, "l2", "softplus" or "softmax". heads, eps: as of the functions. factors: of o, and of what
    the product behind makes of it, beside gamma. averaged: whether o is divided by the number of tokens besides.
    residual: whether x is added. features: the axis of x that holds its channels; samples are axis 0. out: for each
    axis of the result, the axes of x that are joined in it.
    """

    feature: str
    heads: int
    eps: float
    factors: tuple[float, float]
    averaged: bool
    residual: bool
    features: int
    out: tuple[tuple[int, ...], ...]


@as_stored
def remember(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gamma: Tensor | None, form: MemoryForm
) -> Tensor:
    """Linear or efficient attention.

    Args:
        x: Any arrangement of tokens and features behind the samples.
        weights: Of queries, keys and values, [out, C] each, and of the product behind, if there is one.
        biases: Of the same, each may be None.
        gamma: One number, or None.
        form: The arrangement.

    Returns:
        y, arranged as the form says.
    """
    order = None
    given = x
    if x.ndim == 3 and form.features == 1:
        given, order = x.mT, (0, 2, 1)
    elif x.ndim > 3 and form.features == x.ndim - 1:
        given, order = x.flatten(1, -2), (*range(x.ndim),)
    settings: dict[str, Any] = {"heads": form.heads, "residual": form.residual}
    inner, outer = _factors(x, form)
    if _flow_is_faster(x, weights, form):
        y = _in_order(given, weights, biases, gamma, form)
    elif form.feature == "softmax":
        query, key, value, *behind = weights
        last = behind[0] if behind else torch.eye(len(value), dtype=value.dtype, device=value.device)
        of_last = biases[3] if behind else None
        for factor in (outer, gamma):
            if factor is not None:
                last, of_last = last * factor, None if of_last is None else of_last * factor
        last = last if inner is None else last * inner
        y = efficient_attention(given, query, key, value, last, biases=(*biases[:3], of_last), **settings)
    else:
        for factor in (inner, outer):
            if factor is not None:
                gamma = x.new_full((1,), factor) if gamma is None else gamma * factor
        settings |= {"feature": form.feature, "eps": form.eps, "gamma": gamma}
        y = linear_attention(given, *weights, biases=biases, **settings)
    if order is not None:
        y = y.permute(order) if x.ndim == 3 else y.reshape(x.shape)
    y = y.permute([i for axis in form.out for i in axis])
    return y.reshape([math.prod(x.shape[i] for i in axis) for axis in form.out])


def _factors(x: Tensor, form: MemoryForm) -> list[float | None]:
    """Of o, and of what the product behind makes of it; None where there is none."""
    inner, outer = form.factors
    if form.averaged:
        inner = inner / (math.prod(x.shape[1:]) / x.shape[form.features])
        return [inner, None if outer == 1.0 else outer]
    return [None if factor == 1.0 else factor for factor in (inner, outer)]


def _flow_is_faster(x: Tensor, weights: Sequence[Tensor], form: MemoryForm) -> bool:
    """Whether "auto" counts that the flow of the network is the faster one, on an x that it takes as it is."""
    if x.dtype not in (torch.float32, torch.float64) or autocast_dtype(x) is not None or x.numel() == 0:
        return False
    if is_traced() or needs_reference() or any(type(t) not in (Tensor, nn.Parameter) for t in (x, *weights)):
        return False
    (keys, c), values = weights[1].shape, weights[2].shape[0]
    if form.feature == "softmax":
        return efficient_flow_is_faster(x, c, keys, values, form.heads)
    return form.heads == 1 and linear_flow_is_faster(x, c, keys)


def _in_order(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gamma: Tensor | None, form: MemoryForm
) -> Tensor:
    """y of tokens or maps x by one product after the other, as a network has them."""
    rows = x.mT if x.ndim == 3 else x.flatten(2)  # [B, C, N]

    def mapped(weight: Tensor, bias: Tensor | None, of: Tensor) -> Tensor:
        """Of features side by side a linear map, else a convolution: what a network has there; neither copies."""
        if of.mT.is_contiguous():
            return F.linear(of.mT, weight, bias).mT
        return F.conv1d(of, weight.unsqueeze(2), bias)

    query, key, value = (mapped(*pair, rows) for pair in zip(weights[:3], biases[:3], strict=True))
    if form.feature == "softmax":
        if form.heads > 1:
            query, key, value = (t.unflatten(1, (form.heads, -1)) for t in (query, key, value))
        o = value @ key.softmax(-1).mT @ query.softmax(-2)
        o = o.flatten(1, 2) if form.heads > 1 else o
    else:
        o = attended(query, key, value, form.feature, form.eps)
    inner, outer = _factors(x, form)
    o = o if inner is None else o * inner
    for weight, bias in zip(weights[3:], biases[3:], strict=True):
        o = mapped(weight, bias, o)
    for factor in (outer, gamma):
        o = o if factor is None else o * factor
    y = rows + o if form.residual else o
    return y.mT if x.ndim == 3 else y.unflatten(2, x.shape[2:])


def _follow_bias(norm: Norm | None, bias: Tensor | None) -> None:
    """Move a running mean by what the bias of the convolution, which the gate was computed without, has in it."""
    if bias is None or norm is None or not updates(norm) or norm.running_mean is None:
        return
    factor: Any = norm.momentum
    if factor is None:
        if norm.num_batches_tracked is None:
            return
        factor = norm.num_batches_tracked.reciprocal().to(norm.running_mean.dtype)
    with torch.no_grad():
        norm.running_mean.add_(bias.to(norm.running_mean.dtype) * factor)


def _folds(rows: Tensor, weights: Sequence[Tensor | None], form: Form) -> bool:
    """Whether the products beside the memories are multiplied with them before they meet the tokens. With heads that is
    a choice, made by counting multiplications."""
    inner, key, _, outer = weights
    if form.heads == 1 or form.of == "key" or not form.apart:
        return True
    if form.of == "x" or outer is None:
        return False
    tokens = None if is_for_any_sizes() else rows.shape[0] * rows.shape[1]
    return counts.products_saved(form.heads, key.shape[0], inner.shape, outer.shape, tokens) >= 0


def _folded(
    weights: Sequence[Tensor | None], biases: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, Tensor, Tensor | None]:
    """K [H * S, d], V [v, H * S] and the bias of o of the products around a double normalization."""
    inner, key, value, outer = weights
    if inner is not None:
        heads = form.heads if form.of == "inner" else 1
        key = torch.matmul(key, inner.unflatten(0, (heads, -1))).flatten(0, 1)
    *_, bias, last = biases
    if outer is not None:
        heads = form.heads if form.apart else 1
        back = outer.unflatten(1, (heads, -1))
        value = (back @ value).flatten(1)
        if bias is not None:
            bias = back.sum(1) @ bias
        bias = bias if last is None else last if bias is None else bias + last
    return without_effect(key, *biases[:2]), value, bias


def _is_channels_last(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
