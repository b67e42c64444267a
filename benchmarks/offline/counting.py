"""What a call moves, by running the real algorithm on tensors without data: nothing of it is written down twice.

On the meta device every operator answers with the shapes of its results. A dispatch mode sees each of them and notes
what it reads and writes; views and allocations do nothing on a GPU and are left out. A Triton kernel is not launched
but noted; which of its pointers it loads from and which it stores to is read from its source (triton_source.py).

The count is a floor. An operator, a pass of the C++ and CUDA backends among them, counts as one launch that meets each
of its inputs once, as the passes do and as the framework's operators do at best: its batch norm and its large sums take
two or three launches, its convolutions sometimes one more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aia_kernels import backends, schemas

#: Written whole without being read.
OVERWRITING = ("copy_", "fill_", "zero_")
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Launch:
    """One launch: the pass that it belongs to ("" outside of passes), its own name, bytes, floating-point operations of
    matrix products, the type of its largest operand, and of the tensors that it meets the elements of each."""

    part: str
    name: str
    read: int
    written: int
    flops: int
    dtype: torch.dtype
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Counter(TorchDispatchMode):
    """Notes every launch that happens inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.part = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        changed, overwritten = _changed(func, args, kwargs)
        here = {_storage(t) for t in inputs}
        views = not changed and all(_storage(t) in here for t in outputs)
        if views or name in ALLOCATING or func.namespace == "prim":
            return out
        # new_zeros and zeros_like take a form from a tensor, and no value.
        spared = {id(t) for t in (inputs if name.startswith("new_") or name.endswith("_like") else overwritten)}
        written = changed or outputs
        formula = flop_registry.get(func.overloadpacket) or flop_registry.get(_out_of_place(func))
        flops = formula(*args, **kwargs, out_val=out) if formula and not overwritten else 0
        if formula and overwritten:  # mm.out and its like: the result is an argument
            flops = formula(*args, out_val=out)
        self.note(name, [t for t in inputs if id(t) not in spared], written, flops)
        return out

    def note(self, name: str, inputs: list[Tensor], outputs: list[Tensor], flops: int = 0) -> None:
        read, written = _bytes(inputs), _bytes(outputs)
        if read + written == 0:
            return
        largest = max(inputs + outputs, key=lambda t: t.nbytes)
        elements = (tuple(_elements(t) for t in _distinct(ts)) for ts in (inputs, outputs))
        self.launches.append(Launch(self.part, name, read, written, flops, largest.dtype, *elements))

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Launches inside belong to a pass; a pass inside of a pass is part of the outer one."""
        before, self.part = self.part, self.part or part
        try:
            yield
        finally:
            self.part = before


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(func, args, kwargs) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments that an operator writes, and those of them that it does not read."""
    changed, overwritten = [], []
    name = func._schema.name.split("::")[1]
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        changed += _tensors(value)
        if name in OVERWRITING or argument.is_out:
            overwritten += _tensors(value)
    return changed, overwritten


def _out_of_place(func):
    return getattr(torch.ops.aten, func._schema.name.split("::")[1].rstrip("_"), None)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _elements(t: Tensor) -> int:
    """Distinct elements: an expanded axis holds one."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of distinct views, of one storage at most all that it holds."""
    by_storage: dict[int, tuple[int, int]] = {}
    for t in _distinct(tensors):
        before, _ = by_storage.get(_storage(t), (0, 0))
        by_storage[_storage(t)] = before + _elements(t) * t.element_size(), t.untyped_storage().nbytes()
    return sum(min(viewed, held) for viewed, held in by_storage.values())


class Named:
    """The passes of a backend, each of which says its name to the counter while it runs."""

    def __init__(self, passes: Any, counter: Counter):
        self._passes, self._counter = passes, counter

    def __getattr__(self, name: str) -> Any:
        if name in schemas.MEMORY_PROPAGATE_PASSES + schemas.CBAM_PROPAGATE_PASSES:
            raise AttributeError(f"{name}: its products and passes are counted one by one")
        found = getattr(self._passes, name)

        @functools.wraps(found)
        def call(*args, **kwargs):
            before = len(self._counter.launches)
            with self._counter.within(name):
                out = found(*args, **kwargs)
            if formula := PRODUCTS.get(name):
                _share(self._counter.launches, before, formula(*args, **kwargs))
            return out

        return call


#: Floating-point operations of the products of Triton's fused passes (algorithms/external_attention_passes.py), that no
#: operator tells: twice the tokens of the batch times the elements of the matrices that each of them meets.
PRODUCTS: dict[str, Callable[..., int]] = {
    "logits": lambda x, key, **_: 2 * _tokens(x) * x.shape[2] * key.shape[1],
    "moments": lambda attention, **_: 2 * _tokens(attention[0]) * attention[0].shape[2] ** 2,
    "values": lambda attention, value, **_: 2 * _tokens(attention[0]) * attention[0].shape[2] * value.shape[1],
    "value_gradient": lambda grad, attention, shape, **_: 2 * _tokens(grad) * grad.shape[2] * shape[2],
    "attention_gradient": lambda grad, attention, value, batch_term=None, **_: (
        2 * _tokens(grad) * (grad.shape[2] * value.shape[2] + (batch_term.inner.numel() if batch_term else 0))
    ),
    "logits_gradient": lambda grad_attention, attention, x, key, needs_x, **_: (
        2 * _tokens(x) * x.shape[2] * key.shape[1] * (1 + bool(needs_x))
    ),
}


def _tokens(t: Tensor) -> int:
    return t.shape[0] * t.shape[1]


def _share(launches: list[Launch], start: int, flops: int) -> None:
    """Divide the operations of a pass among its Triton kernels that hold products, if it has any."""
    from . import triton_source

    products = [i for i in range(start, len(launches)) if triton_source.multiplies(launches[i].name)]
    for i in products:
        launches[i] = Launch(**{**vars(launches[i]), "flops": flops // len(products)})


@contextlib.contextmanager
def _triton_noted(counter: Counter) -> Iterator[None]:
    """Triton's launches are noted in the place of being made."""
    from aia_kernels.triton import tiles

    from . import triton_source

    def launch(kernel, x, grid, *args, **constants) -> None:
        if 0 in grid:
            return
        given = dict(zip(kernel.arg_names, args, strict=False))
        reads, writes = triton_source.accesses(kernel)
        inputs, outputs = ([given[n] for n in names if isinstance(given.get(n), Tensor)] for names in (reads, writes))
        counter.note(triton_source.name_of(kernel), inputs, outputs)

    with mock.patch.object(tiles, "launch", launch):
        yield


@contextlib.contextmanager
def counting(backend: str) -> Iterator[Counter]:
    """Inside, layers on the meta device take the passes of a backend, whatever runs on this machine; what they and
    plain operators launch is counted."""
    counter, passes = Counter(), backends.passes
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "select", lambda *_: backend))
        stack.enter_context(mock.patch.object(backends, "passes", lambda *which: Named(passes(*which), counter)))
        if backend == "triton":
            stack.enter_context(_triton_noted(counter))
        stack.enter_context(counter)
        yield counter
