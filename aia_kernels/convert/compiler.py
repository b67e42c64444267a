"""A backend of torch.compile that puts fused calls into what it compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from .graphs import has_fixed_shapes, known_shapes, rewrite
from .spellings import Reader
from .storage import known_run


def fuse_backend(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a network with its external attention and units of Attention in Attention fused, and without having
    converted it.

        compiled = torch.compile(model, backend=aia_kernels.fuse_backend)

    What torch.compile has recorded is rewritten as fuse rewrites a graph, and handed on to another backend. The model
    is not changed. Gradients are those of the fused layers.

    Args:
        graph_module: What was recorded.
        example_inputs: Its inputs.
        options: "backend" names the backend that compiles in the end, "inductor" unless it is given; what else there is
            goes to inductor.

    Returns:
        The compiled function.
    """
    settings = dict(options or {})
    name = settings.pop("backend", "inductor")
    graph = graph_module.graph
    if rewrite(Reader(graph_module, graph, known_shapes(graph), has_fixed_shapes(graph), known_run(graph)))[0]:
        graph_module.recompile()
    backend = torch._dynamo.lookup_backend(name)
    return backend(graph_module, example_inputs, **({"config_patches": settings} if settings else {}))
