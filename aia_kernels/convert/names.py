"""What the code of a class names."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any


@functools.cache
def names_in(kind: Any) -> frozenset[str]:
    """What is named in the methods of a class of modules, and in the functions that they call."""
    kinds = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "aia_kernels."))]
    found: set[str] = set()
    members = (getattr(f, "fget", getattr(f, "__func__", f)) for base in kinds for f in vars(base).values())
    waiting = [f for f in members if inspect.isfunction(f)]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names = set(_of_code(function.__code__))
        if (decorated := getattr(function, "__wrapped__", None)) is not None:
            names.add(function.__code__.co_name)
            waiting += [decorated] if inspect.isfunction(decorated) else []
        found |= names
        called = (function.__globals__.get(name) for name in names)
        waiting += [f for f in called if inspect.isfunction(f) and not (f.__module__ or "").startswith("torch")]
    return frozenset(found)


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
