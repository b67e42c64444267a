"""Layers under autograd's own tools: hooks, anomaly mode, graphs kept or cut, threads; copies; other processes."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from uses_layers import (
    LAYERS,
    MAIN,
    assert_close,
    assert_same_bits,
    batch,
    every_device,
    every_layer,
    every_layer_without_dropout,
    in_new_threads,
    layer,
    left_by,
    main_layers,
    plain_step,
    step,
    towards,
)

DOUBLE = torch.float64


def called(module: nn.Module, x: Tensor) -> Tensor:
    """The layer from the seed of step."""
    torch.manual_seed(2)
    return module(x)


@every_layer
@every_device
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(device, name):
    assert_same_bits(step(name, around=torch.autograd.detect_anomaly, device=device), plain_step(name, device=device))


@every_layer
def test_hooks_on_tensors(name):
    """A hook on y, x or a parameter sees the gradient, and may put another in its place."""
    module, x, expected = layer(name), batch(name).requires_grad_(), plain_step(name)
    seen = {}
    x.register_hook(lambda g: seen.update(x=g.clone()) or 2 * g)
    for key, p in module.named_parameters():
        p.register_hook(lambda g, key=key: seen.update({key: g.clone()}) or -g)
        p.register_post_accumulate_grad_hook(lambda p, key=key: seen.update({f"after {key}": p.grad.clone()}))
    y = called(module, x)
    y.register_hook(lambda g: seen.update(y=g.clone()))
    y.backward(towards(y))
    assert torch.equal(seen["y"], towards(y))
    assert torch.equal(seen["x"], expected["grad x"]) and torch.equal(x.grad, 2 * seen["x"])
    for key, p in module.named_parameters():
        assert torch.equal(seen[key], expected[f"grad {key}"])
        assert torch.equal(p.grad, -seen[key]) and torch.equal(p.grad, seen[f"after {key}"])


@main_layers
def test_a_hook_on_y_changes_what_flows(name):
    module, x, twice = layer(name, DOUBLE), batch(name, DOUBLE).requires_grad_(), plain_step(name, DOUBLE)
    y = called(module, x)
    y.register_hook(lambda g: 2 * g)
    y.grad_fn.register_prehook(lambda grads: tuple(g if g is None else 2 * g for g in grads))
    y.grad_fn.register_hook(lambda into, _outof: tuple(g if g is None else g.clone() for g in into))
    y.backward(towards(y) / 4)
    assert_close(left_by(module, x, y), twice)


@main_layers
@pytest.mark.parametrize("mode", ["all", "any"])
def test_multi_grad_hook(name, mode):
    module, x, expected = layer(name), batch(name).requires_grad_(), plain_step(name)
    tensors, seen = (x, *module.parameters()), []
    register_multi_grad_hook(tensors, lambda grads: seen.append(grads), mode=mode)
    y = called(module, x)
    y.backward(towards(y))
    assert len(seen) == 1
    if mode == "all":
        assert all(torch.equal(g, t.grad) for g, t in zip(seen[0], tensors, strict=True))
    assert torch.equal(x.grad, expected["grad x"])


@main_layers
def test_module_hooks(name):
    """Hooks on the layer itself, which every layer's own forward allows."""
    seen = {}

    def wrap(module):
        module.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
        module.register_forward_hook(lambda _m, _args, y: seen.update(y=y))
        module.register_full_backward_pre_hook(lambda _m, grads: seen.update(grad_y=grads[0]))
        module.register_full_backward_hook(lambda _m, into, _outof: seen.update(grad_x=into[0]))
        return module

    found = step(name, wrap)
    assert_same_bits(found, plain_step(name))
    assert torch.equal(seen["y"], found["y"]) and torch.equal(seen["grad_x"], found["grad x"])
    assert torch.equal(seen["grad_y"], towards(found["y"]))


@every_layer
@every_device
def test_backward_twice(device, name):
    """Over a graph that was kept the second backward gives what the first did; over one that was not, an error."""
    module, x = layer(name, device=device), batch(name, device=device).requires_grad_()
    y = called(module, x)
    for _ in range(2):
        x.grad = None
        module.zero_grad()
        y.backward(towards(y), retain_graph=True)
        assert_same_bits(left_by(module, x, y), plain_step(name, device=device))
    y.backward(towards(y))
    expected = plain_step(name, device=device)
    assert torch.equal(x.grad, 2 * expected["grad x"])
    if not name.startswith("TemporalShift"):  # nothing is saved there, so nothing can be gone
        with pytest.raises(RuntimeError, match="second time"):
            y.backward(towards(y))


