"""HaloNet's attention in both published layouts of parameters: the formula, query by query."""

from __future__ import annotations

import pytest
import torch
from agreement import EXACT
from conftest import DEVICES
from kept_memory import kept_bytes
from torch.nn.attention.flex_attention import flex_attention

from aia_kernels import HaloAttention, HaloAttn, testing
from aia_kernels.modules import halo_attention

DIM, BLOCK, HALO, HEADS, D = 6, 3, 2, 2, 4
WINDOW = BLOCK + 2 * HALO
LAYERS = {
    "halonet-pytorch": lambda: HaloAttention(dim=DIM, block_size=BLOCK, halo_size=HALO, dim_head=D, heads=HEADS),
    "timm": lambda: HaloAttn(DIM, 8, HEADS, 3, BLOCK, HALO, qkv_bias=True),
    "timm, scaled": lambda: HaloAttn(DIM, 8, HEADS, None, BLOCK, HALO, scale_pos_embed=True),
}


def parts(module, x):
    """Queries, keys and values [H, W, heads, d] of one sample, in each layout; the tables and the scale of their terms;
    whether padding is left out; and what follows."""
    maps = x.movedim(0, -1)
    if isinstance(module, HaloAttention):
        q, kv = module.to_q(maps), module.to_kv(maps)
        k, v = kv[..., : HEADS * D], kv[..., HEADS * D :]
        tables = module.rel_pos_emb.rel_height, module.rel_pos_emb.rel_width
        return *(t.unflatten(-1, (HEADS, -1)) for t in (q, k, v)), tables, D**-0.5, True, module.to_out
    q, kv = module.q(x.unsqueeze(0))[0].movedim(0, -1), module.kv(x.unsqueeze(0))[0].movedim(0, -1)
    q, kv = q.unflatten(-1, (HEADS, -1)), kv.unflatten(-1, (HEADS, -1))
    d = q.shape[-1]
    tables = module.pos_embed.height_rel, module.pos_embed.width_rel
    return q, kv[..., :d], kv[..., d:], tables, d**-0.5 if module.scale_pos_embed else 1.0, False, lambda o: o


