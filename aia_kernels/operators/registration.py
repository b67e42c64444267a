"""How a whole layer becomes a registered operator: its schema, implementation, fake and gradient.

torch.compile, torch.export and selective checkpointing record a layer as one operator. They do not look inside it. It
can be differentiated once and has no side effects. Each layer's file says all about its operators. Their arguments and
results mean what they mean in the functions of the same name of the algorithm. A backend and a unit are named by
strings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..schemas import NAMESPACE

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(name: str, schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define an operator with an implementation for every device and a fake one, and return it."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiate(forward: str, setup: Callable, gradient: Callable, backward: str | None = None) -> None:
    """Give the operator ``forward`` a gradient. The operator ``backward``, which computes it, then refuses its own."""
    torch.library.register_autograd(f"{NAMESPACE}::{forward}", gradient, setup_context=setup)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{backward}", _no_second_derivative)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("a compiled layer has first derivatives only; take second ones in eager mode")
