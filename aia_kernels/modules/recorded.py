"""The layers under torch.fx.symbolic_trace, which follows a forward with stand-ins for tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def one_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward, which torch.fx.symbolic_trace then records as one call of the layer, as it does torch.nn's.

    The forward itself asks for sizes and types, which a stand-in does not have.

    Raises:
        TypeError: In a trace of a layer alone, or of a class with a forward of its own around this one: a call of the
            layer would stand in the graph of its own forward.
    """

    @functools.wraps(forward)
    def recorded(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Proxy):
            name = type(self).__name__
            if x.tracer.root is self or type(self).forward is not recorded:
                raise TypeError(
                    f"{name}: torch.fx.symbolic_trace records this layer as one call, in a module that holds it, and "
                    "not its own forward; trace aia_kernels.to_reference(layer) to see the plain operations"
                )
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *args), kwargs)
        return forward(self, x, *args, **kwargs)

    return recorded