@every_layer
def test_gradients_of_a_part_of_the_inputs(name):
    """Each input alone, from a fresh graph: no gradient hangs on whether others are wanted."""
    expected = plain_step(name)
    for wanted in ("x", *(key for key, _ in layer(name).named_parameters())):
        module, x = layer(name), batch(name).requires_grad_()
        y = called(module, x)
        (found,) = torch.autograd.grad(y, x if wanted == "x" else module.get_parameter(wanted), towards(y))
        torch.testing.assert_close(found, expected[f"grad {wanted}"], rtol=0, atol=0, msg=wanted)


@every_layer
@pytest.mark.parametrize("frozen", ["x", "parameters", "half of the parameters"])
@every_device
def test_inputs_without_gradients(device, name, frozen):
    module, x = layer(name, DOUBLE, device), batch(name, DOUBLE, device)
    parameters = list(module.parameters())
    for p in parameters[:: 2 if frozen.startswith("half") else 1]:
        p.requires_grad_(frozen == "x")
    x.requires_grad_(frozen != "x")
    y = called(module, x)
    if not y.requires_grad:
        assert frozen == "x" and not parameters
        return
    y.backward(towards(y))
    expected = plain_step(name, DOUBLE, device)
    for key, value in left_by(module, x, y).items():
        if value is not None:
            torch.testing.assert_close(value, expected[key], rtol=1e-11, atol=1e-11, msg=key)
    assert (x.grad is None) == (frozen == "x")
    assert all((p.grad is None) != p.requires_grad for p in parameters)


@every_layer
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@every_device
def test_without_gradients(device, name, around):
    module, x, expected = layer(name, device=device), batch(name, device=device), plain_step(name, device=device)
    with around():
        y = called(module, x)
    assert not y.requires_grad and torch.equal(y, expected["y"])
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, expected[key]), key


@every_layer
def test_a_layer_born_in_inference_mode(name):
    """It runs there, and outside wherever torch lets its tensors take part: without gradients."""
    with torch.inference_mode():
        module, x = layer(name).eval(), batch(name)
        y = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), y)


@every_layer
def test_y_changed_in_place(name):
    """The layers allow it, as their backward does not need y; double_normalize, as softmax, does, and says so."""
    module, x, expected = layer(name, DOUBLE), batch(name, DOUBLE).requires_grad_(), plain_step(name, DOUBLE)
    y = called(module, x)
    grad_y = towards(y)
    y.mul_(2)
    if name.startswith("double_normalize"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad_y)
        return
    y.backward(grad_y / 2)
    torch.testing.assert_close(x.grad, expected["grad x"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("changed", ["x", "parameters"])
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if not name.startswith(("TemporalShift", "double_normalize"))]
)
def test_what_backward_needs_changed_in_place(name, changed):
    """The version counters hold for the fused passes too; or a copy was kept, and the gradients are right. (The two
    left out keep neither x nor parameters.)"""
    module, leaf = layer(name), batch(name).requires_grad_()
    x = leaf * 1.0
    y = called(module, x)
    with torch.no_grad():
        for tensor in [x] if changed == "x" else module.parameters():
            tensor.add_(1.0)
    try:
        y.backward(towards(y))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        # torch's linear copies it
        assert name in ("Token, transposed", "MultiHead, transposed", "CaaM", "Halo") and changed == "x"
        torch.testing.assert_close(leaf.grad, plain_step(name)["grad x"])


@main_layers
def test_gradient_edges_and_views(name):
    """x as a view of a leaf, y read through a view, the gradient asked at an edge of the graph."""
    module, expected = layer(name, DOUBLE), plain_step(name, DOUBLE)
    leaf = torch.zeros((2, *LAYERS[name].sizes), dtype=DOUBLE)
    leaf[1] = batch(name, DOUBLE)
    leaf.requires_grad_()
    x = LAYERS[name].stored(leaf[1])
    y = called(module, x)
    (found,) = torch.autograd.grad(y[None].squeeze(0), get_gradient_edge(x), towards(y), retain_graph=True)
    torch.testing.assert_close(found, expected["grad x"], rtol=1e-11, atol=1e-11)
    y.backward(towards(y))
    torch.testing.assert_close(leaf.grad[1], expected["grad x"], rtol=1e-11, atol=1e-11)
    assert not leaf.grad[0].any()


@every_layer_without_dropout
def test_lazily_negated_tensors(name):
    """The imaginary part of a conjugate is stored with the other sign, and only a bit of the tensor says so."""
    module, x = layer(name, DOUBLE).eval(), batch(name, DOUBLE).requires_grad_()
    y = module(x)

    def negated(t):
        lazily = torch.complex(torch.zeros_like(t), -t.detach()).conj().imag
        assert lazily.is_neg()
        return lazily

    leaf = negated(x).requires_grad_()
    repeated = module(leaf)
    found = torch.autograd.grad(repeated, (leaf, *module.parameters()), negated(towards(y)))
    expected = torch.autograd.grad(y, (x, *module.parameters()), towards(y))
    for value, wanted in zip((repeated, *found), (y, *expected), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)


