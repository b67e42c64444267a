"""Attention by a memory per sample as functions: the papers' formulas with the whole map of attention, derivatives,
padding, and what is extreme or empty."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import EXACT
from torch import Tensor

import aia_kernels
from aia_kernels import backends, functional

FEATURES = ("l2", "softplus", "softmax")
B, N, C, K, V, HEADS = 2, 7, 6, 4, 8, 2


def parameters(feature: str, c: int = C, k: int = K, v: int = V, device="cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"query": (k, c), "key": (k, c), "query_bias": (k,), "key_bias": (k,)}
    if feature == "softmax":
        shapes |= {"value": (v, c), "value_bias": (v,), "reprojection": (c, v), "reprojection_bias": (c,)}
    else:
        shapes |= {"value": (c, c), "value_bias": (c,), "gamma": (1,)}
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    return {name: t.to(device).requires_grad_() for name, t in made.items()}


def tokens(b: int = B, n: int = N, c: int = C, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, n, c, generator=generator, dtype=torch.float64).to(device).requires_grad_()


def call(feature: str, x: Tensor, tensors: dict[str, Tensor], heads: int = 1, **settings) -> Tensor:
    order = ("query", "key", "value", "reprojection")[: 4 if feature == "softmax" else 3]
    tensors = dict(tensors)
    biases = [tensors.pop(f"{name}_bias", None) for name in order]
    if feature == "softmax":
        return functional.efficient_attention(x, **tensors, biases=biases, heads=heads, **settings)
    return functional.linear_attention(x, **tensors, biases=biases, heads=heads, feature=feature, **settings)


def by_the_map(feature: str, x: Tensor, p: dict[str, Tensor], heads: int = 1, eps: float = 1e-6) -> Tensor:
    """y by the map of attention of all pairs of tokens [N, N], sample by sample and head by head."""
    ys = []
    for sample in x:
        q, k, v = (sample @ p[f"{name}"].T + p[f"{name}_bias"] for name in ("query", "key", "value"))
        o = []
        for qh, kh, vh in zip(*(t.chunk(heads, 1) for t in (q, k, v)), strict=True):
            if feature == "softmax":
                similar = torch.softmax(qh, 1) @ torch.softmax(kh, 0).T
                o.append(similar @ vh)
                continue
            if feature == "l2":
                qh, kh = (t / (t * t).sum(1, keepdim=True).sqrt() for t in (qh, kh))
            else:
                qh, kh = ((1 + t.exp()).log() for t in (qh, kh))
            similar = qh @ kh.T + (1.0 if feature == "l2" else 0.0)
            o.append(similar @ vh / (similar.sum(1, keepdim=True) + eps * qh.sum(1, keepdim=True)))
        o = torch.cat(o, 1)
        if feature == "softmax":
            ys.append(sample + o @ p["reprojection"].T + p["reprojection_bias"])
        else:
            ys.append(sample + p["gamma"] * o)
    return torch.stack(ys)


def grads(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True))


def assert_all_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("feature", FEATURES)
def test_is_attention_by_the_whole_map(feature, heads, linear_on):
    x, p = tokens(device=linear_on[1]), parameters(feature, device=linear_on[1])
    found, expected = call(feature, x, p, heads), by_the_map(feature, x, p, heads)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_all_close(grads(found, x, *p.values()), grads(expected, x, *p.values()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_without_the_residual(feature, masked, linear_on):
    """y less x, and 0 where a token takes no part, on tokens and on channels_last maps alike."""
    x, p = tokens(n=12, device=linear_on[1]), parameters(feature, device=linear_on[1])
    padding = torch.arange(12, device=linear_on[1]).expand(B, 12) > 8 if masked else None
    settings = {"heads": HEADS, "padding_mask": padding}
    expected = call(feature, x, p, **settings) - x
    found = call(feature, x, p, residual=False, **settings)
    assert not masked or not found[:, 9:].any()
    torch.testing.assert_close(found, expected, **EXACT)
    assert_all_close(grads(found, x, *p.values()), grads(expected, x, *p.values()))
    maps = x.mT.unflatten(2, (3, 4)).contiguous(memory_format=torch.channels_last)
    y = call(feature, maps, p, residual=False, **settings)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.flatten(2).mT, expected, **EXACT)


@pytest.mark.parametrize("feature", FEATURES)
def test_maps_of_any_height_and_layout(feature, linear_on):
    x, p = tokens(n=12, device=linear_on[1]), parameters(feature, device=linear_on[1])
    expected = call(feature, x, p)
    for sizes, form in (((3, 4), torch.channels_last), ((4, 3), torch.contiguous_format), ((2, 3, 2), None)):
        maps = x.mT.unflatten(2, sizes)
        maps = maps.contiguous(memory_format=form) if form else maps.contiguous()
        y = call(feature, maps, p)
        torch.testing.assert_close(y.flatten(2).mT, expected, **EXACT)
        assert y.stride() == maps.stride()
        assert_all_close(grads(y.flatten(2).mT, x, *p.values()), grads(expected, x, *p.values()))


@pytest.mark.parametrize("heads, residual", [(1, True), (HEADS, True), (HEADS, False)])
@pytest.mark.parametrize("feature", FEATURES)
def test_first_and_second_derivatives(feature, heads, residual, linear_on):
    x, p = tokens(1, 3, 4, linear_on[1]), parameters(feature, 4, 4, 2, linear_on[1])

    def function(x, *tensors):
        return call(feature, x, dict(zip(p, tensors, strict=True)), heads, residual=residual)

    assert torch.autograd.gradcheck(function, (x, *p.values()))
    assert torch.autograd.gradgradcheck(function, (x, *p.values()))


def test_channels_by_the_map(linear_on):
    """Every pair of channels, written out."""
    x, gamma = tokens(device=linear_on[1]), torch.tensor([0.7], dtype=torch.float64, device=linear_on[1])
    gamma.requires_grad_()
    ys = []
    for sample in x:  # [N, C]
        hat = sample / (sample * sample).sum(1, keepdim=True).sqrt()
        columns = []
        for c in range(C):
            over = sum((sample[:, c] * hat[:, other]).sum() * hat[:, other] for other in range(C)) + sample.sum(1)
            mass = N + (hat[:, c] * (hat.sum(1) + 1e-6)).sum()
            columns.append(over / mass)
        ys.append(sample + gamma * torch.stack(columns, 1))
    expected, found = torch.stack(ys), functional.channel_linear_attention(x, gamma)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_all_close(grads(found, x, gamma), grads(expected, x, gamma))
    small = tokens(1, 3, 4, linear_on[1])
    assert torch.autograd.gradcheck(functional.channel_linear_attention, (small, gamma))
    assert torch.autograd.gradgradcheck(functional.channel_linear_attention, (small, gamma))


@pytest.mark.parametrize("c, n", [(3, 20), (5, 4), (20, 3), (1, 6), (4, 1)], ids=str)
@pytest.mark.parametrize("by_channel", [False, True], ids=["tokens", "maps"])
def test_channels_backward(c, n, by_channel, linear_compiled_on):
    """S or R kept and made again, both storage orders, with gamma and without: the derivatives of the reference."""
    device = linear_compiled_on[1]
    x = tokens(2, n, c, device).detach()
    x = (x.mT.contiguous().mT if by_channel else x).requires_grad_()
    gamma = torch.tensor([0.7], dtype=torch.float64, device=device, requires_grad=True)
    for of in ((x, gamma), (x,)):
        with aia_kernels.use_backend("reference"):
            expected = functional.channel_linear_attention(*of, eps=1e-2)
        found = functional.channel_linear_attention(*of, eps=1e-2)
        torch.testing.assert_close(found, expected, **EXACT)
        assert found.stride() == x.stride()
        assert_all_close(grads(found, *of), grads(expected, *of))
        (only,) = torch.autograd.grad(found.sum(), of[-1:])
        torch.testing.assert_close(only, torch.autograd.grad(expected.sum(), of[-1:])[0], **EXACT)


def test_channels_in_narrow_types(linear_compiled_on):
    """But bfloat16 on a GPU, which is made in it (test_linear_attention_launched.py holds it to its error budget)."""
    x = tokens(2, 40, 5, linear_compiled_on[1]).detach()
    for dtype in (torch.float16,) if x.is_cuda else (torch.bfloat16, torch.float16):
        narrow, wide = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
        found, expected = (functional.channel_linear_attention(t) for t in (narrow, wide))
        ones = torch.ones_like(expected)
        both = torch.autograd.grad(found, narrow, ones.to(dtype))[0], torch.autograd.grad(expected, wide, ones)[0]
        # All is made in float32; the result is rounded once.
        for one, other in ((found, expected), both):
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(one.double(), other, rtol=unit, atol=unit * 1e-3)


def test_channels_keep_little():
    """x, and S and p, or with few positions R and p, where they are small beside it."""
    kept: list[Tensor] = []
    for c, n, most in ((4, 400, 1.02), (400, 4, 1.3), (16, 16, 1.0), (16, 12, 1.0)):
        x = torch.randn(1, n, c, requires_grad=True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            functional.channel_linear_attention(x)
        assert sum(t.nbytes for t in kept if t.is_floating_point()) <= most * x.nbytes


@pytest.mark.parametrize("kept", ["nothing", "sums", "logits"])
@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_made_again_is_the_same(feature, kept, monkeypatch, linear_compiled_on):
    x, p = tokens(device=linear_compiled_on[1]), parameters(feature, device=linear_compiled_on[1])
    monkeypatch.setattr("aia_kernels.algorithms.linear_attention.keeps", lambda *_: (kept == "logits", kept == "sums"))
    expected = by_the_map(feature, x, p)
    assert_all_close(grads(call(feature, x, p), x, *p.values()), grads(expected, x, *p.values()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_passes_in_pytorch(feature, masked, monkeypatch):
    """What backends without passes of their own take gives the same."""
    x, p = tokens(), parameters(feature)
    padding = torch.arange(N).expand(B, N) == 2 if masked else None
    with backends.use_backend("reference"):
        expected = call(feature, x, p, HEADS, padding_mask=padding)
    monkeypatch.setattr(backends, "passes", lambda name, family: backends.memory_passes)
    with backends.use_backend("cpu"):
        found = call(feature, x, p, HEADS, padding_mask=padding)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_all_close(grads(found, x, *p.values()), grads(expected, x, *p.values()))


class TestPadding:
    @pytest.mark.parametrize("feature", FEATURES)
    def test_is_as_if_the_tokens_were_not_there(self, feature, linear_on):
        x, p = tokens(device=linear_on[1]), parameters(feature, device=linear_on[1])
        mask = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        mask[:, [2, 5]] = True
        shown = ~mask[0]
        found, expected = call(feature, x, p, 2, padding_mask=mask), call(feature, x[:, shown], p, 2)
        torch.testing.assert_close(found[:, shown], expected, **EXACT)
        assert torch.equal(found[:, ~shown], x[:, ~shown])
        both = grads(found[:, shown], x, *p.values()), grads(expected, x, *p.values())
        assert_all_close(*both)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_of_a_whole_sample_leaves_x(self, feature, linear_on):
        x, p = tokens(device=linear_on[1]), parameters(feature, device=linear_on[1])
        mask = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        mask[1] = True
        y = call(feature, x, p, 2, padding_mask=mask)
        assert torch.equal(y[1], x[1])
        found = grads(y, x, *p.values())
        assert all(g.isfinite().all() for g in found)
        expected = grads(call(feature, x[:1], p, 2), *p.values())
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        torch.testing.assert_close(found[0][1], weights[1], **EXACT)
        alone = torch.autograd.grad((call(feature, x[:1], p, 2) * weights[:1]).sum(), [*p.values()])
        assert len(expected) == len(alone)
        assert_all_close(found[1:], alone)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_may_hold_anything(self, feature, linear_on):
        x, p = tokens(device=linear_on[1]), parameters(feature, device=linear_on[1])
        mask = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        mask[:, 3] = True
        expected = call(feature, x, p, padding_mask=mask)
        spoiled = x.detach().clone()
        spoiled[:, 3] = torch.nan
        found = call(feature, spoiled.requires_grad_(), p, padding_mask=mask)
        torch.testing.assert_close(found[~mask], expected[~mask], **EXACT)
        assert all(g[..., :].isfinite().all() for g in grads(found[~mask], *p.values()))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=["large", "small"])
def test_extreme_logits(feature, scale, linear_on):
    x, p = tokens(device=linear_on[1]), parameters(feature, device=linear_on[1])
    p = {name: (t * scale if name in ("query", "key") else t) for name, t in p.items()}
    y = call(feature, x, p)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads(y, x))
    if feature != "softplus":  # whose formula, written out, overflows
        torch.testing.assert_close(y, by_the_map(feature, x, p), **EXACT)


@pytest.mark.parametrize("sizes", [(1, 1, 6), (3, 1, 6), (2, 5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_one_token_and_one_channel(feature, sizes, linear_on):
    x, p = tokens(*sizes, linear_on[1]), parameters(feature, sizes[2], 2, 3, linear_on[1])
    found, expected = call(feature, x, p), by_the_map(feature, x, p)
    torch.testing.assert_close(found, expected, **EXACT)
    assert_all_close(grads(found, x, *p.values()), grads(expected, x, *p.values()))


@pytest.mark.parametrize("sizes", [(0, 5, 6), (2, 0, 6)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_empty(feature, sizes, linear_on):
    x, p = tokens(*sizes, linear_on[1]), parameters(feature, device=linear_on[1])
    y = call(feature, x, p)
    assert y.shape == x.shape
    assert all((g == 0).all() for g in grads(y, x, *p.values()))
    assert functional.channel_linear_attention(x).shape == x.shape


def test_keys_and_queries_of_zero(linear_on):
    """0 / 0 as published; here a vector of no length."""
    x = torch.zeros(1, 4, C, dtype=torch.float64, device=linear_on[1], requires_grad=True)
    p = parameters("l2", device=linear_on[1])
    p = {name: t for name, t in p.items() if name not in ("query_bias", "key_bias")}
    y = call("l2", x, p)
    torch.testing.assert_close(y, (p["gamma"] * p["value_bias"]).expand_as(y), **EXACT)
    assert all(g.isfinite().all() for g in grads(y, x, *p.values()))
    assert functional.channel_linear_attention(x).isfinite().all()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_million_tokens(feature, linear_compiled_on):
    """A map of all pairs would take 4 TB. In float16 the sums over tokens pass its range."""
    device = linear_compiled_on[1]
    p = {name: t.detach().half() for name, t in parameters(feature, 2, 2, 2, device).items()}
    p["query"], p["query_bias"] = p["key"], p["key_bias"]  # or 1 + q k / |q k| may cancel
    x = torch.full((1, 10**6, 2), 2.0, dtype=torch.float16, device=device)
    y = call(feature, x, p)
    expected = call(feature, x[:, :1].double(), {name: t.double() for name, t in p.items()})
    # Equal tokens: attention gives back their value. One rounding of y and of each of its factors.
    torch.testing.assert_close(y[:, ::99999].double(), expected.expand(1, 11, 2), rtol=8 * 2**-11, atol=8 * 2**-11)


def bad(**changed):
    return lambda feature: {"x": tokens().detach(), **parameters(feature), **changed}


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (bad(x=torch.randn(2, 3)), ValueError, r"x: got shape \(2, 3\), expected \[B, N, C\]"),
        (bad(x=torch.randn(2, 3, 0)), ValueError, "x: .*at least one channel"),
        (bad(x=torch.zeros(2, 3, 6, dtype=torch.int64)), TypeError, "x: got torch.int64"),
        (bad(x=[1.0]), TypeError, "x: got list"),
        (bad(key=torch.randn(4, 5).double()), ValueError, r"key: got shape \(4, 5\), expected \(4, 6\)"),
        (bad(query=torch.randn(3, 6).double()), ValueError, r"query: got shape \(3, 6\), expected \(4, 6\)"),
        (bad(query=torch.randn(4, 6)), TypeError, "query: got torch.float32, expected torch.float64"),
        (bad(key_bias=torch.randn(3).double()), ValueError, r"key_bias: got shape \(3,\), expected \(4,\)"),
        (bad(value=torch.randn(5).double()), ValueError, r"value: got shape \(5,\)"),
        (bad(heads=0), ValueError, "heads: got 0, expected at least 1"),
        (bad(heads=3), ValueError, "key: .*heads = 3"),
        (bad(heads=1.5), TypeError, "heads: got 1.5, expected an integer"),
        (bad(padding_mask=torch.zeros(2, 6, dtype=torch.bool)), ValueError, r"padding_mask: got shape \(2, 6\)"),
        (bad(padding_mask=torch.zeros(2, 7)), TypeError, "padding_mask: got torch.float32"),
        (bad(process_group=1), TypeError, "process_group: got 1"),
    ],
)
@pytest.mark.parametrize("feature", ["l2", "softmax"])
def test_bad_input(feature, arguments, error, words):
    arguments = arguments(feature)
    settings = {name: arguments.pop(name) for name in ("heads", "padding_mask", "process_group") if name in arguments}
    with pytest.raises(error, match=words):
        call(feature, arguments.pop("x"), arguments, **settings)


def test_bad_settings():
    x, p = tokens(), parameters("l2")
    matrices = [p[name] for name in ("query", "key", "value")]
    with pytest.raises(TypeError, match="residual: got None, expected a bool"):
        call("l2", tokens(), parameters("l2"), residual=None)
    with pytest.raises(ValueError, match="feature: got 'softmax', expected 'l2' or 'softplus'"):
        functional.linear_attention(x, *matrices, feature="softmax")
    with pytest.raises(ValueError, match=r"gamma: got shape \(2,\)"):
        functional.linear_attention(x, *matrices, gamma=torch.ones(2).double())
    for biases in (None, (), (None, None)):
        with pytest.raises(ValueError, match=r"biases: got .*, expected 3"):
            functional.linear_attention(x, *matrices, biases=biases)
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps: got"):
            functional.channel_linear_attention(x, eps=eps)
