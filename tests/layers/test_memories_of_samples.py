"""functional.external_attention with keys or values of each sample, as networks make them from data."""

from __future__ import annotations

import pytest
import torch
from agreement import EXACT

from aia_kernels import functional

B, N, HEADS, S, D, V = 2, 7, 2, 6, 3, 4


def tensors(device="cpu"):
    """x, keys and values of each sample and head, and a bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = (B, N, HEADS * D), (B, HEADS, S, D), (B, HEADS, V, S), (HEADS, V)
    made = (torch.randn(size, generator=generator, dtype=torch.float64).to(device) for size in sizes)
    return [a.requires_grad_() for a in made]


def test_as_published(external_on):
    """The flow of a query from one tensor, keys and values from another."""
    x, key, value, bias = tensors(external_on[1])
    p = (x.unflatten(2, (HEADS, D)).transpose(1, 2) @ key.mT).softmax(2)
    expected = (p / (1e-9 + p.sum(3, keepdim=True)) @ value.mT + bias.unsqueeze(1)).transpose(1, 2).flatten(2)
    found = functional.external_attention(x, key, value, heads=HEADS, value_bias=bias, eps=1e-9)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    grads = (torch.autograd.grad(o, (x, key, value, bias), grad) for o in (found, expected))
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("of_samples", ["key", "value", "both"])
@pytest.mark.parametrize("shared", [False, True], ids=["own heads", "shared heads"])
def test_equal_memories_are_one_memory(shared, of_samples, external_on):
    """Repeated for each sample, with groups, padding and dropout: the same o, masks and sums of gradients."""
    x, key, value, bias = tensors(external_on[1])
    key, value = (a.detach()[:1, :1] if shared else a.detach()[:1] for a in (key, value))
    mask = torch.zeros(B, N, dtype=torch.bool, device=x.device)
    mask[0, -2:] = True
    settings = {"heads": HEADS, "value_bias": bias, "group": 3, "padding_mask": mask, "dropout": 0.4}
    results = []
    for repeated in (True, False):
        leaves = [a.clone().requires_grad_() for a in (key, value)]
        given = [
            a.expand(B, -1, -1, -1) if repeated and of_samples in (name, "both") else a[0, 0] if shared else a[0]
            for name, a in zip(("key", "value"), leaves, strict=True)
        ]
        torch.manual_seed(1)
        o = functional.external_attention(x, *given, **settings)
        results.append((o, *torch.autograd.grad(o.sin().sum(), (x, *leaves, bias))))
    torch.testing.assert_close(*results, **EXACT)
    assert results[0][0].is_contiguous() and not results[0][0][0, -2:].any()


def test_derivatives(external_on):
    x, key, value, bias = tensors(external_on[1])

    def call(x, key, value, bias):
        return functional.external_attention(x, key, value, heads=HEADS, value_bias=bias, eps=1e-9)

    assert torch.autograd.gradcheck(call, (x, key, value, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, key, value, bias), fast_mode=True)


def test_one_graph_and_autocast():
    x, key, value = (a.detach().float() for a in tensors()[:3])
    call = torch.compile(functional.external_attention, backend="aot_eager", fullgraph=True)
    expected = functional.external_attention(x, key, value, heads=HEADS)
    torch.testing.assert_close(call(x, key, value, heads=HEADS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.external_attention(x, key, value, heads=HEADS)
    assert found.dtype == torch.bfloat16
    # Values of order one, rounded by 2**-9 in each of three products.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    assert call(x[:0], key[:0], value[:0], heads=HEADS).shape == (0, N, HEADS * V)


def test_of_another_batch():
    x, key, value, _ = tensors()
    with pytest.raises(ValueError, match=r"memory_value: got shape \(1, 2, 4, 6\), expected .*\(2, 2, 4, 6\)"):
        functional.external_attention(x, key, value[:1], heads=HEADS)
