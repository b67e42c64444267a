"""convert: the published layers of a model become the fused ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import behaviour
from .flow import is_rewritten, rewrite_forwards
from .names import names_in
from .published import FUSED_LAYERS, Form, find_form
from .report import Converted, Report, class_name, names_of
from .storage import of_published


def convert(model: nn.Module) -> Report:
    """Make every published layer in a model the fused layer, in place, and say what became of which.

    Layers are found by the names, kinds and shapes of their submodules, wherever their code comes from: the units C,
    ST, CinST, STinC and STinC2 of Attention in Attention (arXiv 2204.09303); CBAM with its gates (arXiv 1807.06521);
    EANet's External_attention, EAMLP's Attention and the attention of its T2T stages (arXiv 2105.02358); external
    attention by two linear layers; linear attention over positions and channels, with MANet's form (arXiv 2007.14902);
    EfficientAttention (1812.01243); CATT (2103.03493), CaaM's pair of attentions (2108.08782), and HaloNet's attention
    in both layouts (2103.12731). A layer is converted if its forward computes what the fused layer computes. This is
    tried on a small copy with random parameters: output, gradients and buffers, in evaluation and in training.

    A converted layer is the same object with another class. It keeps its parameters and buffers, and so optimizers and
    the keys of the state dict; its training mode, device, dtype and requires_grad; num_segments, dropouts and the
    settings of its batch norms; and its own hooks.

    A forward that is none of these, and has one of these layers in it in other words, is rewritten as fuse does it.

    These are left alone, and named in the report: a layer with hooks on its submodules, a look-alike of other shapes,
    one with a forward of its own, and one whose forward leaves something behind (an attention map that it keeps, a list
    that it appends to, a counter).

    Args:
        model: Any module. The layers may be nested, shared, wrapped, or the model itself.

    Returns:
        What became of the layers; its undo() gives them their own classes back. to_reference makes the fused layers
        plain PyTorch.

    Raises:
        TypeError: The model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    names = names_of(model)
    report = Report(model)
    tried: dict[Any, tuple[type[nn.Module], dict[str, str]] | str] = {}
    reasons: dict[nn.Module, str] = {}
    for module, known_as in names.items():
        if type(module) in FUSED_LAYERS or is_rewritten(module):
            report.already_fused += known_as[:1]
        elif (form := find_form(module)) is not None:
            before = class_name(module)
            found = _fused_layer(module, form, tried)
            if isinstance(found, str):
                if not form.common:
                    reasons[module] = found
            else:
                layer, stored = found
                report._ways_back.append(_exchange(module, layer, {**form.settings(module), **stored}))
                report.converted.append(Converted(tuple(known_as), before, layer.__name__))
    rewrite_forwards(report, names, reasons)
    return report


def _fused_layer(
    module: nn.Module, form: Form, tried: dict[Any, tuple[type[nn.Module], dict[str, str]] | str]
) -> tuple[type[nn.Module], dict[str, str]] | str:
    """The fused layer that computes what a module computes, with how it stores y; or why there is none."""
    reason = behaviour.unlike(module) or _hooked(module) or form.mismatch(module) or _sets_autocast(module)
    if reason is not None:
        return reason
    key = behaviour.signature(module)
    if key not in tried:
        tried[key] = _compare(module, form)
    return tried[key]


def _compare(module: nn.Module, form: Form) -> tuple[type[nn.Module], dict[str, str]] | str:
    # The layer of the same name is the likeliest, and its difference the one to tell.
    layers = sorted(form.layers, key=lambda layer: layer.__name__ != type(module).__name__)
    told = ""
    for layer in layers:
        inputs = form.example, form.of_other_rank
        settings = form.settings(module)
        if (reason := behaviour.difference(module, layer, settings, *inputs, several=form.several)) is None:
            return layer, _storage(module, layer, form)
        told = told or reason
    if form.known and told.startswith("its y "):
        told = f"{form.known}; {told}"
    others = " and ".join(layer.__name__ for layer in layers[1:])
    return f"{told}; {others} do not fit either" if others else told


def _storage(module: nn.Module, layer: type[nn.Module], form: Form) -> dict[str, str]:
    """How a layer is to store y, where the published one does not store it as x."""
    if not hasattr(layer, "storage"):
        return {}
    storage = of_published(module, form.example(module, torch.Generator()))
    return {} if storage == layer.storage else {"storage": storage}


def _hooked(module: nn.Module) -> str | None:
    for name, child in module.named_modules():
        hooks = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        if name and hooks:
            return f"{name} has hooks, which would not see its calls"
    return None


def _sets_autocast(module: nn.Module) -> str | None:
    """Whether the types in a forward are its own under autocast, as no trial shows: all run without it."""
    kind: Any = type(module)
    if any("autocast" in name for name in names_in(kind)):
        return "its forward sets autocast, or asks how it is set, which no fused layer does"
    return None


def _exchange(module: nn.Module, layer: type[nn.Module], settings: Mapping[str, Any]) -> Callable[[], None]:
    """Give a module the class of a fused layer and settings; the result takes them back."""
    kind = type(module)
    module.__class__ = layer
    added = tuple(name for name in settings if name not in vars(module))
    for name in added:
        setattr(module, name, settings[name])

    def undo() -> None:
        module.__class__ = kind
        for name in added:
            delattr(module, name)

    return undo
