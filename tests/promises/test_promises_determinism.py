"""Two runs give the same bits, on any number of threads."""

from __future__ import annotations

import external_cases
import pytest
import torch
from external_cases import FORMS, Sizes

import aia_kernels
from aia_kernels import testing
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise


def assert_same_bits(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["stage 3", "stage 5"])
@pytest.mark.parametrize("name", UNITS)
def test_same_bits_twice(name, shape, dtype, compiled_on):
    backend, device = compiled_on
    shape = SHAPES[shape]
    module = randomise(getattr(aia_kernels, name)(shape.t)).to(device, dtype)
    x, grad_y = (make_input(shape, dtype, seed=seed, device=device) for seed in (0, 1))
    assert_same_bits(*(testing.run(module, x, grad_y, backend) for _ in range(2)))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", UNITS)
def test_same_bits_on_one_thread_and_two(name, layout):
    if (reason := aia_kernels.available_backends()["cpu"]) is not None:
        pytest.skip(reason)
    shape = testing.Shape(3, 4, 24, 14, 14)
    module = randomise(getattr(aia_kernels, name)(shape.t))
    x, grad_y = (make_input(shape, torch.float32, layout, seed) for seed in (0, 1))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(testing.run(module, x, grad_y, "cpu"))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_external_attention_gives_the_same_bits_twice(form, dtype, external_compiled_on):
    """On one number of threads: the framework's products may split their sums by it."""
    backend, device = external_compiled_on
    sizes = Sizes(2, 31, 33, 64, 64, 64)
    module = external_cases.make(form, sizes, dtype, device)
    x = external_cases.make_input(form, sizes, dtype, device=device)
    grad = external_cases.make_grad(form, sizes, dtype, device)
    assert_same_bits(*(testing.run(module, x, grad, backend) for _ in range(2)))
