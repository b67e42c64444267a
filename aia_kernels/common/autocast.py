"""The type that autocast gives to products, and code that runs without autocast as its tensors have their types
already.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast, where it is on, gives to products of x; None where it leaves them alone."""
    if x.device.type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of x."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def without_autocast(function: Callable) -> Callable:
    """Run a function of (plan, x, ...) without autocast: a backward pass may be called inside of it."""

    @functools.wraps(function)
    def wrapped(plan: Any, x: Tensor, *arguments: Any) -> Any:
        with no_autocast(x):
            return function(plan, x, *arguments)

    return wrapped
