"""What is fused has the strides of what it replaces: views behind it take them, or not, as before."""

from __future__ import annotations

import copy
import itertools
import random

import convert_cases
import fuse_cases
import fuse_variants
import fuse_wordings
import memory_variants
import pytest
import torch
from fuse_steps import build
from torch import nn

import aia_kernels
from aia_kernels.common.layouts import in_order, memory_order
from benchmarks.published import external_attention as external
from benchmarks.published import halo_attention as halo
from benchmarks.published import linear_attention as linear

SHAPES = fuse_cases.KINDS | fuse_variants.VARIANTS | fuse_wordings.WORDINGS | memory_variants.KINDS
#: One of each way in which a result comes to be stored.
KINDS = {
    kind: SHAPES[kind][1]
    for kind in (
        *(fuse_cases.NormOfGroups, fuse_cases.HeadsOnMaps, fuse_cases.LinearOnMaps, fuse_cases.ConvolutionsOnMaps),
        *(fuse_cases.NoActivation, fuse_cases.NoOutput, fuse_cases.MemoriesAsParameters, fuse_cases.OnVolumes),
        *(fuse_variants.EinsumThatMoves, fuse_variants.FunctionalConvolutions),
        *(fuse_wordings.MapsByEinsum, fuse_wordings.WeightsOfLinears, fuse_wordings.GroupsOfConvolutions),
        *(memory_variants.UnitVectors, memory_variants.JoinedHeads, memory_variants.HeadsInALoop),
    )
}


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def part(x):
    """Some of the channels of a larger tensor in channels_last."""
    return channels_last(torch.cat((x, x), 1))[:, : x.shape[1]]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "part": part}
#: And an order of axes that is neither.
ALL_LAYOUTS = LAYOUTS | {"turned": lambda x: x.mT.contiguous().mT}


def in_channels_last(module):
    for p in module.parameters():
        if p.ndim in (4, 5):
            p.data = p.data.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[p.ndim])
    return module


def assert_stored_alike(found, expected):
    assert found.shape == expected.shape
    steps = zip(expected.shape, found.stride(), expected.stride(), strict=True)
    assert all(size == 1 or step == wanted for size, step, wanted in steps), (found.stride(), expected.stride())


def networks(kind):
    """A network with its weights in either layout."""
    network = build(kind, torch.float32).eval()
    marked = [in_channels_last(copy.deepcopy(network))] if any(p.ndim > 3 for p in network.parameters()) else []
    return [network, *marked]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_rewritten_forwards(kind):
    for own in networks(kind):
        model = copy.deepcopy(own)
        assert aia_kernels.fuse(model).converted
        for layout in ALL_LAYOUTS.values():
            for samples in (1, KINDS[kind][0]):
                x = layout(torch.randn(samples, *KINDS[kind][1:]))
                try:
                    expected = own(x)
                except RuntimeError:  # a view inside does not take such an x
                    continue
                assert_stored_alike(model(x), expected)
                with torch.no_grad():
                    assert_stored_alike(model(x), expected)


LAYERS = {
    "EANet": (lambda: external.ExternalAttention2d(6, 5), (3, 6, 4, 4)),
    "linear attention": (lambda: linear.PositionLinearAttention(8, 4), (2, 8, 4, 4)),
    "MANet": (lambda: linear.KernelAttention(8, 2), (2, 8, 4, 4)),
    "channels": (linear.ChannelLinearAttention, (2, 6, 4, 4)),
    "efficient attention": (lambda: linear.EfficientAttention(6, 4, 2, 8), (2, 6, 4, 4)),
    "CBAM": convert_cases.LAYERS["CBAM"][:2],
    "HaloAttention": (
        lambda: halo.HaloAttention(dim=6, block_size=2, halo_size=1, dim_head=4, heads=2),
        (2, 6, 4, 6),
    ),
    "HaloAttn": (lambda: halo.HaloAttn(6, 2, 2, 1), (2, 6, 4, 6)),
    "CinST": convert_cases.LAYERS["CinST"][:2],
}


