"""External attention on odd input: other strides, nothing, extreme numbers, masks, dropout and autocast; and the
properties of the double normalization."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT, assert_same, assert_within_budget
from external_cases import FORMS, SIZES, Sizes, make, make_grad, make_input, padding, published

from aia_kernels import Norm, backends, functional, testing

LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILY = "external_attention"


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("form", FORMS)
def test_expanded_and_strided_gradients(form, transposed, external_on):
    device = external_on[1]
    module = make(form, SIZES["prime"], device=device).eval()
    x = make_input(form, SIZES["prime"], device=device, transposed=transposed).requires_grad_()
    dense = make_grad(form, SIZES["prime"], device=device)
    wide = torch.randn(*dense.shape[:-1], 2 * dense.shape[-1], dtype=torch.float64, device=device)
    expanded = torch.randn((), dtype=torch.float64, device=device).expand(dense.shape)
    for grad in (expanded, wide[..., ::2], dense.transpose(1, -1).contiguous().transpose(1, -1)):
        (found,) = torch.autograd.grad(module(x), x, grad)
        (expected,) = torch.autograd.grad(module(x), x, torch.empty_like(dense).copy_(grad))
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_input_of_other_strides(form, external_on):
    backend, device = external_on
    sizes = SIZES["prime"]
    module, grad = make(form, sizes, device=device), make_grad(form, sizes, device=device)
    base = make_input(form, sizes, device=device)
    sliced = torch.cat((base, base), -1)[..., : base.shape[-1]]
    strided = torch.stack((base, base), -1)[..., 0]
    late = torch.cat((base[:, :1], base), 1)[:, 1:]
    for x in (sliced, strided, late, base[:1].expand(base.shape)):
        dense = x.clone(memory_format=torch.contiguous_format)
        assert_same(testing.run(module, x, grad, backend), testing.run(module, dense, grad, backend))


@pytest.mark.parametrize("form", FORMS)
def test_empty_input(form, external_on):
    module = make(form, SIZES["small"], device=external_on[1])
    buffers = copy.deepcopy(dict(module.named_buffers()))
    x = make_input(form, SIZES["small"], device=external_on[1])
    for empty in (x[:0], x[:, :0] if form != "block" else x[:, :, :0]):
        leaf = empty.clone().requires_grad_()
        y = module(leaf)
        y.sum().backward()
        assert y.shape[:2] == empty.shape[:2] and y.numel() == 0 and leaf.grad.shape == empty.shape
        assert all(p.grad.count_nonzero() == 0 for p in module.parameters())
        assert all(torch.equal(b, buffers[key]) for key, b in module.named_buffers())


def test_output_is_stored_as_the_input(external_on):
    for transposed in (False, True):
        x = make_input("block", SIZES["small"], device=external_on[1], transposed=transposed).requires_grad_()
        y = make("block", SIZES["small"], device=external_on[1])(x)
        y.sum().backward()
        assert y.stride() == x.grad.stride() == x.stride()
        x = make_input("plain", SIZES["small"], device=external_on[1], transposed=transposed)
        assert make("plain", SIZES["small"], device=external_on[1])(x).is_contiguous()


@pytest.mark.parametrize("group", [6, 3])
def test_columns_and_rows_sum_to_one(group, external_on):
    """A's rows, in each group; and P's columns, P being A times the group's sum of P."""
    logits = 3 * torch.randn(2, 29, 6, dtype=torch.float64, device=external_on[1])
    a = functional.double_normalize(logits, group=group).unflatten(-1, (-1, group))
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]), **EXACT)
    p = functional.double_normalize(logits.mT, group=29).mT  # over tokens last: P without a second sum of its own
    eps = 1e3  # P is far below eps, so A is P / eps to the first order
    tiny = functional.double_normalize(logits, group=group, eps=eps) * eps
    torch.testing.assert_close(tiny.sum(1), torch.ones_like(tiny[:, 0]), rtol=group / eps, atol=0)
    assert p.shape == logits.shape


def test_a_constant_added_to_a_slot_changes_nothing(external_on):
    logits, constant = (torch.randn(*s, dtype=torch.float64, device=external_on[1]) for s in ((2, 13, 6), (6,)))
    for eps in (0.0, 1e-9, 0.1):
        found, expected = (functional.double_normalize(a, eps=eps) for a in (logits + constant, logits))
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dropout"])
def test_permuted_tokens_permute_the_output(form, external_on):
    device, sizes = external_on[1], SIZES["long"]
    module, x = make(form, sizes, device=device), make_input(form, sizes, device=device)
    order = torch.randperm(sizes.n, device=device)

    def permuted(t):
        return t.flatten(2)[..., order].view(t.shape) if form == "block" else t[:, order]

    torch.testing.assert_close(module(permuted(x)), permuted(module(x)), **EXACT)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("dropout", "block")])
