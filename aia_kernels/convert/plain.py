"""to_reference: the fused layers of a model become plain PyTorch, for exporters that know no other operators.

The forwards here say the published order operation by operation, in what TorchScript compiles. What depends on the rank
or the type of a tensor stands in functions that torch.fx records as they are: a symbolic trace knows neither.
"""

from __future__ import annotations

from typing import Optional, Tuple  # noqa: UP035  TorchScript knows no other spelling

import torch
import torch.fx
from torch import Tensor, nn

from .. import modules
from ..functional.checks import check_clips
from ..modules.external_attention import EPS
from ..modules.linear_attention import attended
from ..reference.linear_attention import channel_linear_attention
from ..reference.shift import temporal_shift
from .behaviour import overridden
from .flow import is_rewritten, own_class


def _clips(x: Tensor, num_segments: int) -> Tensor:
    """[B, T, C, H, W] of x, [B * T, C, H, W] or [B, C, T, H, W]."""
    if not torch.jit.is_scripting():
        num_segments = check_clips(x, num_segments)
    elif x.dim() != 4 and x.dim() != 5:
        raise ValueError(f"x: got {x.dim()} axes, expected [B * T, C, H, W] or [B, C, T, H, W]")
    return x.unflatten(0, [-1, num_segments]) if x.dim() == 4 else x.transpose(1, 2)


def _shaped_as(clips: Tensor, x: Tensor) -> Tensor:
    """The inverse of _clips."""
    return clips.flatten(0, 1) if x.dim() == 4 else clips.transpose(1, 2)


def _shifted(clips: Tensor, fold_div: int) -> Tensor:
    return temporal_shift(clips, clips.shape[2] // fold_div)


def _normalized(logits: Tensor, eps: float = EPS) -> Tensor:
    """A of logits [..., N, M], as reference.double_normalize has it."""
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    log_p = wide.log_softmax(-2)
    if eps == 0.0:
        return log_p.softmax(-1).to(logits.dtype)
    p = log_p.exp()
    return (p / (eps + p.sum(-1, keepdim=True))).to(logits.dtype)


def _normalized_as_the_port(logits: Tensor) -> Tensor:
    """A of the port with two linear layers: over axis 1, then over axis 2, whatever the rank."""
    if logits.dim() == 3:
        return _normalized(logits, 0.0)
    attention = logits.softmax(1)
    return attention / attention.sum(2, keepdim=True)


def _tokens(x: Tensor, or_more: bool = False) -> Tensor:
    if x.dim() < 3 or (x.dim() > 3 and not or_more):
        raise ValueError(f"x: got shape {[int(n) for n in x.shape]}, expected [B, N, d]")
    return x


def _as_maps(x: Tensor) -> Tensor:
    """Points and volumes as maps of one column."""
    return x.flatten(2).unsqueeze(3) if x.dim() == 3 or x.dim() == 5 else x


def _activated(y: Tensor, activation: Optional[str]) -> Tensor:  # noqa: UP045  TorchScript knows no other spelling
    name = "" if activation is None else activation
    if name == "relu":
        return y.relu()
    if name == "gelu":
        return nn.functional.gelu(y)
    return nn.functional.silu(y) if name == "silu" else y


def _over_channels(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, gamma.dtype))  # as x + gamma * o is
    return channel_linear_attention(wide.flatten(2), gamma, eps).reshape(x.shape)


for _name in (
    "_clips",
    "_shaped_as",
    "_shifted",
    "_normalized",
    "_normalized_as_the_port",
    "_tokens",
    "_as_maps",
    "_activated",
    "_over_channels",
):
    torch.fx.wrap(_name)


def _pooled(a: Tensor, axis: int) -> Tensor:
    """The maximum and the mean over an axis, [B, 2, ...], the other axes in the order T, C, H, W."""
    return torch.stack((torch.max(a, axis)[0], a.mean(axis)), 1)


class _PlainUnit(nn.Module):
    """The gates of the units, as fields that multiply clips [B, T, C, H, W]."""

    def _channel(self, a: Tensor) -> Tensor:
        z = self.C_conv(_pooled(a, 2))
        if hasattr(self, "C_bn") and self.use_BN:
            z = self.C_bn(z)
        return z.sigmoid()[:, 0].unsqueeze(2)

    def _over_t(self, a: Tensor) -> Tensor:
        z = self.T_conv(_pooled(a, 1))
        if hasattr(self, "T_bn") and self.use_BN:
            z = self.T_bn(z)
        return z.sigmoid()[:, 0].unsqueeze(1)

    def _over_h(self, a: Tensor) -> Tensor:
        z = self.H_conv(_pooled(a, 3))
        if hasattr(self, "H_bn") and self.use_BN:
            z = self.H_bn(z)
        return z.sigmoid()[:, 0].unsqueeze(3)

    def _over_w(self, a: Tensor) -> Tensor:
        # As published, convolved with its axes in the order T, H, C.
        z = self.W_conv(_pooled(a, 4).transpose(3, 4))
        if hasattr(self, "W_bn") and self.use_BN:
            z = self.W_bn(z)
        return z.sigmoid()[:, 0].transpose(2, 3).unsqueeze(4)

    def _spacetime(self, a: Tensor) -> Tensor:
        return (self._over_t(a) + self._over_h(a) + self._over_w(a)) / 3


