"""One argument set after the other: a seed makes a set, and the operator either raises or gives the right values."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import torch
from torch import Tensor

from . import arguments, cbam, memory, wholes
from .spoiled import readable, spoil

OPERATORS = arguments.OPERATORS | cbam.OPERATORS | memory.OPERATORS | wholes.OPERATORS


class Set:
    """The argument set of a seed: an operator's name, its arguments, and how they were spoiled, if they were."""

    def __init__(self, seed: int, operator: str = ""):
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.seed, self.operator = seed, operator or r.choice(list(OPERATORS))
        self.arguments, self.ways = OPERATORS[self.operator].draw(r), []
        for _ in range(r.choice((0, 0, 1, 1, 2))):
            self.arguments, way = spoil(r, self.arguments)
            self.ways.append(way)

    def __str__(self) -> str:
        ways = "; ".join(self.ways) or "nothing spoiled"
        return f"seed {self.seed}: {self.operator}({', '.join(map(_told, self.arguments))}) with {ways}"

    def run(self, call=None) -> str | None:
        """The error of a set that is refused, None for one that gave the right values; else it raises AssertionError.

        call: the operator, torch's own by default.
        """
        call = call or getattr(torch.ops.aia_kernels, self.operator)
        before = copied(self.arguments)
        try:
            results = call(*self.arguments)
        except (RuntimeError, TypeError) as error:
            assert same(before, copied(self.arguments)), f"refused, but changed an argument: {error}"
            return str(error)
        OPERATORS[self.operator].check(before, self.arguments, results)
        return None


def copied(value: Any) -> Any:
    """A copy of arguments, each tensor stored alike where it can be read."""
    if isinstance(value, list):
        return [copied(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    if not readable(value):
        return "nobody may read it"
    if value.data_ptr() % value.element_size() == 0:
        return torch.empty_like(value).copy_(value)
    # The framework itself may not read what is not aligned.
    raw = bytearray(ctypes.string_at(value.data_ptr(), value.numel() * value.element_size()))
    return torch.frombuffer(raw, dtype=value.dtype).view(value.shape)


def same(a: Any, b: Any) -> bool:
    """Whether two copies of arguments hold the same values, NaN the same as NaN."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
    return a == b or a != a


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if not isinstance(value, Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} {list(value.shape)} strides {list(value.stride())} from {value.storage_offset()}"
