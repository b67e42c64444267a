"""torch.export: the program runs, takes other batches, and is differentiable."""

from __future__ import annotations

import copy

import external_cases
import pytest
import torch
from agreement import EXACT, assert_same
from external_cases import FORMS, SIZES

import aia_kernels
from aia_kernels import testing
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", UNITS)
def test_exported_unit(name, strict, backend_on):
    _, device = backend_on
    shape = SHAPES["small"]
    module = randomise(getattr(aia_kernels, name)(shape.t)).double().to(device)
    frames = shape.t * torch.export.Dim("clips", max=64)
    example = make_input(shape, torch.float64, device=device)
    program = torch.export.export(copy.deepcopy(module), (example,), dynamic_shapes=({0: frames},), strict=strict)
    exported = program.module()
    x, grad_y = (make_input(shape._replace(b=3), torch.float64, seed=seed, device=device) for seed in (2, 3))
    assert_same(testing.run(exported, x, grad_y, "auto"), testing.run(module, x, grad_y, "auto"))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced(layout, backend_on):
    """torch.jit.trace, for those who still have it: the reference is recorded, parameters stay parameters."""
    module = randomise(aia_kernels.CinST(SHAPES["small"].t)).double().to(backend_on[1]).eval()
    shapes = SHAPES["small"], SHAPES["small"]._replace(b=3)
    example, x = (make_input(shape, torch.float64, layout, device=backend_on[1]) for shape in shapes)
    traced = torch.jit.trace(module, example)
    with torch.no_grad():
        module.C_conv.weight.mul_(2)
    torch.testing.assert_close(traced(x), module(x), **EXACT)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_exported_external_attention(form, strict, external_on):
    device = external_on[1]
    module = external_cases.make(form, SIZES["small"], device=device)
    example = external_cases.make_input(form, SIZES["small"], device=device)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(copy.deepcopy(module), (example,), dynamic_shapes=({0: batch},), strict=strict)
    exported = program.module()
    sizes = SIZES["small"]._replace(b=3)
    x, grad = (make(form, sizes, device=device) for make in (external_cases.make_input, external_cases.make_grad))
    assert_same(testing.run(exported, x, grad, "auto"), testing.run(module, x, grad, "auto"))
