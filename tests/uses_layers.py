"""Every layer with its inputs, and what a step of it gives: what the suite of uses (test_uses_*.py) compares.

A use is something that PyTorch lets one do to any layer. A test of one takes a layer from the table, does a step in
plain eager and one under the use, on the same backend, and compares everything that a step leaves behind: y, the
gradients of x and of every parameter, and the buffers. Where both run the same operations on the same numbers they
must agree bit for bit; where a use changes the order of sums (the reference in place of the fused passes, shards), or
asks for derivatives that the passes do not have, the comparison is in float64 within EXACT.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICES, some_of
from torch import Tensor, nn

import aia_kernels
from aia_kernels import backends, functional, testing
from aia_kernels.testing import Shape

if backends.select("cpu", torch.float32, "attention_in_attention") == "reference":
    pytest.skip("the layers are plain PyTorch here, which torch is tested with", allow_module_level=True)

#: Float64 sums in another order. Values are of order one to a hundred, and sums have at most a few thousand terms:
#: 1e-16 times a few thousand times a hundred.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

CLIPS = Shape(2, 3, 6, 5, 4)
FRAMES = (CLIPS.b * CLIPS.t, *CLIPS[2:])
VIDEO = (CLIPS.b, CLIPS.c, CLIPS.t, *CLIPS[3:])
MAPS = (3, 6, 5, 3)
TOKENS = (3, 11, 6)
BLOCKS = (3, 6, 4, 2)


class DoubleNormalize(nn.Module):
    """functional.double_normalize of logits [B, N, M] as a layer."""

    def forward(self, logits: Tensor) -> Tensor:
        return functional.double_normalize(logits, eps=1e-9)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def transposed(x: Tensor) -> Tensor:
    """Tokens made of maps: their features lie apart."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part(x: Tensor) -> Tensor:
    """Some channels, or tokens, of a larger tensor: no dense layout."""
    larger = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan, dtype=x.dtype, device=x.device)
    larger[:, 2:-1] = x
    return larger[:, 2:-1]


class Layer(NamedTuple):
    """A layer, the sizes of x and how x is stored. draws: it has dropout."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    stored: Callable[[Tensor], Tensor] = contiguous
    draws: bool = False


# proj_drop is torch's own dropout: on the CPU it draws in place, and so cannot be kept by selective checkpointing.
def _multi_head(drop: float = 0.0) -> nn.Module:
    return aia_kernels.MultiHeadExternalAttention(6, num_heads=2, attn_drop=drop)


def _token(drop: float = 0.0) -> nn.Module:
    return aia_kernels.TokenExternalAttention(6, 5, k=7, attn_drop=drop)


def _unit(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(aia_kernels, name)(CLIPS.t)


def _plain() -> nn.Module:
    return aia_kernels.ExternalAttention(6, S=5)


def _block() -> nn.Module:
    return aia_kernels.ExternalAttention2d(6, k=5)


def _linear(feature: str = "l2") -> nn.Module:
    return aia_kernels.PositionLinearAttention(6, 2, feature=feature)


def _efficient() -> nn.Module:
    return aia_kernels.EfficientAttention(6, 4, 2, 8)


def _shift() -> nn.Module:
    return aia_kernels.TemporalShift(CLIPS.t, fold_div=3)


def _cbam() -> nn.Module:
    return aia_kernels.CBAM(6, 2)


class Joined(nn.Module):
    """CaaM's pair of attentions with both results in one."""

    def __init__(self):
        super().__init__()
        self.both = aia_kernels.ComplementAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.both(x), -1)


# Its dropout is torch's, which draws in place on the CPU.
def _catt() -> nn.Module:
    return aia_kernels.CausalAttention(6, 2, 5)


def _halo() -> nn.Module:
    return aia_kernels.HaloAttention(dim=6, block_size=2, halo_size=1, dim_head=3, heads=2)


