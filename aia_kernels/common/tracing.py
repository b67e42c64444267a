"""Who follows or records a call: there passes that write into their operands cannot be shown."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

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
