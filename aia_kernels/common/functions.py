"""Autograd functions in ordinary calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply, for calls in which no functorch transform is active and no argument was left behind by one
    (tracing.is_observed, torch._C._functorch.is_functorch_wrapped_tensor). torch's own asks for both, for the latter
    argument by argument in Python, which takes half as long as all that follows."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
