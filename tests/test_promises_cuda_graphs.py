"""A training step captured in a CUDA graph replays with the bits of the eager step, on new input."""

from __future__ import annotations

import copy

import pytest
import torch

import aia_kernels
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.mark.parametrize("name", UNITS)
def test_captured_step(name):
    shape = SHAPES["stage 5"]
    module = randomise(getattr(aia_kernels, name)(shape.t)).cuda()
    eager = copy.deepcopy(module)
    x, grad_y = (make_input(shape, torch.float32, seed=seed, device="cuda") for seed in (0, 1))
    x.requires_grad_()

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
        x.copy_(make_input(shape, torch.float32, seed=2, device="cuda"))
    graph.replay()
    for found, expected in zip(captured, step(eager), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(module.buffers(), eager.buffers(), strict=True):
        assert torch.equal(found, expected)
