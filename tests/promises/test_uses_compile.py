"""Layers that are recorded and run again: compiled, with compiled backwards, exported, and checkpoints around them."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import some_of
from torch._functorch.aot_autograd import aot_module, make_boxed_func
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from uses_layers import (
    FEW,
    LAYERS,
    MAIN,
    WITHOUT_DROPOUT,
    assert_close,
    batch,
    every_device,
    few_layers,
    layer,
    left_by,
    main_layers,
    plain_step,
    step,
    towards,
    uses,
)

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str = "aot_eager", **settings):
    return lambda module: torch.compile(module, backend=backend, fullgraph=True, **settings)


def checkpointed(**settings):
    def wrap(module):
        @torch.compile(backend="aot_eager", fullgraph=True)
        def run(x):
            return checkpoint(module, x, use_reentrant=False, **settings)

        return run

    return wrap


def keep_products() -> tuple:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.bmm.default])


def compiled_around_a_checkpoint(module):
    """The compiled layer inside of an eager checkpoint."""
    return functools.partial(checkpoint, compiled()(module), use_reentrant=False)


COMPILED = {
    "aot_eager": compiled(),
    "a compiled checkpoint": checkpointed(),
    "a compiled selective checkpoint": checkpointed(context_fn=keep_products),
    "a checkpoint of the compiled": compiled_around_a_checkpoint,
}


@uses(COMPILED)
@few_layers
@every_device
def test_compiled(device, name, use):
    """One graph, forward and backward. A checkpoint may move the running statistics again: it is left to torch."""
    found = step(name, use, dtype=DOUBLE, device=device)
    expected = plain_step(name, DOUBLE, device)
    if "checkpoint" in use.__qualname__:
        buffers = {key for key, _ in layer(name).named_buffers()}
        found, expected = ({key: of[key] for key in of.keys() - buffers} for of in (found, expected))
    assert_close(found, expected)


@few_layers
def test_partitioned_by_memory(name):
    """The compiler's own checkpointing: without a budget it computes in backward what it can."""
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        found = step(name, compiled("aot_eager_decomp_partition"), dtype=DOUBLE)
    if LAYERS[name].draws:  # generators of the compiler's own
        assert found["y"].isfinite().all()
        return
    assert_close(found, plain_step(name, DOUBLE))


#: Contiguous, their compiled steps are promises with tests of their own (test_promises_compile.py).
PROMISED = ("C", "ST", "STinC", "STinC2", "ExternalAttention", "ExternalAttention2d", "MultiHead")


OTHERS = [name for name in LAYERS if name not in FEW]


@some_of("name", OTHERS, *[name for name in OTHERS if name not in PROMISED])
@every_device
def test_compiled_in_other_layouts(device, name):
    """The layers that test_compiled leaves out."""
    assert_close(step(name, compiled(), dtype=DOUBLE, device=device), plain_step(name, DOUBLE, device))


#: Inductor takes seconds for each; what it does to a layer is what it does to an operator between others.
@some_of(
    "name",
    ("STinC2, 5d", "ExternalAttention2d, channels_last", "CinST", "TemporalShift", "ExternalAttention", "Token"),
    "STinC2, 5d",  # blocks in channels_last: test_promises_compile.py
)
def test_inductor(name):
    """Dropout stays out: inductor draws by generators of its own."""
    assert_close(step(name, compiled("inductor"), dtype=DOUBLE), plain_step(name, DOUBLE))


def recorded_backward(fullgraph: bool):
    """Compiled autograd: the whole backward is recorded as one graph when it runs."""
    return lambda: torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=fullgraph))


@few_layers
def test_compiled_autograd(name):
    assert_close(step(name, compiled(), recorded_backward(True), DOUBLE), plain_step(name, DOUBLE))


@some_of("name", MAIN, "CinST", "TemporalShift", "ExternalAttention")
def test_compiled_autograd_of_an_eager_forward(name):
    """It follows the fused backward pass by pass."""
    assert_close(step(name, around=recorded_backward(False), dtype=DOUBLE), plain_step(name, DOUBLE))


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_exported_with_one_layout_and_run_with_others(name):
    """The exported program is trained on what the example's strides do not tell."""
    traced = layer(name, DOUBLE)
    example = torch.randn(LAYERS[name].sizes, dtype=DOUBLE)
    program = torch.export.export(traced, (example,)).module()
    x = batch(name, DOUBLE).requires_grad_()
    y = program(x)
    y.backward(towards(y))
    assert_close(left_by(program, x, y), plain_step(name, DOUBLE))
    odd = torch.randn((*LAYERS[name].sizes, 2), dtype=DOUBLE)[..., 1]
    eager = layer(name, DOUBLE)
    eager.load_state_dict(program.state_dict())
    assert_close({"y": program(odd)}, {"y": eager(odd)})


def functionalized(module):
    """AOT's functionalization without dynamo: parameters and buffers become inputs, changed at the end."""
    return aot_module(module, fw_compiler=lambda graph, _: make_boxed_func(graph.forward))


@main_layers
def test_aot_functionalization(name):
    assert_close(step(name, functionalized, dtype=DOUBLE), plain_step(name, DOUBLE))


@main_layers
def test_functionalize(name):
    """torch.func.functionalize takes mutation away; a graph recorded through it has none of x."""
    module = layer(name, DOUBLE).eval()
    x = batch(name, DOUBLE)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(functionalize(module)(x), expected, rtol=1e-11, atol=1e-11)
        graph = make_fx(functionalize(module))(x)
    torch.testing.assert_close(graph(x), expected, rtol=1e-11, atol=1e-11)
