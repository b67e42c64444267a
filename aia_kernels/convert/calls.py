"""What a rewritten graph calls in the place of what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.autocast import autocast_dtype, no_autocast
from ..common.tracing import is_traced
from ..functional.external_attention import (
    double_normalize,
    external_attention,
    external_attention_block,
    without_effect,
)
from ..modules.submodules import norm_of, products_saved
from ..reference import Norm


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


class NotAsRecorded(Exception):
    """A size is not what a recorded forward was recorded for."""


def expect(condition: bool, recorded: bool) -> None:
    """Raise NotAsRecorded unless a condition on sizes is what it was when a forward was recorded."""
    if bool(condition) is not recorded:
        raise NotAsRecorded


def normalize(logits: Tensor, tokens: int, slots: int, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """A softmax over one axis, divided by eps and its sum over another.

    Args:
        logits: Any shape, floating-point.
        tokens: The axis of the softmax.
        slots: The axis of the sum.
        eps: Added to the sum.
        dtype: The type to which the softmax casts the logits; None: their own or, under autocast, float32, as torch's.

    Returns:
        A, in the shape of the logits, and contiguous where they are: what follows may want to view it as they are.
    """
    if dtype is None and autocast_dtype(logits) is not None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
    attention = double_normalize(logits if dtype is None else logits.to(dtype), dims=(tokens, slots), eps=eps)
    return attention.contiguous() if logits.is_contiguous() else attention


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


def attend(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    form: Form,
    eps: float,
    dropout: nn.Dropout | float | None = None,
) -> Tensor:
    """External attention with the products around it.

    Args:
        x: Any arrangement of samples, tokens and features.
        weights: Of the inner, key, value and outer product, [out, in] each, the heads outermost; inner and outer may be
            None.
        biases: Of the same, each may be None.
        form: The arrangement.
        eps: Added to the sum over slots.
        dropout: Of the attention map: a module, its probability, or None.

    Returns:
        o, arranged as the form says, and contiguous unless x is channels_last.
    """
    if isinstance(dropout, nn.Module):
        dropout = dropout.p if dropout.training else 0.0
    dropout = dropout or 0.0
    sizes = [x.shape[i] for i in (*form.batch, *form.tokens)]
    samples, tokens = math.prod(sizes[: len(form.batch)]), math.prod(sizes[len(form.batch) :])
    rows = x.permute(*form.batch, *form.tokens, form.feature).reshape(samples, tokens, x.shape[form.feature])
    if not _folds(rows, weights, form):
        o = _by_heads(rows, weights, biases, form, eps, dropout)
        if weights[3] is None:
            sizes.append(form.heads)
        return _arranged(o.reshape(*sizes, -1), form, x)
    with no_autocast(x):
        key, value, bias = _folded(weights, biases, form)
    slots = weights[1].shape[0] // (form.heads if form.of == "key" else 1)
    if dropout or not _is_channels_first(x, form):
        o = external_attention(rows, key, value, value_bias=bias, eps=eps, group=slots, dropout=dropout)
        return _arranged(o.reshape(*sizes, -1), form, x)
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


def _arranged(o: Tensor, form: Form, x: Tensor) -> Tensor:
    """o, [*batch, *tokens, ..., features], with the axes that the form says."""
    arranged = o.permute([i for axis in form.out for i in axis])
    arranged = arranged.reshape([math.prod([o.shape[i] for i in axis]) for axis in form.out])
    return arranged if _is_channels_last(x) else arranged.contiguous()


def _is_channels_first(x: Tensor, form: Form) -> bool:
    """Whether the result is wanted as [*batch, features, *tokens]."""
    count = len(form.batch)
    wanted, feature = [i for axis in form.out for i in axis], count + len(form.tokens)
    return wanted == [*range(count), feature, *range(count, feature)] and not _is_channels_last(x)


def block(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    norm: _BatchNorm | tuple | None,
    eps: float,
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
        eps: Added to the sum over slots.
        activation: "relu", "gelu", "silu" or None.
        residual: Whether x is added, or what is added in its place.

    Returns:
        y, stored as x.
    """
    with no_autocast(x):
        key, value, bias = _folded(weights, biases, Form((0,), (), 1, 1, "key", False, ()))
    described: Norm | None = None
    if isinstance(norm, _BatchNorm):
        described = norm_of(norm)
    elif norm is not None:
        mean, var, gain, shift, training, momentum, norm_eps = norm
        described = Norm(gain, shift, mean, var, None, training, momentum, norm_eps)
    settings = {"eps": eps, "value_bias": bias, "activation": activation, "residual": residual}
    return external_attention_block(x, key, value, described, **settings)


def _folds(rows: Tensor, weights: Sequence[Tensor | None], form: Form) -> bool:
    """Whether the products beside the memories are multiplied with them before they meet the tokens. With heads that is
    a choice, made by counting multiplications."""
    inner, key, _, outer = weights
    if form.heads == 1 or form.of == "key" or not form.apart:
        return True
    if form.of == "x" or outer is None:
        return False
    tokens = None if is_traced() else rows.shape[0] * rows.shape[1]
    return products_saved(form.heads, key.shape[0], inner.shape, outer.shape, tokens) >= 0


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
