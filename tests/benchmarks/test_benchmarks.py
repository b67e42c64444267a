"""The benchmarks: the baseline is the published flow, wrong numbers get no time, the demo's pieces do what they say."""

import contextlib
import csv
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import aia_kernels

pytest.importorskip("tqdm", reason="the benchmarks show their progress with tqdm")
pytest.importorskip("matplotlib", reason="the benchmarks draw their rows with matplotlib")

from benchmarks import measure, passes, plot, providers, records, registry, run, table
from benchmarks.published import attention_in_attention as published
from benchmarks.published import external_attention as published_ea
from benchmarks.published.self_attention import SelfAttention
from benchmarks.registry import cbam, dot_product_attention, linear_attention
from benchmarks.registry.attention_in_attention import LAYOUTS, NAMES, STAGES, UnitCase
from benchmarks.registry.external_attention import PLACES, SWEEP, LayerCase, decided

GOLDEN = Path(__file__).parents[1] / "golden"
STORED = sorted(path.stem for path in GOLDEN.glob("*.npz"))
TINY = UnitCase("CinST", "5x6x4", 2, "fp32", "contiguous", (5, 6, 4), segments=3)
FAMILIES = tuple(registry.FAMILIES)
CPU_MISSING = {family: aia_kernels.available_backends(family)["cpu"] for family in aia_kernels.backends.FAMILIES}


def test_the_stored_vectors_are_there():
    assert {name.split("_")[0] for name in STORED} == {"aia", "ea"}


def published_of(name: str, sizes: tuple[int, ...]) -> nn.Module:
    """The published layer of a stored case with an input of these sizes."""
    family, kind, segments, *_ = name.split("_")
    if family == "aia":
        return published.UNITS[kind](int(segments[1:]), use_BN="nobn" not in name)
    return {
        "eanet": lambda: published_ea.ExternalAttention2d(sizes[1]),
        "eamlp": lambda: published_ea.MultiHeadExternalAttention(sizes[2], num_heads=2),
        "fightingcv": lambda: published_ea.ExternalAttention(sizes[2], S=8),
    }[kind]()


