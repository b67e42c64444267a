"""What the functions of every family ask of their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..backends import DTYPES


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
    """An integer as Python has it: of numpy's too, or a tensor of one integer; bool is none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {value!r}, expected an integer")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
