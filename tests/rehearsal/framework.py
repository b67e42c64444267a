"""Torch's own operators on the tensors of a rehearsal: the CPU does their work on the same memory.

They replace torch's kernels for the dispatch key CUDA, so that autograd, custom operators and C++ meet them too. While
a graph is captured they wait in it, as kernels do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import rehearsal

#: Operators that only make tensors, or ask about them: torch's own are right.
_OWN = {"empty", "empty_strided", "record_stream", "_pin_memory", "is_pinned", "set_", "resize_", "_resize_output_"}
#: Those that torch takes apart, or gives to cuDNN or a copy engine, before the key is asked.
_WHOLE = {"aten::_convolution", "aten::convolution_backward", "aten::copy_"}

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
    """A call of an operator with CUDA tensors in it: done by the CPU, or kept in the graph that is captured."""

    def __init__(self, operator: Callable, args: tuple, kwargs: dict):
        self._operator = operator
        values, self._spec = tree_flatten((args, kwargs))
        found = [v.device for v in values if isinstance(v, Tensor) and v.is_cuda] + [v for v in values if _is_cuda(v)]
        self._device = found[0] if found else torch.device("cuda", torch.cuda.current_device())
        self._devices = {self._device, *found}
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        self._values = [self._moved(value) for value in values]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            alias = on_host(value)
            self._originals[id(alias)] = value, alias  # which keeps the number its own
            return alias
        if isinstance(value, torch.Generator):
            return None
        return torch.device("cpu") if _is_cuda(value) else value

    def _result(self, values: list) -> Any:
        args, kwargs = tree_unflatten(values, self._spec)
        return self._operator(*args, **kwargs)

    def _made(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device)

    def _back(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._originals:
            return self._originals[id(value)][0]
        made = self._made(value)
        on_host(made).copy_(value)
        return made

    def now(self) -> Any:
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        result = self._result(self._values)
        for original, alias in self._originals.values():
            if alias.shape != original.shape:  # an out= that the operator sized
                on_host(original.resize_(alias.shape)).copy_(alias)
        return tree_map(self._back, result)

    def captured(self) -> Any:
        """Queue the work; what it returns is sized by a trial on copies."""
        copies = [value.clone() if id(value) in self._originals else value for value in self._values]
        aliases = {id(copy): alias for copy, alias in zip(copies, self._values, strict=True)}
        trial, spec = tree_flatten(self._result(copies))
        made = [self._made(t) if isinstance(t, Tensor) and id(t) not in aliases else None for t in trial]
        targets = [None if new is None else on_host(new) for new in made]

        def work() -> None:
            for target, value in zip(targets, tree_flatten(self._result(self._values))[0], strict=True):
                if target is not None:
                    target.copy_(value)

        rehearsal.queue(torch.cuda.current_stream(self._device), work)
        return tree_unflatten(
            [self._back(aliases.get(id(t), t)) if new is None else new for t, new in zip(trial, made, strict=True)],
            spec,
        )


def _on_cpu(operator: Callable) -> Callable:
    def run(*args, **kwargs):
        call = _Call(operator, args, kwargs)
        return call.captured() if torch.cuda.is_current_stream_capturing() else call.now()

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
    torch._C._jit_override_can_fuse_on_gpu(False)  # by a compiler that the device is asked to run
    torch.backends.mkldnn.enabled = False
