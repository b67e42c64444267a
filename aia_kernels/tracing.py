"""Who follows or records a call, and what they must be shown instead of passes that write into their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .autocast import no_autocast

#: The modes of selective checkpointing: a result that was kept takes the place of running its operator again.
_REPLAYING = (torch.utils.checkpoint._CachingTorchDispatchMode, torch.utils.checkpoint._CachedTorchDispatchMode)


def is_symbolic() -> bool:
    """Whether tensors may stand for others that come later: torch.compile, torch.export, make_fx, fake tensors."""
    if torch.compiler.is_compiling():
        return True
    # Modes with a key are torch's own: fake tensors, proxies, functionalisation.
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack()
    )


def is_traced() -> bool:
    """Whether what runs is recorded to be run again: symbolic calls, and selective checkpointing.

    A layer must then be one registered operator that changes nothing. A single pass is no such thing: left out in
    favour of its kept result it would not write what it writes, and its sizes would be those of the record.
    """
    return is_symbolic() or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(isinstance(mode, _REPLAYING) for mode in _get_current_dispatch_mode_stack())
    )


def needs_reference() -> bool:
    """Whether somebody follows the call operation by operation, as a pass cannot be followed: a functorch transform,
    forward-mode differentiation or torch.jit.trace. Under torch.compile the operators speak for themselves."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


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
    again = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(grad):
        inputs = [a.view_as(a) if need else a for a, need in zip(inputs, needs, strict=True)]
        wanted = [a for a, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=again))
    return [next(found) if need else None for need in needs]
