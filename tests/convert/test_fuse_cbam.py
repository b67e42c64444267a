"""fuse: CBAM and its gates are found by what flows, whatever their wording."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cbam_variants import KINDS, Branches, InABottleneck, InOneForward, Light, PooledOneByOne, ReducedOverBothAxes
from conftest import some_of
from convert_cases import EXACT
from fuse_steps import (
    assert_copied_and_taken_back,
    assert_found,
    assert_found_in_a_graph,
    assert_found_when_compiled,
    assert_same_steps,
    build,
    called,
    inputs_of,
)
from torch import nn

import aia_kernels

# float32 sums of up to two hundred terms, twice, and of as many gradients: 1e2 roundings of 6e-8.
SINGLE = {"rtol": 1e-5, "atol": 2e-5}


class TestKinds:
    @some_of("call", [aia_kernels.fuse, aia_kernels.convert], aia_kernels.fuse)
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_is_found_and_computes_the_same(self, kind, call, monkeypatch):
        assert_found(kind, KINDS[kind], call, SINGLE, monkeypatch)

    @pytest.mark.parametrize("kind", [PooledOneByOne, ReducedOverBothAxes, Light])
    def test_other_sizes_and_layouts(self, kind):
        model = build(kind)
        own = copy.deepcopy(model)
        aia_kernels.fuse(model)
        for layout in (torch.contiguous_format, torch.channels_last):
            (x,) = inputs_of([(3, KINDS[kind][1][1], 9, 3)])
            x = x.contiguous(memory_format=layout)
            assert_same_steps(model, own, [x], **EXACT)
            assert copy.deepcopy(model)(x).is_contiguous(memory_format=layout)

    def test_copies_pickles_and_back(self):
        assert_copied_and_taken_back(ReducedOverBothAxes, KINDS[ReducedOverBothAxes])

    def test_a_part_with_hooks_is_called(self):
        model, seen = build(PooledOneByOne), []
        model.sa.conv.register_forward_hook(lambda *_: seen.append(1))
        report = aia_kernels.fuse(model)
        assert "CBAM" not in called(report)
        model(*inputs_of([KINDS[PooledOneByOne][1]]))
        assert seen == [1]


def test_branches_of_permuted_maps():
    """Each is its own module: the forward around them stays."""
    model, own = build(Branches), build(Branches)
    assert called(aia_kernels.fuse(model)) == ["SpatialGate"] * 3
    for sizes in ((2, 5, 5, 5), (1, 4, 6, 3)):
        assert_same_steps(model, own, inputs_of([sizes]), **EXACT)


class TestGraphs:
    @pytest.mark.parametrize("record", ["fx", "export"])
    @pytest.mark.parametrize("kind", [PooledOneByOne, InOneForward, InABottleneck, Light])
    def test_graph(self, kind, record):
        graph = assert_found_in_a_graph(kind, KINDS[kind], record).graph
        assert not [node for node in graph.nodes if "max" in str(node.target)]

    def test_compiled(self, monkeypatch):
        assert_found_when_compiled(InABottleneck, (["CBAM"], KINDS[InABottleneck][1]), monkeypatch)


class LookAlike(InOneForward):
    """A channel gate, and what a function makes of it and of x."""

    def __init__(self, recalibrate=torch.mul, pool=None, act=F.relu, squash=torch.sigmoid, other=False):
        super().__init__()
        self.recalibrate, self.act, self.squash = recalibrate, act, squash
        self.pool = pool or (lambda x: x)
        self.fc3 = nn.Linear(2, 6) if other else None

    def forward(self, x):
        pooled = self.pool(x)
        average = self.fc2(self.act(self.fc1(pooled.mean((2, 3)))))
        largest = (self.fc3 or self.fc2)(self.act(self.fc1(pooled.amax((2, 3)))))
        return self.recalibrate(x, self.squash(average + largest)[:, :, None, None])


class OtherConvolution(InOneForward):
    """A spatial gate whose convolution is none of CBAM's."""

    def __init__(self, **settings):
        super().__init__()
        del self.fc1, self.fc2
        self.conv = nn.Conv2d(2, 1, 3, **settings)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(torch.cat((x.mean(1, True), x.amax(1, True)), 1)))


class WithinWindows(InOneForward):
    """Pools that leave positions out, or count some twice, and still make one number of a map of 4 x 5."""

    def __init__(self, average, largest):
        super().__init__()
        self.average, self.largest = average, largest

    def forward(self, x):
        pools = (pool(x).flatten(1) for pool in (self.average, self.largest))
        return x * torch.sigmoid(sum(map(self.mlp, pools)))[:, :, None, None]


class Activated(InOneForward):
    """A spatial gate with an activation behind its convolution."""

    def __init__(self):
        super().__init__()
        del self.fc1, self.fc2

    def forward(self, x):
        return x * torch.sigmoid(F.relu(self.conv(torch.cat((x.mean(1, True), x.amax(1, True)), 1))))