def test_masked_equals_shortened(form, external_on):
    """Tokens under the mask weigh nothing, whatever they hold: o is that of the others alone, and zero there."""
    backend, device = external_on
    sizes = SIZES["prime"]
    kind, chosen = FORMS[form]
    mask = padding(sizes, device)
    masked = testing.randomise(kind(sizes, padding_mask=mask, **chosen)).to(device, torch.float64)
    x, grad = make_input(form, sizes, device=device), make_grad(form, sizes, device=device)
    x[mask] = grad[mask] = torch.nan
    found = testing.run(masked, x, grad, backend)
    assert found["y"][mask].count_nonzero() == found["grad x"][mask].count_nonzero() == 0
    expected = []
    for i in range(sizes.b):
        single = testing.randomise(kind(sizes, **chosen)).to(device, torch.float64)
        shown = ~mask[i]
        expected.append(testing.run(single, x[i : i + 1, shown], grad[i : i + 1, shown], backend))
        for key in ("y", "grad x"):
            torch.testing.assert_close(found[key][i, shown], expected[-1][key][0], **EXACT)
    for key in found.keys() - {"y", "grad x"}:
        torch.testing.assert_close(found[key], sum(e[key] for e in expected), **EXACT)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "block"])
def test_a_sample_of_padding_alone_gives_zeros(form, external_on):
    backend, device = external_on
    sizes = SIZES["small"]
    mask = torch.zeros(sizes.b, sizes.n, dtype=torch.bool, device=device)
    mask[1] = True
    kind, chosen = FORMS[form]
    module = testing.randomise(kind(sizes, padding_mask=mask, **chosen)).to(device, torch.float64)
    x, grad = make_input(form, sizes, device=device), make_grad(form, sizes, device=device)
    results = testing.run(module, x, grad, backend)
    assert results["y"][1].count_nonzero() == results["grad x"][1].count_nonzero() == 0
    assert all(r.isfinite().all() for r in results.values())


def test_mask_of_logits_of_any_rank(external_on):
    """[B, N] spreads over the axes between; [..., N] is taken as it is."""
    logits = torch.randn(2, 3, 7, 4, dtype=torch.float64, device=external_on[1])
    mask = padding(Sizes(2, 1, 7, 2, 4), external_on[1])
    found = functional.double_normalize(logits, padding_mask=mask)
    assert torch.equal(found, functional.double_normalize(logits, padding_mask=mask[:, None].expand(2, 3, 7)))
    for i in range(3):
        expected = functional.double_normalize(logits[:, i], padding_mask=mask)
        torch.testing.assert_close(found[:, i], expected, **EXACT)
    torch.testing.assert_close(functional.double_normalize(logits[0, 0], padding_mask=mask[0]), found[0, 0], **EXACT)


