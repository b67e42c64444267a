"""Backends: who can run what, and why not.

========= =============== ==========================================================================
name      runs on         what it is
========= =============== ==========================================================================
reference any device      the specification in plain PyTorch (aia_kernels/reference), under autograd
cpu       CPU             C++ passes (csrc/cpu)
triton    CUDA            Triton passes (aia_kernels/triton); CPU tensors under TRITON_INTERPRET=1
cuda      CUDA            CUDA C++ passes (csrc/cuda)
========= =============== ==========================================================================

A backend may have the passes of one family and not yet those of the other; then it says so when it is asked for those.

The choice is, first that speaks: use_backend (a context, for this thread or task), set_backend (the process), the
variable AIA_KERNELS_BACKEND, "auto". A backend named explicitly runs or raises with the reason; only "auto" chooses, by
device, type and, for external attention on a CPU, size.

A layer asks for the choice once, when it is called, and its backward keeps to that, in whichever thread it runs.
Activation checkpointing calls the layer again, in backward(): see use_backend.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from .. import schemas
from ..algorithms.external_attention_passes import FUSED_PASSES
from ..common.dtypes import DTYPES
from . import choices, extension, memory_passes
from .matmul_passes import MatmulPasses

NAMES = ("reference", "cpu", "triton", "cuda")

#: The families of layers, by the name of the module that holds their algorithm, with the passes of a compiled backend.
FAMILIES = {
    "attention_in_attention": schemas.PASSES,
    "external_attention": schemas.DOUBLE_NORM_PASSES + schemas.RESIDUAL_PASSES,
    "linear_attention": schemas.MEMORY_PASSES,
    "temporal_shift": schemas.SHIFT_PASSES,
    "cbam": schemas.CBAM_PASSES,
}

#: Where these have no passes of linear attention, PyTorch's operators take their place (memory_passes).
WITHOUT_MEMORY_PASSES = ("cpu", "triton")

#: What "auto" tries, in order, by type of device, where nothing was measured (choices.csv); the reference runs
#: everywhere.
AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_process_choice = os.environ.get("AIA_KERNELS_BACKEND") or "auto"
_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("aia_kernels_backend", default=None)

#: Autograd computes the gradients of CUDA tensors in threads of its own, which do not have the context of the caller of
#: backward(). But what the caller has stashed under this key they have: (its thread, its choice). In the thread that
#: stashed it the context counts, as several tasks may take turns there.
_STASH = "aia_kernels.backend"


_CHOICES = frozenset((*NAMES, "auto"))


def _check_name(name: str) -> None:
    if name not in _CHOICES:
        raise ValueError(f"unknown backend {name!r}; expected one of: auto, {', '.join(NAMES)}")


def set_backend(name: str) -> None:
    """Choose the backend of this process.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto".

    Raises:
        ValueError: The name is none of these.
    """
    global _process_choice
    _check_name(name)
    _process_choice = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a with block, for this thread or task only.

    It reaches what a backward() inside the block calls, in every thread of autograd. Activation checkpointing calls a
    layer again in backward(). Outside the block the layer then gets another backend. torch.utils.checkpoint refuses
    that ("a different number of tensors was saved") or, where it is reentrant, does not notice. So call backward()
    inside the block too, or have the block in the function that is checkpointed.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        A context manager.

    Raises:
        ValueError: The name is none of these.
    """
    _check_name(name)
    mine, around = threading.get_ident(), _stashed()
    token = _choice.set(name)
    _stash(mine, name)
    try:
        yield
    finally:
        _choice.reset(token)
        # Not what this thread itself had stashed before: blocks of its tasks need not end in turn.
        _stash(*(around if around[0] != mine else (mine, _choice.get())))


def _stash(thread: int, name: str | None) -> None:
    choice = thread, name
    references = sys.getrefcount(choice)
    torch._C._stash_obj_in_tls(_STASH, choice)
    if sys.getrefcount(choice) == references:  # torch 2.10 later lets go of a reference that it has not taken
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(choice))


def _stashed() -> tuple[int, str | None]:
    if torch._C._is_key_in_tls(_STASH):
        return torch._C._get_obj_in_tls(_STASH)
    return threading.get_ident(), None


def chosen_backend() -> str:
    """Tell which choice is in force.

    Returns:
        One of NAMES, or "auto".

    Raises:
        ValueError: AIA_KERNELS_BACKEND names none of these.
    """
    if torch._C._is_key_in_tls(_STASH):
        thread, name = torch._C._get_obj_in_tls(_STASH)
        name = _choice.get() if thread == threading.get_ident() else name
    else:
        name = _choice.get()
    name = name or _process_choice
    _check_name(name)
    return name


