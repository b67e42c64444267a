"""Attention by a memory per sample as modules, with the published names, parameters and initialization: linear
attention (arXiv 2007.14902) and efficient attention (arXiv 1812.01243).

The submodules hold parameters and settings. A layer reads them and does not call them. If one has hooks or is of
another kind (quantized, adapted, replaced), all of them are called in the published order. So they are where "auto"
counts that their flow is the faster one (backends.published_flow_is_faster).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends
from ..algorithms.linear_attention import keeps
from ..common.layouts import stored_for
from ..functional import plain
from ..functional.checks import check_at_least_one
from ..functional.external_attention_checks import check_eps
from ..functional.linear_attention import (
    MAPS,
    attention_of_maps,
    channel_linear_attention,
    efficient_attention,
    linear_attention,
)
from ..functional.linear_attention_checks import fit_at_once
from ..functional.sharded import is_distributed
from ..reference import Form
from .recorded import one_call
from .submodules import held, is_pointwise, must_be_called, read_at_once


class _OnMaps(nn.Module):
    """A layer on maps [B, C, H, W]; points [B, C, N] and volumes [B, C, D, H, W] are taken as maps of one column."""

    #: How y is stored: "as x"; where convert has found that the published layer has it otherwise, as of
    #: layouts.stored_for.
    storage = "as x"

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, _OnMaps.forward, x)
        if getattr(x, "ndim", 4) in (3, 5):
            return self._attend(x.flatten(2).unsqueeze(3)).reshape(x.shape)
        if getattr(x, "ndim", 4) != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, H, W], [B, C, N] or [B, C, D, H, W]")
        y = self._attend(x)
        return y if self.storage == "as x" else stored_for(y, self.storage, self._last_weight())

    def _last_weight(self) -> Tensor | None:
        """That of the convolution that makes what x is added to, if there is one."""
        return None

    def _attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PositionLinearAttention(_OnMaps):
    """Linear attention over positions, y = x + gamma * o (arXiv 2007.14902; functional.linear_attention).

    It takes x [B, in_places, H, W], contiguous or channels_last, and returns y, shaped and stored as x. Points and
    volumes are taken alike. Any H and W will do; the published code fails where they differ.

    Args:
        in_places: C, the channels of x.
        scale: Keys and queries have C // scale features.
        eps: Added to the sums of the keys.
        feature: "l2", as published, or "softplus", the kernel attention of MANet.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or the feature is none of these; in forward, as
            functional.linear_attention.
    """

    # That of the published module, which has no attribute for it.
    feature = "l2"

    def __init__(self, in_places: int, scale: int = 8, eps: float = 1e-6, *, feature: str = "l2"):
        super().__init__()
        check_at_least_one(in_places=in_places, scale=scale)
        if in_places < scale:
            raise ValueError(f"in_places: got {in_places}, expected at least scale = {scale}")
        if feature not in MAPS:
            raise ValueError(f"feature: got {feature!r}, expected 'l2' or 'softplus'")
        self.gamma = nn.Parameter(torch.zeros(1))
        self.in_places, self.eps, self.feature = in_places, eps, feature
        self.query_conv = nn.Conv2d(in_places, in_places // scale, kernel_size=1)
        self.key_conv = nn.Conv2d(in_places, in_places // scale, kernel_size=1)
        self.value_conv = nn.Conv2d(in_places, in_places, kernel_size=1)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, feature={self.feature!r}"

    def _attend(self, x: Tensor) -> Tensor:
        convolutions = [held(self, name) for name in ("query_conv", "key_conv", "value_conv")]
        gamma = held(self, "gamma")
        if (found := _read_at_once(x, convolutions, gamma)) is not None and self.feature in MAPS:
            if x.dtype in plain.WIDE and self._published_is_faster(x):
                return self._as_published(x, gamma, *_projected(x, found))
            check_eps(self.eps)
            return attention_of_maps(x, found, gamma, Form(self.feature, eps=self.eps))
        if _is_ordinary(x, self.key_conv) and self._published_is_faster(x):
            return self._through_submodules(x)
        if not all(map(_can_be_read, (self.query_conv, self.key_conv, self.value_conv))):
            return self._through_submodules(x)
        query, key, value = (conv.weight.flatten(1) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return linear_attention(
            x,
            query,
            key,
            value,
            biases=(self.query_conv.bias, self.key_conv.bias, self.value_conv.bias),
            gamma=self.gamma,
            feature=self.feature,
            eps=self.eps,
        )

    def _published_is_faster(self, x: Tensor) -> bool:
        key = held(self, "key_conv")
        return linear_flow_is_faster(x, key.in_channels, key.out_channels, PUBLISHED_CALLS)

    def _through_submodules(self, x: Tensor) -> Tensor:
        made = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return self._as_published(x, self.gamma, *made)

    def _as_published(self, x: Tensor, gamma: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return x + gamma * attended(query, key, value, self.feature, self.eps).view(x.shape)


class KernelLinearAttention(PositionLinearAttention):
    """PositionLinearAttention with the feature "softplus": the kernel attention of MANet, as convert finds it.

    Args:
        in_places: As of PositionLinearAttention.
        scale: As of PositionLinearAttention.
        eps: As of PositionLinearAttention.
    """

    feature = "softplus"

    def __init__(self, in_places: int, scale: int = 8, eps: float = 1e-6):
        super().__init__(in_places, scale, eps, feature="softplus")


#: The published flow of linear attention has two dozen operators: the calls of ours cost next to nothing over them.
PUBLISHED_CALLS = 0.01


def linear_flow_is_faster(x: Tensor, channels: int, keys: int, calls: float = 1) -> bool:
    """Whether "auto" leaves linear attention to another flow, by counting: folding leaves out c^2 multiplications per
    position, and costs d c^2 per sample, in products that are small and half as fast. calls: of choices.folding_pays,
    those of a flow that is as short as can be."""
    saved = channels * channels * (x.numel() // channels - 2 * x.shape[0] * keys)
    return backends.published_flow_is_faster(x.device, 2 * x.numel(), saved, calls)


#: The flow of efficient attention has a dozen operators, ours one for each direction. Measured over 36 sizes, 16 to 576
#: positions of 32, 64 and 256 channels, one head and four: ours is faster from 1.5 million on, in a step from 2.3.
EFFICIENT_CALLS = 0.5


def efficient_flow_is_faster(x: Tensor, channels: int, keys: int, values: int, heads: int, calls: float = 1) -> bool:
    """The same of efficient attention. Per position, folding leaves out the products of the values and of the
    reprojection and puts wider ones in their places; in training keys and queries are made twice where they are not
    small beside x."""
    saved = 2 * (channels * values + keys * values // heads - keys * channels)
    if torch.is_grad_enabled() and not keeps(channels, keys, keys, None)[0]:
        saved -= 2 * keys * channels // 3  # a step is three times a forward
    positions = x.numel() // channels
    per_sample = 4 * keys * channels * values // heads  # small products, at half the speed of large ones
    elements = 2 * (keys + values) * positions // 3  # measured: x itself is met less often than in linear attention
    return backends.published_flow_is_faster(x.device, elements, saved * positions - per_sample * x.shape[0], calls)


def attended(query: Tensor, key: Tensor, value: Tensor, feature: str, eps: float) -> Tensor:
    """o [B, v, N] of q and k [B, d, N] and v [B, v, N] in the published order of operations: a memory of the values
    themselves, and the division behind it."""
    if feature == "softplus":
        query, key = nn.functional.softplus(query), nn.functional.softplus(key)
    else:
        query, key = unit(query), unit(key)
    mass = query.transpose(1, 2) @ (key.sum(2, keepdim=True) + eps)
    o = value @ key.transpose(1, 2) @ query
    if feature == "l2":
        mass, o = mass + key.shape[2], o + value.sum(2, keepdim=True)
    return o / mass.transpose(1, 2)


def unit(rows: Tensor) -> Tensor:
    """[B, d, N] divided by their length over d; zero where that is zero."""
    square = rows.square().sum(1, keepdim=True)
    return rows * (square + (square == 0)).rsqrt()


class ChannelLinearAttention(_OnMaps):
    """Linear attention over channels, y = x + gamma * o (arXiv 2007.14902; functional.channel_linear_attention).

    It takes x [B, C, H, W], contiguous or channels_last, and returns y, shaped and stored as x. Points and volumes are
    taken alike.

    Args:
        eps: Added to the sums over channels.

    Raises:
        TypeError, ValueError: In forward, as functional.channel_linear_attention.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.eps = eps

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

    def _attend(self, x: Tensor) -> Tensor:
        return channel_linear_attention(x, self.gamma, eps=self.eps)


