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
from aia_kernels.functional import plain

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


#: Samples, slots and tokens: tokens side by side or slots, logarithms or sums (functional/plain.py), one of each.
ARRANGED = [(2, 8, 40), (1, 8, 40), (2, 8, 5), (2, 20, 40), (2, 1, 40), (1, 1, 7), (2, 64, 300), (2, 2, 9000)]


@pytest.mark.parametrize("biases", [False, True], ids=["published", "with biases"])
@pytest.mark.parametrize("samples, slots, tokens", ARRANGED)
def test_arrangements(samples, slots, tokens, biases, passes):
    torch.manual_seed(0)
    module, x = aia_kernels.ExternalAttention(6, S=slots).double(), torch.randn(samples, tokens, 6, dtype=torch.float64)
    if biases:
        module.mk, module.mv = nn.Linear(6, slots).double(), nn.Linear(slots, 6).double()
    for p in module.parameters():
        nn.init.normal_(p)
    grad_y, unseen = torch.randn_like(x), {"grad mk.bias"}
    for of_parameters_only in (False, True):
        found = evaluated_and_stepped(module, x, grad_y, of_parameters_only)
        with aia_kernels.use_backend("reference"):
            expected = evaluated_and_stepped(module, x, grad_y, of_parameters_only)
        assert_close(*({k: v for k, v in of.items() if k not in unseen} for of in (found, expected)), **EXACT)
        assert all(p.grad is not None for p in module.parameters())
    assert passes.calls == 0


def evaluated_and_stepped(module: nn.Module, x: torch.Tensor, grad_y: torch.Tensor, of_parameters_only: bool) -> dict:
    with torch.no_grad():
        found = {"evaluated": module(x)}
    if not of_parameters_only:
        return found | step(module, x, grad_y)
    module.zero_grad()
    module(x).backward(grad_y)
    return found | {f"grad {key}": p.grad for key, p in module.named_parameters()}


@pytest.mark.parametrize("name", MAIN)
def test_hooks_see_small_calls(name):
    module, (x, _) = layer(name).eval(), inputs(name)
    seen, expected = [], module(x)
    for key, child in module.named_modules():
        if key:
            child.register_forward_hook(lambda *_, key=key: seen.append(key))
    assert_close(module(x), expected, **EXACT)
    assert {*seen} == {key for key, _ in module.named_modules() if key}


@pytest.mark.parametrize("name", MAIN)
def test_low_precision_is_normalized_in_float32(name):
    """Not in the type of the product, as the operators that small calls are left to would."""
    module, (x, _) = layer(name, torch.float32).eval(), inputs(name, torch.float32)

    def results():
        with torch.autocast("cpu", torch.bfloat16):
            yield module(x)
        yield copy.deepcopy(module).bfloat16()(x.bfloat16())

    with torch.no_grad():
        found = [*results()]
        with aia_kernels.use_backend("reference"):
            expected = [*results()]
    # The same but for the rounding of a sum in another order to bfloat16, here and there.
    assert_close(found, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", MAIN)
def test_transforms_of_small_calls(name):
    module, (x, _) = layer(name).eval(), inputs(name)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x.unsqueeze(0),)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        module.zero_grad()
        loss(parameters, sample).backward()
        for key, p in parameters.items():
            if key not in UNSEEN:
                assert_close(found[key][i], p.grad, **EXACT)


LARGE = {
    "plain": (lambda: aia_kernels.ExternalAttention(16, S=64), (8, 300, 16)),
    "block": (lambda: aia_kernels.ExternalAttention2d(16), (2, 16, 224, 224)),
    "block, many channels": (lambda: aia_kernels.ExternalAttention2d(256), (1, 256, 80, 80)),
    "multi-head": (lambda: aia_kernels.MultiHeadExternalAttention(16, num_heads=2), (2, 200, 16)),
    "token": (lambda: TokenExternalAttention(16, 16), (2, 600, 16)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_inputs_are_fused(name, passes):
    make, sizes = LARGE[name]
    with torch.no_grad():
        make().eval()(torch.randn(sizes))
    assert passes.calls == 1


def test_blocks_are_fused_earlier_in_training(passes):
    module, x = aia_kernels.ExternalAttention2d(16), torch.randn(2, 16, 80, 80)
    with torch.no_grad():
        module.eval()(x)
    assert passes.calls == 0
    module.train()(x)
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
    module = aia_kernels.ExternalAttention(3, S=3)
    with torch.no_grad():
        module.mk.weight.copy_(torch.eye(3)), module.mv.weight.copy_(torch.eye(3))
    for a in (functional.double_normalize(x), module(x)):
        assert_close(a.sum(2), torch.ones(1, 2))


def test_a_mass_that_underflows_in_a_map_whose_sums_are_looked_at():
    logits = torch.zeros(1, 300, 64)
    logits[0, 0] = 300.0
    for dims in ((1, 2), (2, 1)):
        a = functional.double_normalize(logits if dims == (1, 2) else logits.mT, dims=dims)
        assert_close(a.sum(dims[1]), torch.ones(1, 300))
    # With few slots side by side the sums are looked at in training too.
    for map_of_logits in (logits, logits[..., :4], logits.clone().requires_grad_(), logits[..., :4].requires_grad_()):
        a = plain.double_normalize(map_of_logits, tokens=1, slots=2)
        assert_close(a.detach(), torch.full_like(a, 1 / a.shape[2]))


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
