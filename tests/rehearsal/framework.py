"""Torch's own operators on the tensors of a rehearsal: the CPU does their work on the same memory.

They replace torch's kernels for the dispatch key CUDA, so that autograd, custom operators and C++ meet them too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

#: Operators that only make tensors, or ask about them: torch's own are right.
_OWN = {"empty", "empty_strided", "record_stream", "_pin_memory", "is_pinned", "set_", "resize_", "_resize_output_"}
#: Those that torch takes apart, or gives to cuDNN or a copy engine, before the key is asked.
_WHOLE = {"aten::convolution", "aten::convolution_backward", "aten::copy_"}

#: Keeps the replacements in force.
_library: torch.library.Library | None = None


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a CUDA tensor."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    if storage.nbytes() < size or tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=storage.nbytes() // size * size)
    alias = whole.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return alias.conj() if tensor.is_conj() else alias


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


class _Call:
    """A call of an operator with CUDA tensors in it, moved to the CPU and back."""

    def __init__(self, values: list):
        found = [v.device for v in values if isinstance(v, Tensor) and v.is_cuda] + [v for v in values if _is_cuda(v)]
        self.device = found[0] if found else torch.device("cuda", torch.cuda.current_device())
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}
        for device in {self.device, *found}:
            torch.cuda.current_stream(device).synchronize()

    def moved(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            alias = on_host(value)
            self._aliases[id(alias)] = value, alias  # which keeps the number its own
            return alias
        if isinstance(value, torch.Generator):
            return None
        return torch.device("cpu") if _is_cuda(value) else value

    def back(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._aliases:
            return self._aliases[id(value)][0]
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        on_host(made).copy_(value)
        return made

    def resize_outputs(self) -> None:
        """Sizes that the operator gave to an out= argument."""
        for value, alias in self._aliases.values():
            if alias.shape != value.shape:
                on_host(value.resize_(alias.shape)).copy_(alias)


def _on_cpu(operator: Callable) -> Callable:
    def run(*args, **kwargs):
        values, spec = tree_flatten((args, kwargs))
        call = _Call(values)
        moved_args, moved_kwargs = tree_unflatten([call.moved(value) for value in values], spec)
        result = operator(*moved_args, **moved_kwargs)
        call.resize_outputs()
        return tree_map(call.back, result)

    return run


def install() -> None:
    """Replace torch's CUDA kernels in this process."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for name in sorted({*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), *_WHOLE}):
        space, _, signature = name.partition("::")
        packet, _, overload = signature.partition(".")
        if space != "aten" or packet in _OWN:
            continue
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if not operator.is_view:
            _library.impl(signature, _on_cpu(operator), "CUDA", allow_override=True)
    torch.backends.cudnn.enabled = False
    torch.backends.mkldnn.enabled = False
