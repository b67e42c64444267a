"""What a layer returns may be changed in place, as the ReLU(inplace=True) of many networks does."""

from __future__ import annotations

import pytest
import torch
from conftest import COMPILED_ON, skip_unless_runnable

import aia_kernels
from aia_kernels.testing import randomise

#: A layer, its input and its family.
LAYERS = {
    "CinST": (lambda: aia_kernels.CinST(2), (4, 8, 5, 3), "attention_in_attention"),
    "CinST 5d": (lambda: aia_kernels.CinST(), (2, 8, 2, 5, 3), "attention_in_attention"),
    "shift": (lambda: aia_kernels.TemporalShift(2), (4, 8, 5, 3), "temporal_shift"),
    "CBAM": (lambda: aia_kernels.CBAM(8, 2), (2, 8, 5, 3), "cbam"),
    "ExternalAttention": (lambda: aia_kernels.ExternalAttention(8, S=5), (2, 7, 8), "external_attention"),
    "ExternalAttention2d": (lambda: aia_kernels.ExternalAttention2d(8, k=4), (2, 8, 5, 3), "external_attention"),
    "MultiHead": (lambda: aia_kernels.MultiHeadExternalAttention(8, num_heads=2), (2, 7, 8), "external_attention"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("backend, device", COMPILED_ON)
@pytest.mark.parametrize("name", LAYERS)
def test_in_place_after_the_layer(name, backend, device, grad):
    make, shape, family = LAYERS[name]
    skip_unless_runnable(backend, device, family)
    layer = randomise(make()).double().to(device)
    x = torch.randn(shape, dtype=torch.float64).to(device).requires_grad_(grad)
    with aia_kernels.use_backend(backend), torch.set_grad_enabled(grad):
        expected, found = layer(x).relu(), layer(x).relu_()
        assert torch.equal(found, expected)
        if grad:
            for a, b in zip(
                *(torch.autograd.grad(y.sum(), (x, *layer.parameters())) for y in (expected, found)), strict=True
            ):
                assert torch.equal(a, b)
