"""A small layer of external attention as one operator in each direction gives what operators of PyTorch give, is taken
for ordinary small calls alone, and refuses what does not fit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import aia_kernels
from aia_kernels import backends, schemas, testing
from aia_kernels.backends import choices, extension
from aia_kernels.functional import small_calls

if extension.load() is not None:
    pytest.skip("only the C++ of the CPU has them", allow_module_level=True)

PASSES = backends.passes("cpu", "external_attention")
COST = choices.CALL_COST

#: Float64 sums in another order, of at most some hundred terms of order one, through batch norms of little variance.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
#: Float32, against float64: some roundings of numbers of order one, which a batch norm of some values multiplies.
ROUNDED = {"rtol": 2e-4, "atol": 2e-4}

#: Channels, slots, and samples with positions: folded or not, one sample, one position, more slots than positions.
BLOCKS = {
    "one sample, folded": (8, 8, (1, 3, 3)),
    "one sample": (8, 64, (1, 2, 2)),
    "folded": (6, 4, (2, 3, 5)),
    "not folded": (5, 9, (3, 1, 2)),
    "one channel": (1, 3, (2, 3, 3)),
    "vectors": (32, 16, (2, 6, 6)),
}
#: Features, published heads, samples and tokens.
HEADS = {"one": (8, 1, (1, 9)), "odd": (12, 3, (2, 5)), "one token": (6, 2, (3, 1)), "samples": (16, 2, (4, 8))}


@pytest.fixture(autouse=True)
def as_installed(monkeypatch, fused_at_any_size) -> None:
    monkeypatch.setattr(choices, "CALL_COST", COST)
    monkeypatch.setattr(small_calls, "_FEW_PRODUCTS", 0)


def block(sizes: str, dtype=torch.float64, **settings) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    c, k, (b, h, w) = BLOCKS[sizes]
    module = testing.randomise(aia_kernels.ExternalAttention2d(c, k, **settings))
    return module.to(dtype), torch.randn(b, c, h, w, dtype=dtype)


def multi_head(sizes: str, dtype=torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    dim, heads, tokens = HEADS[sizes]
    module = testing.randomise(aia_kernels.MultiHeadExternalAttention(dim, heads))
    return module.to(dtype), torch.randn(*tokens, dim, dtype=dtype)


def is_taken(y: torch.Tensor) -> bool:
    """Whether such an operator is among those that y came from."""
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if "ExternalLayer" in type(node).__name__:
            return True
        nodes += [before for before, _ in node.next_functions if before is not None]
    return False


def results(module: nn.Module, x: torch.Tensor, taken: bool, second: bool = False) -> dict[str, torch.Tensor]:
    """y and gradients of a step, buffers behind it, and y of an evaluation; or second derivatives too."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    y = module(x)
    weight = torch.cos(torch.arange(y.numel(), dtype=x.dtype)).view(y.shape)
    assert is_taken(y) == taken
    inputs = {"x": x} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    first = torch.autograd.grad((y.sin() * weight).sum(), [*inputs.values()], create_graph=second)
    found = {"y": y.detach()} | {f"gradient of {name}": g.detach() for name, g in zip(inputs, first, strict=True)}
    if second:
        twice = torch.autograd.grad(sum((g * g).sum() for g in first), [*inputs.values()], allow_unused=True)
        pairs = zip(inputs, twice, strict=True)
        return found | {f"second of {name}": g for name, g in pairs if g is not None and "bias" not in name}
    found |= {name: b.clone() for name, b in module.named_buffers()}
    with torch.no_grad():
        return found | {"evaluated": module.eval()(x)}


