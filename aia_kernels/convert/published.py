"""The published layers as they are recognized: by the names of their submodules, and by kind and shape of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import modules
from ..modules.cbam import is_map_convolution
from ..modules.submodules import must_be_called
from ..reference.cbam import POOLS


class Form(NamedTuple):
    """A published layer, up to its forward.

    children: the names of submodules that give it away. layers: the fused layers whose forward it may have. mismatch:
    why the submodules of a module with these names are not the published ones, or None. settings: attributes that the
    fused layer reads, as the submodules have them. example: a small input of random numbers, in float64 on the CPU.
    of_other_rank: one of another rank, where the published forward takes it too. common: many other layers have these
    names, and nothing is said of those. several: the forward returns several tensors. known: what public code with
    these submodules is known to compute instead, told where y differs.
    """

    children: frozenset[str]
    layers: tuple[type[nn.Module], ...]
    mismatch: Callable[[nn.Module], str | None]
    settings: Callable[[nn.Module], Mapping[str, Any]]
    example: Callable[[nn.Module, torch.Generator], Tensor]
    of_other_rank: Callable[[nn.Module, torch.Generator], Tensor] | None = None
    common: bool = False
    several: bool = False
    known: str = ""


def find_form(module: nn.Module) -> Form | None:
    """The form whose names a module has; of several, the one with the most names. Linear attention over channels has
    no submodules: it is known by its one parameter, and by an eps or a function l2_norm that it holds."""
    names = set(module._modules.keys())
    if not names and module._parameters.keys() == {"gamma"} and not module._buffers:
        held = vars(module).keys() & {"eps", "l2_norm"}
        gamma = module._parameters["gamma"]
        return CHANNELS if held and gamma is not None and tuple(gamma.shape) == (1,) else None
    return next((form for form in FORMS if form.children <= names), None)


def _differs(path: str, child: Any, kind: type[nn.Module], **expected: Any) -> str | None:
    """Why a submodule is not a plain module of a kind with these attributes, or None."""
    if not isinstance(child, kind):
        found = type(child)
        name = f"{found.__module__}.{found.__name__}" if found.__name__ == kind.__name__ else found.__name__
        return f"{path} is a {name}, expected a {kind.__name__.lstrip('_')}"
    if must_be_called(child):
        told = "that must be called (for a forward, weights or hooks of its own)"
        return f"{path} is a {type(child).__name__} {told}, expected a plain {kind.__name__.lstrip('_')}"
    for name, value in expected.items():
        if (found := getattr(child, name)) != value:
            told = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else found
            return f"{path}.{name}: got {told}, expected {value}"
    return None


def _first(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


_GATE_CONV = {
    "in_channels": 2,
    "out_channels": 1,
    "kernel_size": (3, 3, 3),
    "stride": (1, 1, 1),
    "padding": (1, 1, 1),
    "dilation": (1, 1, 1),
    "groups": 1,
    "padding_mode": "zeros",
    "bias": None,
}


def _unit(letters: str, *names: str) -> Form:
    """A unit of arXiv 2204.09303 with these gates."""

    def mismatch(unit: nn.Module) -> str | None:
        segments = getattr(unit, "num_segments", None)
        if not isinstance(segments, int) or segments < 1:
            return f"num_segments: got {segments!r}, expected the number of frames of a clip"
        if more := [
            f"{letter}_conv" for letter in "CTHW" if letter not in letters and f"{letter}_conv" in unit._modules
        ]:
            return f"it has {', '.join(more)} beside the submodules of {' or '.join(names)}"
        reasons = []
        for letter in letters:
            reasons.append(_differs(f"{letter}_conv", unit._modules[f"{letter}_conv"], nn.Conv3d, **_GATE_CONV))
            if uses_bn(unit):
                reasons.append(_differs(f"{letter}_bn", unit._modules.get(f"{letter}_bn"), _BatchNorm, num_features=1))
        return _first(*reasons)

    def uses_bn(unit: nn.Module) -> bool:
        return bool(getattr(unit, "use_BN", any(f"{letter}_bn" in unit._modules for letter in letters)))

    return Form(
        frozenset(f"{letter}_conv" for letter in letters),
        tuple(getattr(modules, name) for name in names),
        mismatch,
        lambda unit: {"use_BN": uses_bn(unit)},
        # Lengths that no two axes share: a gate with its axes in another order has another result.
        lambda unit, generator: _normal((2 * unit.num_segments, 3, 4, 5), generator),
    )


def _cbam_mismatch(block: nn.Module) -> str | None:
    """CBAM of Jongchan/attention-module, with or without its spatial gate."""
    gate = block._modules["ChannelGate"]
    mlp = getattr(gate, "_modules", {}).get("mlp")
    if (reason := _differs("ChannelGate.mlp", mlp, nn.Sequential)) is not None or len(mlp) != 4:
        return reason or f"ChannelGate.mlp has {len(mlp)} submodules, expected Flatten, Linear, ReLU, Linear"
    if (reason := _differs("ChannelGate.mlp.1", mlp[1], nn.Linear)) is not None:
        return reason
    c, hidden = mlp[1].in_features, mlp[1].out_features
    known = getattr(gate, "pool_types", ())
    if not isinstance(known, (list, tuple)) or not known or any(name not in POOLS for name in known):
        return f"ChannelGate.pool_types: got {known!r}, expected names of {', '.join(POOLS)}"
    reasons = [
        None if type(mlp[2]) is nn.ReLU else f"ChannelGate.mlp.2 is a {type(mlp[2]).__name__}, expected a ReLU",
        _differs("ChannelGate.mlp.3", mlp[3], nn.Linear, in_features=hidden, out_features=c),
    ]
    if "SpatialGate" in block._modules:
        spatial = getattr(block._modules["SpatialGate"], "_modules", {}).get("spatial")
        conv, bn = (getattr(spatial, "_modules", {}).get(name) for name in ("conv", "bn"))
        plain = {"in_channels": 2, "out_channels": 1, "bias": None}
        if (reason := _differs("SpatialGate.spatial.conv", conv, nn.Conv2d, **plain)) is not None:
            return reason
        if not is_map_convolution(conv):
            return f"SpatialGate.spatial.conv is {conv}, expected an odd kernel that keeps H and W"
        if bn is not None:
            reasons.append(_differs("SpatialGate.spatial.bn", bn, _BatchNorm, num_features=1))
    return _first(*reasons)


def _cbam_form(*children: str) -> Form:
    return Form(
        frozenset(children),
        (modules.CBAM,),
        _cbam_mismatch,
        lambda block: {"gates_are_read": True, "no_spatial": "SpatialGate" not in block._modules},
        lambda block, generator: _normal((3, block.ChannelGate.mlp[1].in_features, 4, 5), generator),
    )


def _pointwise(path: str, child: Any, kind: type[nn.Module], **expected: Any) -> str | None:
    axes = 1 if kind is nn.Conv1d else 2
    plain = {"kernel_size": (1,) * axes, "stride": (1,) * axes, "padding": (0,) * axes, "groups": 1}
    return _differs(path, child, kind, **plain, **expected)


def _block_mismatch(block: nn.Module) -> str | None:
    """EANet's External_attention."""
    conv1, linear_0, linear_1, conv2 = (block._modules[name] for name in ("conv1", "linear_0", "linear_1", "conv2"))
    if (reason := _differs("conv1", conv1, nn.Conv2d) or _differs("linear_0", linear_0, nn.Conv1d)) is not None:
        return reason
    c, k = conv1.in_channels, linear_0.out_channels
    if (reason := _differs("conv2", conv2, nn.Sequential)) is not None or len(conv2) != 2:
        return reason or f"conv2 has {len(conv2)} submodules, expected a convolution and a batch norm"
    return _first(
        _pointwise("conv1", conv1, nn.Conv2d, out_channels=c),
        _pointwise("linear_0", linear_0, nn.Conv1d, in_channels=c),
        _pointwise("linear_1", linear_1, nn.Conv1d, in_channels=k, out_channels=c, bias=None),
        _pointwise("conv2.0", conv2[0], nn.Conv2d, in_channels=c, out_channels=c, bias=None),
        _differs("conv2.1", conv2[1], _BatchNorm, num_features=c),
    )