class XFirst(external.ExternalAttention2d):
    """EANet's block with its sum the other way round: y is stored as x."""

    def forward(self, x):
        b, c, h, w = x.shape
        attn = self.linear_0(self.conv1(x).view(b, c, h * w)).softmax(-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return (x + self.conv2(self.linear_1(attn).view(b, c, h, w))).relu()


LAYERS["EANet, x first"] = (lambda: XFirst(6, 5), (3, 6, 4, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers(name):
    make, sizes = LAYERS[name]
    for change in (lambda module: module, in_channels_last):
        own = change(build(make, torch.float32))
        model = copy.deepcopy(own)
        report = aia_kernels.convert(model)
        assert report.converted
        for training in (False, True):
            for layout in LAYOUTS.values():
                x = layout(torch.randn(sizes))
                try:
                    expected = own.train(training)(x)
                except RuntimeError:  # a view inside does not take such an x
                    continue
                assert_stored_alike(model.train(training)(x), expected)
        report.undo()
        assert vars(model).keys() == vars(own).keys()


@pytest.mark.parametrize("kind", [external.ExternalAttention2d, fuse_cases.NoActivation], ids=["named", "other"])
def test_a_view_behind(kind):
    """z + x is contiguous, whatever x is: what views it goes on after the block was exchanged."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = kind(6, 5)

        def forward(self, x):
            return self.block(x).view(x.shape[0], -1)

    own = build(Head, torch.float32).eval()
    model, x = copy.deepcopy(own), channels_last(torch.randn(3, 6, 4, 5))
    aia_kernels.convert(model)
    torch.testing.assert_close(model(x), own(x), rtol=1e-5, atol=1e-5)  # float32 sums of tens of terms of order one
    compiled = torch.compile(own, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"})
    torch.testing.assert_close(compiled(x), own(x), rtol=1e-5, atol=1e-5)


COMPILED = fuse_cases.NormOfGroups, fuse_cases.LinearOnMaps, fuse_cases.NoActivation, fuse_cases.HeadsOnMaps


@pytest.mark.parametrize("kind", COMPILED, ids=lambda kind: kind.__name__)
def test_behind_a_compiler(kind):
    for own in networks(kind):
        for layout in (torch.Tensor.contiguous, channels_last):
            x = layout(torch.randn(KINDS[kind]))
            torch._dynamo.reset()
            compiled = torch.compile(own, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"})
            assert_stored_alike(compiled(x), own(x))


def test_graphs():
    own = build(fuse_cases.NoActivation, torch.float32).eval()
    for graph in (torch.fx.symbolic_trace(own), torch.export.export(own, (torch.randn(3, 6, 4, 5),)).module()):
        assert aia_kernels.fuse(graph).converted
        assert_stored_alike(graph(torch.randn(3, 6, 4, 5)), own(torch.randn(3, 6, 4, 5)))
    graph = torch.fx.symbolic_trace(own)
    aia_kernels.fuse(graph)
    x = channels_last(torch.randn(3, 6, 4, 5))
    assert_stored_alike(graph(x), own(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: aia_kernels.ExternalAttention2d(6, 5),
        lambda: aia_kernels.PositionLinearAttention(6, 2),
        lambda: aia_kernels.EfficientAttention(6, 4, 2, 8),
        lambda: aia_kernels.HaloAttention(dim=6, block_size=2, halo_size=1, dim_head=4, heads=2),
        lambda: aia_kernels.HaloAttn(6, num_heads=2, block_size=2, halo_size=1),
    ],
)
def test_the_layers_themselves_store_y_as_x(layer):
    module = build(layer, torch.float32)
    for layout in (torch.Tensor.contiguous, channels_last):
        x = layout(torch.randn(3, 6, 4, 6))
        assert_stored_alike(module(x), x)


def test_orders():
    x = torch.randn(2, 3, 4, 5)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)):
        y = in_order(x, order)
        assert memory_order(y) == order
        assert in_order(y, order) is y
        assert torch.equal(y, x)
    assert memory_order(channels_last(torch.randn(1, 3, 4, 5))) == (0, 2, 3, 1)
    assert memory_order(torch.randn(1, 3, 1, 1)) == (0, 1, 2, 3)


class TwoStreams(fuse_cases.NoActivation):
    """A block beside another tensor, which comes first in their sum or last."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x, y):
        z = self.of_block(x)
        return y + z if self.first else z + y

    def of_block(self, x):
        b, c, h, w = x.size()
        attn = self.linear_0(self.conv1(x).reshape(b, c, h * w)).softmax(-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        return self.conv2(self.linear_1(attn).view(b, c, h, w))


@pytest.mark.parametrize("first", [True, False])
def test_what_is_added_may_come_first(first):
    own = build(lambda: TwoStreams(first), torch.float32).eval()
    model = copy.deepcopy(own)
    assert aia_kernels.fuse(model).converted[0].now == "external_attention_block"
    for of_x, of_y in itertools.product(ALL_LAYOUTS.values(), repeat=2):
        x, y = (layout(torch.randn(3, 6, 4, 5)) for layout in (of_x, of_y))
        assert_stored_alike(model(x, y), own(x, y))


def test_order_of_what_is_made_of_a_tensor():
    """As torch's elementwise operators have it, of expanded tensors too."""
    r = random.Random(0)
    for _ in range(500):
        n = r.randint(2, 5)
        order = r.sample(range(n), n)
        x = torch.empty([r.choice((1, 2, 3)) for _ in order]).permute(order)
        if r.random() < 0.5:
            axis = r.randrange(n)
            x = x.narrow(axis, 0, 1).expand([2 if i == axis else -1 for i in range(n)])
        x = x[tuple(slice(None, None, r.choice((1, 2))) for _ in range(n))]
        assert_stored_alike(in_order(torch.empty(x.shape), memory_order(x)), x.sigmoid() * 1.0)