@main_layers
@pytest.mark.parametrize("grad_y", ["expanded", "overlapping rows", "part"])
def test_gradients_for_y_of_any_strides(name, grad_y):
    module = layer(name, DOUBLE).eval()
    y = module(batch(name, DOUBLE).requires_grad_())
    made = {
        "expanded": lambda: torch.ones((), dtype=DOUBLE).expand(y.shape),
        "overlapping rows": lambda: torch.randn(y.numel(), dtype=DOUBLE).as_strided(y.shape, [1] * y.ndim),
        "part": lambda: torch.randn((*y.shape, 3), dtype=DOUBLE)[..., 1],
    }[grad_y]()
    results = []
    for grad in (made, made.clone(memory_format=torch.contiguous_format)):
        leaf = batch(name, DOUBLE).requires_grad_()
        results.append(torch.autograd.grad(module(leaf), (leaf, *module.parameters()), grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@main_layers
def test_backward_in_another_thread(name):
    module, x = layer(name), batch(name).requires_grad_()
    y = called(module, x)
    in_new_threads(lambda: y.backward(towards(y)))
    assert_same_bits(left_by(module, x, y), plain_step(name))


@pytest.mark.parametrize("name", [name for name in MAIN if not LAYERS[name].draws])
def test_steps_in_threads_at_once(name):
    """Eight layers, eight threads, the same bits. Dropout stays out: threads share the generator."""
    found = [None] * 8

    def work(i):
        found[i] = step(name)

    in_new_threads(*(functools.partial(work, i) for i in range(8)))
    for results in found:
        assert_same_bits(results, plain_step(name))


@every_layer
def test_copies(name):
    """deepcopy, pickle, torch.save and share_memory of a layer that has run and has gradients."""
    module = layer(name)
    step(name, module=module)
    module.zero_grad()
    module.load_state_dict(layer(name).state_dict())
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
        copy.deepcopy(module).share_memory(),
    ):
        assert_same_bits(step(name, module=other), plain_step(name))


@main_layers
def test_a_result_may_be_copied(name):
    """y with a history is no leaf and refuses, as torch's own results do; without one it copies."""
    y = layer(name)(batch(name).requires_grad_())
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(y)
    assert torch.equal(copy.deepcopy(y.detach()), y)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_use():
    """A child of a process that has computed, as a loader of data is, computes too: without gradients, as autograd's
    threads do not outlive a fork, and on one thread, as OpenMP's do not."""
    names = [name for name, of in LAYERS.items() if not of.draws]
    expected = {name: plain_step(name)["y"] for name in names}
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                # One thread, and a forward that keeps nothing, may add up in another order: some roundings.
                close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
                right = all(close(layer(name)(batch(name)), expected[name]) for name in names)
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("threads", [1, 2, 7])
@main_layers
def test_number_of_threads(name, threads):
    """Float64 within EXACT: products of the framework may split their sums by it."""
    expected = plain_step(name, DOUBLE)
    torch.set_num_threads(threads)
    assert_close(step(name, dtype=DOUBLE), expected)


@every_layer
def test_empty_batch(name):
    """No sample: an empty y, gradients of zero, statistics that stay."""
    module = layer(name)
    x = batch(name)[:0].requires_grad_()
    y = module(x)
    assert y.shape == (0, *plain_step(name)["y"].shape[1:])
    y.backward(torch.zeros_like(y))
    assert x.grad.shape == x.shape
    for key, p in module.named_parameters():
        assert p.grad is not None and not p.grad.any(), key
    for (key, b), old in zip(module.named_buffers(), layer(name).buffers(), strict=True):
        assert torch.equal(b, old), key


@every_layer_without_dropout
def test_accumulated_gradients(name):
    """Two backwards add up, and so do two uses of one layer in a graph."""
    module, x = layer(name, DOUBLE).eval(), batch(name, DOUBLE).requires_grad_()
    once = step(name, dtype=DOUBLE, module=layer(name, DOUBLE).eval())
    (module(x) + module(x)).backward(towards(module(x)))
    y = module(x)
    y.backward(towards(y))
    for key, value in left_by(module, x, y).items():
        if key.startswith("grad"):
            torch.testing.assert_close(value, 3 * once[key], rtol=1e-11, atol=1e-11, msg=key)