def _heads_mismatch(attention: nn.Module) -> str | None:
    """EAMLP's Attention in transformer_block.py."""
    trans, first, second, proj = (attention._modules[name] for name in ("trans_dims", "linear_0", "linear_1", "proj"))
    if (reason := _differs("trans_dims", trans, nn.Linear) or _differs("linear_0", first, nn.Linear)) is not None:
        return reason
    heads = getattr(attention, "num_heads", None)
    wide, d = trans.out_features, first.in_features
    if not isinstance(heads, int) or heads * d != wide:
        return f"num_heads: got {heads!r}, expected the {wide} features of trans_dims over {d}, those of linear_0"
    return _first(
        _differs("linear_1", second, nn.Linear, in_features=first.out_features, out_features=d),
        _differs("proj", proj, nn.Linear, in_features=wide, out_features=trans.in_features),
        _dropouts(attention),
    )


def _dropouts(attention: nn.Module) -> str | None:
    return _first(*(_differs(name, attention._modules[name], nn.Dropout) for name in ("attn_drop", "proj_drop")))


def _token_mismatch(attention: nn.Module) -> str | None:
    """EAMLP's Attention in token_performer.py and, with other names, in token_transformer.py."""
    names = ("linear_0", "linear_1") if "linear_0" in attention._modules else ("linear_1", "linear_2")
    query, key, value, proj = (attention._modules[name] for name in ("q_linear", *names, "proj"))
    if (reason := _differs("q_linear", query, nn.Linear) or _differs(names[0], key, nn.Linear)) is not None:
        return reason
    d = query.out_features
    for name, linear in ((names[1], value), ("proj", proj)):
        if getattr(linear, "bias", None) is None:
            return f"{name}.bias: got None, expected one"
    return _first(
        _differs(names[0], key, nn.Linear, in_features=d, bias=None),
        _differs(names[1], value, nn.Linear, in_features=key.out_features, out_features=d),
        _differs("proj", proj, nn.Linear, in_features=d, out_features=d),
        _dropouts(attention),
    )


