"""What torch.compile gets of multi-head external attention: plain operators where there is little to save, else one
operator of this package, in the form of fewer products; the numbers are those of the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import aia_kernels
from aia_kernels import backends, functional
from aia_kernels.backends import choices
from aia_kernels.convert import calls
from aia_kernels.modules import counts
from benchmarks.published import external_attention as published

OPERATOR = "aia_kernels.external_attention_forward.default"
#: A cost of the passes with which every call here is a small one.
SMALL = 10**9
#: Samples and tokens. Of dim 24 and 4 published heads folding leaves out products from 38 tokens on.
FEW, MANY = (2, 9), (2, 60)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    if backends.select("cpu", torch.float64, "external_attention") != "cpu":
        pytest.skip("auto has no fused passes to choose here")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, dynamic=False):
    """The module behind torch.compile, which runs what it records, and the nodes that call this package."""
    recorded = []

    def recording(graph, _inputs):
        recorded.extend(node for node in graph.graph.nodes if "aia_kernels" in str(node.target))
        return graph.forward

    return torch.compile(module, fullgraph=True, backend=recording, dynamic=dynamic), recorded


def multi_head(dtype=torch.float64):
    torch.manual_seed(0)
    return aia_kernels.MultiHeadExternalAttention(24, 1).to(dtype)


def step(call, module, x):
    """o and all gradients of sin(o)."""
    x = x.detach().requires_grad_()
    o = call(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(o.sin().sum(), (x, *parameters))
    return {"o": o.detach(), **dict(zip(("x", *names), gradients, strict=True))}


#: Without effect: zero, or roundings of zero.
UNSEEN = ("trans_dims.bias", "linear_0.bias", "conv1.bias")


def assert_agree(found, expected, tolerance):
    for name, value in expected.items():
        if name in UNSEEN:
            assert found[name].abs().max() <= tolerance
        else:
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cost", [SMALL, 0], ids=["small", "large"])
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few tokens", "many tokens"])
def test_multi_head(sizes, cost, monkeypatch):
    monkeypatch.setattr(choices, "CALL_COST", cost)
    module, x = multi_head(), torch.randn(*sizes, 24, dtype=torch.float64)
    call, recorded = compiled(module)
    found = step(call, module, x)
    with backends.use_backend("reference"):
        assert_agree(found, step(module, module, x), 1e-11)
        with torch.no_grad():
            expected = module(x)
    if cost:
        assert not recorded
    else:
        (operator,) = recorded
        key = operator.args[1].meta["example_value"]
        # [heads or 1, slots, features]: folded into one matrix of all heads, or shared by them as it is.
        assert str(operator.target) == OPERATOR and key.shape == ((1, 4 * 64, 24) if sizes == MANY else (1, 64, 24))
    with torch.no_grad():
        torch.testing.assert_close(call(x), expected, rtol=1e-11, atol=1e-11)


def test_multi_head_of_any_number_of_tokens():
    """Where the number is not known, nothing is said of it: one program serves few and many."""
    module = multi_head()
    call, recorded = compiled(module, dynamic=True)
    for sizes in (FEW, MANY):
        x = torch.randn(*sizes, 24, dtype=torch.float64)
        found = step(call, module, x)
        with backends.use_backend("reference"):
            assert_agree(found, step(module, module, x), 1e-11)
    assert [str(node.target) for node in recorded] == [OPERATOR]


@pytest.mark.parametrize(
    "make, sizes",
    [
        (lambda: aia_kernels.ExternalAttention2d(6, 5), (2, 6, 4, 5)),
        (lambda: aia_kernels.ExternalAttention2d(6, 5, activation="gelu"), (2, 6, 4, 5)),
        (lambda: aia_kernels.TokenExternalAttention(6, 6, k=5), (2, 9, 6)),
        (multi_head, (*FEW, 24)),
    ],
)
def test_eps_is_no_input_of_a_program(make, sizes):
    module = make().double()
    call, recorded = compiled(module, dynamic=True)
    x = torch.randn(*sizes, dtype=torch.float64)
    torch.testing.assert_close(call(x), module(x), rtol=1e-11, atol=1e-11)
    assert not [node for node in recorded if node.op == "placeholder"]


@pytest.mark.parametrize("what", ["dropout", "hook"])
def test_what_a_small_call_does_not_leave_out(what, monkeypatch):
    """A draw of dropout is that of every other path, and hooks run."""
    monkeypatch.setattr(choices, "CALL_COST", SMALL)
    module, x, seen = multi_head(), torch.randn(*FEW, 24, dtype=torch.float64), []
    if what == "dropout":
        module.attn_drop.p = 0.5
    else:
        module.linear_0.register_forward_hook(lambda *_: seen.append(what))
    call, _recorded = compiled(module)
    torch.manual_seed(1)
    found = call(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, module(x), rtol=1e-11, atol=1e-11)
    assert bool(seen) == (what == "hook")


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_heads_that_share_their_memories(dtype, eps, monkeypatch):
    """The function, with heads, each of another bias, and of a map far from uniform."""
    monkeypatch.setattr(choices, "CALL_COST", SMALL)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.value = nn.Parameter(torch.randn(20, 6)), nn.Parameter(torch.randn(5, 20))
            self.bias = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return functional.external_attention(x, self.key, self.value, heads=3, value_bias=self.bias, eps=eps)

    torch.manual_seed(0)
    module, x = Attention().to(dtype), torch.randn(*FEW, 18, dtype=dtype)
    call, recorded = compiled(module)
    found = step(call, module, x)
    with backends.use_backend("reference"):
        # Sums of at most 20 values below 3, of a map and memories rounded once, differ by a few roundings of 2^-8.
        assert_agree(found, step(module, module, x), 1e-11 if dtype == torch.float64 else 2.0**-3)
        with torch.no_grad():
            expected = module(x)
    with torch.no_grad():
        tolerance = 1e-11 if dtype == torch.float64 else 2.0**-4
        torch.testing.assert_close(call(x), expected, rtol=tolerance, atol=tolerance)
    assert not recorded


@pytest.mark.parametrize("slots, folded", [(8, True), (20, False)])
@pytest.mark.parametrize("training", [True, False], ids=["step", "eval"])
def test_small_block_of_a_network_that_was_not_converted(slots, folded, training, monkeypatch):
    """fuse_backend leaves it to the compiler too, folded where there are more positions, here 15, than slots."""
    monkeypatch.setattr(choices, "CALL_COST", SMALL)

    def fused(*_, **__):
        raise AssertionError("a small block is left to the compiler")

    monkeypatch.setattr(calls, "external_attention_block", fused)
    folds, real = [], counts.block_folding_pays
    monkeypatch.setattr(counts, "block_folding_pays", lambda *given: folds.append(real(*given)) or folds[-1])
    module = published.ExternalAttention2d(24, slots).double().train(training)
    expected, x = copy.deepcopy(module), torch.randn(1, 24, 3, 5, dtype=torch.float64)
    call = torch.compile(module, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"}, dynamic=False)
    assert_agree(step(call, module, x), step(expected, expected, x), 1e-11)
    assert {*folds} == {folded}
    for name, value in expected.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), value, rtol=1e-11, atol=1e-11)
