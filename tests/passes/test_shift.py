"""The temporal shift: every backend moves exactly the right elements, and its gradient moves them back."""

from __future__ import annotations

import json
import subprocess
import sys

import pass_cases
import pytest
import torch
from conftest import BACKENDS_ON, COMPILED_ON, skip_unless_runnable
from pass_backends import each, passes_of
from pass_cases import Case, activation, in_order, pick, without
from torch.func import grad, vmap

import aia_kernels
from aia_kernels import backends, functional
from aia_kernels.common import maps
from aia_kernels.operators.temporal_shift import temporal_shift_by
from aia_kernels.testing import LAYOUTS, Shape, make_input
from benchmarks.offline import environment_without_interpreter

FAMILY = "temporal_shift"
SHAPE = Shape(2, 3, 9, 5, 4)


def moved(clips: torch.Tensor, fold: int, reverse: bool = False) -> torch.Tensor:
    """What is expected of x [B, T, C, H, W]: slices copied one by one."""
    y = torch.zeros_like(clips)
    ahead, behind = slice(0, fold), slice(fold, 2 * fold)
    if reverse:
        ahead, behind = behind, ahead
    y[:, :-1, ahead] = clips[:, 1:, ahead]
    y[:, 1:, behind] = clips[:, :-1, behind]
    y[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return y


def expected(x: torch.Tensor, fold: int, reverse: bool = False, t: int = SHAPE.t) -> torch.Tensor:
    if x.ndim == 5:
        return moved(x.transpose(1, 2), fold, reverse).transpose(1, 2)
    return moved(x.unflatten(0, (-1, t)), fold, reverse).flatten(0, 1)


def bits(x: torch.Tensor) -> torch.Tensor:
    """x as integers, so that NaN and the signs of zeros count."""
    return x.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.fixture(params=BACKENDS_ON, ids="-".join)
def shift_on(request):
    """The reference and the compiled backends of each device, chosen for the duration of the test."""
    backend, device = request.param
    skip_unless_runnable(backend, device, FAMILY)
    with aia_kernels.use_backend(backend):
        yield backend, device


#: Beyond the shared table: vectors of 16 bytes that keep to a fold and to a frame, that leave a fold or a frame, whose
#: source lies between vectors, that fold and frame both cut, and clips without vectors.
CASES = pass_cases.CASES | {
    "vectors": Case((2, 3, 16, 6, 6)),
    "vectors bf16": Case((2, 3, 16, 7, 7), "TCHW", torch.bfloat16),
    "vectors fp64 CTHW": Case((2, 3, 8, 4, 3), "CTHW", torch.float64),
    "vectors fp16 THWC": Case((2, 3, 64, 3, 2), "THWC", torch.float16),
    "vectors across folds": Case((2, 4, 6, 7, 7)),
    "vectors across folds THWC": Case((2, 3, 12, 3, 3), "THWC"),
    "vectors across frames bf16 CTHW": Case((1, 8, 16, 7, 7), "CTHW", torch.bfloat16),
    "vectors of several pixels bf16 THWC": Case((1, 4, 2, 5, 8), "THWC", torch.bfloat16),
    "vectors in several blocks CTHW": Case((2, 4, 20, 8, 15), "CTHW"),
    "no vectors in several blocks": Case((2, 3, 19, 9, 11), "TCHW", torch.float16),
}


@pytest.fixture(params=["cpu", "triton", "emulator", pytest.param("cuda", marks=pytest.mark.sanitizer)])
def shift(request, monkeypatch, uninitialized_memory_is_nan):
    """The raw pass of a backend; fresh memory is NaN, so that an element which it forgets shows."""
    with passes_of(FAMILY, request, monkeypatch) as passes:
        yield passes.temporal_shift


@pytest.fixture
def passes(request, monkeypatch, uninitialized_memory_is_nan):
    with passes_of(FAMILY, request, monkeypatch) as found:
        yield found


WHOLE = {name: case for name, case in CASES.items() if not case.elements}
#: What Triton's interpreter takes in every run.
INTERPRETED = pick(WHOLE, "prime CTHW", "bf16 THWC", "one pixel", "vectors across folds THWC", "fp64")


@each(
    (("cpu", "emulator", "cuda"), WHOLE),
    (("triton",), INTERPRETED),
    sweep=((("triton",), without(WHOLE, INTERPRETED)),),
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_pass(passes, case, reverse):
    x = activation(case)
    for fold in {0, x.shape[2] // 4, x.shape[2] // 2}:
        y = passes.temporal_shift(x, fold, reverse)
        assert y.dtype == x.dtype and maps.storage_order(y) == maps.storage_order(x)
        assert torch.equal(bits(y), bits(moved(x, fold, reverse)))


@pytest.mark.parametrize("order", maps.ORDERS)
def test_pass_in_several_blocks(shift, order, monkeypatch):
    """Folds that end inside a block of channels, and more elements than a program of Triton takes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("aia_kernels.triton.shift.BLOCK", 256)
    x = activation(Case((2, 3, 50, 2, 3), order))
    for fold in (6, 16, 25):
        assert torch.equal(bits(shift(x, fold, False)), bits(moved(x, fold)))


def test_pass_keeps_every_bit(shift):
    """Elements are moved, not computed with: -0, infinities and NaN arrive as they were."""
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1.0])
    x = in_order(special[torch.randint(6, (1, 3, 8, 2, 3))], "THWC").to(pass_cases.DEVICE)
    assert torch.equal(bits(shift(x, 3, False)), bits(moved(x, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_function_and_gradient(layout, shift_on):
    x = make_input(SHAPE, torch.float32, layout, device=shift_on[1]).requires_grad_()
    grad_y = make_input(SHAPE, torch.float32, layout, seed=1, device=shift_on[1])
    y = functional.temporal_shift(x, SHAPE.t, 4)
    assert y.stride() == x.stride()
    assert torch.equal(y, expected(x, 2))
    assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], expected(grad_y, 2, reverse=True))
    with torch.no_grad():
        assert torch.equal(functional.temporal_shift(x, SHAPE.t, 4), y)


def test_gradients_that_arrive_expanded_or_strided(shift_on):
    x = make_input(SHAPE, torch.float32, device=shift_on[1]).requires_grad_()
    y = functional.temporal_shift(x, SHAPE.t, 3)
    ones = torch.ones_like(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], expected(ones, 3, reverse=True))
    grad_y = make_input(SHAPE, torch.float32, "channels_last", device=shift_on[1])
    assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], expected(grad_y, 3, reverse=True))


def test_input_that_is_not_dense(shift_on):
    x = make_input(SHAPE._replace(h=10), torch.float32, device=shift_on[1])[:, :, ::2].requires_grad_()
    y = functional.temporal_shift(x, SHAPE.t, 2)
    assert torch.equal(y, expected(x, 4))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected(torch.ones_like(x), 4, reverse=True))


def test_numerical_derivatives(shift_on):
    x = make_input(Shape(1, 3, 5, 2, 2), torch.float64, device=shift_on[1]).requires_grad_()

    def nonlinear(x):
        return functional.temporal_shift(x, 3, 2).sin() * x

    assert torch.autograd.gradcheck(nonlinear, x)
    assert torch.autograd.gradgradcheck(nonlinear, x)


def test_torch_func(shift_on):
    xs = torch.stack([make_input(SHAPE, torch.float32, seed=seed, device=shift_on[1]) for seed in range(3)])
    found = vmap(grad(lambda x: functional.temporal_shift(x, SHAPE.t, 4).square().sum()))(xs)
    for x, one in zip(xs, found, strict=True):
        # The square of what survived the shift, differentiated: every element that is still in y, doubled.
        assert torch.equal(one, expected(2 * expected(x, 2), 2, reverse=True))
    x = xs[0].requires_grad_()
    y = functional.temporal_shift(x, SHAPE.t, 4)
    rows = vmap(lambda grad_y: torch.autograd.grad(y, x, grad_y, retain_graph=True)[0])(xs.detach())
    for grad_y, row in zip(xs.detach(), rows, strict=True):
        assert torch.equal(row, expected(grad_y, 2, reverse=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(layout, traced_on):
    module = aia_kernels.TemporalShift(SHAPE.t, 4)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (2, 3):
        x = make_input(SHAPE._replace(b=b), torch.float32, layout, device=traced_on[1]).requires_grad_()
        y = compiled(x)
        assert y.stride() == x.stride()
        assert torch.equal(y, expected(x, 2))
        (found,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(found, expected(2 * y, 2, reverse=True))


@pytest.mark.parametrize("backend, device", COMPILED_ON)
def test_operator(backend, device):
    skip_unless_runnable(backend, device, FAMILY)
    x = make_input(SHAPE, torch.float32, device=device).unflatten(0, (-1, SHAPE.t)).requires_grad_()
    torch.library.opcheck(temporal_shift_by, (x, 2, False, backend))


def test_exported(shift_on):
    backend, device = shift_on
    module, frames = aia_kernels.TemporalShift(SHAPE.t, 4), SHAPE.t * torch.export.Dim("clips", max=64)
    program = torch.export.export(
        module, (make_input(SHAPE, torch.float32, device=device),), dynamic_shapes=({0: frames},)
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("aia_kernels" in name for name in called) == (backend != "reference")
    x = make_input(SHAPE._replace(b=5), torch.float32, device=device)
    assert torch.equal(program.module()(x), expected(x, 2))


def test_the_chosen_backend_runs(monkeypatch):
    x = make_input(SHAPE, torch.float32)
    with aia_kernels.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for, but"):
        functional.temporal_shift(x, SHAPE.t)
    skip_unless_runnable("cpu", "cpu", FAMILY)
    assert backends.select("cpu", torch.float32, FAMILY) == "cpu"
    skip_unless_runnable("triton", "cpu", FAMILY)
    passes, calls = backends.passes("triton", FAMILY), []
    original = passes.temporal_shift
    monkeypatch.setattr(passes, "temporal_shift", lambda *args: calls.append(args) or original(*args))
    with aia_kernels.use_backend("triton"):
        functional.temporal_shift(x.requires_grad_(), SHAPE.t).sum().backward()
    assert len(calls) == 2


def test_degenerate_sizes(shift_on):
    device = shift_on[1]
    one_frame = make_input(Shape(3, 1, 8, 2, 2), torch.float32, device=device)
    y = functional.temporal_shift(one_frame, 1, 4)
    assert torch.equal(y, expected(one_frame, 2, t=1)) and not y[:, :4].any()
    few_channels = make_input(Shape(2, 3, 7, 2, 2), torch.float32, device=device)
    assert torch.equal(functional.temporal_shift(few_channels, 3, 8), few_channels)
    empty = torch.empty(0, 8, 2, 2, device=device, requires_grad=True)
    y = functional.temporal_shift(empty, 3)
    y.sum().backward()
    assert y.shape == empty.shape == empty.grad.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, shift_on):
    x = make_input(SHAPE, dtype, device=shift_on[1])
    with torch.autocast(shift_on[1], torch.bfloat16):
        y = functional.temporal_shift(x, SHAPE.t, 4)
    assert y.dtype == dtype and torch.equal(y, expected(x, 2))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.randn(8, 3, 4),), ValueError, r"x: got shape \(8, 3, 4\), expected"),
        (
            (torch.randn(7, 3, 4, 5), 4),
            ValueError,
            "x: got a batch of 7 frames, expected a multiple of num_segments = 4",
        ),
        ((torch.randn(8, 3, 4, 5), 0), ValueError, "num_segments: got 0, expected at least 1"),
        ((torch.randn(8, 3, 4, 5), 4, 1), ValueError, "fold_div: got 1, expected at least 2"),
        ((torch.ones(8, 3, 4, 5).int(), 4), TypeError, r"x: got torch\.int32, expected a floating-point"),
    ],
    ids=["rank", "batch", "num_segments", "fold_div", "integers"],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        functional.temporal_shift(*arguments)


def test_module():
    module = aia_kernels.TemporalShift(SHAPE.t, 4)
    x = make_input(SHAPE, torch.float32)
    assert torch.equal(module(x), expected(x, 2))
    assert not module.state_dict() and "num_segments=3, fold_div=4" in repr(module)


def test_machine_code():
    """Compiled for sm_90 without a GPU: no spill, and every access of 16 bytes where a frame's channels allow it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, __file__], env=environment_without_interpreter(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["spills"] == 0 and row["narrow"] == 0 and row["wide"] > 0, row


def main() -> None:
    """The rows that test_machine_code reads."""
    from aia_kernels.triton import shift, tiles
    from benchmarks.offline import triton_compile

    for order, dtype, sizes in (
        ("TCHW", torch.float32, (8, 8, 256, 56, 56)),
        ("TCHW", torch.bfloat16, (8, 8, 1024, 14, 14)),
        ("TCHW", torch.float32, (8, 8, 2048, 7, 7)),
        ("THWC", torch.bfloat16, (8, 8, 512, 28, 28)),
    ):
        x = in_order(torch.empty(sizes, device="meta", dtype=dtype), order)
        with triton_compile.recorded(tiles) as launches:
            shift.temporal_shift(x, sizes[2] // 8, False)
        code = triton_compile.machine_code(launches[0], 90)
        counts = {
            "wide": code.count("LDG", "STG", wide=True),
            "narrow": code.count("LDG", "STG", wide=False),
            "spills": code.count("LDL", "STL"),
        }
        print(json.dumps({"order": order, "dtype": str(dtype), "sizes": sizes, "registers": code.registers} | counts))


if __name__ == "__main__":
    main()
