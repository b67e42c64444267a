"""What a training step keeps for its backward."""

from __future__ import annotations

import pytest
import torch
from kept_memory import kept_bytes

import aia_kernels
from aia_kernels.testing import Shape, make_input


# The targets of the design: 1.5 |X| at 56 x 56 and 2.4 |X| at 7 x 7 in float32; the published code keeps 4.06 |X|.
@pytest.mark.parametrize("shape, limit", [(Shape(1, 8, 64, 56, 56), 1.5), (Shape(1, 8, 512, 7, 7), 2.4)], ids=str)
@pytest.mark.parametrize("name", ["ST", "CinST", "STinC", "STinC2"])
def test_bytes_kept_for_backward(name, shape, limit, compiled_on):
    _, device = compiled_on
    x = make_input(shape, torch.float32, device=device).requires_grad_()
    kept = kept_bytes(getattr(aia_kernels, name)().to(device), x)
    assert kept < limit * x.numel() * x.element_size()


def test_nothing_is_kept_without_gradients(backend_on):
    _, device = backend_on
    x = make_input(Shape(1, 8, 4, 5, 6), torch.float32, device=device)
    assert aia_kernels.CinST().to(device).requires_grad_(False)(x).grad_fn is None
