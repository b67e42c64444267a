"""torch.compile: one graph, dynamic batch, the same numbers; the operators it records satisfy opcheck."""

from __future__ import annotations

import copy
import itertools

import external_cases
import pytest
import torch
from conftest import some_of
from external_cases import FORMS, SIZES, Sizes

import aia_kernels
from aia_kernels import backends, functional, testing
from aia_kernels.backends import choices
from aia_kernels.operators import attention_in_attention as operators
from aia_kernels.operators import external_attention as external_operators
from aia_kernels.reference import UNITS
from aia_kernels.testing import SHAPES, Shape, make_input, randomise

SHAPE = SHAPES["small"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_step(call, x, grad_y, module):
    x = x.detach().requires_grad_()
    y = call(x)
    module.zero_grad()
    y.backward(grad_y)
    return {
        "y": y.detach(),
        "x": x.grad,
        **{k: p.grad for k, p in module.named_parameters()},
        **dict(module.named_buffers()),
    }


def assert_equal_steps(found, expected):
    for name, value in expected.items():
        # Both paths run the same passes; only sums around them may be fused otherwise. float64 leaves ample room.
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("error:Dynamo detected")  # nothing that it traces is cached
# Two units have every pass of all five; fixed statistics enter in one way for all.
@some_of("name, train", itertools.product(UNITS, (True, False)), ("CinST", True), ("CinST", False), ("STinC2", True))
def test_full_graph_with_dynamic_batch(name, train, traced_on):
    _, device = traced_on
    in_one_graph_with_any_batch(name, train, device)


def test_full_graph_of_the_reference():
    """One gate and its gradients have all of it; the sweep has every unit."""
    with backends.use_backend("reference"):
        in_one_graph_with_any_batch("C", True, "cpu")


def in_one_graph_with_any_batch(name, train, device):
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().to(device).train(train)
    expected = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for clips in (2, 3, 5):
        shape = SHAPE._replace(b=clips)
        x, grad_y = (make_input(shape, torch.float64, seed=clips + k, device=device) for k in (0, 1))
        assert_equal_steps(train_step(compiled, x, grad_y, module), train_step(expected, x, grad_y, expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout, traced_on):
    _, device = traced_on
    module = randomise(aia_kernels.CinST(SHAPE.t)).double().to(device)
    if layout == "channels_last_3d":
        module.to(memory_format=torch.channels_last_3d)
    expected = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, grad_y = (make_input(SHAPE, torch.float64, layout, seed, device) for seed in (0, 1))
    found = train_step(compiled, x, grad_y, module)
    assert_equal_steps(found, train_step(expected, x, grad_y, expected))
    assert found["y"].stride() == found["x"].stride() == x.stride()


def test_inductor_around_the_unit(traced_on):
    """The unit between operations that inductor fuses and may want to lay out otherwise."""
    _, device = traced_on

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = randomise(aia_kernels.STinC(SHAPE.t))

        def forward(self, x):
            return self.unit(x.relu() * 2).sin()

    module = Block().double().to(device)
    expected = copy.deepcopy(module)
    x, grad_y = (make_input(SHAPE, torch.float64, "channels_last", seed, device) for seed in (0, 1))
    compiled = torch.compile(module, fullgraph=True)
    assert_equal_steps(train_step(compiled, x, grad_y, module), train_step(expected, x, grad_y, expected))


def test_derivative_of_a_recorded_backward_is_refused(compiled_on):
    backend, device = compiled_on
    x, weight, affine, fixed, *settings = unit_arguments(backend, device)
    y, *kept = operators.unit_forward(x, weight, affine, fixed, *settings)
    grad_x, *_ = operators.unit_backward(torch.ones_like(y), x, weight, *kept, *settings)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad_x.sum().backward()


def unit_arguments(backend, device, name="CinST", batch=(True, False, True, True)):
    n, shape = len(UNITS[name].letters), Shape(2, 2, 3, 2, 4)
    x = make_input(shape, torch.float64, device=device).unflatten(0, (shape.b, shape.t)).requires_grad_()
    weight = torch.randn(n, 2, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    affine = torch.randn(n, 2, dtype=torch.float64, device=device, requires_grad=True)
    fixed = torch.rand(n, 2, dtype=torch.float64, device=device)
    return x, weight, affine, fixed, name, backend, list(batch[:n]), [1e-5] * n, [""] * n


@pytest.mark.parametrize("shared", ["THW", "CTHW"])
@pytest.mark.parametrize("name", ["CinST", "STinC"])
def test_gates_that_share_a_norm(name, shared, traced_on):
    """A norm that serves several gates moves once for each, in the order of the published calls, compiled or not."""
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().to(traced_on[1])
    for letter in shared:
        setattr(module, f"{letter}_bn", module.T_bn)
    x = make_input(SHAPE, torch.float64, device=traced_on[1])
    plain, compiled = copy.deepcopy(module), copy.deepcopy(module)
    plain = aia_kernels.to_reference(plain)
    for call in (module, plain, torch.compile(compiled, backend="aot_eager", fullgraph=True)):
        call(x)
    assert module.T_bn.num_batches_tracked == len(shared)
    for other in (plain, compiled):
        for (key, found), expected in zip(other.named_buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@some_of("name", UNITS, "C", "CinST", "STinC2")
def test_opcheck_of_the_unit(name, compiled_on):
    backend, device = compiled_on
    torch.library.opcheck(operators.unit_forward, unit_arguments(backend, device, name))


@some_of("name", UNITS, "CinST", "STinC2")
def test_evaluation_without_gradients_keeps_nothing(name):
    """One operator without indices, where the backend has it; else, and with gradients, the one that keeps them."""
    if backends.select("cpu", torch.float64, "attention_in_attention") != "cpu":
        pytest.skip("only C++ has the unit as one pass")
    module = randomise(getattr(aia_kernels, name)(SHAPE.t)).double().eval()
    compiled, recorded = recorded_operators(module, dynamic=True)
    for clips in (2, 3):
        x = make_input(SHAPE._replace(b=clips), torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-11, atol=1e-11)
    kept, evaluated = (f"aia_kernels.unit_{what}.default" for what in ("forward", "evaluate"))
    assert recorded == [kept if UNITS[name].averaged else evaluated]
    compiled(x)
    assert recorded[1:] == [kept]


def recorded_operators(module: torch.nn.Module, dynamic: bool) -> tuple[torch.nn.Module, list[str]]:
    """The module behind torch.compile, which runs what it records, and the operators of this package in it."""
    recorded: list[str] = []

    def recording(graph, _inputs):
        recorded.extend(str(node.target) for node in graph.graph.nodes if "aia_kernels" in str(node.target))
        return graph.forward

    return torch.compile(module, fullgraph=True, backend=recording, dynamic=dynamic), recorded


@pytest.mark.parametrize("dynamic", [False, True], ids=["sizes known", "sizes unknown"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("slots, tokens", [(1, 9), (3, 9), (20, 9), (20, 900)])
def test_evaluation_of_external_attention_keeps_nothing(slots, tokens, dtype, dynamic, monkeypatch):
    """It is left to the compiler where that is told there is little to save, and else one operator."""
    if backends.select("cpu", torch.float64, "external_attention") != "cpu":
        pytest.skip("only C++ has an evaluation of its own")
    monkeypatch.setattr(choices, "CALL_COST", choices.gain(2 * 100, 20) // 4)
    module = aia_kernels.ExternalAttention(6, slots).to(dtype)
    torch.nn.init.normal_(module.mk.weight)
    compiled, recorded = recorded_operators(module, dynamic)
    # Sums of at most 20 values below 3, of a map and memories rounded once, differ by a few roundings of 2^-8.
    tolerance = 1e-11 if dtype == torch.float64 else 2.0**-5
    for samples in (2, 3):
        x = torch.randn(samples, tokens, 6, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=tolerance, atol=tolerance)
    left = slots < choices.FEW_SLOTS or (not dynamic and tokens <= 100)
    assert {*recorded} == (set() if left else {"aia_kernels.external_attention_evaluate.default"})


@pytest.mark.parametrize("slots", [3, 20])
def test_opcheck_of_evaluated_external_attention(slots):
    if backends.select("cpu", torch.float32, "external_attention") != "cpu":
        pytest.skip("only C++ has an evaluation of its own")
    key, value = (torch.randn(slots, 6), torch.randn(5, slots))
    for bias in (None, torch.randn(5)):
        arguments = torch.randn(2, 9, 6), key, value, bias, 1e-9, "cpu"
        torch.library.opcheck(external_operators.external_attention_evaluate, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["sizes known", "sizes unknown"])
@pytest.mark.parametrize("slots, tokens", [(3, 900), (20, 9), (20, 900)])
def test_a_small_step_is_left_to_the_compiler(slots, tokens, dynamic, monkeypatch):
    """Few slots of any number of tokens; others by the count of what the passes save, where sizes are known."""
    if backends.select("cpu", torch.float64, "external_attention") != "cpu":
        pytest.skip("auto has no fused passes to choose here")
    monkeypatch.setattr(choices, "CALL_COST", choices.gain(2 * 100, 20) // 4)
    module = aia_kernels.ExternalAttention(6, slots).double()
    torch.nn.init.normal_(module.mk.weight)
    compiled, recorded = recorded_operators(module, dynamic)
    x, grad_y = (torch.randn(2, tokens, 6, dtype=torch.float64) for _ in range(2))
    found = train_step(compiled, x, grad_y, module)
    with backends.use_backend("reference"):
        assert_equal_steps(found, train_step(module, x, grad_y, module))
    left = slots < choices.FEW_SLOTS or (not dynamic and tokens <= 100)
    assert recorded == ([] if left else ["aia_kernels.external_attention_forward.default"])


@pytest.mark.parametrize("cost", [10**6, 0], ids=["small", "large"])
@pytest.mark.parametrize("samples, slots", [(1, 40), (1, 4), (3, 4)])
def test_a_small_block_is_left_to_the_compiler(samples, slots, cost, monkeypatch):
    """Folded where that saves products, by the statistics of the batch, which move the running ones."""
    if backends.select("cpu", torch.float64, "external_attention") != "cpu":
        pytest.skip("auto has no fused passes to choose here")
    monkeypatch.setattr(choices, "CALL_COST", cost)
    module = aia_kernels.ExternalAttention2d(24, slots).double()
    expected = copy.deepcopy(module)
    compiled, recorded = recorded_operators(module, dynamic=False)
    x, grad_y = (torch.randn(samples, 24, 3, 5, dtype=torch.float64) for _ in range(2))
    found = train_step(compiled, x, grad_y, module)
    with backends.use_backend("reference"):
        wanted = train_step(expected, x, grad_y, expected)
    unseen = "conv1.bias"  # rounding of zero in the one, zero in the other
    assert_equal_steps(found, {key: value for key, value in wanted.items() if key != unseen})
    assert found[unseen].abs().max() < 1e-10
    left = cost > 0 or slots > 24
    assert recorded == ([] if left else ["aia_kernels.external_attention_block_forward.default"])


def test_opcheck_of_evaluation(compiled_on):
    backend, device = compiled_on
    x, weight, affine, fixed, name, *_ = unit_arguments(backend, device)
    if not hasattr(backends.passes(backend, "attention_in_attention"), "evaluate"):
        pytest.skip(f"the {backend} backend has no evaluate")
    scale, shift, mean, var = ([*of.detach().T[i].split(1)] for of in (affine, fixed) for i in (0, 1))
    shift[1] = mean[0] = var[0] = None
    weights, eps = [*weight.detach().split(1)], [1e-5] * 4
    arguments = x.detach(), weights, scale, shift, mean, var, name, backend, eps
    torch.library.opcheck(operators.unit_evaluate, arguments)


@pytest.mark.parametrize("context", [1, 3], ids=["channel", "spacetime"])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_opcheck_of_the_passes(backend, context):
    if (reason := aia_kernels.available_backends()[backend]) is not None:
        pytest.skip(reason)
    from aia_kernels.common import maps

    passes = backends.passes(backend, "attention_in_attention")
    shape = (2, 3, 4, 5, 6)
    x, grad_y = (torch.randn(shape, device=backend) for _ in range(2))
    dims = [n for d in maps.map_dims(shape, context, passes.map_order("TCHW")) for n in d]
    norm = torch.rand(context, 4, device=backend)
    weight = list(torch.randn(context, 2, 3, 3, 3, device=backend).split(1))
    pooled, argmax = passes.pool(x, context, None, 0)
    ones, nothing = [torch.ones(1, device=backend) for _ in weight], [None] * context
    gate, z = passes.gate_again(pooled, weight, norm, dims)
    statistics = [torch.rand(1, 3, device=backend) for _ in weight]
    tracked = [torch.zeros((), dtype=torch.int64, device=backend)]
    calls = {
        "pool": (x, context, gate, context),
        "gate": (pooled, weight, ones, nothing, ones, ones, [1e-5] * context, [True] * context, dims),
        "gate_again": (pooled, weight, norm, dims),
        "gate_backward_reduce": (gate, z, norm, dims),
        "gate_backward": (gate, z, norm, None, norm[:, :3].contiguous(), pooled, weight, dims),
        "move_statistics_": (ones, [one.clone() for one in ones], tracked, statistics, 0.1),
        "recalibrate": (x, gate, context),
        "recalibrate_reduce": (grad_y, x, context),
        "unpool_reduce": (x, pooled, argmax, context, context),
        "unpool": (grad_y, gate, pooled, argmax, context, gate, context, pooled, argmax, context),
    }
    for name, arguments in calls.items():
        # No autograd formula on purpose: derivatives belong to the unit.
        torch.library.opcheck(
            getattr(torch.ops.aia_kernels, name), arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.filterwarnings("error:Dynamo detected")  # nothing that it traces is cached
@some_of(
    "form, train",
    [(form, train) for form in FORMS if form != "dropout" for train in (True, False)],
    *[(form, True) for form in FORMS if form != "dropout"],
    ("block", False),  # no other form has a graph of its own in evaluation
)
def test_full_graph_of_external_attention(form, train, external_traced_on):
    device = external_traced_on[1]
    external_in_one_graph_with_any_batch(form, train, device)


@some_of("form", ["eps", "block"], "block")
def test_full_graph_of_the_reference_of_external_attention(form):
    with backends.use_backend("reference"):
        external_in_one_graph_with_any_batch(form, True, "cpu")


def external_in_one_graph_with_any_batch(form, train, device):
    module = external_cases.make(form, SIZES["small"], device=device).train(train)
    expected = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for b in (2, 3, 5):
        sizes = SIZES["small"]._replace(b=b)
        x, grad = (make(form, sizes, device=device) for make in (external_cases.make_input, external_cases.make_grad))
        assert_equal_steps(train_step(compiled, x, grad, module), train_step(expected, x, grad, expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_full_graph_with_dropout(external_on):
    """The graph draws its mask with the generator's state at the call, under aot_eager as eager draws it."""
    module = external_cases.make("shared heads", SIZES["small"], device=external_on[1])
    x = external_cases.make_input("shared heads", SIZES["small"], device=external_on[1])

    def call(x):
        parameters = module.memory_key, module.memory_value
        return functional.external_attention(x, *parameters, heads=2, dropout=0.5)

    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        results.append(torch.autograd.grad(run(x).sin().sum(), tuple(module.parameters())[:2]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@some_of("form, transposed", itertools.product(("plain", "block"), (False, True)), ("plain", False), ("block", True))
def test_inductor_around_external_attention(form, transposed, external_traced_on):
    device = external_traced_on[1]

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = external_cases.make(form, SIZES["prime"], device=device)

        def forward(self, x):
            return self.layer(x.relu() * 2).sin()

    module = Around()
    expected = copy.deepcopy(module)
    x = external_cases.make_input(form, SIZES["prime"], device=device, transposed=transposed)
    grad = external_cases.make_grad(form, SIZES["prime"], device=device)
    compiled = torch.compile(module, fullgraph=True)
    assert_equal_steps(train_step(compiled, x, grad, module), train_step(expected, x, grad, expected))


def external_arguments(backend, device):
    """Arguments of each whole-layer operator, between them with and without everything that is optional."""
    sizes = Sizes(2, 2, 3, 4, 6)
    x = external_cases.make_input("plain", sizes, device=device)
    maps = external_cases.make_input("block", sizes, device=device).flatten(2).mT
    parameters = [torch.randn(*s, dtype=torch.float64, device=device) for s in ((2, 6, 2), (2, 5, 6), (10,))]
    matrices = [torch.randn(*s, dtype=torch.float64, device=device) for s in ((6, 4), (4, 6), (4,), (4,))]
    padding = torch.zeros(2, 6, dtype=torch.bool, device=device)
    padding[0, 3:] = True
    keep = torch.randint(0, 2, (2, 6, 12), dtype=torch.uint8, device=device)
    fixed = torch.rand(2, 4, dtype=torch.float64, device=device) + 0.5
    forward, block = external_operators.external_attention_forward, external_operators.external_attention_block_forward
    return {
        "double_normalize": (external_operators.double_normalize_forward, (x, padding, 2, 1e-6, "", backend)),
        "everything": (forward, (x, *parameters, padding, keep, 3, 1e-6, "", 2.0, backend)),
        "nothing": (forward, (maps, *parameters[:2], None, None, None, 6, 0.0, "", 1.0, backend)),
        "block in training": (block, (maps, *matrices, None, 1e-9, True, 1e-5, "", backend)),
        "block in evaluation": (block, (maps, *matrices[:2], None, None, fixed, 1e-9, False, 1e-5, "", backend)),
    }


@pytest.mark.parametrize(
    "case", ["double_normalize", "everything", "nothing", "block in training", "block in evaluation"]
)
def test_opcheck_of_external_attention(case, external_compiled_on):
    operator, arguments = external_arguments(*external_compiled_on)[case]
    arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    if case == "block in evaluation":
        arguments[5].requires_grad_(False)  # running statistics have no gradient
    torch.library.opcheck(operator, arguments)


def test_derivative_of_a_recorded_backward_of_external_attention_is_refused(external_compiled_on):
    logits = torch.randn(2, 5, 6, device=external_compiled_on[1], requires_grad=True)
    settings = None, 6, 0.0, "", external_compiled_on[0]
    attention, mass = external_operators.double_normalize_forward(logits, *settings)
    grad = external_operators.double_normalize_backward(torch.ones_like(attention), attention, mass, *settings)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