EXTREME = {
    "alternating": lambda n, m: 1e4 * (-1.0) ** torch.arange(n * m).view(n, m),
    "all equal": lambda n, m: torch.full((n, m), 1e4),
    "one dominant": lambda n, m: 1e4 * F.one_hot(torch.zeros(n, dtype=torch.long), m),
    "one dominant token": lambda n, m: 1e4 * F.one_hot(torch.zeros(m, dtype=torch.long), n).mT,
    "nothing but low": lambda n, m: torch.full((n, m), -1e4),
}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize("kind", EXTREME)
def test_extreme_logits(kind, eps, dtype, external_on):
    """Finite, forward and backward, in every type; without eps each token's row still sums to one."""
    n, m = 9, 6
    logits = EXTREME[kind](n, m).expand(2, n, m).to(external_on[1], dtype, copy=True).requires_grad_()
    a = functional.double_normalize(logits, eps=eps)
    a.backward(torch.randn_like(a))
    assert a.isfinite().all() and logits.grad.isfinite().all()
    if eps == 0:
        # One rounding of each of m elements of at most 1.
        torch.testing.assert_close(
            a.double().sum(-1), a.new_ones(2, n).double(), rtol=0, atol=m * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_what_is_not_finite_spreads_as_published(value, external_on):
    """An infinite logit makes its column NaN, and with it every token's row; -inf weighs nothing."""
    logits = torch.randn(2, 9, 6, dtype=torch.float64, device=external_on[1])
    logits[0, 4, 2] = value
    for group in (6, 3):
        found, expected = functional.double_normalize(logits, group=group), published(logits, group, 0.0)
        torch.testing.assert_close(found, expected, equal_nan=True, **EXACT)


@pytest.mark.parametrize("value", [float("-inf"), -1e9], ids=str)
@pytest.mark.parametrize("slots", [5, 64])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_logits_that_hide_a_token(how, slots, value, external_on):
    """All of its logits are -inf, or a number as low: with eps A is 0 there, as published, and so is the gradient."""
    logits = torch.randn(2, 9, slots, dtype=torch.float64, device=external_on[1])
    logits[0, 4], logits[:, 7] = value, value
    weight, grads = torch.randn_like(logits), []
    normalize = functional.double_normalize
    if how == "compiled":
        normalize = torch.compile(normalize, backend="aot_eager", fullgraph=True)
    for function in (lambda a: normalize(a, eps=1e-9), lambda a: published(a, slots, 1e-9)):
        leaf = logits.clone().requires_grad_()
        a = function(leaf)
        grads.append((a.detach(), *torch.autograd.grad((a * weight).sum(), leaf)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    assert (grads[0][0][0, 4] == 0).all() and (grads[0][1][0, 4] == 0).all()


def test_float16_at_full_range(external_on):
    """eps 1e-9 is 0 in float16, and P below 6e-8 too: both live in float32."""
    device = external_on[1]
    logits = (8 * torch.randn(1, 4000, 6, dtype=torch.float64)).half().to(device)
    found = functional.double_normalize(logits, eps=1e-9)
    expected = published(logits.double(), 6, 1e-9)
    # A rounding of the result, and 16 float32 roundings of the exponent, which is up to 60.
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-24 + 1000 * 2**-24)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p, external_on):
    """The same elements are left out forward and backward, A is scaled by 1 / (1 - p), and a seed decides which."""
    device = external_on[1]
    x = torch.randn(2, 7, 6, dtype=torch.float64, device=device, requires_grad=True)
    key, value = torch.randn(4, 6, dtype=torch.float64, device=device), torch.eye(4, dtype=torch.float64, device=device)
    full = functional.external_attention(x, key, value)  # o is A itself
    torch.manual_seed(5)
    dropped = functional.external_attention(x, key, value, dropout=p)
    torch.manual_seed(5)
    repeated = functional.external_attention(x, key, value, dropout=p)
    assert torch.equal(dropped, repeated)
    kept = dropped != 0
    assert kept.any() == (p < 1) and not kept.all()
    expected = torch.where(kept, full / (1 - p) if p < 1 else full, 0.0)
    torch.testing.assert_close(dropped, expected, **EXACT)
    grad = torch.randn_like(dropped)
    found, expected = (torch.autograd.grad(a, x, grad)[0] for a in (dropped, expected))
    torch.testing.assert_close(found, expected, **EXACT)


def test_dropout_mask_is_the_same_on_every_backend(external_compiled_on):
    backend, device = external_compiled_on
    x, key, value = (torch.randn(*s, dtype=torch.float64, device=device) for s in ((2, 7, 6), (4, 6), (5, 4)))
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(3)
        with backends.use_backend(name):
            results.append(functional.external_attention(x, key, value, dropout=0.5))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["eps", "own heads", "block"])
def test_autocast(form, dtype, external_on):
    """Parameters in float32, activations in either type: the products are bfloat16's, the gradients those of leaves."""
    backend, device = external_on
    module = make(form, SIZES["prime"], torch.float32, device)
    x, grad = make_input(form, SIZES["prime"], dtype, device=device), make_grad(form, SIZES["prime"], dtype, device)
    expected = torch.float32 if form == "block" and dtype == torch.float32 else torch.bfloat16
    with torch.autocast(device, torch.bfloat16):
        results = testing.run(module, x, grad.to(expected), backend)
        assert_within_budget(testing.compare(module, x, grad.to(expected), backend, low=module))
    assert results["y"].dtype == expected and results["grad x"].dtype == dtype
    assert {r.dtype for key, r in results.items() if key not in ("y", "grad x")} == {torch.float32}


def test_autocast_leaves_float64_alone(external_on):
    device = external_on[1]
    module, x = make("eps", SIZES["small"], device=device), make_input("eps", SIZES["small"], device=device)
    expected = module(x)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_block_of_maps_that_negative_sums_darken(external_on):
    """A sum of exactly zero has gradient zero, as torch's relu has; NaN passes."""
    device = external_on[1]
    key, value = torch.zeros(2, 3, device=device), torch.zeros(3, 2, device=device)
    x = torch.tensor([-1.0, 0.0, 2.0, torch.nan], device=device).view(1, 1, 4, 1).repeat(1, 3, 1, 1).requires_grad_()
    norm = Norm(running_mean=torch.zeros(3, device=device), running_var=torch.ones(3, device=device))
    y = functional.external_attention_block(x.detach()[:, :, :3].clone(), key, value, norm)
    assert y[0, 0, :, 0].tolist() == [0.0, 0.0, 2.0]
    leaf = x.detach()[:, :, :3].clone().requires_grad_()
    functional.external_attention_block(leaf, key, value, norm).sum().backward()
    assert leaf.grad[0, 0, :, 0].tolist() == [0.0, 0.0, 1.0]
    assert functional.external_attention_block(x, key, value, norm).isnan().all()


def test_nothing_is_kept_without_gradients(external_on):
    module = make("block", SIZES["small"], device=external_on[1]).requires_grad_(False)
    assert module(make_input("block", SIZES["small"], device=external_on[1])).grad_fn is None
