"""External attention of small inputs, which "auto" leaves to plain PyTorch: the same numbers, errors and storage.

Other tests have this switched off (conftest.fused_at_any_size), so that their small inputs test the passes.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from external_layers import CONSTANT, LAYERS, MAIN, UNSEEN, inputs, layer, step
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import aia_kernels
from aia_kernels import TokenExternalAttention, backends, functional
from aia_kernels.backends import choices

if backends.select("cpu", torch.float32, "external_attention") == "reference":
    pytest.skip("auto has no fused passes to choose here", allow_module_level=True)

#: Float64 sums in another order, of at most some hundred terms of order one, through batch norms of little variance.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
COST = choices.CALL_COST


@pytest.fixture(autouse=True)
def as_installed(monkeypatch, fused_at_any_size) -> None:
    monkeypatch.setattr(choices, "CALL_COST", COST)


class Passes:
    """How often a fused pass was called."""

    def __init__(self, monkeypatch):
        self.calls = 0
        passes = backends.passes("cpu", "external_attention")
        monkeypatch.setattr(passes, "column_statistics", functools.partial(self._counted, passes.column_statistics))

    def _counted(self, original, *arguments):
        self.calls += 1
        return original(*arguments)


@pytest.fixture
def passes(monkeypatch) -> Passes:
    return Passes(monkeypatch)


def fused_step(module: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    with aia_kernels.use_backend("cpu"):
        return step(module, x, grad_y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in CONSTANT])
def test_same_step(name, training, passes):
    module, (x, grad_y) = layer(name).train(training), inputs(name)
    found = step(copy.deepcopy(module), x, grad_y)
    assert passes.calls == 0
    expected = fused_step(module, x, grad_y)
    assert passes.calls == 1
    for key in UNSEEN:
        found.pop(f"grad {key}", None), expected.pop(f"grad {key}", None)
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_storage_of_y(name):
    module, (x, _) = layer(name).eval(), inputs(name)
    forms = [x, x[::2]]
    if x.ndim == 4:
        forms.append(x.contiguous(memory_format=torch.channels_last))
    for form in forms:
        with aia_kernels.use_backend("cpu"):
            expected = module(form)
        assert module(form).stride() == expected.stride()


LARGE = {
    "plain": (lambda: aia_kernels.ExternalAttention(16, S=64), (8, 300, 16)),
    "block": (lambda: aia_kernels.ExternalAttention2d(16), (2, 16, 40, 40)),
    "block, many channels": (lambda: aia_kernels.ExternalAttention2d(256), (1, 256, 16, 16)),
    "multi-head": (lambda: aia_kernels.MultiHeadExternalAttention(16, num_heads=2), (2, 200, 16)),
    "token": (lambda: TokenExternalAttention(16, 16), (2, 600, 16)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_inputs_are_fused(name, passes):
    make, sizes = LARGE[name]
    with torch.no_grad():
        make().eval()(torch.randn(sizes))
    assert passes.calls == 1


def test_what_saves_more_products_is_fused_earlier():
    rows = choices.CALL_COST // choices.ELEMENT_GAIN // 8
    assert choices.fusing_pays(rows + 1, 8) and not choices.fusing_pays(rows, 8)
    assert choices.fusing_pays(rows // 2, 8, choices.CALL_COST) and not choices.fusing_pays(rows + 1, 8, -1000)
    assert not choices.fusing_pays(10 * rows, 1)
    # Without a backward, slots for one vector save nothing.
    assert choices.fusing_pays(rows, 16, backward=False) and not choices.fusing_pays(9 * rows, 8, backward=False)


@pytest.mark.parametrize("name", MAIN)
def test_a_named_backend_is_taken(name, passes):
    module, (x, _) = layer(name), inputs(name)
    with aia_kernels.use_backend("cpu"):
        module(x)
    assert passes.calls == 1


def test_functions():
    x, key, value = torch.randn(2, 9, 6), torch.randn(2, 5, 3), torch.randn(2, 4, 5)
    padding = torch.rand(2, 9) < 0.3
    calls = {
        "heads": lambda: functional.external_attention(x, key, value, heads=2, value_bias=torch.ones(4), eps=1e-9),
        "padding": lambda: functional.external_attention(x, key, value, heads=2, padding_mask=padding),
        "groups": lambda: functional.double_normalize(x, group=3),
        "a bias of one head": lambda: functional.external_attention(
            x, key[0].repeat(1, 2), value[0], value_bias=x[0, :1, :4]
        ),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        found = call()
        with aia_kernels.use_backend("cpu"):
            expected = call()
        assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("sizes", [(2, 5, 9), (2, 64, 3000)])
def test_slots_that_lie_apart_are_not_turned(sizes, eps, passes):
    logits = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sizes, dtype=torch.float64)

    def step():
        a = functional.double_normalize(logits, dims=(2, 1), eps=eps)
        return a.detach(), *torch.autograd.grad((a * weight).sum(), logits)

    found = step()
    assert passes.calls == 0
    with aia_kernels.use_backend("cpu"):
        expected = step()
    assert passes.calls == 1
    assert_close(found, expected, **EXACT)


def test_a_mass_that_underflows():
    """Published code divides zero by zero here."""
    x = torch.zeros(1, 2, 3, dtype=torch.float32)
    x[0, 0] = 300.0
    plain = aia_kernels.ExternalAttention(3, S=3)
    with torch.no_grad():
        plain.mk.weight.copy_(torch.eye(3)), plain.mv.weight.copy_(torch.eye(3))
    for a in (functional.double_normalize(x), plain(x)):
        assert_close(a.sum(2), torch.ones(1, 2))


@pytest.mark.parametrize("name", MAIN)
def test_second_derivatives(name):
    module, (x, _) = layer(name).eval(), inputs(name)

    def product():
        return torch.autograd.functional.hvp(lambda a: module(a).sin().sum(), x, torch.ones_like(x))[1]

    found = product()
    with aia_kernels.use_backend("reference"):
        assert_close(found, product(), **EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_selective_checkpoint(name):
    def policy(context, operator, *_, **__):
        kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    module, (x, grad_y) = layer(name), inputs(name)
    expected = step(copy.deepcopy(module), x, grad_y)
    x = x.requires_grad_()
    checkpoint(module, x, use_reentrant=False, context_fn=contexts).backward(grad_y)
    found = {"grad x": x.grad} | {f"grad {key}": p.grad for key, p in module.named_parameters()}
    for key, gradient in found.items():
        if key.removeprefix("grad ") not in UNSEEN:
            assert_close(gradient, expected[key], **EXACT)


def test_a_weight_that_moves_when_read():
    """spectral_norm makes a step of its iteration each time that the weight is read."""
    module, (x, grad_y) = layer("plain"), inputs("plain")
    parametrizations.spectral_norm(module.mk)
    other = copy.deepcopy(module)
    found, expected = step(module, x, grad_y), fused_step(other, x, grad_y)
    assert_close(found, expected, **EXACT)


def test_dropout_draws_as_fused():
    module = TokenExternalAttention(6, 5, k=4, attn_drop=0.5).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    with aia_kernels.use_backend("cpu"):
        assert_close(found, module(x), **EXACT)


def test_a_traced_call_is_one_operator():
    module, (x, _) = layer("plain").eval(), inputs("plain")
    program = torch.export.export(module, (x,))
    assert "external_attention_forward" in str(program.graph)


def test_operators_are_counted():
    module, (x, _) = layer("plain").eval(), inputs("plain")
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 2 * x.numel() * 5


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("plain", lambda x: x[..., :-1], ValueError),
        ("plain", lambda x: x[0], ValueError),
        ("plain", lambda x: x.long(), TypeError),
        ("plain", lambda x: x.float(), TypeError),
        ("block", lambda x: x[:, :-1], ValueError),
        ("block", lambda x: x[:1, :, :1, :1], ValueError),
        ("multi-head", lambda x: x[..., :-1], ValueError),
        ("multi-head", lambda x: x[0], ValueError),
    ],
)
def test_bad_input_is_named(name, wrong, error):
    with pytest.raises(error, match="got"):
        layer(name)(wrong(inputs(name)[0]))