def _token_form(key: str, value: str, layer: type[nn.Module]) -> Form:
    return Form(
        frozenset({"q_linear", key, value, "attn_drop", "proj", "proj_drop"}),
        (layer,),
        _token_mismatch,
        lambda attention: {},
        lambda attention, generator: _tokens(attention.q_linear.in_features, generator),
    )


def _linear_mismatch(attention: nn.Module) -> str | None:
    """Linear attention's position attention module, and MANet's kernel attention."""
    query, key, value = (attention._modules[f"{name}_conv"] for name in ("query", "key", "value"))
    if (reason := _differs("key_conv", key, nn.Conv2d)) is not None:
        return reason
    c, d = key.in_channels, key.out_channels
    gamma = attention._parameters.get("gamma")
    if gamma is None or tuple(gamma.shape) != (1,):
        found = None if gamma is None else tuple(gamma.shape)
        return f"gamma: got {found}, expected a parameter of shape (1,)"
    return _first(
        _pointwise("query_conv", query, nn.Conv2d, in_channels=c, out_channels=d),
        _pointwise("key_conv", key, nn.Conv2d),
        _pointwise("value_conv", value, nn.Conv2d, in_channels=c, out_channels=c),
    )


def _efficient_mismatch(attention: nn.Module) -> str | None:
    """efficient-attention's module."""
    keys, values = attention._modules["keys"], attention._modules["values"]
    if (reason := _differs("keys", keys, nn.Conv2d) or _differs("values", values, nn.Conv2d)) is not None:
        return reason
    c, k, v = keys.in_channels, keys.out_channels, values.out_channels
    heads = getattr(attention, "head_count", None)
    if not isinstance(heads, int) or heads < 1 or k % heads or v % heads:
        return f"head_count: got {heads!r}, expected a divisor of the {k} features of keys and the {v} of values"
    return _first(
        _pointwise("keys", keys, nn.Conv2d),
        _pointwise("queries", attention._modules["queries"], nn.Conv2d, in_channels=c, out_channels=k),
        _pointwise("values", values, nn.Conv2d, in_channels=c),
        _pointwise("reprojection", attention._modules["reprojection"], nn.Conv2d, in_channels=v, out_channels=c),
    )


def _catt_mismatch(attention: nn.Module) -> str | None:
    """CATT: attention in the sample beside that to a dictionary."""
    att, fc = attention._modules["att"], attention._modules["fc"]
    parts = {name: getattr(att, "_modules", {}).get(name) for name in ("query", "key", "value")}
    if (reason := _differs("fc", fc, nn.Linear)) is not None:
        return reason
    dim, heads = fc.out_features, _heads_of_catt(attention)
    dictionary = attention._parameters.get("M")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        return f"heads: got {heads!r}, expected a divisor of the {dim} features of fc"
    if dictionary is None or dictionary.ndim != 3 or dictionary.shape[0] != 1 or dictionary.shape[2] != dim:
        return f"M: got {None if dictionary is None else tuple(dictionary.shape)}, expected a parameter [1, S, {dim}]"
    sizes = {"in_features": dim, "out_features": dim}
    return _first(
        _differs("fc", fc, nn.Linear, in_features=2 * dim),
        *(_differs(f"att.{name}", part, nn.Linear, **sizes) for name, part in parts.items()),
    )