def compare(monkeypatch, module: nn.Module, x: torch.Tensor, **settings) -> None:
    found = results(module, x, True, **settings)
    monkeypatch.setattr(small_calls, "MOST_ELEMENTS", 0)
    expected = results(module, x, False, **settings)
    assert found.keys() == expected.keys() or settings
    for name, value in found.items():
        if name in expected:
            assert_close(value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
            steps = zip(value.shape, value.stride(), expected[name].stride(), strict=True)
            assert settings or all(size == 1 or step == other for size, step, other in steps)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", BLOCKS)
def test_block(sizes, layout, training, monkeypatch):
    module, x = block(sizes)
    compare(monkeypatch, module.train(training), x.contiguous(memory_format=layout))


@pytest.mark.parametrize("sizes", HEADS)
def test_multi_head(sizes, monkeypatch):
    compare(monkeypatch, *multi_head(sizes))


def token(_sizes: str = "", dtype=torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = testing.randomise(aia_kernels.TokenExternalAttention(7, 5, k=6))
    return module.to(dtype), torch.randn(2, 9, 7, dtype=dtype)


#: What operators of PyTorch follow.
OTHERS = {
    "GroupNorm, GELU": {"norm": partial(nn.GroupNorm, 2), "activation": "gelu"},
    "no norm": {"norm": None},
    "no activation": {"activation": None},
    "no residual": {"residual": False},
    "SiLU": {"activation": "silu"},
    "no projection": {"projection": False},
    "bare": {"norm": None, "activation": None, "residual": False, "projection": False},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", ["folded", "one sample"])
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_blocks(settings, sizes, layout, monkeypatch):
    module, x = block(sizes, **settings)
    compare(monkeypatch, module, x.contiguous(memory_format=layout))


@pytest.mark.parametrize("settings", [OTHERS["GroupNorm, GELU"], OTHERS["no projection"]])
def test_second_derivatives_of_other_blocks(settings, monkeypatch):
    compare(monkeypatch, *block("folded", **settings), second=True)


def test_fixed_statistics_of_sync_batch_norm(monkeypatch):
    module, x = block("folded", norm=nn.SyncBatchNorm)
    compare(monkeypatch, module.eval(), x)


@pytest.mark.parametrize("absent", [None, "q_linear.bias", "linear_1.bias", "proj.bias"])
def test_attention_of_a_token_stage(absent, monkeypatch):
    module, x = token()
    if absent:
        owner, _, name = absent.rpartition(".")
        setattr(getattr(module, owner), name, None)
    compare(monkeypatch, module, x)


ABSENT = {
    "affine": lambda: block("folded", norm=partial(nn.BatchNorm2d, affine=False)),
    "conv1.bias": lambda: block("not folded"),
    "trans_dims.bias": lambda: multi_head("odd"),
    "linear_0.bias": lambda: multi_head("odd"),
    "linear_1.bias": lambda: multi_head("odd"),
    "proj.bias": lambda: multi_head("odd"),
}


@pytest.mark.parametrize("absent", ABSENT)
def test_what_may_be_absent(absent, monkeypatch):
    module, x = ABSENT[absent]()
    owner, _, name = absent.rpartition(".")
    if owner:
        setattr(getattr(module, owner), name, None)
    compare(monkeypatch, module, x)


LAYERS = [(block, "folded"), (block, "not folded"), (multi_head, "odd"), (token, "token")]


@pytest.mark.parametrize("make, sizes", LAYERS)
def test_second_derivatives(make, sizes, monkeypatch):
    compare(monkeypatch, *make(sizes), second=True)


@pytest.mark.parametrize("make, sizes", LAYERS)
def test_float32(make, sizes):
    """Rounded as often as the operators of PyTorch, and no oftener."""
    module, x = make(sizes)
    expected, found = results(module, x, True), results(module.float(), x.float(), True)
    for name, value in found.items():
        assert_close(value.double(), expected[name].double(), **ROUNDED, msg=lambda text, name=name: f"{name}: {text}")


NARROW = {
    "block": (lambda: block("folded"), torch.channels_last),
    "block, unfolded": (lambda: block("not folded"), torch.contiguous_format),
    "no norm": (lambda: block("folded", norm=None), torch.channels_last),
    "multi-head": (lambda: multi_head("odd"), None),
    "token": (token, None),
    "plain": (lambda: (testing.randomise(aia_kernels.ExternalAttention(6, 5)).double(), torch.randn(2, 9, 6)), None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_16_bits(name, dtype):
    """All is made in float32 of the parameters as they are rounded: what is left is the rounding of each result, in a
    step and in an evaluation, and y is stored as x is."""
    make, layout = NARROW[name]
    module, x = make()
    module, x = module.to(dtype), x.to(dtype)
    x = x if layout is None else x.contiguous(memory_format=layout)
    found = results(module, x, True)
    assert found["y"].dtype is dtype
    assert found["y"].stride() == x.stride() if found["y"].shape == x.shape else found["y"].is_contiguous()
    exact = copy.deepcopy(module).double()
    expected = results(exact, x.double(), isinstance(module, aia_kernels.ExternalAttention) is False)
    for key, value in found.items():
        want = expected[key]
        if key == "gradient of x" or not want.any():
            continue
        size = want.double().norm() / max(1, want.numel()) ** 0.5
        # A gradient comes of that of y, and running statistics of z, which are rounded themselves.
        bound = 8 * torch.finfo(dtype).eps * size
        assert ((value.double() - want).norm() / max(1, want.numel()) ** 0.5) <= bound, key


@pytest.mark.parametrize("name", ["no norm", "multi-head", "plain"])
def test_second_derivatives_in_16_bits(name):
    """By the formula, in the type of the layer: as good as its roundings let them be, which a batch norm of some values
    multiplies."""
    make, _ = NARROW[name]
    module, x = make()
    exact = results(module, x.double(), not isinstance(module, aia_kernels.ExternalAttention), second=True)
    found = results(module.bfloat16(), x.bfloat16(), True, second=True)
    for key, value in found.items():
        if key.startswith("second") and exact[key].norm() > 1e-6:
            assert (value.double() - exact[key]).norm() <= 0.1 * exact[key].norm() + 1e-3, key


@pytest.mark.parametrize("make, sizes", [(block, "folded"), (block, "one sample"), (multi_head, "odd"), (token, "")])
def test_frozen_parameters(make, sizes):
    """Each gradient by itself is that of all together."""
    module, x = make(sizes)
    x = x.requires_grad_()
    parameters = dict(module.named_parameters())
    module(x).square().sum().backward()
    expected = {"x": x.grad, **{name: p.grad for name, p in parameters.items()}}
    for wanted in expected:
        for name, tensor in {"x": x, **parameters}.items():
            tensor.grad = None
            tensor.requires_grad_(name == wanted)
        y = module(x)
        assert is_taken(y)
        y.square().sum().backward()
        found = {name: t.grad for name, t in {"x": x, **parameters}.items() if t.grad is not None}
        assert_close(found, {wanted: expected[wanted]}, **EXACT)


@pytest.mark.parametrize("settings", [{"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}])
def test_running_statistics(settings, monkeypatch):
    """As torch moves them, whoever does it."""
    module, x = block("folded")
    module.conv2[1] = nn.BatchNorm2d(6, **settings).double()
    moves = settings.get("momentum") is not None
    found = results(module, x, moves)
    monkeypatch.setattr(small_calls, "MOST_ELEMENTS", 0)
    assert_close(found, results(module, x, False), **EXACT)


def test_a_buffer_that_moves_counts_as_changed():
    module, x = block("folded")
    mean = module.conv2[1].running_mean
    before = mean._version
    module(x)
    assert mean._version > before
    after = mean._version
    module.eval()(x)
    assert mean._version == after


@pytest.mark.parametrize("make, sizes", [(block, "folded"), (multi_head, "odd")])
def test_saved_tensors_with_other_strides(make, sizes):
    """As offloading gives them back."""
    module, x = make(sizes)
    expected = results(module, x, True)

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), turned):
        assert_close(results(module, x, True), expected, **EXACT)


@pytest.mark.parametrize("make, sizes", [(block, "folded"), (multi_head, "odd")])
def test_checkpointed(make, sizes):
    module, x = make(sizes)
    expected = results(module.eval(), x, True)["gradient of x"]
    x = x.requires_grad_()
    y = checkpoint(module, x, use_reentrant=False)
    weight = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
    assert_close(torch.autograd.grad((y.sin() * weight).sum(), x)[0], expected, **EXACT)


@pytest.mark.parametrize("make, sizes", [(block, "folded"), (multi_head, "odd")])
def test_inference_mode(make, sizes):
    module, x = make(sizes)
    with torch.no_grad():
        expected = module.eval()(x)
    with torch.inference_mode():
        found = module(x.clone())
    assert found.is_inference()
    assert_close(found, expected, rtol=0, atol=0)


def test_y_may_be_changed_in_place():
    module, x = multi_head("odd")
    twice = 2 * module(x)
    y = module(x)
    expected = torch.autograd.grad(twice.sum(), module.proj.weight)
    assert_close(torch.autograd.grad(y.mul_(2).sum(), module.proj.weight), expected, **EXACT)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_what_is_no_number_shows(spoiled):
    module, x = block("folded")
    x[0, 0, 0, 0] = spoiled
    with torch.no_grad():
        assert module.eval()(x)[0].isnan().any() and module(x)[1].isfinite().all()
        assert module.train()(x).isnan().any()


def test_what_is_left_to_others():
    module, x = block("folded")
    x = x.requires_grad_()
    assert is_taken(module(x))
    for change in (
        lambda m: m.linear_0.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.conv2[1], "running_var", m.conv2[1].running_var.float()),
        lambda m: m.linear_0.weight.set_(m.linear_0.weight.detach().transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        other = copy.deepcopy(module)
        with torch.no_grad():
            change(other)
        if other.conv2[1].running_var.dtype is torch.float64:
            assert not is_taken(other(x))
        else:
            with torch.no_grad():
                assert small_calls.block(x, *other._read_at_once(x)[:2], other._read_at_once(x)[3], 0.0, False) is None
    assert not is_taken(module(x[..., ::2]))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_taken(copy.deepcopy(module).float()(x.detach().float()))
    with aia_kernels.use_backend("reference"):
        assert not is_taken(module.double()(x))
    large, y = aia_kernels.ExternalAttention2d(4, 4), torch.randn(1, 4, 100, 100)
    assert not is_taken(large(y))


def raw(which: str) -> tuple[list, list]:
    """Arguments of external_propagate_ and of external_propagate_back."""
    if which == "heads":
        x, weights = torch.randn(2, 5, 4), [torch.randn(*s) for s in ((6, 4), (7, 3), (2, 7), (2,), (4, 4), (4,))]
        forward = [x, weights, [], [], 2, 1e-9, False, False, 0.0, 0.0]
    elif which == "residual":
        x, sizes = torch.randn(2, 5, 4), ((6, 4), (7, 6), (3, 7), (3,), (6, 3), (6,), (6,))
        weights = [torch.randn(*s) for s in sizes]
        forward = [x, weights, [], [], 1, 1e-9, False, False, 0.0, 0.0]
    elif which == "maps":
        x, weights = torch.randn(2, 4, 3, 2), [torch.randn(*s) for s in ((4, 4, 1, 1), (7, 4, 1), (4, 7, 1))]
        forward = [x, [*weights, None, None, None], [], [], 1, 1e-9, False, False, 0.0, 0.0]
        weights = forward[1]
    else:
        x, weights = torch.randn(2, 4, 3, 2), [torch.randn(*s) for s in ((4, 4, 1, 1), (7, 4, 1), (4, 7, 1))]
        weights = [*weights, None, torch.randn(4, 4, 1, 1), None]
        running = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
        norm = [torch.ones(4), torch.zeros(4), None, None]
        forward = [x, weights, norm, running, 1, 1e-9, which == "folded", True, 1e-5, 0.1]
    y, kept = PASSES.external_propagate_(*forward)
    of_block = which in ("block", "folded")
    needs = [*(w is not None for w in weights), *(of_block,) * 2, True]
    y_of_block = y if of_block else None
    back = [torch.randn_like(y), x, y_of_block, weights, forward[2], kept, forward[4], which == "folded", 1e-5, needs]
    return forward, back


def put(place: int, entry: object):
    return lambda values: [*values[:place], entry, *values[place + 1 :]]


BAD = {
    "x of a narrower type": (0, 0, lambda x: x.bfloat16(), "must be of the type of x, bfloat16, got float32"),
    "x of integers": (0, 0, lambda x: x.int(), "x must be float16, bfloat16, float32 or float64, got int32"),
    "x with gaps": (0, 0, lambda x: x[:, :, ::2], "x must be contiguous"),
    "empty": (0, 0, lambda x: x[:0], "x must be .* not empty"),
    "x of three axes": (0, 0, lambda x: x[0], "x must be .* of a block"),
    "negative eps": (0, 5, lambda _: -1.0, "eps must not be negative"),
    "weights too few": (0, 1, lambda w: w[:5], "weights must be W_1, K, V"),
    "no key": (0, 1, put(1, None), "weights must be W_1, K, V"),
    "a key of other features": (0, 1, put(1, torch.ones(7, 3)), r"W_1 must be contiguous float32 \[3, 4\]"),
    "a key that is no matrix": (0, 1, put(1, torch.ones(7, 4, 2)), "K must be a contiguous matrix"),
    "a value of another type": (0, 1, put(2, torch.ones(4, 7).double()), "V must be a contiguous matrix"),
    "a value of other slots": (0, 1, put(2, torch.ones(4, 6)), r"V must be contiguous float32 \[4, 7\]"),
    "a value turned": (0, 1, put(2, torch.ones(7, 4).mT), "V must be a contiguous matrix"),
    "other outputs": (0, 1, put(4, torch.ones(5, 4)), "maps must have as many channels behind"),
    "a bias in a block": (0, 1, put(3, torch.ones(4)), "maps must have .* no biases"),
    "heads without W_1": (0, 4, lambda _: 0, "several heads need W_1 and W_2"),
    "more heads than rows": (0, 4, lambda _: 2**62, "W_1 must have rows, and W_2 columns, for each head"),
    "norm too short": (0, 2, lambda norm: norm[:3], "norm must be empty, or scale, shift"),
    "a scale of other channels": (0, 2, put(0, torch.ones(3)), "scale, shift, mean and variance must be contiguous"),
    "nothing to normalize by": (0, 7, lambda _: False, "running must be empty or, of a batch"),
    "running statistics alone": (0, 3, lambda running: running[:1], "running must be empty or, of a batch"),
    "a gradient of another shape": (1, 0, lambda g: g[:1], "grad and x must agree"),
    "no y": (1, 2, lambda _: None, "y must be given for a block"),
    "kept too short": (1, 5, lambda kept: kept[:-1], r"kept must be contiguous float32 \[2[0-9]{2}\]"),
    "kept with gaps": (1, 5, lambda kept: kept.repeat_interleave(2)[::2], "kept must be contiguous"),
    "kept of another type": (1, 5, lambda kept: kept.double(), "kept must be contiguous float32"),
    "needs too few": (1, 9, lambda needs: needs[:8], "needs must hold 9 entries, got 8"),
    "needs of what is not there": (1, 9, put(3, True), "needs must be of weights that are there"),
}


#: The same of tokens with a residual.
BAD_RESIDUALS = {
    "features": (0, 1, lambda w: [*w[:4], w[4][:5], w[5][:5], w[6]], "a residual is of one head and tokens"),
    "heads": (0, 4, lambda _: 2, "W_1 must be contiguous"),
    "a bias of other features": (0, 1, put(6, torch.ones(5)), r"the bias of W_1 must be contiguous float32 \[6\]"),
    "folded": (0, 6, lambda _: True, "weights of one head fold"),
    "a gradient of another shape": (1, 0, lambda g: g[:, :, :4], r"grad must be contiguous float32 \[2, 5, 6\]"),
    "needs too few": (1, 9, lambda needs: needs[:9], "needs must hold 10 entries, got 9"),
}


@pytest.mark.parametrize(
    "kind, which, place, change, words",
    [("block", *of) for of in BAD.values()] + [("residual", *of) for of in BAD_RESIDUALS.values()],
    ids=[*BAD, *(f"residual: {name}" for name in BAD_RESIDUALS)],
)
def test_bad_arguments_are_refused(kind, which, place, change, words):
    arguments = raw(kind)[which]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=words):
        (PASSES.external_propagate_, PASSES.external_propagate_back)[which](*arguments)


@pytest.mark.parametrize("kind", ["heads", "residual", "maps", "block", "folded"])
@pytest.mark.parametrize("which", [0, 1])
def test_opcheck(which, kind):
    name = schemas.EXTERNAL_PROPAGATE_PASSES[which]
    arguments = tuple(raw(kind)[which])
    opcheck(getattr(torch.ops.aia_kernels, name).default, arguments, test_utils=("test_schema", "test_faketensor"))