def by_query(module, x):
    ys = []
    for sample in x:
        q, k, v, (by_row, by_column), of_terms, masked, after = parts(module, sample)
        h, w, d = *q.shape[:2], q.shape[-1]
        o = sample.new_zeros(h, w, HEADS, v.shape[-1])
        for row in range(h):
            for column in range(w):
                top, left = row // BLOCK * BLOCK - HALO, column // BLOCK * BLOCK - HALO
                for head in range(HEADS):
                    query, logits, values = q[row, column, head], [], []
                    for i in range(WINDOW):
                        for j in range(WINDOW):
                            r, c = top + i, left + j
                            inside = 0 <= r < h and 0 <= c < w
                            if masked and not inside:
                                continue
                            key = k[r, c, head] if inside else torch.zeros_like(query)
                            terms = by_row[i - row % BLOCK + WINDOW - 1] + by_column[j - column % BLOCK + WINDOW - 1]
                            logits.append(query @ key * d**-0.5 + query @ terms * of_terms)
                            values.append(v[r, c, head] if inside else torch.zeros_like(v[0, 0, 0]))
                    o[row, column, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
        ys.append(after(o.flatten(2)).movedim(-1, 0))
    return torch.stack(ys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("operands_in_cache, piece", [(0, 2**17), (0, 1), (2**20, 2**17)])
def test_is_the_formula(name, operands_in_cache, piece, device, monkeypatch):
    monkeypatch.setattr("aia_kernels.functional.dot_product._OPERANDS_IN_CACHE", operands_in_cache)
    monkeypatch.setattr("aia_kernels.functional.dot_product._PIECE", piece)
    module = testing.randomise(LAYERS[name]()).double().to(device)
    x = torch.randn(2, DIM, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    found, expected = module(x), by_query(module, x)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    inputs = x, *module.parameters()
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, **EXACT)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("operands_in_cache", [0, 2**20])
def test_first_and_second_derivatives_and_those_of_forward_mode(name, operands_in_cache, monkeypatch):
    monkeypatch.setattr("aia_kernels.functional.dot_product._OPERANDS_IN_CACHE", operands_in_cache)
    make = {"halonet-pytorch": lambda: HaloAttention(dim=2, block_size=2, halo_size=1, dim_head=2, heads=1)}
    module = testing.randomise(
        make.get(name, lambda: HaloAttn(2, 2, 1, None, 2, 1, scale_pos_embed="scaled" in name))()
    )
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.double(), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(module, (x,))


def test_hooks_of_timms_convolutions_are_called():
    module, x = testing.randomise(LAYERS["timm"]()), torch.randn(2, DIM, 6, 3)
    expected, seen = module(x), []
    for convolution in (module.q, module.kv):
        convolution.register_forward_hook(lambda *_: seen.append(1))
    # Sums of six and more terms in another order.
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


def test_published_keys():
    module = LAYERS["halonet-pytorch"]()
    assert {key: tuple(p.shape) for key, p in module.state_dict().items()} == {
        "rel_pos_emb.rel_height": (2 * WINDOW - 1, D),
        "rel_pos_emb.rel_width": (2 * WINDOW - 1, D),
        "to_q.weight": (HEADS * D, DIM),
        "to_kv.weight": (2 * HEADS * D, DIM),
        "to_out.weight": (DIM, HEADS * D),
        "to_out.bias": (DIM,),
    }
    assert {key: tuple(p.shape) for key, p in LAYERS["timm, scaled"]().state_dict().items()} == {
        "q.weight": (8, DIM, 1, 1),
        "kv.weight": (16, DIM, 1, 1),
        "pos_embed.height_rel": (2 * WINDOW - 1, 4),
        "pos_embed.width_rel": (2 * WINDOW - 1, 4),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operands_in_cache", [0, 2**20])
def test_low_precision_leaves_padding_out(dtype, operands_in_cache, monkeypatch):
    """Its term is the lowest number: it must not become infinite, and its weight must be 0."""
    monkeypatch.setattr("aia_kernels.functional.dot_product._OPERANDS_IN_CACHE", operands_in_cache)
    module = testing.randomise(LAYERS["halonet-pytorch"]())
    x = torch.randn(1, DIM, 3, 3)
    expected = module(x)
    found = module.to(dtype)(x.to(dtype))
    # Logits of order ten, rounded to the type, are off by ten roundings; o is a mean of values of order one to four.
    assert (found.float() - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LAYERS["timm"]()(torch.randn(1, DIM, 0, 3)), "multiples of block_size = 3, not 0"),
        (lambda: LAYERS["timm"]()(torch.randn(1, DIM, 3, 3, device="meta")), "x: got device meta, expected that of"),
        (lambda: LAYERS["timm"]()(torch.randn(1, DIM, 4, 3)), "multiples of block_size = 3"),
        (lambda: LAYERS["timm"]()(torch.randn(1, 5, 3, 3)), r"x: got shape \(1, 5, 3, 3\), expected \[B, 6, H, W\]"),
        (lambda: LAYERS["halonet-pytorch"]()(torch.randn(6, 3, 3)), r"x: got shape \(6, 3, 3\)"),
        (lambda: HaloAttn(8, 9, 2), "dim_out: got 9"),
        (lambda: HaloAttention(dim=8, block_size=2, halo_size=0), "halo_size: got 0"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", LAYERS)
def test_bad_types(name):
    for x, words in (
        (torch.zeros(1, DIM, 3, 3, dtype=torch.int64), "x: got torch.int64"),
        (
            torch.zeros(1, DIM, 3, 3).double(),
            "x: got torch.float64, expected the type of the parameters",
        ),
        (None, "x: got NoneType, expected a tensor"),
    ):
        with pytest.raises(TypeError, match=words):
            LAYERS[name]()(x)


def as_documented(query, key, value, score_mod, scale):
    """What FlexAttention computes, in operators that have derivatives on a CPU too."""
    scores = (query * scale) @ key.mT
    block, head, i, j = (
        torch.arange(n).view([-1 if a == axis else 1 for a in range(4)]) for axis, n in enumerate(scores.shape)
    )
    return score_mod(scores, block, head, i, j).softmax(-1) @ value


@pytest.mark.parametrize("flex", [flex_attention, as_documented])
@pytest.mark.parametrize("name", LAYERS)
def test_over_flex_attention(name, flex, monkeypatch):
    """Where it runs it is compiled (flex_attention_runs). Here torch's own is called as it is, without derivatives,
    which it does not have on a CPU; and what it is documented to compute, with them."""
    module = testing.randomise(LAYERS[name]()).double()
    x = torch.randn(2, DIM, 2 * BLOCK, BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = (x.requires_grad_(), *module.parameters())
    expected, calls = module(x), []
    monkeypatch.setattr(halo_attention, "flex_attention_runs", lambda q, v: True)
    monkeypatch.setattr(halo_attention, "_flex_attention", lambda: calls.append(1) or flex)
    with torch.set_grad_enabled(flex is as_documented):
        found = module(x)
    assert calls
    torch.testing.assert_close(found, expected, **EXACT)
    if found.requires_grad:
        grad = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), **EXACT)


def test_flex_attention_runs_on_no_cpu():
    q = torch.zeros(3, 1, 9, 16)
    assert not halo_attention.flex_attention_runs(q, q)


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch(name):
    module = testing.randomise(LAYERS[name]())
    x = torch.zeros(0, DIM, 2 * BLOCK, BLOCK, requires_grad=True)
    y = module(x)
    assert y.shape == (0, y.shape[1], 2 * BLOCK, BLOCK)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not any(p.grad.any() for p in module.parameters())


def test_windows_are_made_again_for_the_backward():
    """Kept are the map of attention, x, its positions' features, q, k and v, and o: windows overlap, and would be
    several times as large."""
    module = HaloAttention(dim=32, block_size=4, halo_size=2, dim_head=8, heads=4)
    x = torch.randn(2, 32, 8, 12, requires_grad=True)
    blocks, heads, queries, window = 2 * 2 * 3, 4, 4**2, 8**2
    few_numbers = 256  # strides
    assert kept_bytes(module, x) <= 4 * (blocks * heads * queries * window + 6 * x.numel()) + few_numbers


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("operands_in_cache", [0, 2**20])
@pytest.mark.parametrize("sign", [1, -1], ids=["high", "low"])
def test_extreme_logits_at_the_border(name, operands_in_cache, sign, monkeypatch):
    """Logits beyond 1e4 and -1e4 where more than half of a window is beyond the map: what is left out stays out, though
    all that is inside is far below 0, and nothing overflows in float32."""
    monkeypatch.setattr("aia_kernels.functional.dot_product._OPERANDS_IN_CACHE", operands_in_cache)
    module = testing.randomise(LAYERS[name]()).double()
    x = torch.rand(1, DIM, BLOCK, BLOCK, dtype=torch.float64) + 0.5
    with torch.no_grad():
        # Queries, keys and x of one sign, so that logits are, before the terms of the positions.
        queries, keys = (module.to_q, module.to_kv) if name == "halonet-pytorch" else (module.q, module.kv)
        queries.weight.copy_(sign * 60 * queries.weight.abs())
        width = keys.weight.shape[0] // 2
        keys.weight[:width] = 60 * keys.weight[:width].abs()
        for table in (module.rel_pos_emb if name == "halonet-pytorch" else module.pos_embed).parameters():
            table.mul_(1e-3)
    x.requires_grad_()
    found, expected = module(x), by_query(module, x)
    largest = float(largest_logit(module, x.detach()[0]))
    assert 1e4 < largest < 1e6
    # Logits are rounded in their own size, weights by the exponential of that.
    rounding = lambda dtype: 16 * largest * torch.finfo(dtype).eps  # noqa: E731
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(torch.float64) * scale)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    scale = max(1.0, float(gradients[1].abs().max())) * largest
    torch.testing.assert_close(*gradients, rtol=0, atol=rounding(torch.float64) * scale)
    narrow = x.detach().float().requires_grad_()
    y = module.float()(narrow)
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), narrow)[0].isfinite().all()


