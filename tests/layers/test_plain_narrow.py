"""Logits of 16 bits, normalized in operators of PyTorch: in float32, and rounded once."""

from __future__ import annotations

import pytest
import torch

from aia_kernels.functional import plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("followed", [False, True], ids=["eval", "step"])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("samples, tokens, slots", [(2, 9, 1), (2, 9, 3), (2, 300, 3), (2, 50, 20), (3, 700, 17)])
def test_normalized_in_float32(samples, tokens, slots, eps, followed, dtype):
    logits = (3 * torch.randn(samples, tokens, slots)).to(dtype).requires_grad_(followed)
    wide = logits.detach().double().requires_grad_()
    p = wide.softmax(1)
    expected = p / (p.sum(2, keepdim=True) + eps)
    with torch.set_grad_enabled(followed):
        found = plain.double_normalize(logits, eps)
    assert found.dtype == dtype
    # Half a unit in the last place for the one rounding; that of float32 is lost in the room of a hundredth.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0.51 * unit, atol=torch.finfo(dtype).smallest_normal)
    if followed:
        weight = torch.randn_like(expected)
        (wanted,) = torch.autograd.grad(expected, wide, weight.to(dtype).double())
        found.backward(weight.to(dtype))
        # Sums over tokens and slots of products of A, at most 1, in float32: rounded once. They cancel in part.
        torch.testing.assert_close(
            logits.grad.double(), wanted, rtol=unit, atol=unit * wanted.abs().max().item() + 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_slot_of_one_large_logit_has_no_gradient(dtype):
    """P of the first token is rounded to one in 16 bits, and is not one."""
    logits = torch.tensor([[[7.0], [0.0], [0.0]]], dtype=dtype, requires_grad=True)
    found = plain.double_normalize(logits)
    found.backward(torch.randn_like(found))
    assert (found == 1).all() and not logits.grad.any()
    with torch.no_grad():
        assert (plain.double_normalize(logits) == 1).all()
        assert plain.double_normalize(logits * torch.nan).isnan().all()
