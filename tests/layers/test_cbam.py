"""CBAM (arXiv 1807.06521) and CaaM's pair of it (arXiv 2108.08782): the formulas, the published names, derivatives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from agreement import EXACT, assert_forward_mode, assert_grad_and_vmap, assert_within_budget
from conftest import COMPILED_ON, skip_unless_runnable
from kept_memory import kept_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import aia_kernels
from aia_kernels import CBAM, CausalCBAM, ChannelGate, SpatialGate, functional, testing
from aia_kernels.backends import choices
from aia_kernels.reference import MLP, Gate, Norm
from benchmarks.published import cbam as published

FAMILY = "cbam"
COST = choices.FOLDING_COST


LAYERS = {
    "CBAM": lambda: CBAM(6, 2),
    "CBAM, one hidden feature, 3 x 3": lambda: CBAM(5, 5, kernel_size=3),
    "CBAM, max": lambda: CBAM(6, 3, pool_types=["max"]),
    "CBAM, pools twice": lambda: CBAM(6, 3, pool_types=["avg", "max", "avg"]),
    "CBAM, mixed pools": lambda: CBAM(6, 3, pool_types=["mix", "max", "mix"]),
    "CBAM, other pools": lambda: CBAM(6, 3, pool_types=["lse", "lp", "avg"]),
    "CBAM, no spatial gate": lambda: CBAM(6, 2, no_spatial=True),
    "CBAM, one channel": lambda: CBAM(1, 1),
    "ChannelGate": lambda: ChannelGate(6, 2),
    "SpatialGate": lambda: SpatialGate(),
    "CausalCBAM": lambda: CausalCBAM(6, 2),
}
MAIN = ("CBAM", "CausalCBAM")


def channels_of(name: str) -> int:
    return {"CBAM, one hidden feature, 3 x 3": 5, "CBAM, one channel": 1}.get(name, 6)


def layer(name: str, dtype=torch.float64, device="cpu") -> nn.Module:
    return testing.randomise(LAYERS[name]()).to(device, dtype)


def sample(name: str, b=2, h=5, w=7, seed=0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, channels_of(name), h, w, generator=generator, dtype=torch.float64).to(dtype)


def formula(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The papers' equations, element by element where it matters: y and x - y."""
    y = x
    of_channels = module if isinstance(module, ChannelGate) else getattr(module, "ChannelGate", None)
    of_positions = module if isinstance(module, SpatialGate) else getattr(module, "SpatialGate", None)
    if of_channels is not None:
        _, first, _, second = of_channels.mlp
        total = 0
        for name in of_channels.pool_types:
            flat = y.reshape(*y.shape[:2], -1)
            if name == "avg":
                pooled = flat.sum(2) / flat.shape[2]
            elif name == "max":
                pooled = torch.stack([torch.stack([row.max() for row in one]) for one in flat])
            elif name == "mix":
                pooled = (
                    flat.sum(2) / flat.shape[2] + torch.stack([torch.stack([*map(max, one)]) for one in flat])
                ) / 2
            elif name == "lp":
                pooled = flat.pow(2).sum(2).pow(0.5)
            else:
                pooled = flat.exp().sum(2).log()
            hidden = (pooled @ first.weight.T + first.bias).clamp(min=0)
            total = total + hidden @ second.weight.T + second.bias
        y = y / (1 + (-total).exp())[:, :, None, None]
    if of_positions is not None:
        conv, bn = of_positions.spatial.conv, of_positions.spatial.bn
        pooled = torch.stack((y.amax(1), y.sum(1) / y.shape[1]), 1)
        k = conv.kernel_size[0]
        windows = F.pad(pooled, (k // 2,) * 4).unfold(2, k, 1).unfold(3, k, 1)  # [B, 2, H, W, k, k]
        z = (windows * conv.weight[0, :, None, None]).sum((1, 4, 5))
        if bn.training:
            mean, var = z.mean(), z.var(correction=0)
        else:
            mean, var = bn.running_mean, bn.running_var
        u = (z - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias
        y = y / (1 + (-u).exp()).unsqueeze(1)
    return y, x - y


def results(module: nn.Module, x: torch.Tensor, call=None) -> tuple[torch.Tensor, ...]:
    found = (module if call is None else call)(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_formula(name, train, layout, cbam_on):
    """Values, gradients and running statistics, against the equations under autograd in float64."""
    module = layer(name, device=cbam_on[1]).train(train)
    bn = getattr(getattr(module, "SpatialGate", module), "spatial", nn.Module())
    before = copy.deepcopy(bn)
    x = sample(name).to(cbam_on[1]).contiguous(memory_format=layout).requires_grad_()
    found = results(module, x)
    expected = formula(module, x)[: len(found)]
    weights = [sample(name, seed=3 + i).to(x.device) for i in range(len(found))]
    leaves = (x, *module.parameters())
    for y, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(y, exact, **EXACT)
        assert y.stride() == x.stride()
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(of, weights, strict=True)), leaves)
        for of in (found, expected)
    ]
    for got, exact in zip(*grads, strict=True):
        torch.testing.assert_close(got, exact, **EXACT)
    if hasattr(before, "bn"):
        of_channels = ChannelGate.forward(module.ChannelGate, x) if hasattr(module, "ChannelGate") else x
        before(torch.stack((of_channels.amax(1), of_channels.mean(1)), 1))
        for key, value in before.state_dict().items():
            torch.testing.assert_close(bn.state_dict()[key], value, **EXACT)


PUBLISHED_KEYS = [
    "ChannelGate.mlp.1.weight",
    "ChannelGate.mlp.1.bias",
    "ChannelGate.mlp.3.weight",
    "ChannelGate.mlp.3.bias",
    "SpatialGate.spatial.conv.weight",
    "SpatialGate.spatial.bn.weight",
    "SpatialGate.spatial.bn.bias",
    "SpatialGate.spatial.bn.running_mean",
    "SpatialGate.spatial.bn.running_var",
    "SpatialGate.spatial.bn.num_batches_tracked",
]


def test_published_names_shapes_and_initialization():
    torch.manual_seed(5)
    module = CBAM(64)
    torch.manual_seed(5)
    slow = published.CBAM(64)
    assert list(module.state_dict()) == PUBLISHED_KEYS == list(slow.state_dict())
    for key, value in slow.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key
    assert module.ChannelGate.mlp[1].weight.shape == (4, 64) and module.ChannelGate.mlp[3].weight.shape == (64, 4)
    bn = module.SpatialGate.spatial.bn
    assert (bn.momentum, bn.eps) == (0.01, 1e-5) and module.SpatialGate.spatial.conv.weight.shape == (1, 2, 7, 7)
    assert list(CBAM(64, no_spatial=True).state_dict()) == PUBLISHED_KEYS[:4]


def test_the_spatial_gate_of_the_pair_starts_at_a_half(cbam_on):
    module = CausalCBAM(32).to(cbam_on[1])
    assert not module.SpatialGate.spatial.bn.weight.any()
    x = torch.randn(2, 32, 5, 4).to(cbam_on[1])
    causal, confounder = module(x)
    torch.testing.assert_close(causal, 0.5 * module.ChannelGate(x))
    torch.testing.assert_close(causal + confounder, x)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["CBAM", "CausalCBAM"])
