"""Checks of arguments that the functions of all families share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..common.autocast import autocast_dtype
from ..common.dtypes import DTYPES
from .sharded import is_distributed


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is not a dense tensor of a type that the layers compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name}: got {layout}, expected a dense one")
    if value.dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"{name}: got {value.dtype}, expected a floating-point tensor, of {expected}")


def check_integer(name: str, value: Any) -> int:
    """Refuse what is not an integer; returns it as Python's. Integers of numpy and tensors of one integer are taken,
    bool is not.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {value!r}, expected an integer")


def check_at_least_one(**sizes: Any) -> None:
    """Refuse sizes, by their names, that are no integers of at least 1."""
    for name, size in sizes.items():
        check_integer(name, size)
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r}, expected a number")


def check_beside(name: str, value: Tensor, parameter: Any) -> None:
    """Refuse a tensor of another device than a parameter, or of another type where no autocast brings them together;
    and a DTensor, of which layers over PyTorch's attention have no form.
    """
    if is_distributed(value):
        raise TypeError(f"{name}: got a DTensor, expected a plain tensor, such as x.to_local()")
    if not isinstance(parameter, Tensor):
        return
    if value.device != parameter.device:
        raise ValueError(f"{name}: got device {value.device}, expected that of the parameters, {parameter.device}")
    if value.dtype != parameter.dtype and autocast_dtype(value) is None:
        raise TypeError(f"{name}: got {value.dtype}, expected the type of the parameters, {parameter.dtype}")


def check_clips(x: Tensor, num_segments: int) -> int:
    """Refuse what is not [B * num_segments, C, H, W] or [B, C, T, H, W] of a floating-point type; returns num_segments,
    which is not checked for the latter.
    """
    check_tensor("x", x)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B * T, C, H, W] or [B, C, T, H, W]")
    if x.ndim == 4:
        num_segments = check_integer("num_segments", num_segments)
        if num_segments < 1:
            raise ValueError(f"num_segments: got {num_segments}, expected at least 1")
        if x.shape[0] % num_segments:
            raise ValueError(
                f"x: got a batch of {x.shape[0]} frames, expected a multiple of num_segments = {num_segments}"
            )
    return num_segments
