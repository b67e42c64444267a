"""CBAM and CaaM's pair of it as modules: the published names, parameters and initialization.

The submodules are real ones, ``mlp`` and ``spatial.conv``, ``spatial.bn``. They hold the parameters, mode and settings,
and may be frozen, converted to SyncBatchNorm or parametrized as usual. A layer reads them and does not call them. They
are called where one is of another kind, has other settings (a stride, a dilation) or has hooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends, functional
from ..functional.cbam import POOL_TYPES, channel_gate_of_few_operators
from ..functional.cbam_calls import at_once
from ..functional.checks import check_integer
from ..reference import MLP, Gate
from ..reference.cbam import POOLS
from .recorded import one_call
from .submodules import can_be_read, held, is_hooked, must_be_called, norm_of, read_at_once, read_cbam_at_once


class BasicConv(nn.Module):
    """The convolution of a spatial gate and its batch norm, as published.

    Args:
        kernel_size: An odd number; zeros keep H and W as they are.
    """

    def __init__(self, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


_LAYERS = (nn.Flatten, nn.Linear, nn.ReLU, nn.Linear)


class ChannelGate(nn.Module):
    """y = x * g_c(x), g_c = sigmoid(sum over pools of mlp(pool of x over H and W)), arXiv 1807.06521.

    It takes x [B, C, H, W], contiguous or channels_last, of the types of functional.cbam, and returns y, shaped and
    stored as x.

    Args:
        gate_channels: C.
        reduction_ratio: The hidden layer of the MLP has C // reduction_ratio features.
        pool_types: "avg", "max", "mix" (the mean of these two, as in timm's LightCbam), "lp" or "lse"; the last two are
            computed in plain PyTorch.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(self, gate_channels: int, reduction_ratio: int = 16, pool_types: Sequence[str] = POOL_TYPES):
        super().__init__()
        _check_channels("gate_channels", gate_channels, reduction_ratio)
        hidden = gate_channels // reduction_ratio
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(gate_channels, hidden), nn.ReLU(), nn.Linear(hidden, gate_channels)
        )
        self.pool_types = list(pool_types)

    def extra_repr(self) -> str:
        return f"pool_types={tuple(self.pool_types)}"

    def _of_a_small_call(self, x: Tensor) -> Tensor | None:
        """y where "auto" counts that x is too small for passes, in as few operators as there can be; None where it is
        not, or where the call is no ordinary one."""
        if type(x) is not Tensor or torch.compiler.is_compiling():  # which would guard each later check
            return None
        # PyTorch's pools of channels that lie side by side take less time than a pass, which finds indices too.
        calls = 1 if torch.is_grad_enabled() or x.is_contiguous() else math.inf
        if not backends.published_flow_is_faster(x.device, x.numel(), 0, calls):
            return None
        mlp: Any = held(self, "mlp")
        layers = (*mlp._modules.values(),)
        if (
            type(mlp) is not nn.Sequential
            or (*map(type, layers),) != _LAYERS
            or any(map(is_hooked, (mlp, *layers[::2])))
        ):
            return None
        if (found := read_at_once(x, layers[1::2])) is None:
            return None
        sizes, hidden = x.shape, len(found[0])
        if len(sizes) != 4 or 0 in sizes or found[0].shape[1] != sizes[1] or found[2].shape != (sizes[1], hidden):
            return None
        return channel_gate_of_few_operators(x, found, self.pool_types)

    def _gate(self, x: Tensor) -> Tensor:
        """g_c [B, C, 1, 1], by calls of the submodules."""
        return sum(self.mlp(POOLS[name](x)) for name in self.pool_types).sigmoid()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, ChannelGate.forward, x)
        if (y := self._of_a_small_call(x)) is not None:
            return y
        if (mlp := _read_mlp(self)) is None:
            return x * self._gate(_checked(x))
        return functional.cbam(x, mlp, None, self.pool_types)


