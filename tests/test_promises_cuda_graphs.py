"""A training step captured in a CUDA graph replays with the bits of the eager step, on new input."""

from __future__ import annotations

import copy

import external_cases
import pytest
import torch
from external_cases import FORMS, SIZES

import aia_kernels
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def assert_replays(module: torch.nn.Module, inputs: list[torch.Tensor], grad_y: torch.Tensor) -> None:
    """Capture a step on the first input and replay it on the second."""
    eager = copy.deepcopy(module)
    x = inputs[0].requires_grad_()

    def step(m):
        y = m(x)
        return y, *torch.autograd.grad(y, (x, *m.parameters()), grad_y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels outside of the capture
        step(copy.deepcopy(module))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module)
    with torch.no_grad():
        x.copy_(inputs[1])
    graph.replay()
    for found, expected in zip(captured, step(eager), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(module.buffers(), eager.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", UNITS)
def test_captured_step(name):
    shape = SHAPES["stage 5"]
    inputs = [make_input(shape, torch.float32, seed=seed, device="cuda") for seed in (0, 2)]
    grad_y = make_input(shape, torch.float32, seed=1, device="cuda")
    assert_replays(randomise(getattr(aia_kernels, name)(shape.t)).cuda(), inputs, grad_y)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_captured_step_of_external_attention(form):
    """Dropout draws a fresh mask in every replay, as it should: there is nothing to compare it with."""
    sizes = SIZES["one sample"]
    module = external_cases.make(form, sizes, torch.float32, "cuda")
    inputs = [external_cases.make_input(form, sizes, torch.float32, seed, "cuda") for seed in (0, 2)]
    assert_replays(module, inputs, external_cases.make_grad(form, sizes, torch.float32, "cuda"))