def test_published_module(name, train, cbam_on):
    """The operations of the authors, with shared parameters: values, gradients and buffers."""
    ours = testing.randomise(getattr(aia_kernels, name)(32)).double().to(cbam_on[1]).train(train)
    theirs = getattr(published, name)(32).double().to(cbam_on[1]).train(train)
    theirs.load_state_dict(ours.state_dict())
    steps = []
    for module in (ours, theirs):
        x = torch.randn(3, 32, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.to(cbam_on[1]).requires_grad_()
        found = results(module, x)
        sum((y.sin() * (i + 1)).sum() for i, y in enumerate(found)).backward()
        steps.append([*found, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for got, want in zip(*steps, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", [name for name in LAYERS if "other pools" not in name])
def test_numerical_derivatives(name, cbam_on):
    module = layer(name, device=cbam_on[1])
    x = sample(name, 2, 3, 2).to(cbam_on[1]).requires_grad_()
    wanted = x, *module.parameters()

    def call(x, *_parameters):
        return module(x)

    assert torch.autograd.gradcheck(call, wanted)
    if name in (*MAIN, "SpatialGate", "ChannelGate"):
        assert torch.autograd.gradgradcheck(call, wanted)


@pytest.mark.parametrize("one", [0, 1], ids=["causal alone", "confounder alone"])
def test_gradient_of_one_of_the_pair(one, cbam_on):
    module = layer("CausalCBAM", device=cbam_on[1])
    x = sample("CausalCBAM").to(cbam_on[1]).requires_grad_()
    weight = sample("CausalCBAM", seed=1).to(x.device)
    found = torch.autograd.grad((module(x)[one] * weight).sum(), (x, *module.parameters()))
    want = torch.autograd.grad((formula(module, x)[one] * weight).sum(), (x, *module.parameters()))
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (3, 64, 7, 7), (1, 33, 14, 3)], ids=str)
def test_agrees_with_the_reference(shape, layout, dtype, cbam_compiled_on):
    """Within twice the error of the reference in the same type (testing.py)."""
    backend, device = cbam_compiled_on
    module = testing.randomise(CBAM(shape[1])).to(device, dtype)
    x, grad = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        .to(device, dtype)
        .contiguous(memory_format=layout)
        for seed in (0, 1)
    )
    worst = testing.compare(module, x, grad, backend)[0]
    assert worst.ratio <= 1, worst


def test_ties_and_nan(cbam_on):
    """The first index takes the gradient of a maximum; NaN spreads as in torch.max, and stays in its sample."""
    module = layer("CBAM, max", device=cbam_on[1]).eval()
    x = torch.randint(0, 2, (2, 6, 4, 3), generator=torch.Generator().manual_seed(0)).double().to(cbam_on[1])
    x.requires_grad_()
    with aia_kernels.use_backend("reference"):
        want = torch.autograd.grad(module(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(module(x).sum(), x)[0], want, **EXACT)
    broken = x.detach().clone()
    broken[0, 2, 1, 1], broken[1, 0, 0, 0] = math.nan, math.inf
    with aia_kernels.use_backend("reference"):
        want = module(broken)
    torch.testing.assert_close(module(broken), want, equal_nan=True, **EXACT)
    assert want[0].isnan().any()


def test_a_gradient_of_nan_ends_at_a_hidden_layer_of_zeros(cbam_on):
    """As in relu's own backward: nothing passes where the hidden layer is 0."""
    module = layer("CBAM", device=cbam_on[1]).eval()
    module.ChannelGate.mlp[1].bias.data.fill_(-1e3)
    x = torch.randn((2, 6, 4, 3), dtype=torch.float64).to(cbam_on[1]).requires_grad_()
    module(x).backward(torch.full_like(x, math.nan))
    assert not module.ChannelGate.mlp[1].weight.grad.any() and module.ChannelGate.mlp[3].bias.grad.isnan().all()


def test_degenerate_sizes(cbam_on):
    for name, sizes in {"CBAM": (2, 6, 1, 1), "CBAM, one channel": (3, 1, 2, 1), "CausalCBAM": (1, 6, 1, 9)}.items():
        module = layer(name, device=cbam_on[1])
        x = torch.randn(sizes, dtype=torch.float64).to(cbam_on[1])
        for got, want in zip(results(module, x), formula(module, x), strict=False):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("sizes", [(0, 6, 4, 3), (2, 6, 0, 3)], ids=str)
@pytest.mark.parametrize("name", ["CBAM", "CausalCBAM", "ChannelGate", "SpatialGate"])
def test_empty(name, sizes, cbam_on):
    module = layer(name, device=cbam_on[1])
    before = copy.deepcopy(module.state_dict())
    x = torch.zeros(sizes, dtype=torch.float64, device=cbam_on[1], requires_grad=True)
    found = results(module, x)
    sum(y.sum() for y in found).backward()
    assert all(y.shape == x.shape for y in found) and x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", MAIN)
def test_height_and_width_exchanged(name, cbam_on):
    """Results lie in memory as x does, as those of the published code."""
    module, x = layer(name, device=cbam_on[1]).eval(), sample(name).to(cbam_on[1])
    turned = x.mT.contiguous().mT
    for found, expected in zip(results(module, turned), results(module, x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    y = module(turned)
    for result in y if isinstance(y, tuple) else (y,):
        assert result.stride() == turned.stride() != x.stride()


def test_input_of_other_strides(cbam_on):
    module = layer("CBAM", device=cbam_on[1])
    x = sample("CBAM", h=10).to(cbam_on[1])[:, :, ::2].requires_grad_()
    torch.testing.assert_close(module(x), formula(module, x)[0], **EXACT)
    grads = [torch.autograd.grad(of.sum(), x)[0] for of in (module(x), formula(module, x)[0])]  # expanded gradients
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_submodules_with_hooks_are_called(name):
    module, x = layer(name), sample(name)
    want, seen = results(module, x), []
    hooked = copy.deepcopy(module)
    for part in ("ChannelGate", "ChannelGate.mlp.1", "SpatialGate", "SpatialGate.spatial", "SpatialGate.spatial.conv"):
        again = layer(name)
        again.get_submodule(part).register_forward_hook(lambda *_, part=part: seen.append(part))
        for got, exact in zip(results(again, x), want, strict=True):
            torch.testing.assert_close(got, exact, **EXACT)
        assert part in seen
    hooked.SpatialGate.spatial.conv = nn.Conv2d(2, 1, 7, padding=3).double()  # a bias: not the published convolution
    assert all(y.shape == x.shape for y in results(hooked, x))


def test_running_statistics_of_torch(cbam_on):
    """momentum None and 0.01, and frozen ones."""
    x = sample("SpatialGate").to(cbam_on[1])
    for momentum, tracked in ((0.01, True), (None, True), (0.1, False)):
        ours = SpatialGate().double().to(cbam_on[1])
        ours.spatial.bn = nn.BatchNorm2d(1, momentum=momentum, track_running_stats=tracked).double().to(cbam_on[1])
        theirs = copy.deepcopy(ours)
        for _ in range(2):
            ours(x)
            theirs.spatial(torch.stack((x.amax(1), x.mean(1)), 1))
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, **EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_torch_func(name, cbam_on):
    module = layer(name, device=cbam_on[1]).eval()
    xs = torch.stack([sample(name, seed=seed) for seed in range(2)]).to(cbam_on[1])
    of_one = module if name == "CBAM" else _First(module)
    assert_grad_and_vmap(of_one, xs)
    assert_forward_mode(of_one, xs[0], xs[1])


class _First(nn.Module):
    """The causal of a pair, and its confounder with another weight."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        causal, confounder = self.module(x)
        return causal + 2 * confounder.sin()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["CBAM", "CausalCBAM", "CBAM, no spatial gate", "SpatialGate"])
def test_compiled(name, layout, cbam_traced_on):
    """One graph for any batch; values, gradients and statistics of plain eager."""
    torch._dynamo.reset()
    module = layer(name, device=cbam_traced_on[1])
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (2, 3):
        steps = []
        for of, call in ((module, compiled), (eager, eager)):
            x = sample(name, b).to(cbam_traced_on[1]).contiguous(memory_format=layout).requires_grad_()
            found = results(of, x, call)
            of.zero_grad()
            sum((y.sin() * (i + 1)).sum() for i, y in enumerate(found)).backward()
            assert all(y.stride() == x.stride() for y in found)
            steps.append([*found, x.grad, *(p.grad for p in of.parameters()), *of.buffers()])
        for got, want in zip(*steps, strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("confounder", [False, True])
@pytest.mark.parametrize("backend, device", COMPILED_ON)
def test_operator(backend, device, confounder):
    skip_unless_runnable(backend, device, FAMILY)
    module = layer("CBAM", device=device)
    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    x = sample("CBAM").to(device).requires_grad_()
    settings = ["avg", "max"], True, 1e-5, "", confounder, backend
    torch.library.opcheck(torch.ops.aia_kernels.cbam_forward, (x, *parameters, None, *settings))
    fixed = torch.tensor([[0.1, 1.2]], dtype=torch.float64, device=device)
    settings = ["max"], False, 1e-5, "", confounder, backend
    torch.library.opcheck(torch.ops.aia_kernels.cbam_forward, (x, *parameters, fixed, *settings))
    alone = [None] * 4 + parameters[4:]
    torch.library.opcheck(torch.ops.aia_kernels.cbam_forward, (x, *alone, fixed, *settings))


def test_exported(cbam_traced_on):
    module = layer("CausalCBAM", device=cbam_traced_on[1]).eval()
    batch = {0: torch.export.Dim("batch", max=64)}
    x = sample("CausalCBAM").to(cbam_traced_on[1])
    program = torch.export.export(module, (x,), dynamic_shapes=(batch,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("aia_kernels" in name for name in called) == (cbam_traced_on[0] != "reference")
    x = sample("CausalCBAM", 5).to(cbam_traced_on[1])
    for got, want in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    plain = program.run_decompositions(aia_kernels.decompositions())
    assert not any("aia_kernels" in str(node.target) for node in plain.graph.nodes)
    for got, want in zip(plain.module()(x), module(x), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("sizes", [(2, 64, 28, 28), (2, 512, 7, 7)], ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_bytes_kept_for_backward(name, sizes, cbam_compiled_on):
    """The target of the design: 1.3 |X| in float32."""
    x = torch.randn(sizes, device=cbam_compiled_on[1], requires_grad=True)
    module = getattr(aia_kernels, name)(sizes[1]).to(x.device)
    kept = kept_bytes(module if name == "CBAM" else _First(module), x)
    confounder = x.numel() * x.element_size() if name == "CausalCBAM" else 0  # of _First's sine
    assert kept - confounder < 1.3 * x.numel() * x.element_size()


def test_autocast(cbam_on):
    """Parameters in float32 beside activations in either type; gates in float32."""
    module = layer("CBAM", torch.float32, cbam_on[1])
    for dtype in (torch.float32, torch.bfloat16):
        x = sample("CBAM", dtype=dtype).to(cbam_on[1])
        with torch.autocast(cbam_on[1], torch.bfloat16):
            y = module(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, module(x.float()).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MAIN)
def test_triton_in_the_interpreter(name):
    """A whole layer on the Triton passes, with the framework's convolution between them."""
    skip_unless_runnable("triton", "cpu", FAMILY)
    module, x = layer(name), sample(name).requires_grad_()
    with aia_kernels.use_backend("triton"):
        found = results(module, x)
        grads = torch.autograd.grad(sum(y.sin().sum() for y in found), (x, *module.parameters()))
    expected = formula(module, x)[: len(found)]
    exact = torch.autograd.grad(sum(y.sin().sum() for y in expected), (x, *module.parameters()))
    for got, want in zip((*found, *grads), (*expected, *exact), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


class Recorder(TorchDispatchMode):
    """The passes of this package that ran, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith("aia_kernels::"):
            self.names.append(func._schema.name.removeprefix("aia_kernels::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("samples", [2, 17])
def test_nothing_runs_between_the_passes(samples):
    """All passes of a direction are one; those of a batch whose MLP is PyTorch's run once each: they read x three times
    and write it once forward, and read it four times and write it once backward."""
    skip_unless_runnable("cpu", "cpu", FAMILY)
    module, x = CBAM(32), torch.randn(samples, 32, 5, 4).requires_grad_()
    with Recorder() as forward, aia_kernels.use_backend("cpu"):
        y = module(x)
    with Recorder() as backward:
        y.sum().backward()
    if samples == 2:
        assert (forward.names, backward.names) == (["cbam_propagate_"], ["cbam_propagate_back"])
        return
    of_gate = ["cbam_pool_channels", "cbam_convolve", "cbam_spatial_gate"]
    assert forward.names == ["cbam_pool_positions", *of_gate, "cbam_recalibrate", "move_statistics_"]
    through_gate = ["cbam_spatial_gate_backward", "cbam_convolve_backward"]
    assert backward.names == ["cbam_recalibrate_reduce", *through_gate, "cbam_unpool_reduce", "cbam_unpool"]


class TestSmallChannelGates:
    """What "auto" makes of a few operators of PyTorch: no pass runs."""

    @pytest.fixture(autouse=True)
    def as_installed(self, monkeypatch, fused_at_any_size) -> None:
        skip_unless_runnable("cpu", "cpu", FAMILY)
        monkeypatch.setattr(choices, "FOLDING_COST", COST)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("pools", [("avg", "max"), ("max",), ("mix", "avg", "mix"), ("lp", "lse")], ids=str)
    def test_formula(self, pools, layout):
        module = testing.randomise(ChannelGate(6, 2, pools)).double()
        x = sample("ChannelGate").contiguous(memory_format=layout).requires_grad_()
        with aia_kernels.use_backend("reference"):
            want = module(x)
        got = module(x)
        torch.testing.assert_close(got, want, **EXACT)
        assert got.stride() == x.stride()
        inputs, grad = (x, *module.parameters()), torch.randn_like(x)
        torch.testing.assert_close(*(torch.autograd.grad(y, inputs, grad) for y in (got, want)), **EXACT)
        assert torch.autograd.gradgradcheck(module, (sample("ChannelGate", 1, 2, 3).requires_grad_(),))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_error_budget(self, dtype):
        module, x = layer("ChannelGate", dtype), sample("ChannelGate", dtype=dtype)
        assert_within_budget(testing.compare(module, x, sample("ChannelGate", seed=1, dtype=dtype), "auto"))

    @pytest.mark.parametrize("side, small", [(8, True), (64, False)])
    def test_by_counting(self, side, small):
        module, x = ChannelGate(64), torch.randn(1, 64, side, side)
        assert (module._of_a_small_call(x) is not None) == small
        with aia_kernels.use_backend("cpu"):
            assert module._of_a_small_call(x) is None

    @pytest.mark.parametrize("part", ["mlp", "mlp.0", "mlp.1", "mlp.2", "mlp.3"])
    def test_hooks_are_called(self, part):
        module, x, seen = layer("ChannelGate"), sample("ChannelGate"), []
        want = module(x)
        module.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(module(x), want, **EXACT)
        assert seen

    def test_errors_are_those_of_any_size(self):
        module, x = layer("ChannelGate"), sample("ChannelGate")
        for given, error, words in (
            (x[:, :5], ValueError, "weight_1 of mlp: got shape"),
            (x[0], ValueError, "x: got shape"),
            (x.float(), TypeError, "weight_1 of mlp: got torch.float64, expected torch.float32"),
        ):
            with pytest.raises(error, match=words):
                module(given)
        module.pool_types = ["median"]
        with pytest.raises(ValueError, match="pool_types: got"):
            module(x)


X = torch.randn(2, 6, 4, 5)
MLP_OF_6 = MLP(torch.randn(3, 6), torch.randn(3), torch.randn(6, 3), torch.randn(6))
GATE = Gate(torch.randn(1, 2, 7, 7), Norm(training=True))


def call(x=X, mlp=MLP_OF_6, gate=GATE, pool_types=("avg", "max")):
    return functional.cbam(x, mlp, gate, pool_types)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"x": X[0]}, ValueError, r"x: got shape \(6, 4, 5\), expected \[B, C, H, W\]"),
        ({"x": X.int()}, TypeError, r"x: got torch\.int32, expected a floating-point"),
        ({"x": X.numpy()}, TypeError, "x: got ndarray, expected a tensor"),
        ({"x": X.double()}, TypeError, r"weight_1 of mlp: got torch\.float32, expected torch\.float64"),
        ({"x": X.to("meta")}, ValueError, "weight_1 of mlp: got device cpu, expected that of x, meta"),
        ({"mlp": None, "gate": None}, ValueError, "mlp and gate: got None twice"),
        ({"mlp": (1, 2)}, TypeError, "mlp: got tuple, expected an MLP"),
        ({"gate": torch.ones(3)}, TypeError, "gate: got Tensor, expected a Gate"),
        ({"mlp": MLP_OF_6._replace(weight_1=None)}, TypeError, "weight_1 of mlp: got NoneType"),
        ({"mlp": MLP_OF_6._replace(weight_1=torch.ones(3, 5))}, ValueError, r"weight_1 of mlp: got shape \(3, 5\)"),
        ({"mlp": MLP_OF_6._replace(weight_2=torch.ones(3, 6))}, ValueError, r"weight_2 of mlp: .*expected \(6, 3\)"),
        ({"mlp": MLP_OF_6._replace(bias_1=torch.ones(6))}, ValueError, r"bias_1 of mlp: .*expected \(3,\)"),
        ({"mlp": MLP_OF_6._replace(bias_2=torch.ones(6).half())}, TypeError, r"bias_2 of mlp: got torch\.float16"),
        ({"gate": Gate(torch.ones(1, 2, 4, 4))}, ValueError, r"weight of gate: got shape \(1, 2, 4, 4\).*odd k"),
        ({"gate": Gate(torch.ones(1, 2, 3, 3, 3))}, ValueError, r"weight of gate: got shape \(1, 2, 3, 3, 3\)"),
        ({"gate": Gate(GATE.weight, Norm(torch.ones(2)))}, ValueError, r"weight of gate's norm: .*expected \(1,\)"),
        ({"gate": Gate(GATE.weight, Norm(running_mean=torch.ones(1)))}, ValueError, "expected both or neither"),
        ({"gate": Gate(GATE.weight, 3)}, TypeError, "norm of gate: got int"),
        ({"x": X[:1, :, :1, :1]}, ValueError, "x: .*expected more than one position for BN"),
        ({"pool_types": "avg"}, TypeError, "pool_types: got 'avg', expected a sequence"),
        ({"pool_types": ()}, ValueError, r"pool_types: got \(\), expected one name or more"),
        ({"pool_types": ("avg", "median")}, ValueError, "pool_types: got .*median"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        call(**arguments)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: CBAM(8.0), TypeError, "in_planes: got 8.0, expected an integer"),
        (lambda: CBAM(8, ["avg"]), TypeError, "reduction_ratio: got .*expected an integer"),
        (lambda: CBAM(8, 0), ValueError, "reduction_ratio: got 0, expected at least 1"),
        (lambda: CBAM(8), ValueError, "in_planes: got 8, expected at least reduction_ratio = 16"),
        (lambda: CBAM(8, 2, ["avg"]), TypeError, "kernel_size: got .*expected an integer"),
        (lambda: CBAM(8, 2, 4), ValueError, "kernel_size: got 4, expected an odd number"),
        (lambda: SpatialGate(-1), ValueError, "kernel_size: got -1, expected an odd number"),
        (lambda: ChannelGate(8, 16), ValueError, "gate_channels: got 8"),
        (lambda: CBAM(8, 2, pool_types=["median"])(torch.ones(1, 8, 2, 2)), ValueError, "pool_types: got"),
        (lambda: CBAM(8, 2)(torch.ones(1, 7, 2, 2)), ValueError, "weight_1 of mlp"),
        (lambda: SpatialGate()(torch.ones(7, 2, 2)), ValueError, r"x: got shape \(7, 2, 2\)"),
    ],
)
def test_bad_argument_of_a_module(make, error, words):
    with pytest.raises(error, match=words):
        make()
