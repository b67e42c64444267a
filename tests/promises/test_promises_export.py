"""torch.export and make_fx: the program runs, takes other batches, sizes and strides, and is differentiable."""

from __future__ import annotations

import copy
import itertools

import external_cases
import pytest
import torch
from agreement import EXACT, assert_same
from conftest import some_of
from external_cases import FORMS, SIZES
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import aia_kernels
from aia_kernels import testing
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, make_input, randomise


@some_of("name, strict", itertools.product(UNITS, (False, True)), *[(name, False) for name in UNITS], ("CinST", True))
def test_exported_unit(name, strict, traced_on):
    _, device = traced_on
    exported_with_any_batch(name, strict, device)


def test_the_exported_reference():
    with aia_kernels.use_backend("reference"):
        exported_with_any_batch("C", False, "cpu")


def exported_with_any_batch(name, strict, device):
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


def maps(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


MAPS, TOKENS = (8, 12, 5, 7), (2, 9, 12)

#: Tensors of one shape whose strides no other has.
STORED = {
    "maps": {
        "contiguous": maps(*MAPS),
        "channels last": maps(*MAPS).contiguous(memory_format=torch.channels_last),
        "some channels": maps(8, 20, 5, 7)[:, 3:15],
        "every second frame": maps(16, 12, 5, 7)[::2],
        "every second row": maps(8, 12, 10, 7)[:, :, ::2],
        "every second column": maps(8, 12, 5, 14)[..., ::2],
        "frames innermost": maps(12, 7, 5, 8).permute(3, 0, 2, 1),
        "one frame, expanded": maps(1, 12, 5, 7).expand(8, -1, -1, -1),
        "one channel, expanded": maps(8, 1, 5, 7).expand(-1, 12, -1, -1),
    },
    "tokens": {
        "contiguous": maps(*TOKENS),
        "features first": maps(2, 12, 9).mT,
        "some features": maps(2, 9, 20)[..., 3:15],
        "every second feature": maps(2, 9, 24)[..., ::2],
        "every second token": maps(2, 18, 12)[:, ::2],
        "samples innermost": maps(12, 9, 2).permute(2, 1, 0),
        "one sample, expanded": maps(1, 9, 12).expand(2, -1, -1),
    },
}
LAYERS = {
    **{name: (lambda name=name: getattr(aia_kernels, name)(4), "maps") for name in UNITS},
    "TemporalShift": (lambda: aia_kernels.TemporalShift(4, fold_div=4), "maps"),
    "ExternalAttention2d": (lambda: aia_kernels.ExternalAttention2d(12, k=5), "maps"),
    "ExternalAttention": (lambda: aia_kernels.ExternalAttention(12, S=5), "tokens"),
    "MultiHeadExternalAttention": (lambda: aia_kernels.MultiHeadExternalAttention(12, num_heads=2), "tokens"),
    "TokenExternalAttention": (lambda: aia_kernels.TokenExternalAttention(12, 8, k=5), "tokens"),
    "double_normalize": (lambda: external_cases.Normalize(None), "tokens"),
}


def step(call, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize("traced_on", ["contiguous", "every second token", "channels last"])
@pytest.mark.parametrize("name", LAYERS)
def test_other_strides_than_those_of_the_example(name, traced_on):
    """A program takes whatever strides it is given, as the layer does: bit for bit the same."""
    make, kind = LAYERS[name]
    if traced_on not in STORED[kind]:
        pytest.skip("an example of the other kind of input")
    module = randomise(make()).eval()
    program = torch.export.export(module, (STORED[kind][traced_on],)).module()
    for stored, x in STORED[kind].items():
        for found, expected in zip(step(program, x), step(module, x), strict=True):
            assert torch.equal(found, expected), stored


@some_of(
    "name, train, strict",
    itertools.product(("C", "CinST", "STinC2", "TemporalShift", "ExternalAttention2d"), (True, False), (True, False)),
    *[(name, True, False) for name in ("CinST", "STinC2", "TemporalShift", "ExternalAttention2d")],
    ("CinST", False, False),
    ("STinC2", True, True),
)
def test_dynamic_height_and_width(name, train, strict):
    """One program for all sizes, beyond the 256 that an index of one byte tells apart too."""
    module = randomise(LAYERS[name][0]()).train(train)
    size = {axis: Dim(letter, min=2, max=1024) for axis, letter in ((2, "h"), (3, "w"))}
    program = torch.export.export(module, (maps(*MAPS),), dynamic_shapes=(size,), strict=strict).module()
    for sizes in ((8, 12, 3, 11), (8, 12, 300, 2), (8, 12, 2, 300)):
        for found, expected in zip(step(program, maps(*sizes)), step(module, maps(*sizes)), strict=True):
            assert torch.equal(found, expected), sizes


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", LAYERS)
def test_recorded_by_make_fx(name, mode):
    """A whole step: the graph holds one operator for each way, and computes what the step does for other numbers."""
    make, kind = LAYERS[name]
    module, x = randomise(make()).eval(), STORED[kind]["contiguous"]
    graph = make_fx(lambda x: step(module, x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    for found, expected in zip(graph(2 * x), step(module, 2 * x), strict=True):
        assert torch.equal(found, expected)
    recorded = [str(node.target) for node in graph.graph.nodes if "aia_kernels" in str(node.target)]
    assert len(recorded) == 2, recorded


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_an_exported_layer(name):
    make, kind = LAYERS[name]
    module, x = randomise(make()).double().eval(), STORED[kind]["contiguous"].double()
    program = torch.export.export(module, (x,)).module()
    results = []
    for call in (program, module):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*results, **EXACT)
