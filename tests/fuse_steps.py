"""Modules with random parameters, one step of them compared with that of another, and what fuse finds in them."""

from __future__ import annotations

import copy
import pickle

import torch
from convert_cases import EXACT, assert_same_objects, tensors
from torch.utils._pytree import tree_leaves

import aia_kernels
from aia_kernels import testing
from aia_kernels.convert import compiler


def build(kind, dtype=torch.float64):
    """A module of a kind, with random parameters and buffers."""
    torch.manual_seed(0)
    return testing.randomise(kind()).to(dtype)


def inputs_of(shapes, dtype=torch.float64):
    """Random inputs of these shapes; numbers stay what they are."""
    generator = torch.Generator().manual_seed(1)
    return [
        given if isinstance(given, int) else torch.randn(given, generator=generator, dtype=torch.float64).to(dtype)
        for given in shapes
    ]


def step(module, inputs):
    """The output, every gradient, and the buffers of one step."""
    module.zero_grad()
    inputs = [x if isinstance(x, int) else x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(3)
    y = module(*inputs)
    y = torch.cat([part.flatten() for part in tree_leaves(y)])
    y.sin().sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    named = {name.removeprefix("_orig_mod."): tensor for name, tensor in (*grads.items(), *module.named_buffers())}
    return {"y": y.detach(), **dict(enumerate(x.grad for x in inputs if isinstance(x, torch.Tensor))), **named}


def assert_same_steps(found, expected, inputs, **tolerance):
    found, expected = step(found, inputs), step(expected, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def called(report):
    """The functions that a report says were put in."""
    return [name for entry in report.converted for name in entry.now.split(" and ")]


def assert_found(kind, described, call, single, monkeypatch):
    """A kind, described by the functions expected and the shapes of its inputs, is found by a call, and computes the
    same: in float64 exactly, in float32 within the tolerance single. Nothing about the module changes."""
    expected, *shapes = described
    model = build(kind)
    before, keys, own = tensors(model), list(model.state_dict()), copy.deepcopy(model)
    report = call(model)
    assert called(report) == expected, report
    assert not report.left_alone, report
    assert_same_objects(model, before)
    assert list(model.state_dict()) == keys
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, single)):
        for training in (True, False):
            for module in (model, own):
                module.to(dtype).train(training)
            assert_same_steps(model, own, inputs_of(shapes, dtype), **tolerance)
    monkeypatch.setattr(kind, "forward", None)  # it is not called
    model(*inputs_of(shapes, torch.float32))


def assert_copied_and_taken_back(kind, described):
    """Copies and pickles of what was fused are fused too, and undo gives the kind back."""
    model, inputs = build(kind), inputs_of(described[1:])
    own = copy.deepcopy(model)
    report = aia_kernels.fuse(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is not kind
        assert_same_steps(other, copy.deepcopy(own), inputs, **EXACT)
    assert type(report.undo()) is kind
    assert_same_steps(model, own, inputs, **EXACT)


def assert_found_in_a_graph(kind, described, record):
    """The same of a graph, which is returned: recorded by torch.fx, or exported in evaluation."""
    expected, *shapes = described
    model, inputs = build(kind), inputs_of(shapes)
    own = copy.deepcopy(model)
    if record == "fx":
        graph_module = torch.fx.symbolic_trace(model)
        report = aia_kernels.fuse(graph_module, *inputs)
    else:
        graph_module = torch.export.export(model.eval(), tuple(inputs)).module()
        own.eval()
        report = aia_kernels.fuse(graph_module)
    assert called(report) == expected, report
    assert_same_steps(graph_module, own, inputs, **EXACT)
    return graph_module


def assert_found_when_compiled(kind, described, monkeypatch):
    """A network that was never converted; values, gradients and buffers of a step, two times."""
    expected, *shapes = described
    torch._dynamo.reset()
    model, own, inputs, graphs = build(kind), build(kind), inputs_of(shapes), []
    rewrite = compiler.rewrite
    monkeypatch.setattr(compiler, "rewrite", lambda reader: graphs.append(found := rewrite(reader)) or found)
    compiled = torch.compile(model, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"})
    for _ in range(2):
        assert_same_steps(compiled, own, inputs, **EXACT)
    assert [[call.now for call in fused] for fused, _ in graphs] == [expected]
    torch._dynamo.reset()