class PlainC(_PlainUnit, modules.C):
    """C in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a = _clips(x, self.num_segments)
        return _shaped_as(a * self._channel(a), x)


class PlainST(_PlainUnit, modules.ST):
    """ST in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a = _clips(x, self.num_segments)
        return _shaped_as(a * self._spacetime(a), x)


class PlainCinST(_PlainUnit, modules.CinST):
    """CinST in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a = _clips(x, self.num_segments)
        return _shaped_as(a * self._spacetime(a * self._channel(a)), x)


class PlainSTinC(_PlainUnit, modules.STinC):
    """STinC in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a = _clips(x, self.num_segments)
        return _shaped_as(a * self._channel(a * self._spacetime(a)), x)


class PlainSTinC2(_PlainUnit, modules.STinC2):
    """STinC2 in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a = _clips(x, self.num_segments)
        t, h, w = self._over_t(a), self._over_h(a), self._over_w(a)
        guide = (t.mean(2, keepdim=True) + h.mean(2, keepdim=True) + w.mean(2, keepdim=True)) / 3
        return _shaped_as(a * self._channel(a * guide), x)


class PlainExternalAttention(modules.ExternalAttention):
    """ExternalAttention in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mv(_normalized_as_the_port(self.mk(_tokens(x, True))))


class PlainExternalAttention2d(modules.ExternalAttention2d):
    """ExternalAttention2d in plain PyTorch, its projections not folded."""

    def forward(self, x: Tensor) -> Tensor:
        maps = _as_maps(x)
        logits = self.linear_0(self.conv1(maps).flatten(2))
        attention = _normalized(logits.transpose(1, 2)).transpose(1, 2)  # .mT is unknown to older exporters
        y = self.conv2(self.linear_1(attention).unflatten(2, maps.shape[2:]))
        if self.residual:
            y = y + maps
        return _activated(y, self.activation).reshape(x.shape)


class PlainMultiHeadExternalAttention(modules.MultiHeadExternalAttention):
    """MultiHeadExternalAttention in plain PyTorch, its projections not folded."""

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            self.trans_dims(_tokens(x)).unflatten(2, [self.num_heads, -1]).transpose(1, 2)
        )  # [B, heads, N, dim / heads]
        attention = self.attn_drop(_normalized(self.linear_0(heads)))
        return self.proj_drop(self.proj(self.linear_1(attention).transpose(1, 2).flatten(2)))


class PlainTokenExternalAttention(modules.TokenExternalAttention):
    """TokenExternalAttention in plain PyTorch, its projections not folded."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_linear(_tokens(x))
        attention = self.attn_drop(_normalized(self.linear_0(q)))
        return q + self.proj_drop(self.proj(self.linear_1(attention)))


class PlainTransformerTokenExternalAttention(modules.TransformerTokenExternalAttention):
    """TransformerTokenExternalAttention in plain PyTorch, its projections not folded."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_linear(_tokens(x))
        attention = self.attn_drop(_normalized(self.linear_1(q)))
        return q + self.proj_drop(self.proj(self.linear_2(attention)))


class PlainPositionLinearAttention(modules.PositionLinearAttention):
    """PositionLinearAttention in plain PyTorch, its values not folded."""

    def forward(self, x: Tensor) -> Tensor:
        maps = _as_maps(x)
        query, key, value = (
            self.query_conv(maps).flatten(2),
            self.key_conv(maps).flatten(2),
            self.value_conv(maps).flatten(2),
        )
        o = attended(query, key, value, self.feature, self.eps)
        return x + self.gamma * o.reshape(x.shape)


class PlainKernelLinearAttention(modules.KernelLinearAttention):
    """KernelLinearAttention in plain PyTorch, its values not folded."""

    def forward(self, x: Tensor) -> Tensor:
        maps = _as_maps(x)
        query, key, value = (
            self.query_conv(maps).flatten(2),
            self.key_conv(maps).flatten(2),
            self.value_conv(maps).flatten(2),
        )
        o = attended(query, key, value, "softplus", self.eps)
        return x + self.gamma * o.reshape(x.shape)


