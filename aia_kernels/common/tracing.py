"""Whether a call is recorded, or followed operation by operation. A pass that writes into its operands must not run
there.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

#: The modes of selective checkpointing: a result that was kept takes the place of running its operator again.
_REPLAYING = (torch.utils.checkpoint._CachingTorchDispatchMode, torch.utils.checkpoint._CachedTorchDispatchMode)

if torch.__version__ >= (2, 12):
    is_exporting = torch.compiler.is_exporting
else:

    def is_exporting() -> bool:
        """torch.compiler.is_exporting, which torch.compile of torch 2.10 and 2.11 takes for true in every record."""
        return torch.compiler._is_exporting_flag


def is_symbolic() -> bool:
    """Whether tensors may stand for others that come later: torch.compile, torch.export, make_fx, fake tensors."""
    if torch.compiler.is_compiling():
        return True
    # Modes with a key are torch's own: fake tensors, proxies, functionalization.
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack()
    )


def is_for_any_sizes() -> bool:
    """Whether a call is recorded for sizes that come later. torch.compile records it again for those that it does not
    know."""
    return is_symbolic() and (not torch.compiler.is_compiling() or is_exporting())


def is_statically(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds whatever torch.compile does not know of them."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def is_traced() -> bool:
    """Whether the call is recorded and may run later from the record: symbolic calls, and selective checkpointing.

    A layer must then be one registered operator that changes nothing. A single pass cannot be recorded. Where a kept
    result replaces a pass, it would not write what it writes, and its sizes would be those of the recorded call.
    """
    return is_symbolic() or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(isinstance(mode, _REPLAYING) for mode in _get_current_dispatch_mode_stack())
    )


def needs_reference() -> bool:
    """Whether the call is followed operation by operation, which passes do not allow: a functorch transform,
    forward-mode differentiation or torch.jit.trace. Under torch.compile a registered operator stands for the layer.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_observed() -> bool:
    """Whether anybody may see or record the operators of a call, or change their types: the questions above, modes of
    any kind and autocast, at once. Every ordinary call asks, so it is as short as it can be."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )
