"""External attention: the reference, the algorithm over plain passes, every backend by error budget; derivatives."""

from __future__ import annotations

import copy

import external_cases as cases
import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT, assert_same, assert_within_budget
from conftest import skip_unless_runnable
from external_cases import FORMS, SIZES, Sizes, functional_call, make, make_grad, make_input, published
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_double_norm import PlainDoubleNorm
from torch import nn

from aia_kernels import Norm, backends, functional, reference, testing
from aia_kernels.backends.matmul_passes import MatmulPasses

LOW = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILY = "external_attention"


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
