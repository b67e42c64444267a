"""External attention: the reference, the algorithm over plain passes, every backend by error budget, derivatives,
the properties of the double normalization and odd input."""

from __future__ import annotations

import copy

import external_cases as cases
import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT, assert_same, assert_within_budget
from conftest import skip_unless_runnable
from external_cases import FORMS, SIZES, Sizes, make, make_grad, make_input
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_double_norm import PlainDoubleNorm
from torch import nn

from aia_kernels import Norm, backends, functional, reference, testing
from aia_kernels.backends.matmul_passes import MatmulPasses

LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILY = "external_attention"


def published(logits, group, eps):
    """The double normalization as published code writes it."""
    p = F.softmax(logits, -2).unflatten(-1, (-1, group))
    return (p / (eps + p.sum(-1, keepdim=True))).flatten(-2)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.1])
@pytest.mark.parametrize("group", [6, 2])
def test_double_normalize_as_published(eps, group, external_on):
    logits = torch.randn(2, 3, 11, 6, dtype=torch.float64, device=external_on[1], requires_grad=True)
    found = functional.double_normalize(logits, group=group, eps=eps)
    expected = published(logits, group, eps)
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(a, logits, grad)[0] for a in (found, expected)), **EXACT)


@pytest.mark.parametrize("dims", [(-1, -2), (1, 3), (3, 0), (-4, 2)])
def test_double_normalize_over_other_axes(dims, external_on):
    """The axes of the softmax and of the sum, by either sign: channels first, slots before tokens, or any two."""
    logits = torch.randn(2, 3, 7, 6, dtype=torch.float64, device=external_on[1], requires_grad=True)
    found = functional.double_normalize(logits, dims=dims, eps=1e-9)
    p = logits.softmax(dims[0])
    expected = p / (1e-9 + p.sum(dims[1], keepdim=True))
    torch.testing.assert_close(found, expected, **EXACT)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(a, logits, grad)[0] for a in (found, expected)), **EXACT)


def test_heads_as_published(external_on):
    """EAMLP's flow: one pair of memories with biases, shared by the heads; the bias of the keys has no effect."""
    x, key, value = (torch.randn(*s, dtype=torch.float64, device=external_on[1]) for s in ((2, 7, 6), (8, 3), (5, 8)))
    key_bias, value_bias = (torch.randn(n, dtype=torch.float64, device=external_on[1]) for n in (8, 5))
    key_bias.requires_grad_()
    heads = x.unflatten(2, (2, 3)).transpose(1, 2)
    a = published(F.linear(heads, key, key_bias), 8, 1e-9)
    expected = F.linear(a, value, value_bias).transpose(1, 2).flatten(2)
    found = functional.external_attention(x, key, value, heads=2, key_bias=key_bias, value_bias=value_bias, eps=1e-9)
    torch.testing.assert_close(found, expected, **EXACT)
    found.sum().backward()
    assert key_bias.grad.count_nonzero() == 0


class ThroughBatchNorm(nn.Module):
    """The block with torch's batch norm on z itself, to be run beside cases.Block with the same parameters."""

    def __init__(self, block: cases.Block):
        super().__init__()
        self.key, self.value, self.bn, self.eps = block.key, block.value, block.bn, block.eps

    def forward(self, x):
        a = published(x.flatten(2).mT @ self.key.mT, self.key.shape[0], self.eps)
        return F.relu(self.bn((a @ self.value.mT).mT.unflatten(2, x.shape[2:])) + x)


def as_published(bn: nn.BatchNorm2d) -> None:
    pass


def cumulative(bn: nn.BatchNorm2d) -> None:
    bn.momentum = None


def without_tracking(bn: nn.BatchNorm2d) -> None:
    bn.track_running_stats = False


def without_running_statistics(bn: nn.BatchNorm2d) -> None:
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None


def without_affine(bn: nn.BatchNorm2d) -> None:
    bn.weight = bn.bias = None


def frozen_inside_training(bn: nn.BatchNorm2d) -> None:
    bn.eval()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change",
    [
        as_published,
        cumulative,
        without_tracking,
        without_running_statistics,
        without_affine,
        frozen_inside_training,
    ],
)
def test_block_as_its_batch_norm_says(change, train, external_on):
    """Two steps beside torch's batch norm: values, gradients and running statistics from the moments of A."""
    block = make("block", SIZES["small"], device=external_on[1]).train(train)
    change(block.bn)
    oracle = ThroughBatchNorm(copy.deepcopy(block))
    for step in range(2):
        x = make_input("block", SIZES["small"], seed=2 * step, device=external_on[1])
        grad_y = make_input("block", SIZES["small"], seed=2 * step + 1, device=external_on[1])
        results = []
        for m in (block, oracle):
            leaf = x.clone().requires_grad_()
            m.zero_grad()
            y = m(leaf)
            y.backward(grad_y)
            results.append({"y": y.detach(), "grad x": leaf.grad} | dict(m.named_buffers()))
            results[-1] |= {key: p.grad for key, p in m.named_parameters()}
        assert_same(*results)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("axes", [1, 3], ids=["points", "volumes"])