def _heads_of_catt(attention: nn.Module) -> Any:
    of_bert = getattr(attention._modules["att"], "num_attention_heads", None)
    return vars(attention).get("heads", of_bert)


def _complement_mismatch(attention: nn.Module) -> str | None:
    """CaaM's attention of a vision transformer."""
    qkv, proj, heads = attention._modules["qkv"], attention._modules["proj"], getattr(attention, "num_heads", None)
    if (reason := _differs("qkv", qkv, nn.Linear)) is not None:
        return reason
    dim = qkv.in_features
    if not isinstance(heads, int) or heads < 1 or dim % heads or not isinstance(getattr(attention, "scale", 0), float):
        return f"num_heads: got {heads!r}, expected a divisor of {dim}"
    return _first(
        _differs("qkv", qkv, nn.Linear, out_features=3 * dim),
        _differs("proj", proj, nn.Linear, in_features=dim, out_features=dim),
        _dropouts(attention),
    )


def _halo_mismatch(attention: nn.Module, names: tuple[str, str], holder: str, keys: int, heads: str) -> str | None:
    """What HaloNet's attention is in both layouts: its sizes, and its tables of relative positions."""
    block, halo, count = (vars(attention).get(name) for name in ("block_size", "halo_size", heads))
    if not all(isinstance(n, int) and n > 0 for n in (block, halo, count)) or keys % count:
        return f"block_size, halo_size, {heads}: got {block!r}, {halo!r}, {count!r}, expected integers above 0"
    expected = 2 * (block + 2 * halo) - 1, keys // count
    for name in names:
        table = getattr(attention._modules[holder], name, None)
        if not isinstance(table, nn.Parameter) or tuple(table.shape) != expected:
            found = None if table is None else tuple(table.shape)
            return f"{holder}.{name}: got {found}, expected a parameter of shape {expected}"
    return None


def _halonet_mismatch(attention: nn.Module) -> str | None:
    """halonet-pytorch's."""
    to_q, to_kv, to_out = (attention._modules[name] for name in ("to_q", "to_kv", "to_out"))
    if (reason := _differs("to_q", to_q, nn.Linear)) is not None:
        return reason
    dim, keys = to_q.in_features, to_q.out_features
    return _first(
        _differs("to_kv", to_kv, nn.Linear, in_features=dim, out_features=2 * keys),
        _differs("to_out", to_out, nn.Linear, in_features=keys, out_features=dim),
        _halo_mismatch(attention, ("rel_height", "rel_width"), "rel_pos_emb", keys, "heads"),
    )


def _timm_halo_mismatch(attention: nn.Module) -> str | None:
    """timm's, without a stride."""
    q, kv, pool = attention._modules["q"], attention._modules["kv"], attention._modules.get("pool")
    if (
        reason := _pointwise("q", q, nn.Conv2d) or _pointwise("kv", kv, nn.Conv2d, in_channels=q.in_channels)
    ) is not None:
        return reason
    if pool is not None and type(pool) is not nn.Identity:
        return f"pool is a {type(pool).__name__}, expected none: modules.HaloAttn has no stride"
    return _halo_mismatch(attention, ("height_rel", "width_rel"), "pos_embed", q.out_channels, "num_heads")


def _blocks(channels: int, block: int, generator: torch.Generator) -> Tensor:
    """Maps of one block by two. Where blocks stand below one another alone, the published code happens to leave y with
    its channels innermost."""
    return _normal((2, channels, block, 2 * block), generator)


def _eps(attention: nn.Module) -> dict[str, float]:
    return {"eps": getattr(attention, "eps", 1e-6)}


def _plain_mismatch(attention: nn.Module) -> str | None:
    """The popular port with two linear layers."""
    mk, mv = attention._modules["mk"], attention._modules["mv"]
    if (reason := _differs("mk", mk, nn.Linear)) is not None:
        return reason
    return _differs("mv", mv, nn.Linear, in_features=mk.out_features, out_features=mk.in_features)


