"""to_reference: the fused layers of a model become plain PyTorch, for exporters that know no other operators."""

from __future__ import annotations

from torch import Tensor, nn

from .. import modules, reference
from ..layouts import as_clips, as_input
from ..modules.attention_in_attention import AttentionInAttention
from .behaviour import overridden


def _normalize(logits: Tensor, eps: float = 0.0) -> Tensor:
    return reference.double_normalize(logits, logits.shape[-1], eps)


class _PlainUnit(AttentionInAttention):
    """The forward of the units in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return self._through_submodules(x)


class _PlainExternal(nn.Module):
    """The forward of external attention's layers in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return self._through_submodules(x, _normalize)


class PlainC(_PlainUnit, modules.C):
    """C in plain PyTorch."""


class PlainST(_PlainUnit, modules.ST):
    """ST in plain PyTorch."""


class PlainCinST(_PlainUnit, modules.CinST):
    """CinST in plain PyTorch."""


class PlainSTinC(_PlainUnit, modules.STinC):
    """STinC in plain PyTorch."""


class PlainSTinC2(_PlainUnit, modules.STinC2):
    """STinC2 in plain PyTorch."""


class PlainExternalAttention(_PlainExternal, modules.ExternalAttention):
    """ExternalAttention in plain PyTorch."""


class PlainExternalAttention2d(_PlainExternal, modules.ExternalAttention2d):
    """ExternalAttention2d in plain PyTorch, its projections not folded."""


class PlainMultiHeadExternalAttention(_PlainExternal, modules.MultiHeadExternalAttention):
    """MultiHeadExternalAttention in plain PyTorch, its projections not folded."""


class PlainTokenExternalAttention(_PlainExternal, modules.TokenExternalAttention):
    """TokenExternalAttention in plain PyTorch, its projections not folded."""


class PlainTransformerTokenExternalAttention(_PlainExternal, modules.TransformerTokenExternalAttention):
    """TransformerTokenExternalAttention in plain PyTorch, its projections not folded."""


class PlainTemporalShift(modules.TemporalShift):
    """TemporalShift in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        clips = as_clips(x, self.num_segments)
        return as_input(reference.temporal_shift(clips, clips.shape[2] // self.fold_div), x.ndim)


#: The plain layer of each fused one.
PLAIN_LAYERS = {
    kind.__bases__[-1]: kind
    for kind in (
        *(PlainC, PlainST, PlainCinST, PlainSTinC, PlainSTinC2, PlainTemporalShift),
        *(PlainExternalAttention, PlainExternalAttention2d, PlainMultiHeadExternalAttention),
        *(PlainTokenExternalAttention, PlainTransformerTokenExternalAttention),
    )
}


def to_reference(model: nn.Module) -> nn.Module:
    """Make every fused layer in a model a plain PyTorch module, in place; returns the model.

    The result calls its submodules and PyTorch's own operators, in the published order and whatever the backend: for
    torch.onnx.export, TensorRT and quantisation. Layers keep their parameters, buffers, keys, settings, modes and
    hooks, as under ``convert``, which makes them fused again. TypeError, before anything is changed, names the
    modules whose class derives from a fused layer and has a forward of its own, or overrides what nn.Module does (as
    FSDP's classes do): what is plain for them is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    exchanges, unknown = {}, []
    for name, module in model.named_modules():
        layer = next((kind for kind in type(module).__mro__ if kind in PLAIN_LAYERS), None)
        if layer is None or type(module) in PLAIN_LAYERS.values():
            continue
        own = overridden(type(module), layer)
        if type(module).forward is not layer.forward or "forward" in module.__dict__:
            own.append("forward")
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