@pytest.mark.parametrize("train", [True, False])
def test_block_on_points_and_volumes(axes, last, train, external_on):
    """They are maps of one row, in their own storage."""
    block = make("block", SIZES["small"], device=external_on[1]).train(train)
    same = copy.deepcopy(block)
    maps, grad_y = (make_input("block", SIZES["small"], seed=seed, device=external_on[1]) for seed in (0, 1))
    results = []
    for m, shape in ((block, (-1,) if axes == 1 else (2, 1, -1)), (same, (1, -1))):
        x, g = (a.flatten(2).unflatten(2, shape) for a in (maps, grad_y))
        x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()
        y = m(x)
        assert y.stride() == x.stride()
        y.backward(g)
        results.append({"y": y.detach().flatten(2), "grad x": x.grad.flatten(2)} | dict(m.named_buffers()))
        results[-1] |= {key: p.grad for key, p in m.named_parameters()}
    assert_same(*results)


def test_nearly_constant_attention_keeps_its_variance(external_on):
    """Keys of 1e-4: A is 1 / S to four digits. Without the shift the variance would lose eight digits, not none."""
    block = make("block", SIZES["long"], device=external_on[1])
    with torch.no_grad():
        block.key.mul_(1e-4)
    x = make_input("block", SIZES["long"], device=external_on[1])
    double = copy.deepcopy(block)
    block.float()
    with backends.use_backend(external_on[0]):
        found = block(x.float()).double()
    # Values are of order one; the product of A itself, with A near 1 / S, rounds by 1e-7 of 1e-4 of its spread.
    torch.testing.assert_close(found, ThroughBatchNorm(double)(x), rtol=0, atol=2e-2)


def test_nearly_constant_attention_keeps_its_gradients(external_compiled_on):
    """A gradient of y with a mean, and A 1 / S to two digits: BN takes a thousand times more of products with A than
    it leaves. Taken of A itself, as the reference does, they end with errors of 2e-3."""
    backend, device = external_compiled_on
    block = make("block", SIZES["long"], device=device)
    with torch.no_grad():
        block.key.mul_(1e-2)
        block.bn.bias.add_(20)  # far from the edge of the relu
    x, grad_y = (make_input("block", SIZES["long"], seed=seed, device=device) for seed in (0, 1))
    exact = testing.run(block, x, grad_y + 3, "reference")
    found = testing.run(block.float(), x.float(), grad_y.float() + 3, backend)
    for key in ("grad value", "grad bn.weight"):
        # A is rounded by 6e-8 / S at 1e-2 / S from its mean, in sums of six hundred tokens: 6e-6 by several terms.
        assert (found[key] - exact[key]).norm() < 1e-4 * exact[key].norm(), key


@pytest.mark.parametrize("slots", [8, 64])
def test_variance_of_a_channel_whose_mean_dwarfs_its_spread(slots, external_compiled_on):
    """A thousand equal tokens and one that is not: all but a thousandth of each second moment is the mean's."""
    backend, device = external_compiled_on
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(sizes, generator=generator).to(device) for sizes in ((slots, 16), (16, slots)))
    x = torch.full((1, 16, 25, 41), 0.001, device=device)
    x[..., 0, 0] = 10.0
    running = torch.zeros(16, device=device), torch.ones(16, device=device)
    with backends.use_backend(backend):
        functional.external_attention_block(x, key, value, Norm(None, None, *running, training=True, momentum=1.0))
    logits = x.double().flatten(2).mT @ key.double().mT
    a = reference.double_normalize(logits, slots, 1e-9)[0]
    z, size = a @ value.double().mT, (a @ value.double().abs().mT).amax(0)
    # A is off by three roundings of a logit and a few of its own, and z by one more for each term.
    error = (3 * logits.abs().max() + slots + 16) * torch.finfo(torch.float32).eps * size
    var = z.var(0)
    assert ((running[1] - var).abs() <= 2 * var.sqrt() * error + error.square()).all()


@pytest.fixture
def plain_passes(monkeypatch) -> None:
    """Run the algorithm over the plain passes and the framework's products."""
    monkeypatch.setattr(backends, "passes", lambda *_: MatmulPasses(PlainDoubleNorm()))
    monkeypatch.setattr(backends, "_resolve", lambda choice, *_: "reference" if choice == "reference" else "cpu")