@pytest.mark.parametrize("operands_in_cache", [0, 2**20])
@pytest.mark.parametrize("logit", [2e4, -2e4])
def test_float16_leaves_padding_out_below_its_logits(logit, operands_in_cache, monkeypatch):
    """Equal positions are their own mean, whatever the logits are; padding, whose values are 0, takes no part in it."""
    monkeypatch.setattr("aia_kernels.functional.dot_product._OPERANDS_IN_CACHE", operands_in_cache)
    module = testing.randomise(LAYERS["halonet-pytorch"]())
    with torch.no_grad():
        for table in module.rel_pos_emb.parameters():
            table.zero_()
        module.to_q.weight.fill_(100 / DIM)
        module.to_kv.weight[: HEADS * D] = logit / (100 * D**0.5) / DIM
    x = torch.ones(1, DIM, BLOCK, 2 * BLOCK)
    maps = x.movedim(1, -1)
    expected = module.to_out(module.to_kv(maps)[..., HEADS * D :]).movedim(-1, 1)
    found = module.half()(x.half())
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def largest_logit(module, sample):
    """The largest product of a query with a key of any place, scaled."""
    q, k, *_ = parts(module, sample)
    return (torch.einsum("ijhd,klhd->ijklh", q, k) * q.shape[-1] ** -0.5).abs().max()
