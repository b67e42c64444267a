"""One argument set after the other: a seed makes a set, and a set is raised or gives the right values."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import torch
from torch import Tensor

from .arguments import OPERATORS
from .spoiled import readable, spoil


class Set:
    """The argument set of a seed: an operator's name, its arguments, and how they were spoiled, if they were."""

    def __init__(self, seed: int, operator: str | None = None):
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
        before = _each(_copied, self.arguments)
        try:
            results = call(*self.arguments)
        except (RuntimeError, TypeError) as error:
            unchanged = _each(_copied, self.arguments)
            assert _same(before, unchanged), f"refused, but changed an argument: {error}"
            return str(error)
        OPERATORS[self.operator].check(before, self.arguments, results)
        return None


def _copied(t: Tensor) -> Tensor | str:
    """A copy that is stored alike, by bytes: the framework itself may not read what is not aligned."""
    if not readable(t):
        return "nobody may read it"
    if t.data_ptr() % t.element_size() == 0:
        return torch.empty_like(t).copy_(t)
    raw = bytearray(ctypes.string_at(t.data_ptr(), t.numel() * t.element_size()))
    return torch.frombuffer(raw, dtype=t.dtype).view(t.shape)


def _each(function, values: Any) -> Any:
    if isinstance(values, list):
        return [_each(function, value) for value in values]
    return function(values) if isinstance(values, Tensor) else values


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return all(map(_same, a, b))
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else True


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if not isinstance(value, Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} {list(value.shape)} strides {list(value.stride())} from {value.storage_offset()}"