LAYERS = {
    "C": Layer(_unit("C"), FRAMES),
    "ST": Layer(_unit("ST"), FRAMES),
    "CinST": Layer(_unit("CinST"), FRAMES),
    "STinC": Layer(_unit("STinC"), FRAMES),
    "STinC2": Layer(_unit("STinC2"), FRAMES),
    "C, channels_last_3d": Layer(_unit("C"), VIDEO, channels_last),
    "ST, channels_last": Layer(_unit("ST"), FRAMES, channels_last),
    "CinST, channels_last": Layer(_unit("CinST"), FRAMES, channels_last),
    "STinC, channels_last": Layer(_unit("STinC"), FRAMES, channels_last),
    "STinC2, 5d": Layer(_unit("STinC2"), VIDEO),
    "CinST, part": Layer(_unit("CinST"), FRAMES, part),
    "TemporalShift": Layer(_shift, FRAMES),
    "TemporalShift, channels_last": Layer(_shift, FRAMES, channels_last),
    "TemporalShift, part": Layer(_shift, FRAMES, part),
    "CBAM": Layer(_cbam, MAPS),
    "CBAM, channels_last": Layer(_cbam, MAPS, channels_last),
    "CBAM, part": Layer(_cbam, MAPS, part),
    "ExternalAttention": Layer(_plain, TOKENS),
    "ExternalAttention, transposed": Layer(_plain, TOKENS, transposed),
    "ExternalAttention, part": Layer(_plain, TOKENS, part),
    "ExternalAttention2d": Layer(_block, MAPS),
    "ExternalAttention2d, channels_last": Layer(_block, MAPS, channels_last),
    "ExternalAttention2d, part": Layer(_block, MAPS, part),
    "MultiHead": Layer(_multi_head, TOKENS),
    "MultiHead, folded": Layer(lambda: aia_kernels.MultiHeadExternalAttention(3, num_heads=1), (2, 33, 3)),
    "MultiHead, transposed": Layer(_multi_head, TOKENS, transposed),
    "MultiHead, dropout": Layer(lambda: _multi_head(0.4), TOKENS, draws=True),
    "Token": Layer(_token, TOKENS),
    "Token, transposed": Layer(_token, TOKENS, transposed),
    "Token, dropout": Layer(lambda: _token(0.4), TOKENS, draws=True),
    "PositionLinear": Layer(_linear, MAPS),
    "PositionLinear, channels_last": Layer(_linear, MAPS, channels_last),
    "PositionLinear, part": Layer(lambda: _linear("softplus"), MAPS, part),
    "ChannelLinear": Layer(aia_kernels.ChannelLinearAttention, MAPS),
    "ChannelLinear, channels_last": Layer(aia_kernels.ChannelLinearAttention, MAPS, channels_last),
    "Efficient": Layer(_efficient, MAPS),
    "Efficient, channels_last": Layer(_efficient, MAPS, channels_last),
    "CATT": Layer(_catt, TOKENS),
    "CaaM": Layer(Joined, TOKENS, transposed),
    "Halo": Layer(_halo, BLOCKS),
    "Halo, channels_last": Layer(lambda: aia_kernels.HaloAttn(6, 6, 2, 2, 2, 1), BLOCKS, channels_last),
    "double_normalize": Layer(DoubleNormalize, TOKENS),
    "double_normalize, transposed": Layer(DoubleNormalize, TOKENS, transposed),
}
#: Layers of products of torch on every backend: those without passes of this package.
OF_TORCH = ("PositionLinear", "ChannelLinear", "Efficient", "CATT", "CaaM", "Halo")
#: One of each kind, for uses that take long.
MAIN = (
    "CinST",
    "STinC2, 5d",
    "ST, channels_last",
    "TemporalShift",
    "CBAM",
    "ExternalAttention",
    "ExternalAttention2d, channels_last",
    "MultiHead, dropout",
    "Token",
    "PositionLinear",
    "Efficient, channels_last",
    "double_normalize",
)
#: One of each family, for uses that take seconds; the others of MAIN follow in the sweep.
FEW = ("CinST", "TemporalShift", "ExternalAttention2d, channels_last", "MultiHead, dropout")
WITHOUT_DROPOUT = tuple(name for name, layer in LAYERS.items() if not layer.draws)

every_layer = pytest.mark.parametrize("name", LAYERS)
every_layer_without_dropout = pytest.mark.parametrize("name", WITHOUT_DROPOUT)
main_layers = pytest.mark.parametrize("name", MAIN)
few_layers = some_of("name", MAIN, *FEW)
every_device = pytest.mark.parametrize("device", DEVICES)


def uses(table: dict[str, Callable]) -> pytest.MarkDecorator:
    """Each use of a table, under its name."""
    return pytest.mark.parametrize("use", table.values(), ids=table)


def layer(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The layer in training, with values that no default hides behind; the same ones in every call."""
    return testing.randomise(LAYERS[name].make()).to(device, dtype)


def batch(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """x, the same for all types but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(LAYERS[name].sizes, generator=generator, dtype=torch.float64)
    return LAYERS[name].stored(x.to(dtype).to(device))


def towards(y: Tensor) -> Tensor:
    """A gradient for y, the same in every call, as autograd hands them on: not of the strides of y."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape[::-1], generator=generator, dtype=torch.float64)
    return grad.to(y.dtype).to(y.device).permute(*reversed(range(y.ndim)))


def in_new_threads(*calls: Callable[[], None]) -> None:
    """Each call in a thread, all at once, with as many threads of OpenMP as this one has.

    Products of the framework may split their sums by it, and a new thread has the number that the environment says,
    whatever torch.set_num_threads said here.
    """
    count = torch.get_num_threads()

    def work(call: Callable[[], None]) -> None:
        torch.set_num_threads(count)
        call()

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def left_by(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a step leaves behind."""
    found = {"y": y.detach(), "grad x": x.grad}
    found |= {f"grad {key}": p.grad for key, p in module.named_parameters()}
    return found | {key: b.clone() for key, b in module.named_buffers()}


def step(
    name: str,
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda module: module,
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    module: nn.Module | None = None,
) -> dict[str, Tensor]:
    """A step of a layer, called through ``wrap`` and all of it inside of ``around``; of ``module`` if it is given."""
    module = layer(name, dtype, device) if module is None else module
    x = batch(name, dtype, device).requires_grad_()
    call = wrap(module)
    torch.manual_seed(2)
    with around():
        y = call(x)
        y.backward(towards(y))
    return left_by(module, x, y)


@functools.cache
def plain_step(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """The step in plain eager."""
    return step(name, dtype=dtype, device=device)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same results, bit for bit, stored in the same way."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
            continue
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **bound: float) -> None:
    """The same results within a bound, by default that of float64 sums in another order."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **(bound or EXACT), msg=lambda m, key=key: f"{key}: {m}")
