"""The arguments of the functions of linear attention, held to what is expected before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .checks import check_integer, check_tensor
from .external_attention_checks import check_parameter


def channels_of(x: Tensor) -> int:
    """C of tokens [B, N, C] or maps [B, C, ...]."""
    return x.shape[2] if x.ndim == 3 else x.shape[1]


def checked_input(x: Tensor, heads: int) -> int:
    """The number of heads, after the rank and the channels of x were held to what is expected."""
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, N, C], [B, C, H, W] or [B, C, D, H, W]")
    if channels_of(x) < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one channel")
    heads = check_integer("heads", heads)
    if heads < 1:
        raise ValueError(f"heads: got {heads}, expected at least 1")
    return heads


def checked_biases(biases: Any, count: int) -> Sequence[Tensor | None]:
    """The biases, of which there are as many as projections."""
    if not isinstance(biases, (tuple, list)) or len(biases) != count:
        raise ValueError(f"biases: got {biases!r}, expected {count}, each a tensor or None")
    return biases


def check_residual(residual: Any) -> None:
    """Whether x is added is said by a bool, and nothing else is taken for one."""
    if not isinstance(residual, bool):
        raise TypeError(f"residual: got {residual!r}, expected a bool")


def check_keys(
    x: Tensor, query: Tensor, key: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, heads: int
) -> None:
    """The keys and queries of all heads have the same number of features, a multiple of heads."""
    check_tensor("key", key)
    columns = key.shape[0] if key.ndim else 0
    if columns < 1 or columns % heads:
        raise ValueError(f"key: got shape {tuple(key.shape)}, expected [heads * d, C] for heads = {heads}, d >= 1")
    for name, matrix in (("key", key), ("query", query)):
        check_parameter(name, matrix, x, ((columns, channels_of(x)),))
    for name, bias in (("key_bias", key_bias), ("query_bias", query_bias)):
        check_parameter(name, bias, x, ((columns,),))


def fit_at_once(x: Tensor, matrices: Sequence[Tensor], gamma: Tensor | None, heads: Any) -> bool:
    """Whether the sizes of an ordinary call of a module fit, which the checks above would name one by one: maps x
    [B, C, H, W] that are not empty, the weights of 1x1 convolutions for queries, keys and values and perhaps behind
    these, gamma [1] and a number of heads."""
    if x.ndim != 4 or x.numel() == 0 or not (gamma is None or gamma.shape == (1,)):
        return False
    query, key, value, *last = matrices
    c, values = x.shape[1], value.shape[0]
    if not (query.shape == key.shape and key.ndim == value.ndim == 4 and key.shape[1] == value.shape[1] == c):
        return False
    if not last:
        return values == c
    divides = type(heads) is int and heads > 0 and key.shape[0] % heads == 0 == values % heads
    return divides and last[0].shape[:2] == (c, values)