@pytest.mark.parametrize("name", STORED)
def test_published_equals_the_stored_vectors(name):
    stored = {key: torch.from_numpy(np.array(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    layer = published_of(name, stored["x"].shape).double().train("train" in name)
    layer.load_state_dict({key[6:]: value for key, value in stored.items() if key.startswith("state.")})
    x = stored["x"].requires_grad_()
    y = layer(x)
    y.backward(stored["grad_y"])
    found = {"y": y.detach(), "grad_x": x.grad}
    found |= {f"grad.{key}": p.grad for key, p in layer.named_parameters()}
    found |= {f"after.{key}": buffer for key, buffer in layer.named_buffers() if f"after.{key}" in stored}
    for key, value in found.items():
        # Both sides are float64: 1e-9 leaves room for sums of some thousand terms in another order.
        torch.testing.assert_close(value, stored[key], rtol=0, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", published_ea.LAYERS)
def test_both_forms_are_initialized_alike(name):
    arguments = {"ExternalAttention2d": {"c": 12}, "ExternalAttention": {"d_model": 12, "S": 8}}.get(name, {"dim": 16})
    torch.manual_seed(5)
    slow = published_ea.LAYERS[name](**arguments)
    torch.manual_seed(5)
    fast = getattr(aia_kernels, name)(**arguments)
    for key, value in slow.state_dict().items():
        assert torch.equal(fast.state_dict()[key], value), key


@pytest.mark.parametrize("unit", NAMES)
def test_published_takes_every_layout(unit):
    case = UnitCase(unit, "5x6x4", 2, "fp32", "contiguous", (5, 6, 4), segments=3)
    module = published.UNITS[unit](num_segments=3).eval()
    plain = module(case.make_input()).detach()
    for layout in ("channels_last", "5d"):
        y = module(UnitCase(unit, "5x6x4", 2, "fp32", layout, (5, 6, 4), segments=3).make_input()).detach()
        y = y.transpose(1, 2).flatten(0, 1) if layout == "5d" else y
        # The same operations on other strides: only the order of a mean's sum may differ.
        torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)


def test_self_attention_is_softmax_over_tokens():
    """The competitor too computes what its name says, on tokens and on maps."""
    layer, maps = SelfAttention(8, 2).double(), torch.randn(2, 8, 3, 4, dtype=torch.float64)
    tokens = maps.flatten(2).mT
    q, k, v = (a.unflatten(2, (2, 4)).transpose(1, 2) for a in layer.qkv(tokens).chunk(3, 2))
    o = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)  # 2 is the root of four features a head
    torch.testing.assert_close(layer(tokens), layer.proj(o))
    torch.testing.assert_close(layer(maps), layer(tokens).mT.unflatten(2, (3, 4)))


def test_registry_bytes():
    case = UnitCase("CinST", "64x56x56", 8, "fp32", "contiguous", STAGES["64x56x56"])
    assert case.x_bytes == 64 * 64 * 56 * 56 * 4 == case.make_input().nbytes
    assert case.budget_bytes("eval") == 4 * case.x_bytes
    assert case.budget_bytes("step") == 9 * case.x_bytes
    budgets = {unit: UnitCase(unit, "5x6x4", 1, "fp32", "contiguous", (5, 6, 4)) for unit in ("C", "ST")}
    assert (budgets["C"].traffic("eval"), budgets["ST"].traffic("step")) == (3, 7)
    # A unit's budget is the sum of its passes': CinST pools twice, recalibrates, and so on.
    steps = ("pool", "pool", "recalibrate", "recalibrate_reduce", "unpool_reduce", "unpool")
    assert sum(sum(passes.attention_in_attention.TRAFFIC[step]) for step in steps) == case.traffic("step")
    for layer in registry.FAMILIES["external_attention"].quick_cases():
        assert layer.x_bytes == layer.make_input().nbytes
        assert layer.traffic("eval") == (3 if layer.name == "ExternalAttention2d" else 2)
    gates = registry.FAMILIES["cbam"].quick_cases()[0]
    assert gates.x_bytes == gates.make_input().nbytes
    assert gates.traffic("step") == sum(sum(met) for met in passes.cbam.TRAFFIC.values())


def test_registry_holds_every_combination_and_begins_with_the_main_input():
    cases = registry.FAMILIES["attention_in_attention"].cases()
    assert len(cases) == len(set(cases)) == 5 * 4 * 3 * 2 * 3
    assert all((c.clips, c.dtype, c.layout) == (8, "fp32", "contiguous") for c in cases[:20])
    cases = registry.FAMILIES["external_attention"].cases()
    assert len(cases) == len(set(cases)) == len(set(map(str, cases))) == 2 * len(PLACES) + 2 * 3 + len(SWEEP)
    assert all((c.kind, c.dtype, c.layout) == ("layer", "fp32", "contiguous") for c in cases[: len(PLACES)])
    cases = linear_attention.cases()
    places, swept = len(linear_attention.PLACES), len(linear_attention.SWEEP)
    assert len(cases) == len(set(map(str, cases))) == 4 * places + swept
    assert all((c.kind, c.dtype, c.layout) == ("layer", "fp32", "contiguous") for c in cases[:places])
    cases = cbam.cases()
    assert len(cases) == len(set(map(str, cases))) == 4 * 3 * 2 * 2
    assert all((c.clips, c.dtype, c.layout) == (8, "fp32", "contiguous") for c in cases[:4])
    assert {case.name for case in dot_product_attention.cases()} == set(dot_product_attention.AttentionCase.layers)


def test_the_published_sizes():
    """Tokens, widths and heads of the networks that are named."""
    assert PLACES["EANet 65x65"].sizes == (1, 512, 65, 65)
    for name, dim, heads in (("EAMLP-7", 256, 4), ("EAMLP-14", 384, 6), ("EAMLP-19", 448, 7)):
        for size in (224, 384):
            place = PLACES[f"{name} {size}"]
            assert place.sizes == (8, (size // 16) ** 2 + 1, dim)
            assert place.arguments == {"dim": dim, "num_heads": heads}
    assert [PLACES[f"T2T {(224 // stride) ** 2}"].sizes[1:] for stride in (4, 8)] == [(3136, 64), (784, 64)]


@pytest.mark.parametrize("family, layer", [(family, "") for family in FAMILIES[1:]] + [(FAMILIES[0], "STinC-")])
def test_a_run_writes_rows_and_the_plots_and_the_table_read_them(family, layer, tmp_path, capsys):
    arguments = ["--quick", "--family", family, "--filter", layer, "--results", str(tmp_path), "--compile", "off"]
    assert run.main(arguments) == 0
    with (tmp_path / family / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == records.COLUMNS
    least = {"copy", "clone", "published"} | ({"reference"} if family in aia_kernels.backends.FAMILIES else {"cpu"})
    assert least <= {row["provider"] for row in rows}
    assert ("sdpa" in {row["provider"] for row in rows}) == (family == "external_attention")
    assert {row["mode"] for row in rows} == {"eval", "step"}
    for row in rows:
        assert float(row["median_ms"]) > 0
        compared = row["provider"] not in ("copy", "clone", "sdpa")
        assert (row["correct"] == "yes" and row["speedup"] != "") if compared else row["speedup"] == ""
    capsys.readouterr()
    assert table.main([family, "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len({(row["name"], row["stage"]) for row in rows if row["kind"] != "sweep"})
    assert len({line.count("|") for line in lines}) == 1
    held = tmp_path / table.HELD / family / "layers.csv"
    records.write(held, [row | {"speedup": "7.5"} for row in rows if row["speedup"]])
    assert table.main([family, "--results", str(tmp_path)]) == 0
    beside = capsys.readouterr().out.splitlines()
    assert beside[0].count("| with AVX2 |") == 2 and all(line.count("| **7.5** |") == 2 for line in beside[2:])
    held.unlink()
    page = tmp_path / "README.md"
    page.write_text("before\n" + "an older table".join(table.marks(family)) + "\nafter")
    for _ in range(2):  # once in the place of nothing, once in its own
        assert table.main([family, "--results", str(tmp_path), "--readme", str(page)]) == 0
        assert page.read_text().splitlines()[2:-2] == lines
    page.write_text("no marks")
    assert table.main([family, "--results", str(tmp_path), "--readme", str(page)]) == 2
    capsys.readouterr()
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    assert plot.main(["--results", str(tmp_path)]) == 0
    drawn = {"speedup", "copies"} | ({"sweep"} if any(row["kind"] == "sweep" for row in rows) else set())
    for name in drawn:
        assert (tmp_path / family / f"{name}.png").stat().st_size > 0


def test_no_rows_to_draw_or_to_list(tmp_path, capsys):
    for read in (plot.main, lambda arguments: table.main([FAMILIES[0], *arguments])):
        assert read(["--results", str(tmp_path)]) == 2
        assert "run python -m benchmarks.run first" in capsys.readouterr().err


def test_the_newest_row_of_a_key_is_drawn(tmp_path):
    case = run.row(TINY, "eval", "cpu", {"device": "cpu"})
    records.write(tmp_path / "layers.csv", [case | {"median_ms": "2"}])
    records.write(tmp_path / "layers.csv", [case | {"median_ms": "1"}])
    assert [row["median_ms"] for row in records.read(tmp_path / "layers.csv")] == ["1"]


class Wrong(published.CinST):
    """Right in the forward; its gradient misses the path through the gates."""

    def flow(self, x):
        c = self.gate("C", published.pool(x.detach(), 2).permute(0, 2, 1, 3, 4).contiguous())
        c = c.permute(0, 2, 1, 3, 4)
        t, h, w = self.spacetime(lambda: x.detach() * c)
        return x * (t + h + w) / 3


class NotFinite(published.CinST):
    def flow(self, x):
        return super().flow(x) + float("nan")


class WithoutSlotNorm(published_ea.ExternalAttention):
    """Right in the forward; the division by the sum over slots is a constant to its gradient."""

    def forward(self, x):
        attention = self.mk(x).softmax(1)
        return self.mv(attention / attention.sum(2, keepdim=True).detach())


PLAIN = LayerCase("ExternalAttention", "9x6", 2, "fp32", "contiguous", (2, 9, 6), (("d_model", 6), ("S", 4)))


@pytest.mark.parametrize(
    "case, make",
    [(TINY, lambda: Wrong(3)), (TINY, lambda: NotFinite(3)), (PLAIN, lambda: WithoutSlotNorm(6, 4))],
    ids=["gradient", "nan", "external attention"],
)
def test_wrong_numbers_get_neither_time_nor_speedup(case, make, capsys):
    candidates = [*providers.of_family("cpu", case.family), providers.Provider("wrong", lambda case: make())]
    rows = list(run.measure_case(case, candidates, "cpu", rounds=1, seconds=0, where={}))
    (row,) = (row for row in rows if row["provider"] == "wrong")
    assert row["correct"] == "no" and row["median_ms"] == "" and row["speedup"] == ""
    assert "wrong is wrong and is not timed" in capsys.readouterr().err
    assert {"published", "reference"} <= {row["provider"] for row in rows if row["correct"] == "yes"}


class Raising(published.CinST):
    """Raises at the chosen stage of a measurement: the first call in a mode checks numbers, the later ones do not."""

    def __init__(self, stage: str):
        super().__init__(3)
        self.stage, self.calls = stage, {True: 0, False: 0}
        if stage == "build":
            raise ValueError("no such layer\nsecond line")

    def flow(self, x):
        self.calls[self.training] += 1
        if self.stage == "check" or (self.stage == "time" and self.calls[self.training] > 1):
            raise ValueError("no such layer\nsecond line")
        return super().flow(x)


@pytest.mark.parametrize("stage", ["build", "check", "time", "kept bytes", "count"])
def test_a_provider_that_raises_gets_a_row_with_its_error_and_the_next_one_its_time(stage, monkeypatch):
    name = "raising"
    if stage == "count":
        name = "cpu"  # one of those that are counted
        monkeypatch.setattr(run.roofline, "count", lambda *_: {}["no such layer"])
    if stage == "kept bytes":
        kept_bytes = measure.kept_bytes
        monkeypatch.setattr(
            measure,
            "kept_bytes",
            lambda layer, x: layer.no_such_layer if type(layer) is Raising else kept_bytes(layer, x),
        )
    raising = providers.Provider(name, lambda case: Raising(stage))
    first, *others = providers.of_family("cpu", TINY.family)[:2]
    rows = list(run.measure_case(TINY, [first, raising, *others], "cpu", rounds=2, seconds=60, where={}))
    failed = [row for row in rows if row["error"]]
    assert failed and {row["provider"] for row in failed} == {name} | (
        {"published", "reference"} if stage == "count" else set()
    )
    message = {
        "count": "KeyError: 'no such layer'",
        "kept bytes": "AttributeError: 'Raising' object has no attribute 'no_such_layer'",
    }.get(stage, "ValueError: no such layer")
    assert all(row["error"] == f"{stage}: {message}" for row in failed)
    timed = [row for row in rows if row["median_ms"]]
    assert {row["provider"] for row in timed} >= {"copy", "clone", "published", *(one.name for one in others)}
    assert (name in {row["provider"] for row in timed}) == (stage in ("kept bytes", "count"))


@pytest.fixture
def run_of(tmp_path):
    """A run over small cases of both families; rows of a family's file."""

    def rows(*arguments: str, family: str = FAMILIES[0], expected: int = 1) -> list[dict]:
        status = run.main(["--quick", "--device", "cpu", "--compile", "off", "--results", str(tmp_path), *arguments])
        path = records.path(tmp_path, family, "--passes" in arguments)
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert status == expected
        return found

    return rows


def test_a_case_that_raises_gets_a_row_and_the_next_case_runs(run_of, monkeypatch):
    make_input = UnitCase.make_input

    def without_cinst(case, *arguments):
        if case.name == "CinST":
            raise MemoryError
        return make_input(case, *arguments)

    monkeypatch.setattr(UnitCase, "make_input", without_cinst)
    rows = run_of("--filter", "16x14x14")
    assert (rows[0]["name"], rows[0]["error"]) == ("CinST", "case: MemoryError: ")
    assert {row["name"] for row in rows if row["median_ms"]} == set(NAMES) - {"CinST"}


@pytest.mark.parametrize("broken", ["calls", "one pass", "count"])
def test_passes_that_raise_get_a_row(broken, run_of, monkeypatch):
    monkeypatch.setattr(providers, "FUSED", ("reference",))
    given = {"good": passes.RawPass(lambda: None, 8), "bad": passes.RawPass(lambda: {}["gone"], 8)}
    given = given if broken == "one pass" else {"good": given["good"]}
    monkeypatch.setattr(passes, "calls", lambda *_: {}["gone"] if broken == "calls" else given)
    monkeypatch.setattr(run.roofline, "count_passes", lambda *_: {}["gone"] if broken == "count" else {})
    rows = run_of("--passes", "--filter", "16x14x14")
    told = {"calls": ("CinST", "passes: "), "one pass": ("bad", "time: "), "count": ("good", "count: ")}
    name, stage = told[broken]
    failed = [(row["name"], row["error"]) for row in rows if row["error"]]
    assert failed == [(name, stage + "KeyError: 'gone'")]
    assert ("good" in {row["name"] for row in rows if row["median_ms"]}) == (broken != "calls")


def test_rows_are_written_as_they_come(run_of, monkeypatch):
    written = []
    monkeypatch.setattr(run, "measure_case", lambda *_: iter([run.row(TINY, "eval", "one", {}), written.append]))
    with pytest.raises(AttributeError):  # what ends the run after the first row
        run_of("--filter", "CinST-16x14x14")


def test_a_lost_device_is_met_in_a_new_process_without_the_provider_that_lost_it(run_of, monkeypatch):
    case = registry.FAMILIES[FAMILIES[0]].quick_cases()[0]
    started = []

    def execute(path, arguments):
        started.append(arguments[arguments.index("benchmarks.run") + 1 :])
        raise KeyboardInterrupt  # this process ends here

    monkeypatch.setattr(run.os, "execv", execute)
    monkeypatch.setattr(run.timing.Processor, "is_lost", lambda self: True)
    raising = providers.Provider("raising", lambda case: Raising("check"))
    monkeypatch.setattr(
        providers, "of_family", lambda *_: [raising, providers.Provider("late", lambda case: Raising("check"))]
    )
    with pytest.raises(KeyboardInterrupt):
        run_of("--filter", "16x14x14")
    options = run.parse(started[0])
    assert (options.begin, options.without, options.quick) == (str(case), [f"{case}:raising"], True)
    assert 0 < options.minutes <= 20
    assert [one.name for one in run.providers_of(case, options)] == ["late"]
    monkeypatch.setattr(run, "measure_case", lambda case, *_: iter([run.row(case, "eval", "x", {})]))
    skipped = run_of(*started[0], "--begin", str(registry.FAMILIES[FAMILIES[0]].quick_cases()[3]), expected=0)
    assert [row["name"] for row in skipped] == ["CinST", *registry.attention_in_attention.NAMES[3:]]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with the interrupt ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("arguments", [(), ("--passes",)], ids=["layers", "passes"])
def test_a_provider_that_never_ends_is_told_and_left(arguments, run_of, monkeypatch, interruptible):
    """Here in the process itself: what would start another one ends the waiting."""
    case, started = registry.FAMILIES[FAMILIES[0]].quick_cases()[0], []

    def execute(path, arguments):
        started.append(arguments)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(run.os, "execv", execute)
    monkeypatch.setattr(run.timing, "on", lambda device: run.timing.Processor())
    monkeypatch.setattr(run.measure, "machine", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(providers, "FUSED", ("hanging",))
    hanging = providers.Provider("hanging", lambda case: case.published())
    monkeypatch.setattr(providers, "of_family", lambda *_: [hanging])
    monkeypatch.setattr(run, "rotating_inputs", lambda case, device: [(case.make_input(), case.make_input())])
    monkeypatch.setattr(providers.Expected, "__init__", lambda self, case, x, grad_y, device: None)
    monkeypatch.setattr(providers, "build", lambda provider, case, device: provider.build(case))
    right = providers.Checked(nn.Identity(), contextlib.nullcontext, 0.0)
    monkeypatch.setattr(providers, "check", lambda *_: right if arguments else time.sleep(60))
    hung = {"pool": passes.RawPass(lambda: time.sleep(60), 8)}
    monkeypatch.setattr(passes, "calls", lambda *_: hung)
    monkeypatch.setattr(run.roofline, "count_passes", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        run_of("--device", "cuda", "--patience", "0.5", "--filter", "CinST-16x14x14", *arguments)
    options = run.parse(started[0][started[0].index("benchmarks.run") + 1 :])
    assert options.without == [f"{case}:hanging"]
    with records.path(options.results, case.family, bool(arguments)).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["provider"], row["error"]) == ("hanging", f"{'time' if arguments else 'check'}: did not end in 0.5 s")


def test_a_run_that_raises_in_a_later_sample_is_left_out():
    calls = iter([None] * 3)
    runs = {"bad": (lambda: next(calls), contextlib.nullcontext), "good": (lambda: None, contextlib.nullcontext)}
    found = run.timing.interleave(runs, 5, 60, "cpu")
    assert found["bad"].error == "StopIteration: " and found["bad"].seconds == [] and len(found["good"].seconds) == 5


def test_sampling_ends_where_the_device_is_lost(monkeypatch):
    monkeypatch.setattr(run.timing.Processor, "is_lost", lambda self: True)
    calls = {name: (call, contextlib.nullcontext) for name, call in (("good", int), ("bad", lambda: {}[0]), ("c", int))}
    found = run.timing.interleave(calls, 2, 60, "cpu")
    assert found["bad"].error == "KeyError: 0" and "c" not in found and not found["good"].error
    assert [name for name, _ in run.sampled(found)] == ["bad"]
    with pytest.raises(RuntimeError, match="KeyError: 0"):
        _ = found["bad"].median


def test_products_are_exact_where_numbers_are_compared(monkeypatch):
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    seen, results = [], measure.results

    def noting(*arguments):
        seen.append([place.allow_tf32 for place in places])
        return results(*arguments)

    monkeypatch.setattr(measure, "results", noting)
    before = [place.allow_tf32 for place in places]
    list(run.measure_case(TINY, providers.of_family("cpu", TINY.family)[:2], "cpu", rounds=1, seconds=0, where={}))
    assert len(seen) == 4 and all(found == [False, False] for found in seen)  # the truth twice, two providers
    assert [place.allow_tf32 for place in places] == before


@pytest.mark.parametrize("device, dtype", [("cuda", "bf16"), ("cpu", "fp32")])
def test_what_matters_most_is_measured_first(device, dtype):
    cases = run.chosen_cases(run.parse(["--device", device]))
    first, units, layers = cases[:8], 4 * 2, len(PLACES)
    assert {case.name for case in first} == {"CinST", "STinC"}
    assert all((case.dtype, case.clips, case.layout) == (dtype, 8, "contiguous") for case in first)
    assert {case.stage for case in cases[units : units + layers]} == set(PLACES)
    rest = len(linear_attention.PLACES) + len(STAGES) + len(dot_product_attention.PLACES)
    main = units + layers + 3 * 4 + rest
    assert all((case.dtype, case.layout) == (dtype, "contiguous") for case in cases[:main])
    others = cases[main : 2 * main]
    assert not {case.dtype for case in others} & {dtype} and {case.layout for case in others} == {"contiguous"}
    swept = len(SWEEP) + len(linear_attention.SWEEP)
    assert [case.kind for case in cases[-swept - 1 :]] == ["layer"] + ["sweep"] * swept


def test_kept_bytes_counts_storages_once():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    assert measure.kept_bytes(Square(), torch.ones(10)) == 40


def test_errors_take_near_ties_out_of_large_gradients_only():
    near_ties = registry.FAMILIES["attention_in_attention"].near_ties
    truth = {"y": torch.ones(4), "grad x": torch.ones(1_000_000)}
    found = {"y": truth["y"], "grad x": truth["grad x"].clone()}
    found["grad x"][:2000] = 1.5
    assert measure.errors(found, truth)["grad x"] == 0.5
    assert measure.errors(found, truth, near_ties)["grad x"] == 0
    assert measure.errors(found, truth, near_ties)["grad x, all"] == 0.5
    found["grad x"][2000] = 1.5
    assert measure.errors(found, truth, near_ties)["grad x"] == 0.5
    assert near_ties(999_999) == 0


def test_the_gradient_of_a_block_is_zero_where_its_sign_is_undecided():
    case = registry.FAMILIES["external_attention"].quick_cases()[0]
    x = case.make_input()
    torch.manual_seed(0)
    block = case.published().double()
    before = block.before_relu(x.double())
    assert torch.equal(before.relu(), block(x.double()))
    found = decided(torch.ones_like(x), block, x)
    assert torch.equal(found == 0, before.abs() < 1e-4 * before.abs().max())
    assert case.gradient(x).count_nonzero() > 0.99 * x.numel()


def assert_finite(result) -> None:
    for item in result if isinstance(result, tuple) else (result,):
        if isinstance(item, tuple):
            assert_finite(item)
        elif isinstance(item, torch.Tensor):
            assert item.double().isfinite().all()


@pytest.mark.skipif(CPU_MISSING[FAMILIES[0]] is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pass_is_called_with_arguments_that_it_takes(layout):
    case = UnitCase("CinST", "5x6x4", 2, "fp32", layout, (5, 6, 4), segments=3)
    x = case.make_input()
    calls = passes.calls("cpu", case, x, case.gradient(x))
    assert {name.split()[0] for name in calls} == set(passes.attention_in_attention.TRAFFIC)
    for one in calls.values():
        assert_finite(one.call())


@pytest.mark.skipif(CPU_MISSING["cbam"] is not None, reason="the C++ extension is not built")
def test_every_pass_of_cbam_is_called_with_arguments_that_it_takes():
    (case,) = cbam.quick_cases()
    x = case.make_input()
    calls = passes.calls("cpu", case, x, case.gradient(x))
    assert set(calls) == set(passes.cbam.TRAFFIC)
    for one in calls.values():
        for _ in range(2):  # it may be repeated
            assert_finite(one.call())


@pytest.mark.skipif(CPU_MISSING[FAMILIES[1]] is not None, reason="the C++ extension does not have these passes")
@pytest.mark.parametrize("case", registry.FAMILIES["external_attention"].quick_cases(), ids=str)
def test_every_fused_pass_is_called_with_arguments_that_it_takes(case):
    x = case.make_input()
    calls = passes.calls("cpu", case, x, case.gradient(x))
    met = {part for name in calls for part in name.split(" + ")}
    other = {"empty_attention", "empty_signs"} | (set() if x.ndim == 4 else {"moments", "signed"})
    assert met == set(aia_kernels.backends.FUSED_PASSES) - other
    for one in calls.values():
        assert one.bytes_moved > 0
        for _ in range(2):  # it may be repeated
            assert_finite(one.call())
