"""Layers under what keeps, replaces or recomputes the tensors that a backward needs: the numbers are the same."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from uses_layers import (
    MAIN,
    assert_close,
    assert_same_bits,
    batch,
    every_device,
    every_layer,
    every_layer_without_dropout,
    layer,
    left_by,
    main_layers,
    plain_step,
    step,
    towards,
    uses,
)

from aia_kernels.common import layouts

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


def through_numpy(t: Tensor):
    return t.detach().cpu().numpy(), t.device


def from_numpy(packed) -> Tensor:
    array, device = packed
    return torch.from_numpy(array.copy()).to(device)


def in_another_order(t: Tensor) -> Tensor:
    """The same values with the axes stored the other way round."""
    axes = tuple(reversed(range(t.ndim)))
    return t.permute(axes).contiguous().permute(axes)


def with_gaps(t: Tensor) -> Tensor:
    """The same values, no two of them side by side, and not from the start of their storage."""
    storage = torch.full(
        (t.numel() * 2 + 3,), torch.nan if t.is_floating_point() else 0, dtype=t.dtype, device=t.device
    )
    spread = storage[3:].as_strided(t.shape, [2 * s for s in t.contiguous().stride()], 3)
    return spread.copy_(t)


def widened(t: Tensor):
    """Kept in a wider type, as a compression would in a narrower one; going back is exact."""
    return (t.double() if t.dtype == torch.float32 else t.clone()), t.dtype


def flattened(t: Tensor):
    """As compressors keep tensors: values in a row, and the shape."""
    return t.flatten().clone(), t.shape


def same(t: Tensor) -> Tensor:
    return t


def copied(t: Tensor) -> Tensor:
    return t.contiguous().clone(memory_format=torch.contiguous_format)


#: What comes back is what was kept, strides and all.
HOOKS = {
    "identity": lambda: saved_tensors_hooks(same, same),
    "copies": lambda: saved_tensors_hooks(torch.clone, same),
    "float64 and back": lambda: saved_tensors_hooks(widened, lambda kept: kept[0].to(kept[1])),
    "save_on_cpu": lambda: save_on_cpu(pin_memory=False),
    "allow_mutation_on_saved_tensors": allow_mutation_on_saved_tensors,
}
#: The same values with other strides. Products of the framework may then add them up in another order.
OTHER_STRIDES = {
    "contiguous when packed": lambda: saved_tensors_hooks(copied, same),
    "contiguous when unpacked": lambda: saved_tensors_hooks(same, copied),
    "numpy": lambda: saved_tensors_hooks(through_numpy, from_numpy),
    "another order of axes": lambda: saved_tensors_hooks(in_another_order, same),
    "gaps": lambda: saved_tensors_hooks(same, with_gaps),
    "in a row": lambda: saved_tensors_hooks(flattened, lambda kept: kept[0].view(kept[1])),
}
if torch.cuda.is_available():  # pinning is CUDA's
    OTHER_STRIDES["save_on_cpu, pinned"] = lambda: save_on_cpu(pin_memory=True)


@uses(HOOKS)
@every_layer
@every_device
def test_saved_tensor_hooks(device, name, use):
    assert_same_bits(step(name, around=use, device=device), plain_step(name, device=device))


@uses(OTHER_STRIDES)
@every_layer
@every_device
def test_saved_tensor_hooks_that_do_not_keep_strides(device, name, use):
    assert_close(step(name, around=use, **in_float64(device)), plain_step(name, **in_float64(device)))


def in_float64(device: str) -> dict:
    return {"dtype": torch.float64, "device": device}


@every_layer
@every_device
def test_what_is_saved_is_hidden_from_nobody(device, name):
    """Zeros in the place of everything saved must reach the gradients: nothing is kept past the hooks."""
    zeros = lambda: saved_tensors_hooks(same, torch.zeros_like)  # noqa: E731
    found, expected = step(name, around=zeros, device=device), plain_step(name, device=device)
    assert torch.equal(found["y"], expected["y"])
    moved = {key for key, value in expected.items() if key.startswith("grad") and not torch.equal(found[key], value)}
    if name.startswith("TemporalShift"):  # a shift back needs nothing
        assert not moved
    else:
        assert "grad x" in moved


@every_layer
def test_what_was_saved_may_change_where_autograd_keeps_copies(name):
    module, leaf = layer(name), batch(name).requires_grad_()
    with allow_mutation_on_saved_tensors():
        x = leaf.clone()
        torch.manual_seed(2)
        y = module(x)
        with torch.no_grad():
            x.add_(1.0)
            for p in module.parameters():
                p.mul_(2.0)
        y.backward(towards(y))
    expected = plain_step(name)
    for key, found in left_by(module, leaf, y).items():
        torch.testing.assert_close(found, expected[key], msg=lambda m, key=key: f"{key}: {m}")


SECOND = {
    "contiguous when packed": lambda module: module,
    "not reentrant": lambda module: checkpointed(CHECKPOINTS["not reentrant"])(module),
}


@pytest.mark.parametrize("use", SECOND)
@every_layer_without_dropout
def test_second_derivatives(name, use):
    """Of a gradient whose graph was made from what hooks gave back, or from a second forward."""

    def second(call, around) -> tuple[Tensor, ...]:
        module, x = layer(name, torch.float64).eval(), batch(name, torch.float64).requires_grad_()
        wanted = x, *module.parameters()
        with around():
            y = call(module)(x)
            (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), wanted, allow_unused=True)

    around = OTHER_STRIDES.get(use, contextlib.nullcontext)
    expected = second(lambda module: module, contextlib.nullcontext)
    for found, value in zip(second(SECOND[use], around), expected, strict=True):
        assert (found is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)


def selecting(policy) -> dict:
    """Settings of checkpoint that keep what a policy, or a list of operators, says."""
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return {"use_reentrant": False, "context_fn": contexts}


def keep_all(_context, _operator, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def keep_nothing(_context, _operator, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def keep_our_own(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    ours = str(operator).startswith("aia_kernels")
    return CheckpointPolicy.PREFER_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "not reentrant, not stopping early": {"use_reentrant": False, "early_stop": False},
    "selective, products": selecting(list(PRODUCTS)),
    "selective, all": selecting(keep_all),
    "selective, nothing": selecting(keep_nothing),
    "selective, the layers' own operators": selecting(keep_our_own),
}


def checkpointed(settings: dict):
    return lambda module: functools.partial(checkpoint, module, **settings)


@pytest.mark.parametrize("use", CHECKPOINTS)
@every_layer
@every_device
def test_checkpoint(device, name, use):
    """A backward may run the layer a second time to its end, or no further than to what it needs."""
    found = step(name, checkpointed(CHECKPOINTS[use]), device=device)
    expected = plain_step(name, device=device)
    buffers = set(after_two_forwards(name, device))
    assert_same_bits(*({key: of[key] for key in of.keys() - buffers} for of in (found, expected)))
    for key in buffers:
        # One of several ways to move them by a tenth: a rounding or two of the factor apart.
        moved = [(found[key] - of[key]).abs().max() for of in (expected, after_two_forwards(name, device))]
        assert min(moved) <= 4 * torch.finfo(torch.float32).eps * expected[key].abs().max(), key


@functools.cache
def after_two_forwards(name: str, device: str) -> dict[str, Tensor]:
    """The buffers of a layer that ran twice forward."""
    module, x = layer(name, device=device), batch(name, device=device)
    module(x), module(x)
    return dict(module.named_buffers())


@pytest.mark.parametrize("preserve", [True, False], ids=["its own state", "whatever state"])
@pytest.mark.parametrize("name", ["MultiHead, dropout", "Token, dropout"])
def test_dropout_of_a_checkpoint_follows_the_generator(name, preserve):
    """preserve_rng_state=False draws another mask in the second run: then, and only then, gradients are others."""
    settings = {"use_reentrant": False, "preserve_rng_state": preserve}

    def then_draws(module):
        call = checkpointed(settings)(module)

        def run(x):
            y = call(x)
            torch.rand(1)
            return y

        return run

    found, expected = step(name, then_draws), plain_step(name)
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["grad x"], expected["grad x"]) == preserve


@pytest.mark.parametrize("name", [name for name in MAIN if name != "Token"])
def test_checkpoint_of_a_sequence(name):
    """Two segments of two layers each, the second fed by the first, as a network would."""

    def run(checkpoints: bool):
        modules = torch.nn.Sequential(*(layer(name) for _ in range(4)))
        if not checkpoints:
            return modules
        return lambda x: checkpoint_sequential(modules, 2, x, use_reentrant=False)

    outside = step(name, lambda module: torch.nn.Sequential(module, run(False)))
    assert_same_bits(step(name, lambda module: torch.nn.Sequential(module, _Called(run(True)))), outside)


class _Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("use", ["not reentrant", "selective, products", "selective, all"])
@main_layers
def test_hooks_inside_of_a_checkpoint(name, use):
    """Both at once: what a checkpoint keeps is offloaded, and what it recomputes too."""
    layouts._as_tensor.cache_clear()
    expected = step(name, **in_float64("cpu"))  # the strides of x are known from here on, those of a copy are not
    found = step(name, checkpointed(CHECKPOINTS[use]), OTHER_STRIDES["contiguous when packed"], **in_float64("cpu"))
    assert_close(
        *({key: of[key] for key in expected if key == "y" or key.startswith("grad")} for of in (found, expected))
    )
