"""A step captured in a CUDA graph replays with the bits of the eager step, on new input, on each compiled backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import external_cases
import pytest
import torch
from conftest import COMPILED, skip_unless_runnable
from external_cases import FORMS, SIZES

import aia_kernels
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.fixture(params=COMPILED["cuda"])
def backend(request) -> Iterator[str]:
    """Each compiled backend of a GPU, chosen for the duration of the test."""
    for family in ("attention_in_attention", "external_attention"):
        skip_unless_runnable(request.param, "cuda", family)
    with aia_kernels.use_backend(request.param):
        yield request.param


Step = Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, ...]]


def training_step(grad_y: torch.Tensor) -> Step:
    def step(module, x):
        y = module(x.requires_grad_())
        return y, *torch.autograd.grad(y, (x, *module.parameters()), grad_y)

    return step


@torch.no_grad()
def evaluation(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (module(x),)


def assert_replays(step: Step, module: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    """Capture a step on the first input and replay it on the second."""
    eager, x = copy.deepcopy(module), inputs[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels outside of the capture
        step(copy.deepcopy(module), x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x)
    with torch.no_grad():
        x.copy_(inputs[1])
    graph.replay()
    for found, expected in zip(captured, step(eager, x), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(module.buffers(), eager.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", UNITS)
def test_captured_step(name, backend):
    shape = SHAPES["stage 5"]
    inputs = [make_input(shape, torch.float32, seed=seed, device="cuda") for seed in (0, 2)]
    grad_y = make_input(shape, torch.float32, seed=1, device="cuda")
    assert_replays(training_step(grad_y), randomise(getattr(aia_kernels, name)(shape.t)).cuda(), inputs)


@pytest.mark.parametrize("name", UNITS)
def test_captured_evaluation(name, backend):
    shape = SHAPES["stage 5"]
    inputs = [make_input(shape, torch.float32, seed=seed, device="cuda") for seed in (0, 2)]
    assert_replays(evaluation, randomise(getattr(aia_kernels, name)(shape.t)).cuda().eval(), inputs)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_captured_step_of_external_attention(form, backend):
    """Dropout draws a fresh mask in every replay, as it should: there is nothing to compare it with."""
    sizes = SIZES["one sample"]
    module = external_cases.make(form, sizes, torch.float32, "cuda")
    inputs = [external_cases.make_input(form, sizes, torch.float32, seed, "cuda") for seed in (0, 2)]
    assert_replays(training_step(external_cases.make_grad(form, sizes, torch.float32, "cuda")), module, inputs)