@functools.cache
def _triton_missing(family: str) -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return "triton is not installed; pip install triton"
    try:
        module = importlib.import_module("..triton", __package__)
    except Exception as error:
        return f"the Triton kernels do not import: {error}"
    if missing := [name for name in _triton_passes(family) if not hasattr(module, name)]:
        return f"the Triton kernels do not have these passes of {family} yet: {', '.join(missing)}"
    return None


def _triton_passes(family: str) -> tuple[str, ...]:
    """External attention's products belong to Triton's own passes; its residual is part of them."""
    own = {"external_attention": schemas.DOUBLE_NORM_PASSES + FUSED_PASSES}
    return own.get(family, FAMILIES[family])


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing_passes(dispatch_key: str, family: str) -> tuple[str, ...]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name in FAMILIES[family] if not has_kernel(f"{schemas.NAMESPACE}::{name}", dispatch_key))


def _compiled_reason(dispatch_key: str, family: str, reason: str | None) -> str | None:
    if reason is not None:
        return reason
    if missing := _missing_passes(dispatch_key, family):
        return f"the {dispatch_key} extension does not have these passes of {family} yet: {', '.join(missing)}"
    return None


@functools.cache
def why_not(name: str, device: torch.device | str, dtype: torch.dtype, family: str) -> str | None:
    """Tell why a backend cannot run a family on tensors of one kind.

    Args:
        name: One of NAMES.
        device: "cuda" stands for any of several CUDA devices, one with an index for itself.
        dtype: That of the tensors.
        family: One of FAMILIES.

    Returns:
        The reason, a sentence, or None if the backend can run.
    """
    if name == "reference":
        return None
    if dtype not in DTYPES:
        return f"the {name} backend takes {', '.join(map(str, DTYPES))}, not {dtype}"
    needed = "cpu" if name == "cpu" else "cuda"
    if name == "triton" and _interpreted():
        needed = "cpu"
    device = torch.device(device)
    if device.type != needed:
        hint = " unless TRITON_INTERPRET=1 is set" if name == "triton" and needed == "cuda" else ""
        return f"the {name} backend runs on {needed} tensors{hint}, and these are on {device.type}"
    if family == "linear_attention" and name in WITHOUT_MEMORY_PASSES:
        return None
    if name == "triton":
        return _triton_missing(family)
    if name == "cpu":
        return _compiled_reason("CPU", family, extension.load())
    return _compiled_reason("CUDA", family, extension.cuda_reason(device.index))


def available_backends(family: str | None = None) -> dict[str, str | None]:
    """Tell which backends can run on this machine.

    Args:
        family: One of FAMILIES; None: all of them.

    Returns:
        For each of NAMES None if it can run the family, or all families, and else the reason, a sentence.

    Raises:
        ValueError: There is no such family.
    """
    if family is None:
        found = [available_backends(name) for name in FAMILIES]
        return {name: next((of[name] for of in found if of[name] is not None), None) for name in NAMES}
    if family not in FAMILIES:
        raise ValueError(f"family: got {family!r}, expected one of {', '.join(FAMILIES)}")
    reasons: dict[str, str | None] = {}
    for name in NAMES:
        device = "cpu" if name in ("reference", "cpu") or (name == "triton" and _interpreted()) else "cuda"
        reason = why_not(name, device, torch.float32, family)
        if reason is None and device == "cuda" and not torch.cuda.is_available():
            hint = "; set TRITON_INTERPRET=1 to run it in the interpreter" if name == "triton" else ""
            reason = f"torch sees no CUDA device here{hint}"
        reasons[name] = reason
    return reasons


def _auto_order(device: torch.device, dtype: torch.dtype, family: str) -> tuple[str, ...]:
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        if order := choices.measured_order(name, family, str(dtype).removeprefix("torch.")):
            return order
    return AUTO.get(device.type, ())


@functools.cache
def _resolve(choice: str, device: torch.device, dtype: torch.dtype, family: str) -> str:
    if choice != "auto":
        if (reason := why_not(choice, device, dtype, family)) is not None:
            raise RuntimeError(f"backend {choice!r} was asked for, but {reason}")
        return choice
    # The interpreter is for tests: it is never chosen, only asked for.
    candidates = [name for name in _auto_order(device, dtype, family) if not (name == "triton" and _interpreted())]
    return next((name for name in candidates if why_not(name, device, dtype, family) is None), "reference")


