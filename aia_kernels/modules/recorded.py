"""The layers under torch.fx.symbolic_trace, which follows a forward with stand-ins for tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def one_call(layer: nn.Module, forward: Callable[..., Any], x: Proxy, *others: Any) -> Any:
    """What a layer returns in a trace of a model that holds it: one call of the layer stands in the record, as of those
    of torch.nn. A forward here asks for sizes and types, which a stand-in does not have.

    Args:
        layer: The layer.
        forward: The forward of its class that asks. No decorator: behind one, torch.compile takes constants of a module
            as inputs of a program for any sizes.
        x: The first input.
        others: All others.

    Raises:
        TypeError: In a trace of a layer alone, or of a class with a forward of its own around this one: a call of the
            layer would stand in the graph of its own forward.
    """
    if x.tracer.root is layer or type(layer).forward is not forward:
        raise TypeError(
            f"{type(layer).__name__}: torch.fx.symbolic_trace records this layer as one call, in a module that holds "
            "it, and not its own forward; trace aia_kernels.to_reference(layer) to see the plain operations"
        )
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x, *others), {})
