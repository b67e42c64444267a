"""The roofline: counts are the design's budgets, the published flow is counted alike, the record is of this code."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")

from benchmarks import gpus, records, registry
from benchmarks.offline import ROOT, counting, environment_without_interpreter, roofline
from benchmarks.registry import linear_attention
from benchmarks.registry.attention_in_attention import HAS_INNER, NAMES, STAGES, UnitCase
from benchmarks.registry.cbam import GatesCase
from benchmarks.registry.external_attention import PLACES, LayerCase

AGAIN = "python -m benchmarks.offline.roofline --results benchmarks/results --page docs/benchmarks.md writes it again"

#: Reads and writes of x-sized tensors, forward and backward, without and with an inner context: DESIGN 2.2.
BUDGET = {False: ((2, 1), (3, 1)), True: ((3, 1), (4, 1))}


def unit(name: str, stage: str = "256x14x14", dtype: str = "fp32") -> UnitCase:
    return UnitCase(name, stage, 8, dtype, "contiguous", STAGES[stage])


def of_x(case, provider: str, mode: str) -> tuple[int, int]:
    return roofline.met(roofline.count(case, provider, mode), case.without_data().numel())


def layer_at(place: str) -> LayerCase:
    name, arguments, sizes = PLACES[place]
    return LayerCase(name, place, sizes[0], "fp32", "contiguous", sizes, tuple(arguments.items()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["64x56x56", "512x7x7"])
def test_a_unit_meets_x_as_often_as_designed(name, stage):
    case = unit(name, stage)
    (reads, writes), (backward_reads, backward_writes) = BUDGET[HAS_INNER[name]]
    # With fixed statistics a clip stays on chip: one operator, but for the unit that averages gates in between.
    assert of_x(case, "cuda", "eval") == ((reads, writes) if name == "STinC2" else (1, 1))
    assert of_x(case, "cuda", "step") == (reads + backward_reads, writes + backward_writes)
    assert sum(of_x(case, "cuda", "step")) == case.traffic("step")


@pytest.mark.parametrize("name", NAMES)
def test_the_published_flow_meets_x_far_more_often(name):
    reads, writes = of_x(unit(name), "published", "step")
    least = 2 if name == "C" else 8
    assert reads + writes > least * unit(name).traffic("step"), (reads, writes)


@pytest.mark.parametrize("name, most", [("C", 8), ("ST", 8), ("CinST", 13), ("STinC", 13), ("STinC2", 15)])
def test_every_launch_of_a_step_is_a_pass(name, most):
    """Forward and backward together, with one for the running statistics."""
    launches = roofline.count(unit(name, dtype="bf16"), "cuda", "step")
    assert len(launches) <= most and all(one.part for one in launches), [one.name for one in launches]


#: Of external attention's layers, the most launches of an evaluation and of a step.
LAUNCHES = {"ExternalAttention2d": (8, 36), "MultiHeadExternalAttention": (8, 26), "ExternalAttention": (4, 10)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_launches_of_external_attention(place, dtype):
    """What is not the block takes fewer than the published flow."""
    case = replace(layer_at(place), dtype=dtype)
    for mode, most in zip(registry.MODES, LAUNCHES[case.name], strict=True):
        launches = roofline.count(case, "cuda", mode)
        assert len(launches) <= most, [f"{one.part} {one.name}" for one in launches]
        assert case.name == "ExternalAttention2d" or len(launches) < len(roofline.count(case, "published", mode))


def test_bytes_of_a_step_are_those_of_x_and_of_its_maps():
    """CinST: nine times x; of the maps, by hand, what recalibrate and recalibrate_reduce meet."""
    case = unit("CinST")
    launches = {one.part: one for one in roofline.count(case, "cuda", "step") if one.part}
    c, h, w = case.sizes
    spacetime = case.clips * (c * h * w + case.segments * c * w + case.segments * h * c) * 4
    assert (launches["recalibrate"].read, launches["recalibrate"].written) == (case.x_bytes + spacetime, case.x_bytes)
    reduce = launches["recalibrate_reduce"]
    assert (reduce.read, reduce.written) == (2 * case.x_bytes, spacetime)


def test_the_block_of_external_attention_around_the_products_of_the_framework():
    """Three and eight are asked for (docs/benchmarks.md). z, the product before the last pass, is written and read; so
    is g, the gradient behind the ReLU, which is read three times where one was asked for."""
    case = layer_at("EANet 65x65")
    assert case.traffic("eval") == 3 and case.traffic("step") == 8
    assert of_x(case, "cuda", "eval") == (3, 2)
    assert of_x(case, "cuda", "step") == (8, 4)


@pytest.mark.parametrize("provider", ["cuda", "cpu"])
def test_cbam_meets_x_as_often_as_designed(provider):
    case = GatesCase("CBAM", "1024x14x14", 8, "bf16", "channels_last", (8, 1024, 14, 14), (("in_planes", 1024),))
    assert of_x(case, provider, "eval") == (3, 1) and case.traffic("eval") == 4
    assert of_x(case, provider, "step") == (7, 2) and case.traffic("step") == 9


@pytest.mark.parametrize("name", ["PositionLinearAttention", "EfficientAttention"])
@pytest.mark.parametrize("provider", ["cuda", "triton", "cpu"])
def test_attention_by_a_memory_meets_x_as_often_as_designed(name, provider):
    """Forward: x for keys and queries, for the sums, as the residual; y. Backward: x and the gradient of y for the
    memory, the latter also through it and as the residual's; x for the projections; and the gradient of x. At 512x32x32
    the sums are not kept, as they are 6 % of x: x is met once more for them."""
    chosen = [case for case in linear_attention.cases() if case.name == name and case.kind != "sweep"]
    for case in (case for case in chosen if case.sizes[1] < 512 and "," not in case.stage):
        assert of_x(case, provider, "eval") == (3, 1), case
        assert of_x(case, provider, "step") == (3 + 5, 1 + 1), case
        assert case.traffic("eval") == 4 and case.traffic("step") == 10
        assert sum(of_x(case, "published", "step")) > 3 * case.traffic("step")


#: The most launches of an evaluation and of a step. A pass of CUDA counts as one, though some take two: with those they
#: are as many as Triton's (test_memory_passes.py).
OF_MEMORIES = {
    "PositionLinearAttention": {"triton": (10, 31), "cuda": (9, 28)},
    "EfficientAttention": {"triton": (12, 38), "cuda": (11, 34)},
    "ChannelLinearAttention": {"triton": (16, 54), "cuda": (16, 54)},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", ["triton", "cuda"])
@pytest.mark.parametrize("name", OF_MEMORIES)
def test_launches_of_attention_by_a_memory(name, provider, dtype):
    """And all that they read and write, in |X|: what is as large as x, and four times over what keys and queries have.
    Those are a quarter of x, as are their gradients. A pass of CUDA counts all that it is given, of which it reads keys
    or queries. Over channels nothing folds: there it is less than what the published flow moves, in both types."""
    if provider == "triton":
        pytest.importorskip("triton", reason="its launches are counted")
    cases = (case for case in linear_attention.cases() if case.name == name and case.stage.endswith("x64x64"))
    for case in (replace(case, dtype=dtype) for case in cases):
        for mode, most in zip(registry.MODES, OF_MEMORIES[name][provider], strict=True):
            launches = roofline.count(case, provider, mode)
            assert len(launches) <= most, [f"{one.part} {one.name}" for one in launches]
            moved = sum(one.read + one.written for one in launches) / case.x_bytes
            if name == "ChannelLinearAttention":
                of_published = roofline.count(case, "published", mode)
                assert moved < 0.7 * sum(one.read + one.written for one in of_published) / case.x_bytes, case
            else:
                more = {"eval": 2, "step": 6 if provider == "triton" else 8}[mode]
                assert moved < case.traffic(mode) + more, case


def recorded() -> list[dict]:
    with (records.RESULTS / "roofline.csv").open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("name", NAMES)
def test_the_record_is_of_this_code(name):
    """Within a tenth: another version of the framework may split an operator."""
    case = unit(name, dtype="bf16")
    for mode in registry.MODES:
        launches = roofline.count(case, "cuda", mode)
        outside = sum(not one.part for one in launches)
        found = {column: str(value) for column, value in case.columns.items()} | {"mode": mode, "provider": "cuda"}
        (row,) = records.select(recorded(), **found | {"kind": "layer"})
        text = f"{name}, {mode}: {len(launches)} launches, {outside} of them outside of passes; "
        assert abs(len(launches) - int(row["launches"])) <= 0.1 * int(row["launches"]), (
            text + f"the record says {row['launches']}; {AGAIN}"
        )
        moved = sum(one.read + one.written for one in launches) / 1e6
        assert moved == pytest.approx(float(row["moved_mb"]), rel=0.1), f"megabytes moved: {AGAIN}"


@pytest.fixture(scope="module")
def counted_on_triton(tmp_path_factory) -> list[dict]:
    """Rows of a process without the interpreter, whose tiles are others."""
    pytest.importorskip("triton", reason="its launches are counted")
    folder = tmp_path_factory.mktemp("roofline")
    command = [sys.executable, "-m", "benchmarks.offline.roofline", "--results", folder, "--filter"]
    for family, words in (("attention_in_attention", "8clips-bf16 CinST-"), ("external_attention", "bf16 EANet")):
        done = subprocess.run(
            [*command, words, "--family", family],
            cwd=ROOT,
            env=environment_without_interpreter(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "case/s" not in done.stderr, done.stderr  # progress is for terminals
        (folder / "roofline.csv").rename(folder / f"{family}.csv")
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as opened:
            found += records.select(list(csv.DictReader(opened)), provider="triton")
    return found


def test_triton_meets_x_as_often_as_designed(counted_on_triton):
    units = records.select(counted_on_triton, kind="layer", name="CinST")
    assert {row["stage"] for row in units} == set(STAGES)
    for row in units:
        reads, writes = (3, 1) if row["mode"] == "eval" else (7, 2)
        assert (int(row["x_reads"]), int(row["x_writes"])) == (reads, writes), row["stage"]
    blocks = records.select(counted_on_triton, kind="layer", name="ExternalAttention2d")
    assert len(blocks) == 2 * 3
    for row in blocks:
        reads, writes = (2, 1) if row["mode"] == "eval" else (7, 3)
        assert (int(row["x_reads"]), int(row["x_writes"])) == (reads, writes), row["stage"]


def test_tritons_launches_and_products_are_all_there(counted_on_triton):
    """A gate of the batch takes two launches forward and three backward where CUDA's blocks wait for one another; its
    products are those of the folded algorithm."""
    for row in records.select(counted_on_triton, kind="layer", name="CinST"):
        of_cuda = roofline.count(unit("CinST", row["stage"], "bf16"), "cuda", row["mode"])
        # In evaluation CUDA has the unit as one; Triton's are a pool and a gate of each context, and the product.
        assert int(row["launches"]) == (5 if row["mode"] == "eval" else len(of_cuda) + 2 * 1 + 2 * 2), row["stage"]
    (row,) = records.select(counted_on_triton, kind="layer", stage="EANet 65x65", mode="eval")
    tokens, channels, slots = 65 * 65, 512, 64
    folding = 2 * 2 * channels * channels * slots
    assert float(row["gflop"]) == pytest.approx((2 * 2 * tokens * channels * slots + folding) / 1e9, rel=0.01)


def test_every_pointer_of_a_triton_kernel_is_read_or_written():
    pytest.importorskip("triton", reason="its kernels are read")
    from benchmarks.offline import triton_source

    found = {}
    for path in (ROOT / "aia_kernels" / "triton").glob("*.py"):  # a pass may have the name of its module
        module = importlib.import_module(f"aia_kernels.triton.{path.stem}")
        for kernel in (value for name, value in vars(module).items() if name.endswith("_kernel")):
            name, pointers = triton_source.name_of(kernel), {n for n in kernel.arg_names if n.endswith("_ptr")}
            reads, writes = (names & pointers for names in triton_source.accesses(kernel))
            assert reads | writes == pointers and writes, name
            found[name] = reads, writes
    assert len(found) > 20
    assert found["recalibrate.recalibrate_kernel"] == ({"x_ptr", "gate_ptr"}, {"y_ptr"})
    reads, writes = found["double_norm.backward_kernel"]
    assert writes == {"grad_ptr"} and "grad_ptr" in reads  # in place


class TestCounter:
    def launches(self, call) -> list[counting.Launch]:
        with counting.Counter() as counter:
            call()
        return counter.launches

    def test_views_and_allocations_are_no_launches(self):
        x = torch.empty(4, 6, device="meta")
        assert self.launches(lambda: (x.view(2, 12).t(), torch.empty_like(x), x[1:].unsqueeze(0), x.detach())) == []

    def test_an_expanded_axis_is_read_once_and_a_storage_once(self):
        x, row = torch.empty(4, 6, device="meta"), torch.empty(6, device="meta")
        (one,) = self.launches(lambda: x * row.expand(4, 6))
        assert (one.read, one.written, one.reads) == (x.nbytes + row.nbytes, x.nbytes, (24, 6))
        (one,) = self.launches(lambda: x * x)
        assert (one.read, one.written) == (x.nbytes, x.nbytes)

    def test_what_is_changed_in_place_is_read_and_written_and_what_is_overwritten_written(self):
        x, y = torch.empty(5, 5, device="meta"), torch.empty(5, 5, device="meta")
        (add,), (copy,) = self.launches(lambda: x.add_(y)), self.launches(lambda: x.copy_(y))
        assert (add.read, add.written) == (2 * x.nbytes, x.nbytes)
        assert (copy.read, copy.written) == (x.nbytes, x.nbytes)
        (zeros,) = self.launches(lambda: x.new_zeros(3))
        assert (zeros.read, zeros.written) == (0, 12)

    def test_products_have_operations(self):
        a, b, out = (torch.empty(s, device="meta") for s in ((3, 4), (4, 5), (3, 5)))
        calls = lambda: a @ b, lambda: torch.mm(a, b, out=out), lambda: out.addmm_(a, b)
        assert [self.launches(call)[0].flops for call in calls] == [2 * 3 * 4 * 5] * 3
        (one,) = self.launches(calls[1])
        assert (one.read, one.written) == (a.nbytes + b.nbytes, out.nbytes)


def test_predictions():
    machine = gpus.known("NVIDIA H200")
    assert machine is gpus.MACHINES["H200"] and gpus.known("NVIDIA A100-SXM4-80GB").name == "A100"
    assert gpus.known("cpu") is None
    names = {"NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H100 NVL": "H100 NVL"}
    assert {name: gpus.known(name).name for name in names} == names
    assert gpus.known("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    one = counting.Launch("", "copy", 10**9, 10**9, 0, torch.float32, (), ())
    paper = roofline.predict([one, one], machine)
    assert paper.roof == pytest.approx(2 * 2e9 / (gpus.ACHIEVED * 4.8e12))
    assert paper.graph == pytest.approx(2 * gpus.GRAPH_US / 1e6) and paper.eager > paper.graph
    measured = machine.with_roof(read=4e12, copy=2e12)
    assert roofline.predict([one], measured).roof == pytest.approx(2e9 / 2e12)
    assert measured.memory_seconds(10**9, 0) == pytest.approx(1e9 / 4e12)
    product = counting.Launch("", "mm", 1, 1, 67 * 10**12, torch.float32, (), ())
    assert roofline.predict([product], machine).roof == pytest.approx(1)
    found = roofline.columns([one], machine, seconds=2 * paper.roof)
    assert found["launches"] == 1 and found["of_roof"] == "0.250"
    assert set(roofline.columns([one], None, 1.0)) == {"launches", "moved_mb"}


def test_the_table_shows_the_main_inputs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: roofline, attention_in_attention -->\n\n<!-- end of table -->\n")
    arguments = ["--family", "attention_in_attention", "--filter", "CinST-512x7x7", "--page", str(page)]
    if "triton" in roofline.PROVIDERS:
        pytest.importorskip("triton", reason="its launches are counted")
    assert roofline.main(arguments) == 0
    lines = page.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:-1]] == ["unit", "---", "CinST"]
    assert len({line.count("|") for line in lines[2:-1]}) == 1
    assert roofline.main(["--filter", "no such case"]) == 2