def select(device: torch.device | str, dtype: torch.dtype, family: str) -> str:
    """Choose the backend that runs a family on tensors of one kind. torch.compile settles it when it traces the call.

    Args:
        device: "cuda" is the current device.
        dtype: That of the tensors.
        family: One of FAMILIES.

    Returns:
        One of NAMES.

    Raises:
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
        ValueError: AIA_KERNELS_BACKEND names no backend.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _resolve(chosen_backend(), device, dtype, family)


def plain_is_faster(device: torch.device, rows: int, slots: int, products: int = 0, calls: float = 1) -> bool:
    """Tell whether "auto" leaves a call of external attention to plain PyTorch, as there is too little to fuse.

    Args:
        device: That of the tensors. Only on a CPU is this a question: elsewhere launches cost more than calls.
        rows: As of choices.fusing_pays.
        slots: As of choices.fusing_pays.
        products: As of choices.fusing_pays.
        calls: As of choices.fusing_pays.

    Returns:
        Whether it does; never where a backend is named.
    """
    if device.type != "cpu" or chosen_backend() != "auto":
        return False
    return not choices.fusing_pays(rows, slots, products, calls)


def published_flow_is_faster(device: torch.device, elements: int, products: int, calls: float = 1) -> bool:
    """Tell whether "auto" leaves a layer of attention by a memory per sample to its published flow on a CPU.

    Args:
        device: That of the tensors.
        elements: As of choices.folding_pays.
        products: As of choices.folding_pays.
        calls: As of choices.folding_pays.

    Returns:
        Whether it does; never where a backend is named.
    """
    pays = device.type != "cpu" or choices.folding_pays(elements, products, calls)
    return not pays and chosen_backend() == "auto"


# What torch.compiler.assume_constant_result does; that decorator would import all of torch's compiler, and Triton.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
chosen_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _any_order(order: str) -> str:
    return order


def _lane_order(order: str) -> str:
    return "THWC" if order == "THWC" else "TCHW"


def _of_memories(name: str) -> Any:
    """passes of linear attention."""
    if name == "triton" and _triton_missing("linear_attention") is None:
        return importlib.import_module("..triton", __package__)
    if name == "cuda" or (name == "cpu" and extension.load() is None):
        more = schemas.MEMORY_PROPAGATE_PASSES if name == "cpu" else ()
        return SimpleNamespace(**{p: schemas.callable_pass(p) for p in (*schemas.MEMORY_PASSES, *more)})
    return memory_passes


@functools.cache
def passes(name: str, family: str) -> Any:
    """Gather what the algorithm of a family takes from a backend.

    Args:
        name: "cpu", "triton" or "cuda"; the reference has no passes.
        family: One of FAMILIES.

    Returns:
        An object with the passes as attributes, by the names of schemas.PASSES or of schemas.SHIFT_PASSES, or, for
        external attention, algorithms.external_attention_passes.Passes and, on some backends, those of
        schemas.EXTERNAL_PROPAGATE_PASSES and schemas.NORMALIZE_PASSES; for linear attention, by those of
        schemas.MEMORY_PASSES and, on some backends, of schemas.MEMORY_PROPAGATE_PASSES. Those of Attention in Attention
        have map_order beside them; some backends evaluate, and some have schemas.PROPAGATE_PASSES, UNIT_PASSES or
        AVERAGE_PASSES, and for CBAM CONVOLVE_PASSES,
        CHANNEL_GATE_PASSES, SPATIAL_GATE_PASSES and CBAM_PROPAGATE_PASSES.
    """
    if family == "linear_attention":
        return _of_memories(name)
    if name == "triton":
        return importlib.import_module("..triton", __package__)
    found = SimpleNamespace(**{p: schemas.callable_pass(p) for p in FAMILIES[family]})
    if family == "external_attention":
        found.move_statistics_ = schemas.callable_pass("move_statistics_")
        of_cpu = *schemas.EXTERNAL_PROPAGATE_PASSES, *schemas.NORMALIZE_PASSES
        more = {"cuda": schemas.FOLD_PASSES, "cpu": of_cpu}[name]
        vars(found).update((p, schemas.callable_pass(p)) for p in more)
        with_products = MatmulPasses(found)
        if name == "cpu":
            vars(with_products).update((p, getattr(found, p)) for p in more)
        return with_products
    if family == "cbam" and name == "cpu":
        of_gates = *schemas.CONVOLVE_PASSES, *schemas.CHANNEL_GATE_PASSES, *schemas.SPATIAL_GATE_PASSES
        more = *of_gates, *schemas.CBAM_PROPAGATE_PASSES, "move_statistics_"
        vars(found).update((p, schemas.callable_pass(p)) for p in more)
    # The CPU's maps have innermost what lies side by side in x: channels, or the positions of a plane (csrc/cpu).
    found.map_order = _lane_order if name == "cpu" else _any_order
    found.evaluate = schemas.callable_pass("evaluate")
    if family == "attention_in_attention":
        of_cpu = *schemas.PROPAGATE_PASSES, *schemas.UNIT_PASSES
        more = *schemas.AVERAGE_PASSES, *(of_cpu if name == "cpu" else ())
        vars(found).update((p, schemas.callable_pass(p)) for p in more)
    return found