class PlainChannelLinearAttention(modules.ChannelLinearAttention):
    """ChannelLinearAttention in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return _over_channels(x, self.gamma, self.eps)


class PlainEfficientAttention(modules.EfficientAttention):
    """EfficientAttention in plain PyTorch, its values and reprojection not folded."""

    def forward(self, x: Tensor) -> Tensor:
        maps = _as_maps(x)
        key = self.keys(maps).flatten(2).unflatten(1, [self.head_count, -1])
        query = self.queries(maps).flatten(2).unflatten(1, [self.head_count, -1])
        value = self.values(maps).flatten(2).unflatten(1, [self.head_count, -1])
        context = value @ key.softmax(3).transpose(2, 3)
        o = (context @ query.softmax(2)).flatten(1, 2).unflatten(2, maps.shape[2:])
        return x + self.reprojection(o).reshape(x.shape)


class PlainTemporalShift(modules.TemporalShift):
    """TemporalShift in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return _shaped_as(_shifted(_clips(x, self.num_segments), self.fold_div), x)


def _gate_pooled(x: Tensor, name: str) -> Tensor:
    """One pool of a channel gate, [B, C]."""
    flat = x.flatten(2)
    if name == "avg":
        return flat.mean(2)
    if name == "max":
        return torch.max(flat, 2)[0]
    if name == "mix":
        return (flat.mean(2) + torch.max(flat, 2)[0]) / 2
    return flat.pow(2.0).sum(2).sqrt() if name == "lp" else flat.logsumexp(2)


class PlainChannelGate(modules.ChannelGate):
    """ChannelGate in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.mlp(_gate_pooled(x, self.pool_types[0]))
        for name in self.pool_types[1:]:
            total = total + self.mlp(_gate_pooled(x, name))
        return x * total.sigmoid().unsqueeze(2).unsqueeze(3)


class PlainSpatialGate(modules.SpatialGate):
    """SpatialGate in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.spatial(_pooled(x, 1)).sigmoid()


class PlainCBAM(modules.CBAM):
    """CBAM in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.ChannelGate(x)
        if hasattr(self, "SpatialGate"):
            y = self.SpatialGate(y)
        return y


class PlainCausalCBAM(modules.CausalCBAM):
    """CausalCBAM in plain PyTorch."""

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006  TorchScript
        y = self.ChannelGate(x)
        if hasattr(self, "SpatialGate"):
            y = self.SpatialGate(y)
        return y, x - y


#: The plain layer of each fused one.
PLAIN_LAYERS = {
    kind.__bases__[-1]: kind
    for kind in (
        *(PlainC, PlainST, PlainCinST, PlainSTinC, PlainSTinC2, PlainTemporalShift),
        *(PlainExternalAttention, PlainExternalAttention2d, PlainMultiHeadExternalAttention),
        *(PlainTokenExternalAttention, PlainTransformerTokenExternalAttention),
        *(PlainCBAM, PlainCausalCBAM, PlainChannelGate, PlainSpatialGate),
        *(PlainPositionLinearAttention, PlainKernelLinearAttention),
        *(PlainChannelLinearAttention, PlainEfficientAttention),
    )
}


def to_reference(model: nn.Module) -> nn.Module:
    """Make every fused layer in a model a plain PyTorch module, in place.

    The result calls its submodules and PyTorch's own operators, in the published order and whatever the backend: for
    torch.onnx.export, TensorRT, torch.fx, quantization and TorchScript. A module whose forward fuse or convert has
    rewritten gets its own back. Layers keep their parameters, buffers, keys, settings, modes and hooks. convert makes
    them fused again.

    Args:
        model: Any module. The layers may be nested, shared, wrapped, or the model itself.

    Returns:
        The model.

    Raises:
        TypeError: The model is no module. Or it has modules, which the message names, whose class derives from a fused
            layer and has a forward of its own, or overrides what nn.Module does (as FSDP's classes do): what is plain
            for them is unknown. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    exchanges, unknown = {}, []
    for name, module in model.named_modules():
        if is_rewritten(module):
            exchanges[module] = own_class(module)
            continue
        layer = next((kind for kind in type(module).__mro__ if kind in PLAIN_LAYERS), None)
        if layer is None or type(module) in PLAIN_LAYERS.values():
            continue
        own = overridden(type(module), layer)
        if type(module).forward is not layer.forward or "forward" in module.__dict__:
            own.append("forward")
        if getattr(module, "memories", None) != getattr(layer, "memories", None):
            own.append("memories")
        if own:
            unknown.append(f"{name or 'the model itself'} ({type(module).__qualname__}: {', '.join(own)})")
        exchanges[module] = PLAIN_LAYERS[layer]
    if unknown:
        raise TypeError(
            f"model: got layers with methods of their own, expected those of the package: {', '.join(unknown)}"
        )
    for module, kind in exchanges.items():
        module.__class__ = kind
    return model