class TestLookAlikes:
    @pytest.mark.parametrize(
        "average, largest",
        [
            (lambda x: F.avg_pool2d(x, x.size(2)), lambda x: F.max_pool2d(x, x.size(2))),
            (nn.AvgPool2d(4), nn.MaxPool2d(4)),
            (nn.AvgPool2d((4, 5), divisor_override=7), nn.MaxPool2d((4, 5))),
            (nn.AvgPool2d((4, 5), padding=1), nn.MaxPool2d((4, 5), padding=1)),
            (nn.AvgPool2d((4, 5)), nn.MaxPool2d((2, 3), dilation=2)),
            (lambda x: F.avg_pool1d(x.flatten(2), 16), lambda x: F.max_pool1d(x.flatten(2), 16)),
        ],
    )
    def test_pools_of_a_part_of_the_map(self, average, largest):
        """A compiler's graph is compared with nothing: what is taken for a gate must be one."""
        own, (x,) = build(lambda: WithinWindows(average, largest)), inputs_of([(2, 6, 4, 5)])
        torch._dynamo.reset()
        compiled = torch.compile(own, backend=aia_kernels.fuse_backend, options={"backend": "aot_eager"})
        torch.testing.assert_close(compiled(x), own(x), **EXACT)
        graph_module = torch.export.export(own, (x,)).module()
        assert not aia_kernels.fuse(graph_module).converted

    @pytest.mark.parametrize(
        "make, reason",
        [
            (Activated, "is a relu between the convolution and the sigmoid"),
            (lambda: LookAlike(act=F.gelu), "comes after a gelu"),
            (lambda: LookAlike(squash=F.hardsigmoid), "is a hardsigmoid"),
            (lambda: LookAlike(other=True), "different layers for the two pools"),
            (lambda: LookAlike(pool=torch.square), None),
            (lambda: LookAlike(recalibrate=torch.add), None),
            (lambda: LookAlike(recalibrate=lambda x, g: torch.cat((x * g, g.expand_as(x)))), "reads"),
            (lambda: OtherConvolution(padding=2, dilation=2), "from the maximum and the mean over channels"),
            (
                lambda: OtherConvolution(padding=1, padding_mode="reflect"),
                "from the maximum and the mean over channels",
            ),
        ],
    )
    def test_is_left_alone(self, make, reason):
        model, (x,) = build(lambda: nn.Sequential(make())), inputs_of([(2, 6, 4, 5)])
        own = copy.deepcopy(model)
        report = aia_kernels.fuse(model)
        assert_same_steps(model, own, [x], **EXACT)
        assert not report.converted, report
        assert reason is None or reason in str(report), report

    def test_a_squeeze_and_excitation_is_none(self):
        class Excited(InOneForward):
            def forward(self, x):
                return x * torch.sigmoid(self.mlp(x.mean((2, 3))))[:, :, None, None]

        report = aia_kernels.fuse(build(lambda: nn.Sequential(Excited())))
        assert not report.converted and not report.left_alone, report


class Twisted(nn.Module):
    """Gates that meet x with two axes exchanged: where both have one length only the order tells."""

    def __init__(self, n=6):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(2, 1, 3, padding=1), nn.Linear(n, 3), nn.Linear(3, n)

    def of_positions(self, x):
        return torch.sigmoid(self.conv(torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)))

    def of_channels(self, largest, average):
        return torch.sigmoid(self.fc2(F.relu(self.fc1(largest))) + self.fc2(F.relu(self.fc1(average))))


class GateTransposed(Twisted):
    def forward(self, x):
        return x * self.of_positions(x).transpose(2, 3)


class MapTransposed(Twisted):
    def forward(self, x):
        return x * self.of_positions(x.transpose(2, 3))


class OverRows(Twisted):
    def forward(self, x):
        return x * torch.sigmoid(self.conv(torch.stack((x.amax(2), x.mean(2)), 1)))


class OverRowsForChannels(Twisted):
    def forward(self, x):
        return x * torch.sigmoid(self.conv(torch.stack((x.amax(2), x.mean(2)), 1))).transpose(1, 2).expand_as(x)


class SamplesForChannels(Twisted):
    def forward(self, x):
        return x * self.of_channels(x.amax((2, 3)).t(), x.mean((2, 3)).t())[:, :, None, None]


class GateOfOtherSamples(Twisted):
    def forward(self, x):
        return x * self.of_channels(x.amax((2, 3)), x.mean((2, 3))).t()[:, :, None, None]


class OverChannelsAndRows(Twisted):
    def forward(self, x):
        return x * self.of_channels(x.amax((1, 2)), x.mean((1, 2)))[:, :, None, None]


@pytest.mark.parametrize("kind", Twisted.__subclasses__(), ids=lambda kind: kind.__name__)
def test_axes_of_one_length_are_told_apart(kind):
    """No numbers are compared when a network is compiled: the axes must be followed."""
    torch._dynamo.reset()
    x = inputs_of([(6, 6, 6, 6)])
    compiled = torch.compile(build(kind), backend=aia_kernels.fuse_backend, options={"backend": "eager"})
    assert_same_steps(compiled, build(kind), x, **EXACT)
    graph_module = torch.fx.symbolic_trace(build(kind))
    assert not aia_kernels.fuse(graph_module, *x).converted
