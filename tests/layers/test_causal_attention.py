"""CATT and CaaM's pair of attentions: the formulas written out, the published keys, and what the dictionary costs."""

from __future__ import annotations

import functools

import pytest
import torch
from agreement import EXACT
from conftest import DEVICES
from kept_memory import kept_bytes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from aia_kernels import CausalAttention, ComplementAttention, testing

B, N, L, DIM, HEADS, SLOTS = 2, 5, 7, 6, 2, 9


def weighted(q, k, v, sign=1.0, shown=None):
    """Attention of each head, written out."""
    heads = []
    for qh, kh, vh in zip(*(t.chunk(HEADS, -1) for t in (q, k, v)), strict=True):
        logits = sign * qh @ kh.mT / (DIM // HEADS) ** 0.5
        if shown is not None:
            logits = logits.masked_fill(~shown.unsqueeze(1), -torch.inf)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        heads.append(weights @ vh)
    return torch.cat(heads, -1)


def assert_same(found, expected, inputs):
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), **EXACT)


def tensors(device, *lengths):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(B, n, DIM, generator=generator, dtype=torch.float64) for n in lengths)
    return [t.to(device).requires_grad_() for t in made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
def test_catt(masked, device):
    module = testing.randomise(CausalAttention(DIM, HEADS, SLOTS)).double().to(device)
    h, context = tensors(device, N, L)
    mask = torch.arange(L, device=device) > torch.tensor([[4], [6]], device=device) if masked else None
    att = module.att
    q, k, v = att["query"](h), att["key"](context), att["value"](context)
    inside = weighted(q, k, v, shown=None if mask is None else ~mask)
    across = weighted(q, *(att[name](module.M).expand(B, -1, -1) for name in ("key", "value")))
    expected = module.fc(torch.cat((inside, across), -1))
    assert_same(module(h, context, mask), expected, (h, context, *module.parameters()))


def test_catt_looks_at_itself_and_has_published_keys():
    module = testing.randomise(CausalAttention(DIM, HEADS, SLOTS)).double()
    (h,) = tensors("cpu", N)
    torch.testing.assert_close(module(h), module(h, h), rtol=0, atol=0)
    keys = {f"att.{name}.{p}" for name in ("query", "key", "value") for p in ("weight", "bias")}
    assert module.state_dict().keys() == keys | {"M", "fc.weight", "fc.bias"}
    fresh = CausalAttention(DIM, HEADS)
    assert fresh.M.shape == (1, 500, DIM) and fresh.M.min() >= 0 and fresh.M.max() <= 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_a_context_of_another_width(device):
    """Between two streams, of words and of regions, as in ViLBERT: keys, values and the dictionary have its width."""
    module = testing.randomise(CausalAttention(DIM, HEADS, SLOTS, context_dim=4)).double().to(device)
    h, context = tensors(device, N, L)
    context = context[..., :4].detach().requires_grad_()
    assert module.M.shape == (1, SLOTS, 4) and module.att["value"].weight.shape == (DIM, 4)
    q, halves = module.att["query"](h), []
    for of in (context, module.M.expand(B, -1, -1)):
        halves.append(weighted(q, module.att["key"](of), module.att["value"](of)))
    assert_same(module(h, context), module.fc(torch.cat(halves, -1)), (h, context, *module.parameters()))


def test_the_dictionary_is_projected_once_for_the_batch():
    module = CausalAttention(DIM, HEADS, 1000)
    counted = []
    for samples in (1, 2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(samples, 1, DIM))
        counted.append(counter.get_total_flops())
    of_dictionary = 2 * 2 * 1000 * DIM * DIM
    assert counted[1] - counted[0] < counted[0] - of_dictionary + 1


#: Of CaaM's pair on a CPU: what decides how it is computed.
WAYS = {
    "both maps kept": {"_MAPS_IN_CACHE": 2**20},
    "logits kept": {"_FEW_FEATURES": 0},
    "logits kept, head by head": {"_FEW_FEATURES": 0, "_PIECE": 1},
    "fused kernels": {},
    "too many to be kept": {"_FEW_FEATURES": 0, "_MOST_KEPT": 0},
}


def takes(monkeypatch, way):
    for name, number in WAYS[way].items():
        monkeypatch.setattr(f"aia_kernels.functional.dot_product.{name}", number)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_caam(bias, way, device, monkeypatch):
    takes(monkeypatch, way)
    module = testing.randomise(ComplementAttention(DIM, HEADS, qkv_bias=bias)).double().to(device)
    (x,) = tensors(device, N)
    q, k, v = module.qkv(x).chunk(3, -1)
    expected = [module.proj(weighted(q, k, v, sign)) for sign in (1.0, -1.0)]
    assert_same(torch.stack(module(x)), torch.stack(expected), (x, *module.parameters()))
    assert module.state_dict().keys() - {"qkv.bias"} == {"qkv.weight", "proj.weight", "proj.bias"}


class Sum(torch.nn.Module):
    """Of a layer's two results."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return sum(self.layer(x))


def test_both_of_caam_keep_the_same_queries():
    """x, one tensor of q, k and v, both results, and one number for each query of each head of both."""
    module, x = ComplementAttention(16, 2), torch.randn(2, 20, 16, requires_grad=True)
    few_numbers = 1024  # strides, and the state of random numbers of PyTorch's kernel
    assert kept_bytes(Sum(module), x) <= 4 * (6 * x.numel() + 2 * 2 * 2 * 20) + few_numbers


def test_caam_keeps_one_map(monkeypatch):
    """The logits, of which both maps are made again, beside x, one tensor of q, k and v, and what the layer behind
    both results keeps of them."""
    takes(monkeypatch, "logits kept")
    module, x = ComplementAttention(16, 2), torch.randn(2, 20, 16, requires_grad=True)
    strides = 64
    assert kept_bytes(Sum(module), x) <= 4 * (6 * x.numel() + 2 * 2 * 20 * 20) + strides


@pytest.mark.parametrize("piece", [1, 2**17])
def test_selective_checkpointing_of_kept_logits(piece, monkeypatch):
    """A replayed operator may write into nothing; what it gives is the same."""
    takes(monkeypatch, "logits kept")
    monkeypatch.setattr("aia_kernels.functional.dot_product._PIECE", piece)
    module, (x,) = testing.randomise(ComplementAttention(DIM, HEADS)).double(), tensors("cpu", N)
    policy = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    found = checkpoint(lambda x: torch.stack(module(x)), x, use_reentrant=False, context_fn=contexts)
    expected, grad = torch.stack(module(x)), torch.randn(2, B, N, DIM, dtype=torch.float64)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))


def test_dropout_in_training_alone():
    module, (h,) = CausalAttention(DIM, HEADS, SLOTS, dropout=0.5).double(), tensors("cpu", N)
    assert not torch.equal(module(h), module(h))
    module.eval()
    assert torch.equal(module(h), module(h))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: CausalAttention(6, 4), ValueError, "dim: got 6, expected a multiple of the 4 heads"),
        (lambda: CausalAttention(6, 2, 0), ValueError, "slots: got 0"),
        (lambda: CausalAttention(6, 2)(torch.randn(2, 6)), ValueError, r"h: got shape \(2, 6\)"),
        (lambda: CausalAttention(6, 2)(torch.randn(2, 3, 5)), ValueError, r"h: got shape \(2, 3, 5\)"),
        (lambda: CausalAttention(6, 2)(*torch.randn(2, 2, 3, 6), torch.ones(2, 3)), TypeError, "mask: got torch.float"),
        (lambda: CausalAttention(6, 2)(*torch.randn(2, 2, 3, 6), torch.ones(2, 2).bool()), ValueError, "mask: got sh"),
        (lambda: CausalAttention(6, 2, context_dim=0), ValueError, "context_dim: got 0"),
        (lambda: CausalAttention(6, 2, context_dim=4)(torch.randn(2, 3, 6)), ValueError, r"context: got shape .*, 4\]"),
        (lambda: CausalAttention(6, 2, dropout=1.5), ValueError, "dropout: got 1.5, expected a probability"),
        (lambda: CausalAttention(6, 2)(torch.randn(2, 3, 6).double()), TypeError, "h: got torch.float64, expected the"),
        (lambda: CausalAttention(6, 2)(torch.randn(2, 3, 6).int()), TypeError, "h: got torch.int32"),
        (
            lambda: CausalAttention(6, 2)(torch.randn(2, 3, 6), torch.randn(2, 3, 6, device="meta")),
            ValueError,
            "context: got device meta, expected that of the parameters, cpu",
        ),
        (lambda: ComplementAttention(6, 2)(torch.randn(2, 3, 6).half()), TypeError, "x: got torch.float16"),
        (lambda: ComplementAttention(6, 2)([1.0]), TypeError, "x: got list, expected a tensor"),
        (lambda: ComplementAttention(6, 4), ValueError, "dim: got 6"),
        (lambda: ComplementAttention(6, 2)(torch.randn(2, 6)), ValueError, r"x: got shape \(2, 6\)"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("n", [0, 1, N])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dim, heads", [(DIM, HEADS), (1, 1)])
def test_few_tokens_one_channel_and_extreme_logits(n, scale, dim, heads):
    """In float32, against the formula in float64: logits of up to 1e8 leave one key for each query."""
    module = testing.randomise(CausalAttention(dim, heads, SLOTS))
    h = scale * torch.randn(2, n, dim, generator=torch.Generator().manual_seed(0))
    found = module(h)
    module, h = module.double(), h.double()
    att = module.att
    q, k, v = (att[name](h) for name in ("query", "key", "value"))

    def of(k, v):
        apart = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        logits = apart[0] @ apart[1].mT / (dim // heads) ** 0.5
        return ((logits - logits.amax(-1, keepdim=True)).softmax(-1) @ apart[2]).transpose(1, 2).flatten(2)

    across = of(*(att[name](module.M).expand(2, -1, -1) for name in ("key", "value")))
    inside = of(k, v) if n else across
    expected = module.fc(torch.cat((inside, across), -1)).float()
    # A logit has rounding errors of 1e-7 of its size, which decide where two keys are that near: none here are.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("make", [lambda: CausalAttention(DIM, HEADS, SLOTS), lambda: ComplementAttention(DIM, HEADS)])
def test_nan_stays_in_its_sample(make):
    module, (h,) = testing.randomise(make()).double(), tensors("cpu", N)
    h = h.detach()
    expected = both(module)(h)
    h[0, 2, 1] = torch.nan
    found = both(module)(h)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], expected[1], **EXACT)


def both(module):
    """A module's result, or a sum of its two."""

    def call(*inputs):
        y = module(*inputs)
        return y if isinstance(y, torch.Tensor) else y[0] + 2 * y[1].square()

    return call


@pytest.mark.parametrize(
    "masked, name, way", [(False, "CATT", None), (True, "CATT", None), *((False, "CaaM", way) for way in WAYS)]
)
def test_first_and_second_derivatives_and_those_of_forward_mode(name, masked, way, monkeypatch):
    """PyTorch's fused kernel on a CPU has first derivatives of reverse mode alone."""
    if way:
        takes(monkeypatch, way)
    make = (lambda: CausalAttention(4, 2, 3)) if name == "CATT" else (lambda: ComplementAttention(4, 2))
    module = testing.randomise(make()).double()
    x = tensors("cpu", 3)[0][..., :4].detach().contiguous().requires_grad_()
    mask = (None, torch.tensor([[False, True, False], [True, True, True]])) if masked and name == "CATT" else ()
    assert torch.autograd.gradcheck(lambda x: both(module)(x, *mask), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: both(module)(x, *mask), (x,))


def test_a_context_of_which_nothing_takes_part_gives_the_dictionary_alone():
    module = testing.randomise(CausalAttention(DIM, HEADS, SLOTS)).double()
    (h,) = tensors("cpu", N)
    mask = torch.tensor([[True] * N, [False] * N])
    q = module.att["query"](h)
    across = weighted(q, *(module.att[name](module.M).expand(B, -1, -1) for name in ("key", "value")))
    inside = weighted(q, module.att["key"](h), module.att["value"](h)) * torch.tensor([0.0, 1.0]).view(2, 1, 1)
    expected = module.fc(torch.cat((inside, across), -1))
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(module.train(training)(h, None, mask), expected, **EXACT)
    assert_same(module(h, None, mask), expected, (h, *module.parameters()))


def test_hooks_on_saved_tensors_see_what_is_kept():
    module = testing.randomise(CausalAttention(DIM, HEADS, SLOTS)).double()
    (h,) = tensors("cpu", N)
    expected = torch.autograd.grad(module(h).sin().sum(), h)
    with torch.autograd.graph.save_on_cpu():
        y = module(h).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(y, h, retain_graph=True), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y, h), expected, rtol=0, atol=0)
