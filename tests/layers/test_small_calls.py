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
import aia_kernels.testing
from aia_kernels import TokenExternalAttention, backends, functional, reference
from aia_kernels.algorithms import few_slots, safe_normalization
from aia_kernels.backends import choices
from aia_kernels.functional import plain
from aia_kernels.modules import counts
from benchmarks.published import external_attention as published

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
        for name in ("column_statistics", "double_normalize"):  # each in a forward of its own
            monkeypatch.setattr(passes, name, functools.partial(self._counted, getattr(passes, name)))

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
    # Without a backward, a large map is made by the passes between products of PyTorch, in both rounds.
    assert passes.calls == 2 * (slots >= choices.FEW_SLOTS and samples * slots * tokens > plain._SMALL_MAP)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots, tokens", [(1, 40), (5, 300), (20, 9), (64, 900)])
def test_low_precision_is_no_coarser_than_published(slots, tokens, dtype):
    """Against float64 of the same parameters: the published flow rounds P, the sums and A, and this A alone."""
    torch.manual_seed(0)
    module, x = aia_kernels.ExternalAttention(16, S=slots).to(dtype), torch.randn(2, tokens, 16).to(dtype)
    nn.init.normal_(module.mk.weight, std=0.25), nn.init.normal_(module.mv.weight)
    grad_y, exact = torch.randn(2, tokens, 16).to(dtype), copy.deepcopy(module).double()

    def as_published(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        p = module.mk(x).softmax(1)
        return module.mv(p / p.sum(2, keepdim=True))

    def errors(form) -> list[float]:
        found = []
        for of, like in ((form, module), (as_published, exact)):
            leaf = x.detach().to(like.mk.weight.dtype).requires_grad_()
            y = of(like, leaf)
            found.append([y.detach(), *torch.autograd.grad(y, [leaf, like.mv.weight], grad_y.to(y.dtype))])
        with torch.no_grad():
            found[0].append(form(module, x)), found[1].append(found[1][0])
        return [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(*found, strict=True)]

    # The gradient of x cancels: where A hardly differs from token to token it is rounding in either form.
    for ours, theirs in zip(errors(lambda module, x: module(x)), errors(as_published), strict=True):
        assert ours <= 1.5 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("samples, channels, slots", [(1, 8, 4), (1, 4, 70), (3, 16, 4), (3, 4, 70)])
def test_blocks_in_bfloat16_are_no_coarser_than_published(samples, channels, slots, training):
    """Folded and not; the published flow rounds P, the sums and A, and, unfolded, two more tensors."""
    torch.manual_seed(0)
    module = published.ExternalAttention2d(channels, slots).train(training)
    # Memories of order one, whose sums do not cancel, as those of a network after training.
    for p in (module.linear_0.weight, module.linear_1.weight):
        nn.init.normal_(p, std=0.5)
    ours, dtype = aia_kernels.ExternalAttention2d(channels, slots).train(training), torch.bfloat16
    ours.load_state_dict(module.state_dict())
    x, grad_y = (torch.randn(samples, channels, 5, 7, dtype=torch.float64) for _ in range(2))
    exact = step(module.double(), x.to(dtype).double(), grad_y.to(dtype).double())
    found, theirs = (step(m.to(dtype), x.to(dtype), grad_y.to(dtype)) for m in (ours, module))
    for key in ("y", "grad x", "grad conv2.0.weight"):
        error, allowed = ((of[key].double() - exact[key]).norm() / exact[key].norm() for of in (found, theirs))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps, key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("samples, slots", [(1, 5), (1, 80), (3, 5), (3, 80)])
def test_blocks_in_channels_last(samples, slots, training, passes):
    """Folded and not, of one sample and of several: the numbers of the passes, stored as x."""
    torch.manual_seed(0)
    module = aia_kernels.testing.randomise(aia_kernels.ExternalAttention2d(6, slots)).double().train(training)
    x, grad_y = (torch.randn(samples, 6, 5, 7, dtype=torch.float64) for _ in range(2))
    x = x.to(memory_format=torch.channels_last)
    found = step(copy.deepcopy(module), x, grad_y)
    assert passes.calls == 0
    expected = fused_step(module, x, grad_y)
    assert found["y"].stride() == x.stride()
    for key in UNSEEN:
        found.pop(f"grad {key}", None), expected.pop(f"grad {key}", None)
    assert_close(found, expected, **EXACT)


LARGE = {
    "plain": (lambda: aia_kernels.ExternalAttention(16, S=64), (8, 300, 16)),
    "block": (lambda: aia_kernels.ExternalAttention2d(64, 8), (2, 64, 160, 160)),
    "block, many channels": (lambda: aia_kernels.ExternalAttention2d(256), (1, 256, 96, 96)),
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
    module, x = aia_kernels.ExternalAttention2d(64, 8), torch.randn(2, 64, 100, 100)
    with torch.no_grad():
        module.eval()(x)
    assert passes.calls == 0
    module.train()(x)
    assert passes.calls == 1


def test_blocks_with_a_map_as_large_as_x_are_never_fused(passes):
    module, x = aia_kernels.ExternalAttention2d(16, 16), torch.randn(2, 16, 224, 224)
    module(x)
    with torch.no_grad():
        module.eval()(x)
    assert passes.calls == 0


def test_what_saves_more_products_is_fused_earlier():
    rows = choices.CALL_COST // choices.ELEMENT_GAIN // 16
    assert choices.fusing_pays(rows + 1, 16) and not choices.fusing_pays(rows, 16)
    assert choices.fusing_pays(rows // 2, 16, choices.CALL_COST) and not choices.fusing_pays(rows + 1, 16, -1000)
    assert not choices.fusing_pays(10**9, choices.FEW_SLOTS - 1)
    assert choices.fusing_pays(0, 8, choices.CALL_COST + 1) and not choices.fusing_pays(rows + 1, 16, calls=2)


def test_a_block_folds_where_that_saves_products():
    def pays(samples: int, positions: int, slots: int) -> bool:
        block = aia_kernels.ExternalAttention2d(16, slots)
        weights = [block.conv1.weight, block.linear_0.weight, block.linear_1.weight, block.conv2[0].weight]
        return counts.block_folding_pays(torch.empty(samples, 16, positions, 1), weights)

    assert pays(1, 9, 8) and not pays(1, 8, 8)  # one sample: products of matrices either way
    enough = choices.CALL_COST // choices.PLAIN_CALLS // (2 * 16 * 16) + 8
    assert pays(2, enough // 2 + 1, 8) and not pays(2, enough // 2 - 1, 8)
    with torch.no_grad():
        assert pays(2, 2, 8) and not pays(2, 2, enough)


@pytest.mark.parametrize("slots", [1, 2, 8, 15, 16])
def test_few_slots_are_not_fused_at_any_size(slots, passes):
    """Fewer than FEW_SLOTS leave lanes idle; sixteen of as many tokens are fused in a step."""
    module, x = aia_kernels.ExternalAttention(4, S=slots), torch.randn(2, 9000, 4, requires_grad=True)
    y = module(x)
    fused = slots >= choices.FEW_SLOTS
    assert passes.calls == fused
    assert ("FewSlots" in type(y.grad_fn).__name__) == (1 < slots < choices.FEW_SLOTS)
    with torch.no_grad():
        module(x)
    assert passes.calls == 2 * fused


FEW = [(2, 300, 7), (1, 400, 2), (3, 100, 15)]


@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize("samples, tokens, slots", FEW)
def test_few_slots(samples, tokens, slots, in_cache, monkeypatch):
    """Values, first and second derivatives of the Function that has the tokens side by side, x in either order."""
    monkeypatch.setattr(few_slots, "_IN_CACHE", 2**40 if in_cache else 0)
    torch.manual_seed(0)
    x = torch.randn(samples, tokens, 5, dtype=torch.float64)
    tensors = torch.randn(slots, 5).double(), torch.randn(3, slots).double(), torch.randn(3).double()
    weight = torch.randn(samples, tokens, 3, dtype=torch.float64)

    def results(form, x, eps):
        inputs = [t.detach().requires_grad_() for t in (x, *tensors)]
        y = form(*inputs, eps)
        first = torch.autograd.grad((y.sin() * weight).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), inputs)
        return y, *first, *second

    def reference(x, key, value, bias, eps):
        return functional.external_attention(x, key, value, value_bias=bias, eps=eps)

    for eps in (0.0, 1e-2):
        for stored in (x, x.mT.contiguous().mT, x.repeat(1, 2, 1)[:, ::2]):
            found = results(few_slots.FewSlotsFunction.apply, stored, eps)
            with aia_kernels.use_backend("reference"):
                expected = results(reference, stored, eps)
            assert_close(found, expected, **EXACT)
            with torch.no_grad():
                assert_close(few_slots.forward(stored, *tensors, eps), expected[0].detach(), **EXACT)


def test_few_slots_that_underflow_or_are_not_numbers():
    """A token whose mass is too small to divide by has an attention all the same; a NaN spoils its sample alone."""
    torch.manual_seed(0)
    x, key, value = torch.zeros(2, 300, 3), torch.eye(3), torch.eye(3)
    x[0, 0] = 300.0
    y = few_slots.FewSlotsFunction.apply(x.requires_grad_(), key, value, None, 0.0)
    assert_close(y.detach().sum(2), torch.ones(2, 300))
    y.sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        x[0, 5, 1] = torch.nan
        for slots in (1, 2, 3):
            module = aia_kernels.ExternalAttention(3, S=slots)
            module.mk.weight.copy_(key[:slots]), module.mv.weight.copy_(value[:, :slots])
            module.mk.weight[:, 1] = 1.0
            with torch.enable_grad():
                in_a_step = module(x)
            for found in (module(x), in_a_step.detach()):
                with aia_kernels.use_backend("reference"):
                    assert torch.equal(found.isnan(), module(x).isnan())
                assert found[0].isnan().all() and found[1].isfinite().all()


AXES = [((2, 300, 7), 1, 2), ((7, 2, 300), 2, 0), ((2, 7, 300), 2, 1), ((5, 1), 0, 1)]


def safe_forms(logits, tokens, slots, eps):
    """A by each form of algorithms/safe_normalization.py that has an eps."""
    yield safe_normalization.by_sums(logits, tokens, slots, eps, kept=True)[0]
    yield safe_normalization.by_sums(logits, tokens, slots, eps, kept=False)[0]
    yield safe_normalization.for_a_compiler(logits, tokens, slots, eps)
    if not eps:
        yield safe_normalization.by_two_softmaxes(logits, tokens, slots)


@pytest.mark.parametrize("spread", [1.0, 200.0, 3000.0])
@pytest.mark.parametrize("shape, tokens, slots", AXES)
def test_safe_normalizations(shape, tokens, slots, spread):
    """Every form gives the specification's map, also where P underflows in all slots of a token; and in float32."""
    torch.manual_seed(0)
    logits = spread * torch.randn(shape, dtype=torch.float64)
    for eps in (0.0, 1e-3):
        rows = reference.double_normalize(logits.movedim((tokens, slots), (-2, -1)), shape[slots], eps)
        expected = rows.movedim((-2, -1), (tokens, slots))
        for found in safe_forms(logits, tokens, slots, eps):
            assert_close(found, expected, rtol=1e-9, atol=1e-12)
        # Logits of 32 bits are numbers of 64, and an exponent of that size is off by its rounding.
        narrow = logits.float()
        rows = reference.double_normalize(narrow.double().movedim((tokens, slots), (-2, -1)), shape[slots], eps)
        expected, tolerance = rows.movedim((-2, -1), (tokens, slots)), 2.0**-20 * (1 + spread)
        for found in safe_forms(narrow, tokens, slots, eps):
            assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape, tokens, slots", AXES[:3])
def test_safe_normalizations_of_what_is_no_number(shape, tokens, slots, value):
    """It spoils its sample, and no other, as in the specification."""
    sample = ({0, 1, 2} - {tokens, slots}).pop()
    logits = torch.randn(shape)
    logits[(0, 0, 0)] = value
    for found in safe_forms(logits, tokens, slots, 0.0):
        assert found.select(sample, 0).isnan().all() and found.select(sample, 1).isfinite().all()


def test_one_slot_has_no_gradient():
    """P / P is one whatever the logits are."""
    module, x = aia_kernels.ExternalAttention(4, S=1), torch.randn(2, 5000, 4, requires_grad=True)
    y = module(x)
    assert_close(y, module.mv.weight[:, 0].expand_as(y))
    y.sum().backward()
    assert not x.grad.any() and not module.mk.weight.grad.any()
    assert_close(module.mv.weight.grad, torch.full((4, 1), 10000.0))


def test_few_slots_under_selective_checkpointing():
    def policy(context, operator, *_, **__):
        kept = operator in (torch.ops.aten.mm.default, torch.ops.aten._softmax.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    module = aia_kernels.ExternalAttention(4, S=5).double()
    x, grad_y = torch.randn(2, 300, 4, dtype=torch.float64), torch.randn(2, 300, 4, dtype=torch.float64)
    expected = step(copy.deepcopy(module), x, grad_y)
    x = x.requires_grad_()
    checkpoint(module, x, use_reentrant=False, context_fn=contexts).backward(grad_y)
    assert_close(x.grad, expected["grad x"], **EXACT)
    for key, p in module.named_parameters():
        assert_close(p.grad, expected[f"grad {key}"], **EXACT)


def test_a_mode_or_a_hook_is_never_overlooked(passes):
    """What an ordinary call is told by, at once: anything else takes the longer way, and gives the same."""
    module, (x, _) = layer("plain", torch.float32).eval(), inputs("plain", torch.float32)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is torch.bfloat16
    module.mk.register_forward_hook(lambda *_: seen.append("mk"))
    seen: list[str] = []
    assert_close(module(x), expected)
    assert seen == ["mk"]


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
