"""Gradients that can be differentiated again: those of a formula in PyTorch operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.autocast import no_autocast


def backward_is_followed() -> bool:
    """Whether a backward under way must be one of PyTorch operations: create_graph=True, or a vmap over gradients."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of a formula in the inputs that need one, given that of its result, which may be a batch of vmap's;
    under create_graph=True a differentiable function of all of them.

    Each input enters as a fresh view, so that a gradient is that of its own argument even where one argument was
    computed from another.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(grad):
        inputs = [a.view_as(a) if need else a for a, need in zip(inputs, needs, strict=True)]
        wanted = [a for a, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
