"""What einops does to a tensor that is recorded: the operations of torch that it makes of a pattern."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch.fx import Proxy


class _Size(Proxy):
    """A size of a tensor that is recorded. It has no hash, so einops keeps none of them in its caches."""

    __hash__ = None  # type: ignore[assignment]


def understand_proxies() -> None:
    """Let einops take what is recorded, if it is in use."""
    if "einops" in sys.modules:
        _make_backend()


@functools.cache
def _make_backend() -> type:
    """A class that einops finds by itself, for tensors that are recorded."""
    from einops._backends import TorchBackend

    class ProxyBackend(TorchBackend):
        framework_name = "torch.fx"  # einops looks for it in sys.modules

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, Proxy)

        def shape(self, x: Any) -> tuple:
            return tuple(_Size(x.shape[i].node, x.tracer) for i in range(x.ndim))

        def is_float_type(self, x: Any) -> bool:
            return x.tracer.values[x.node].is_floating_point()

    return ProxyBackend