class SpatialGate(nn.Module):
    """y = x * g_s(x), g_s = sigmoid(BN(conv(maximum and mean of x over C))), arXiv 1807.06521.

    It takes x [B, C, H, W], contiguous or channels_last, of the types of functional.cbam, and returns y, shaped and
    stored as x.

    Args:
        kernel_size: That of the convolution, odd.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(self, kernel_size: int = 7):
        super().__init__()
        if check_integer("kernel_size", kernel_size) < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number")
        self.spatial = BasicConv(kernel_size)

    def _gate(self, x: Tensor) -> Tensor:
        """g_s [B, 1, H, W], by calls of the submodules."""
        return self.spatial(_pooled(x)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, SpatialGate.forward, x)
        if (gate := _read_spatial(self)) is None:
            return x * self._gate(_checked(x))
        return functional.cbam(x, None, gate)


class _BothGates(nn.Module):
    """Base of CBAM and CausalCBAM: both gates, and how they are read."""

    #: Whether the gates are read whatever their classes are: convert found that they do what those of this package do.
    gates_are_read = False

    def __init__(
        self,
        in_planes: int,
        reduction_ratio: int = 16,
        kernel_size: int = 7,
        pool_types: Sequence[str] = POOL_TYPES,
        no_spatial: bool = False,
    ):
        super().__init__()
        _check_channels("in_planes", in_planes, reduction_ratio)
        self.ChannelGate = ChannelGate(in_planes, reduction_ratio, pool_types)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = SpatialGate(kernel_size)

    def extra_repr(self) -> str:
        return f"no_spatial={self.no_spatial}"

    def _read(self) -> tuple[MLP, Gate | None] | None:
        """The parameters of both gates, or None where submodules must be called."""
        of_channels, of_positions = self.ChannelGate, None if self.no_spatial else self.SpatialGate
        if self._must_be_called(of_channels, ChannelGate) or (mlp := _read_mlp(of_channels)) is None:
            return None
        if of_positions is None:
            return mlp, None
        if self._must_be_called(of_positions, SpatialGate) or (gate := _read_spatial(of_positions)) is None:
            return None
        return mlp, gate

    def _at_once(self, x: Tensor, confounder: bool) -> list[Tensor] | None:
        """The results of an ordinary call, all that it needs read at once; None where this cannot be told, which says
        nothing yet."""
        if type(x) is not Tensor or torch.compiler.is_compiling():  # which would guard each later check
            return None
        modules: Any = self._modules
        of_channels, of_positions = modules.get("ChannelGate"), modules.get("SpatialGate")
        if type(of_channels) is not ChannelGate or is_hooked(of_channels):
            return None
        conv = bn = None
        if not self.no_spatial:
            if type(of_positions) is not SpatialGate or is_hooked(of_positions):
                return None
            spatial = of_positions._modules.get("spatial")
            if type(spatial) is not BasicConv or is_hooked(spatial):
                return None
            conv, bn = spatial._modules.get("conv"), spatial._modules.get("bn")
            if conv is None or bn is None:
                return None
        if (read := read_cbam_at_once(x, held(of_channels, "mlp"), conv, bn)) is None:
            return None
        return at_once(x, read, of_channels.pool_types, confounder)

    def _must_be_called(self, gate: nn.Module, kind: type[nn.Module]) -> bool:
        return is_hooked(gate) or (not self.gates_are_read and type(gate).forward is not kind.forward)

    def _through_submodules(self, x: Tensor) -> Tensor:
        y = self.ChannelGate(x)
        return y if self.no_spatial else self.SpatialGate(y)


class CBAM(_BothGates):
    """y = x * g_c(x) * g_s(x * g_c): a gate of channels and then one of positions (arXiv 1807.06521).

    It takes x [B, C, H, W], contiguous or channels_last, of the types of functional.cbam, and returns y, shaped and
    stored as x.

    Args:
        in_planes: C.
        reduction_ratio: As of ChannelGate.
        kernel_size: As of SpatialGate.
        pool_types: As of ChannelGate.
        no_spatial: Whether to leave the spatial gate out.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected; in forward, as
            functional.cbam.
    """

    def __init__(
        self,
        in_planes: int,
        reduction_ratio: int = 16,
        kernel_size: int = 7,
        pool_types: Sequence[str] = POOL_TYPES,
        no_spatial: bool = False,
    ):
        super().__init__(in_planes, reduction_ratio, kernel_size, pool_types, no_spatial)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, CBAM.forward, x)
        if (found := self._at_once(x, False)) is not None:
            return found[0]
        if (read := self._read()) is None:
            return self._through_submodules(x)
        return functional.cbam(x, *read, self.ChannelGate.pool_types)


class CausalCBAM(_BothGates):
    """CaaM's pair (arXiv 2108.08782): causal = CBAM's y, and confounder = x - y, from one read of x.

    It takes x [B, C, H, W] as CBAM does, and returns both, shaped and stored as x. The spatial gate's BN starts with a
    weight of 0, as published: g_s is then 1 / 2 everywhere.

    Args:
        in_planes: As of CBAM.
        reduction_ratio: As of CBAM.
        kernel_size: As of CBAM.
        pool_types: As of CBAM.
        no_spatial: As of CBAM.

    Raises:
        TypeError, ValueError: As CBAM.
    """

    def __init__(
        self,
        in_planes: int,
        reduction_ratio: int = 16,
        kernel_size: int = 7,
        pool_types: Sequence[str] = POOL_TYPES,
        no_spatial: bool = False,
    ):
        super().__init__(in_planes, reduction_ratio, kernel_size, pool_types, no_spatial)
        if not no_spatial:
            nn.init.zeros_(self.SpatialGate.spatial.bn.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(x, Proxy):
            return one_call(self, CausalCBAM.forward, x)
        if (found := self._at_once(x, True)) is not None:
            causal, confounder = found
            return causal, confounder
        if (read := self._read()) is None:
            y = self._through_submodules(x)
            return y, x - y
        return functional.causal_cbam(x, *read, self.ChannelGate.pool_types)


def _pooled(x: Tensor) -> Tensor:
    """The maximum and the mean over C, [B, 2, H, W]."""
    return torch.stack((x.max(1).values, x.mean(1)), 1)


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, H, W]")
    return x


def _check_channels(name: str, channels: int, reduction_ratio: int) -> None:
    check_integer(name, channels)
    if check_integer("reduction_ratio", reduction_ratio) < 1:
        raise ValueError(f"reduction_ratio: got {reduction_ratio}, expected at least 1")
    if channels < reduction_ratio:
        raise ValueError(f"{name}: got {channels}, expected at least reduction_ratio = {reduction_ratio}")


def _read_mlp(gate: Any) -> MLP | None:
    """The parameters of a channel gate, or None where its submodules must be called."""
    mlp = gate.mlp
    if must_be_called(mlp) or len(mlp) != 4:
        return None
    flatten, first, relu, second = mlp
    if is_hooked(flatten) or next(flatten.parameters(), None) is not None:
        return None
    if is_hooked(relu) or type(relu) is not nn.ReLU or not all(can_be_read(m, nn.Linear) for m in (first, second)):
        return None
    return MLP(first.weight, first.bias, second.weight, second.bias)


def _read_spatial(gate: Any) -> Gate | None:
    """The parameters of a spatial gate, or None where its submodules must be called."""
    conv, bn = gate.spatial.conv, gate.spatial.bn
    if is_hooked(gate.spatial) or must_be_called(conv) or not is_map_convolution(conv):
        return None
    if bn is not None and not can_be_read(bn, _BatchNorm):
        return None
    return Gate(conv.weight, None if bn is None else norm_of(bn))


def is_map_convolution(conv: nn.Module, with_bias: bool = False) -> bool:
    """Whether a module is the convolution of a gate as published: k x k with an odd k, zeros around, no bias unless it
    may have one."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and (conv.padding == (conv.kernel_size[0] // 2,) * 2 or conv.padding == "same")
        and conv.padding_mode == "zeros"
        and set(conv.stride) == set(conv.dilation) == {1}
        and conv.groups == 1
        and (with_bias or conv.bias is None)
    )