@pytest.mark.parametrize("transposed", [False, True], ids=["as stored", "transposed"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_algorithm_over_plain_passes(form, sizes, transposed, plain_passes):
    sizes = SIZES[sizes]
    for train in (True, False):
        module = make(form, sizes).train(train)
        x, grad = make_input(form, sizes, transposed=transposed), make_grad(form, sizes)
        assert_same(testing.run(module, x, grad, "auto"), testing.run(module, x, grad, "reference"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_backend_by_error_budget(form, sizes, dtype, external_compiled_on):
    backend, device = external_compiled_on
    # Storage rotates through sizes and types, so that every pair of the two meets within the table.
    transposed = bool((list(SIZES).index(sizes) + LOW.index(dtype)) % 2)
    x = make_input(form, SIZES[sizes], dtype, device=device, transposed=transposed)
    grad = make_grad(form, SIZES[sizes], dtype, device)
    # With one token A is 1 / S and z has no variance: its gradient in training is all rounding, by 1 / sqrt(eps).
    module = make(form, SIZES[sizes], dtype, device).train(SIZES[sizes].n > 1)
    assert_within_budget(testing.compare(module, x, grad, backend))


@pytest.mark.parametrize("form", ["eps", "dropout", "block"])
def test_triton_in_the_interpreter(form):
    skip_unless_runnable("triton", "cpu", FAMILY)
    sizes = Sizes(1, 3, 4, 6, 4)
    x, grad = make_input(form, sizes, torch.float32), make_grad(form, sizes, torch.float32)
    assert_within_budget(testing.compare(make(form, sizes, torch.float32), x, grad, "triton"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(sorted(FORMS)),
    b=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    d=st.integers(1, 12).map(lambda k: 2 * k),
    s=st.integers(1, 12).map(lambda k: 2 * k),
    v=st.integers(1, 9),
    transposed=st.booleans(),
)
def test_drawn_sizes(form, b, h, w, d, s, v, transposed):
    if form == "block" and b * h * w == 1:
        w = 2  # batch statistics need more than one value
    sizes = Sizes(b, h, w, d, s, v)
    module, x, grad = make(form, sizes), make_input(form, sizes, transposed=transposed), make_grad(form, sizes)
    assert_same(testing.run(module, x, grad, "auto"), testing.run(module, x, grad, "reference"))


def functional_call(form: str, train=True, device="cpu", masked=False):
    """A form as a function of x and its parameters, with random float64 inputs for it."""
    sizes = Sizes(2, 2, 2, 4, 4, 2)
    module = make(form, sizes, device=device).train(train)
    if masked:
        module.settings["padding_mask"] = padding(sizes, device)
    parameters = dict(module.named_parameters())
    inputs = [p.detach().requires_grad_() for p in (make_input(form, sizes, device=device), *parameters.values())]

    def call(x, *tensors):
        state = dict(module.named_buffers()) | dict(zip(parameters, tensors, strict=True))
        return torch.func.functional_call(module, state, (x,))

    return call, inputs


def padding(sizes: Sizes, device="cpu") -> torch.Tensor:
    """The last tokens of the first sample, none of the others."""
    mask = torch.zeros(sizes.b, sizes.n, dtype=torch.bool, device=device)
    mask[0, -(sizes.n // 2) :] = True
    return mask


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, train, external_on):
    call, inputs = functional_call(form, train, external_on[1])
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "block"])
def test_gradcheck_with_padding(form, external_on):
    call, inputs = functional_call(form, device=external_on[1], masked=True)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form, external_on):
    for train in (True, False):
        call, inputs = functional_call(form, train, external_on[1])
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_second_derivative_with_arguments_that_depend_on_each_other(external_on):
    """The keys are computed from x: each gradient must be that of its own argument, not of both."""
    call, (x, key, *rest) = functional_call("block", device=external_on[1])

    def dependent(x, key):
        return call(x, key * x.mean(), *rest)

    assert torch.autograd.gradgradcheck(dependent, (x, key), fast_mode=True)


@pytest.mark.parametrize("form", ["plain", "own heads", "block"])
def test_gradients_of_a_part_of_the_inputs(form, external_on):
    backend, device = external_on
    module = make(form, SIZES["small"], device=device)
    x, grad = make_input(form, SIZES["small"], device=device), make_grad(form, SIZES["small"], device=device)
    expected = testing.run(module, x, grad, backend)
    only_parameters = copy.deepcopy(module)
    only_parameters(x).backward(grad)
    for key, p in only_parameters.named_parameters():
        torch.testing.assert_close(p.grad, expected[f"grad {key}"], **EXACT)
    only_x = copy.deepcopy(module).requires_grad_(False)
    (grad_x,) = torch.autograd.grad(only_x(x.requires_grad_()), x, grad)
    torch.testing.assert_close(grad_x, expected["grad x"], **EXACT)


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