class EfficientAttention(_OnMaps):
    """Efficient attention, y = x + reprojection(o), with softmaxes over tokens and over the features of a head
    (arXiv 1812.01243; functional.efficient_attention).

    It takes x [B, in_channels, H, W], contiguous or channels_last, and returns y, shaped and stored as x. Points and
    volumes are taken alike.

    Args:
        in_channels: C, the channels of x.
        key_channels: The features of keys and of queries, of all heads.
        head_count: The heads, a divisor of key_channels and of value_channels.
        value_channels: The features of values, of all heads.

    Raises:
        TypeError, ValueError: A size is no integer of at least 1, or no multiple of head_count; in forward, as
            functional.efficient_attention.
    """

    def __init__(self, in_channels: int, key_channels: int, head_count: int, value_channels: int):
        super().__init__()
        sizes = {"in_channels": in_channels, "key_channels": key_channels, "value_channels": value_channels}
        check_at_least_one(head_count=head_count, **sizes)
        for name in ("key_channels", "value_channels"):
            if sizes[name] % head_count:
                raise ValueError(f"{name}: got {sizes[name]}, expected a multiple of head_count = {head_count}")
        self.in_channels, self.key_channels, self.value_channels = in_channels, key_channels, value_channels
        self.head_count = head_count
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def _attend(self, x: Tensor) -> Tensor:
        convolutions = [held(self, name) for name in ("queries", "keys", "values", "reprojection")]
        _, keys, values, _ = convolutions
        if (found := _read_at_once(x, convolutions, heads=self.head_count)) is not None:
            # In narrow types a forward of the passes is no slower, at any size. A step makes keys and queries twice.
            if (x.dtype in plain.WIDE or torch.is_grad_enabled()) and self._published_is_faster(x):
                o = self._as_published(*_projected(x, found[:6]))
                return x + torch.conv2d(o.reshape(x.shape[0], -1, *x.shape[2:]), *found[6:])
            return attention_of_maps(x, found, None, Form("softmax", self.head_count))
        if _is_ordinary(x, keys) and isinstance(values, nn.Conv2d) and self._published_is_faster(x):
            return self._through_submodules(x)
        if not all(map(_can_be_read, convolutions)):
            return self._through_submodules(x)
        query, key, value, reprojection = (conv.weight.flatten(1) for conv in convolutions)
        biases = tuple(conv.bias for conv in convolutions)
        return efficient_attention(x, query, key, value, reprojection, biases=biases, heads=self.head_count)

    def _last_weight(self) -> Tensor | None:
        return held(held(self, "reprojection"), "weight")

    def _published_is_faster(self, x: Tensor) -> bool:
        keys, values = held(self, "keys"), held(self, "values")
        sizes = keys.in_channels, keys.out_channels, values.out_channels
        return efficient_flow_is_faster(x, *sizes, self.head_count, EFFICIENT_CALLS)

    def _through_submodules(self, x: Tensor) -> Tensor:
        o = self._as_published(*(held(self, name)(x).flatten(2) for name in ("queries", "keys", "values")))
        return x + held(self, "reprojection")(o.reshape(x.shape[0], -1, *x.shape[2:]))

    def _as_published(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """o [B, values, N], before the reprojection."""
        if (heads := self.head_count) == 1:  # views cost as much as small products
            return value @ key.softmax(-1).mT @ query.softmax(-2)
        key, query, value = (t.unflatten(1, (heads, -1)) for t in (key, query, value))
        return (value @ key.softmax(-1).mT @ query.softmax(-2)).flatten(1, 2)


def _projected(x: Tensor, parameters: list[Any]) -> list[Tensor]:
    """What 1x1 convolutions make of x [B, C, H, W], [B, features, N] each, of the weight and the bias of each: a call
    of a submodule costs as much as a small operator."""
    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    return [torch.conv2d(x, weight, bias).flatten(2) for weight, bias in pairs]


def _is_ordinary(x: Any, conv: Any) -> bool:
    """Whether x is what an ordinary call brings, which the published flow takes too: maps that are not empty."""
    ordinary = isinstance(x, Tensor) and not is_distributed(x) and x.ndim == 4 and x.numel() > 0
    if not (ordinary and isinstance(conv, nn.Conv2d) and x.shape[1] == conv.in_channels):
        return False
    weight = conv._parameters.get("weight")  # a parametrized weight must not be read twice: spectral_norm moves it
    return weight is not None and plain.serves(x, weight)


def _read_at_once(x: Tensor, convolutions: list[Any], gamma: Any = None, heads: Any = 1) -> list[Any] | None:
    """The weight and the bias of each convolution of an ordinary call whose sizes fit; None where it is no such call,
    or where that cannot be told at once."""
    found = read_at_once(x, convolutions)
    if found is None or (gamma is not None and (type(gamma) is not nn.Parameter or gamma.dtype is not x.dtype)):
        return None
    return found if fit_at_once(x, found[::2], gamma, heads) else None


def _can_be_read(conv: Any) -> bool:
    return not must_be_called(conv) and is_pointwise(conv)
