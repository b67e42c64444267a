"""convert: CATT, CaaM's pair of attentions and HaloNet's attention become the layers of this package."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_cases import EXACT, assert_same_objects, tensors
from fuse_steps import assert_same_steps, build, inputs_of
from torch import nn

import aia_kernels
from benchmarks.published import causal_attention as causal
from benchmarks.published import halo_attention as halo

TOKENS, MAPS = (2, 5, 6), (2, 6, 4, 6)
#: How to make each, the sizes of an input, and the layer.
LAYERS = {
    "CATT": (lambda: causal.CausalAttention(6, 2, 7), TOKENS, "CausalAttention"),
    "CaaM": (lambda: causal.ComplementAttention(6, 3), TOKENS, "ComplementAttention"),
    "halonet-pytorch": (
        lambda: halo.HaloAttention(dim=6, block_size=2, halo_size=1, dim_head=4, heads=2),
        MAPS,
        "HaloAttention",
    ),
    "timm": (lambda: halo.HaloAttn(6, 2, 2, 1, qkv_bias=True), MAPS, "HaloAttn"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_becomes_the_layer(name):
    make, sizes, layer = LAYERS[name]
    model = nn.ModuleDict({"inside": build(make)})
    own, before, keys = copy.deepcopy(model["inside"]), tensors(model), list(model.state_dict())
    report = aia_kernels.convert(model)
    assert [(entry.names, entry.now) for entry in report.converted] == [(("inside",), layer)], report
    assert type(model["inside"]) is getattr(aia_kernels, layer)
    assert_same_objects(model, before)
    assert list(model.state_dict()) == keys
    for training in (True, False):
        model["inside"].train(training), own.train(training)
        assert_same_steps(model["inside"], own, inputs_of([sizes]), **EXACT)
    report.undo()
    assert type(model["inside"]) is type(own) and vars(model["inside"]).keys() == vars(own).keys()
    assert_same_steps(model["inside"], own, inputs_of([sizes]), **EXACT)


@pytest.mark.parametrize("name", ["CATT", "CaaM"])
def test_dropout_is_where_it_was(name):
    """With all of it dropped the maps of attention are zero, and only biases are left."""
    make, sizes, _ = LAYERS[name]
    model = build(make)
    dropout = model.att.dropout if name == "CATT" else model.attn_drop
    aia_kernels.convert(model)
    dropout.p = 1.0
    (x,) = inputs_of([sizes])
    bias = model.fc.bias if name == "CATT" else model.proj.bias
    for y in model(x) if name == "CaaM" else (model(x),):
        torch.testing.assert_close(y, bias.expand_as(y), **EXACT)
    model.eval()
    assert not torch.allclose(*(y[0] for y in (model(x), model(2 * x))))


@pytest.mark.parametrize("name", ["CATT", "CaaM"])
def test_a_dropout_with_a_hook_sees_the_map_of_attention(name):
    make, sizes, _ = LAYERS[name]
    model, seen = build(make), []
    aia_kernels.convert(model)
    (x,) = inputs_of([sizes])
    expected = model(x)
    dropout = model.att.dropout if name == "CATT" else model.attn_drop
    dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for y, other in zip(model(x), expected, strict=True):
        torch.testing.assert_close(y, other, **EXACT)
    assert [t.shape[-2] for t in seen] == ([5, 10] if name == "CATT" else [5, 5])
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0].sum(-1)), **EXACT)


class SelfAttention(causal.ComplementAttention):
    """The attention of most vision transformers, which has the same submodules."""

    def forward(self, x):
        return super().forward(x)[0]


class InsideLeftOut(halo.HaloAttention):
    """As halonet-pytorch has it: what is left out is what is inside of the map."""

    def forward(self, x):
        (b, _, h, w), n, halo_size = x.shape, self.block_size, self.halo_size
        window = {"kernel_size": n + 2 * halo_size, "stride": n, "padding": halo_size}
        blocks = x.unfold(2, n, n).unfold(3, n, n).permute(0, 2, 3, 4, 5, 1).reshape(b, -1, n * n, x.shape[1])
        around = F.unfold(x, **window).view(b, x.shape[1], -1, blocks.shape[1]).permute(0, 3, 2, 1)
        q, k, v = self.to_q(blocks), *self.to_kv(around).chunk(2, dim=-1)
        q, k, v = (t.unflatten(3, (self.heads, -1)).transpose(2, 3).flatten(0, 2) for t in (q, k, v))
        logits = self.scale * q @ k.mT + self.rel_pos_emb(self.scale * q)
        inside = F.unfold(x.new_ones(1, 1, h, w), **window)[0].t()[None, :, None, None, :]
        logits = logits.view(b, -1, self.heads, *logits.shape[1:])
        o = logits.masked_fill(inside == 1, -torch.finfo(x.dtype).max).softmax(-1).flatten(0, 2) @ v
        o = self.to_out(o.view(b, -1, self.heads, n * n, o.shape[-1]).transpose(2, 3).flatten(3))
        return o.view(b, h // n, w // n, n, n, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def spoiled(name, change):
    def make():
        module = LAYERS[name][0]()
        change(module)
        return module

    return make


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: SelfAttention(6, 3), None),
        (spoiled("halonet-pytorch", lambda m: setattr(m, "scale", 1.0)), None),
        (
            lambda: InsideLeftOut(dim=6, block_size=2, halo_size=1, dim_head=4, heads=2),
            "leaves out the positions beyond the map, and halonet-pytorch up to 0.0.4 those inside",
        ),
        (spoiled("halonet-pytorch", lambda m: setattr(m, "halo_size", 2)), r"rel_height: got \(7, 4\)"),
        (spoiled("timm", lambda m: setattr(m, "pool", nn.AvgPool2d(2))), "pool is a AvgPool2d"),
        (spoiled("timm", lambda m: setattr(m, "q", nn.Conv2d(6, 6, 1, stride=2))), "q.stride: got"),
    ],
)
def test_look_alikes(make, reason):
    model = nn.Sequential(make())
    kind = type(model[0])
    report = aia_kernels.convert(model)
    if reason is None:  # another scale is a setting that the layer reads; most transformers are not spoken of
        assert not report.left_alone, report
        assert (type(model[0]) is kind) == (kind is SelfAttention)
    else:
        assert type(model[0]) is kind
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(str(report).replace("\n", " "))