def _normal(sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")


def _tokens(features: int, generator: torch.Generator) -> Tensor:
    """Twelve tokens by which even the smallest eps shows.

    Eight of them are opposite in pairs, and larger from sample to sample. In every slot one of each pair wins. That
    leaves so little of the softmax over tokens to the last four that the smallest eps shows.
    """
    tokens = _normal((4, 12, features), generator)
    tokens[:, 4:8] = -tokens[:, :4]
    tokens[:, :8] *= torch.tensor([1.0, 8.0, 20.0, 50.0], dtype=torch.float64, device="cpu").view(4, 1, 1)
    return tokens


#: Linear attention over channels. Its published code takes square maps, as that over positions.
CHANNELS = Form(
    frozenset(),
    (modules.ChannelLinearAttention,),
    lambda attention: None,
    _eps,
    lambda attention, generator: _normal((2, 5, 2, 2), generator),
)

#: Those with more names come first: the names of one form may be a part of another's.
FORMS = (
    _unit("CTHW", "CinST", "STinC", "STinC2"),
    _unit("THW", "ST"),
    _cbam_form("ChannelGate", "SpatialGate"),
    _cbam_form("ChannelGate"),
    _unit("C", "C"),
    Form(
        frozenset({"trans_dims", "linear_0", "linear_1", "attn_drop", "proj", "proj_drop"}),
        (modules.MultiHeadExternalAttention,),
        _heads_mismatch,
        lambda attention: {"k": attention.linear_0.out_features},
        lambda attention, generator: _tokens(attention.trans_dims.in_features, generator),
    ),
    _token_form("linear_0", "linear_1", modules.TokenExternalAttention),
    _token_form("linear_1", "linear_2", modules.TransformerTokenExternalAttention),
    Form(
        frozenset({"keys", "queries", "values", "reprojection"}),
        (modules.EfficientAttention,),
        _efficient_mismatch,
        lambda attention: {"head_count": attention.head_count},
        lambda attention, generator: _normal((2, attention.keys.in_channels, 3, 4), generator),
    ),
    Form(
        frozenset({"conv1", "linear_0", "linear_1", "conv2"}),
        (modules.ExternalAttention2d,),
        _block_mismatch,
        lambda block: {"k": block.linear_0.out_channels},
        lambda block, generator: _tokens(block.conv1.in_channels, generator).mT.unflatten(2, (3, 4)),
    ),
    Form(
        frozenset({"query_conv", "key_conv", "value_conv"}),
        (modules.PositionLinearAttention, modules.KernelLinearAttention),
        _linear_mismatch,
        _eps,
        # Few positions, so that eps shows.
        lambda attention, generator: _normal((3, attention.key_conv.in_channels, 2, 2), generator),
    ),
    Form(
        frozenset({"to_q", "to_kv", "to_out", "rel_pos_emb"}),
        (modules.HaloAttention,),
        _halonet_mismatch,
        lambda attention: {"dim": attention.to_q.in_features},
        lambda attention, generator: _blocks(attention.to_q.in_features, attention.block_size, generator),
        known="HaloAttention leaves out the positions beyond the map, and halonet-pytorch up to 0.0.4 those inside",
    ),
    Form(
        frozenset({"q", "kv", "pos_embed"}),
        (modules.HaloAttn,),
        _timm_halo_mismatch,
        lambda attention: {"dim": attention.q.in_channels, "keys": attention.q.out_channels},
        lambda attention, generator: _blocks(attention.q.in_channels, attention.block_size, generator),
    ),
    Form(
        frozenset({"qkv", "attn_drop", "proj", "proj_drop"}),
        (modules.ComplementAttention,),
        _complement_mismatch,
        lambda attention: {},
        lambda attention, generator: _normal((2, 5, attention.qkv.in_features), generator),
        common=True,
        several=True,
    ),
    Form(
        frozenset({"att", "fc"}),
        (modules.CausalAttention,),
        _catt_mismatch,
        lambda attention: {"heads": _heads_of_catt(attention), "dropout": getattr(attention, "dropout", 0.0)},
        lambda attention, generator: _normal((2, 5, attention.fc.out_features), generator),
        common=True,
    ),
    Form(
        frozenset({"mk", "mv"}),
        (modules.ExternalAttention,),
        _plain_mismatch,
        lambda attention: {},
        lambda attention, generator: _tokens(attention.mk.in_features, generator),
        lambda attention, generator: _normal((2, 3, 4, attention.mk.in_features), generator),
    ),
)

#: Every layer that a published one may become.
FUSED_LAYERS = frozenset(layer for form in (*FORMS, CHANNELS) for layer in form.layers)
