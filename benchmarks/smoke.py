"""Does every kernel run, and is it right? One screen in a minute: python -m benchmarks.smoke

On each GPU backend every raw pass once, in float32 against the CPU's passes in float64, and one training step of every
layer in bfloat16: against the reference, captured in a CUDA graph, and on a side stream. Each layer and each family's
passes run in a process of their own, side by side, which is started again behind a cell that killed it, lost the device
or did not end in time. On the CPU the backends are cpu and Triton in the interpreter, in float32, without graphs and
side streams.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import aia_kernels
from aia_kernels import testing

from . import passes, providers, records, timing
from .registry.attention_in_attention import NAMES, UnitCase
from .registry.external_attention import LayerCase

BACKENDS = {"cpu": ("triton", "cpu"), "cuda": ("triton", "cuda")}
COLUMNS = ["backend", "family", "name", "cell", "result", "seconds"]
PASS = "pass"

SEGMENTS = 4
MAPS, TOKENS = (8, 16, 14, 14), (2, 49, 32)


class Difference(nn.Module):
    """That of the two results of a layer, so that one gradient reaches both."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.layer(x)
        return one - other


#: By family: each layer with the sizes of its input. 14 x 14 is met by vectors, and ends in half of one.
LAYERS: dict[str, dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "attention_in_attention": {name: (lambda name=name: getattr(aia_kernels, name)(SEGMENTS), MAPS) for name in NAMES},
    "external_attention": {
        "ExternalAttention": (lambda: aia_kernels.ExternalAttention(32), TOKENS),
        "ExternalAttention2d": (lambda: aia_kernels.ExternalAttention2d(16), MAPS),
        "MultiHeadExternalAttention": (lambda: aia_kernels.MultiHeadExternalAttention(32, num_heads=2), TOKENS),
        "TokenExternalAttention": (lambda: aia_kernels.TokenExternalAttention(32, 32), TOKENS),
    },
    "cbam": {
        "CBAM": (lambda: aia_kernels.CBAM(16, 4), MAPS),
        "CausalCBAM": (lambda: Difference(aia_kernels.CausalCBAM(16, 4)), MAPS),
    },
    "linear_attention": {
        "PositionLinearAttention": (lambda: aia_kernels.PositionLinearAttention(16, scale=4), MAPS),
        "ChannelLinearAttention": (lambda: aia_kernels.ChannelLinearAttention(), MAPS),
        "EfficientAttention": (lambda: aia_kernels.EfficientAttention(16, 8, 2, 16), MAPS),
    },
    "temporal_shift": {"TemporalShift": (lambda: aia_kernels.TemporalShift(SEGMENTS), MAPS)},
}
#: The inputs of the raw passes. In channels_last every backend stores maps in one order.
PASS_CASES = {
    "attention_in_attention": UnitCase("CinST", "16x14x14", 2, "fp32", "channels_last", (16, 14, 14), SEGMENTS),
    "external_attention": LayerCase(
        "ExternalAttention2d", "16x14x14", 2, "fp32", "channels_last", (2, 16, 14, 14), (("c", 16), ("k", 64))
    ),
}
#: Of a pass's results those that are the same in every backend, where the others are its own business.
MEANT: dict[str, Callable[..., tuple]] = {
    "logits + normalize": lambda logits, *state: (),  # the passes that take the map show it
    "values": lambda o, signs: (o,),
    "attention_gradient": lambda gradient, reduced: (reduced,),
    "moments": lambda origin, first, second: centred(origin, first, second, math.prod((2, 14, 14))),
}
#: By device: Triton's interpreter has faults of its own in bfloat16.
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Sums of some hundred terms in float32, of the largest value of a result.
CLOSE = 1e-4


class Subject(NamedTuple):
    """What one process runs: a layer, or with the name "passes" the raw passes of a family, on a backend."""

    backend: str
    family: str
    name: str


def subjects(device: str) -> list[Subject]:
    """Triton's first: they compile."""
    names = {family: [*layers, *(["passes"] if family in PASS_CASES else [])] for family, layers in LAYERS.items()}
    return [Subject(b, family, name) for b in BACKENDS[device] for family in names for name in names[family]]


def cells(subject: Subject, device: str) -> dict[str, Callable[[], None]]:
    """The cells of a subject by name; each raises if something is wrong."""
    if subject.name == "passes":
        return pass_cells(subject, device)
    make, sizes = LAYERS[subject.family][subject.name]
    module = testing.randomise(make()).to(device, DTYPE[device])
    generator = torch.Generator().manual_seed(0)
    x, other, grad_y = (torch.randn(sizes, generator=generator).to(device, DTYPE[device]) for _ in range(3))
    found = {"eager": lambda: right(module, x, grad_y, subject.backend)}
    if device == "cuda":
        found["graph"] = lambda: replayed(module, x, other, grad_y)
        found["stream"] = lambda: on_a_side_stream(module, x, grad_y)
    return found


def right(module: nn.Module, x: Tensor, grad_y: Tensor, backend: str) -> None:
    with providers.exact_products():
        worst = testing.compare(module, x, grad_y, backend)[0]
    assert worst.ratio <= 1, f"{worst.name} is off by {worst.error:.1e}, at most {worst.budget:.1e} expected"


def step(module: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
    y = module(x)
    return {"y": y} | dict(zip(("grad x", *names), torch.autograd.grad(y, (x, *parameters), grad_y), strict=True))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, as eager calls are."""
    for name, value in found.items():
        off = (value.double() - expected[name].double()).abs().max() / expected[name].double().abs().max()
        assert torch.equal(value, expected[name]), f"{name} differs from the eager one by {off:.1e} of the largest"


def replayed(module: nn.Module, x: Tensor, other: Tensor, grad_y: Tensor) -> None:
    """A step captured on x, replayed on other."""
    leaf = x.clone().requires_grad_()
    on_a_side_stream(module, x, grad_y)  # compiles outside of the capture
    captured, graph = copy.deepcopy(module), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(captured, leaf, grad_y)
    with torch.no_grad():
        leaf.copy_(other)
    graph.replay()
    same(found, step(copy.deepcopy(module), other.clone().requires_grad_(), grad_y))


def on_a_side_stream(module: nn.Module, x: Tensor, grad_y: Tensor) -> None:
    """A step on a stream where x was just written, behind work that takes a while."""
    expected = step(copy.deepcopy(module), x.clone().requires_grad_(), grad_y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds
        found = step(copy.deepcopy(module), x.clone().requires_grad_(), grad_y)
    torch.cuda.current_stream().wait_stream(side)
    same(found, expected)


def pass_cells(subject: Subject, device: str) -> dict[str, Callable[[], None]]:
    """A cell for each raw pass. The calls are made with the arguments that the passes before them give."""
    case = PASS_CASES[subject.family]
    x = case.make_input()
    grad_y = case.gradient(x)
    expected = passes.calls("cpu", case, x.double(), grad_y.double())
    found = passes.calls(subject.backend, case, x.to(device), grad_y.to(device))

    def compare(name: str) -> None:
        meant = MEANT.get(name, lambda *results: results)
        pairs = [tensors(meant(*tupled(one[name].call()))) for one in (found, expected)]
        for value, truth in zip(*pairs, strict=True):
            error = ((value.cpu().double() - truth.double()).abs().max() / truth.double().abs().max()).item()
            assert error <= CLOSE, f"off by {error:.1e} of the largest value"

    return {name: lambda name=name: compare(name) for name in found}


def centred(origin: Tensor, first: Tensor, second: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of n samples, of sums about an origin."""
    return origin + first / n, second / n - torch.outer(first / n, first / n)


def tupled(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def tensors(values: object) -> list[Tensor]:
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def run(subject: Subject, device: str, behind: str, path: Path) -> int:
    """In the process of a subject: its cells behind one, each noted as it begins and as it ends. 1: the device is lost,
    and the next cell needs a new process."""
    note(path, subject, "start")
    torch.set_num_threads(1)  # beside as many others as there are cores
    if (reason := aia_kernels.available_backends(subject.family)[subject.backend]) is not None:
        note(path, subject, "start", f"cannot run: {reason}")
        return 0
    aia_kernels.set_backend(subject.backend)
    try:
        found = cells(subject, device)
        timing.on(device).wait()
    except Exception as error:
        note(path, subject, "start", records.failure(error))
        return 0
    note(path, subject, "start", PASS)
    names = list(found)
    for name in names[names.index(behind) + 1 if behind else 0 :]:
        note(path, subject, name)
        start, result = time.perf_counter(), PASS
        try:
            found[name]()
            timing.on(device).wait()
        except Exception as error:
            result = records.failure(error)
        note(path, subject, name, result, time.perf_counter() - start)
        if result != PASS and timing.on(device).is_lost():
            return 1
    return 0


def note(path: Path, subject: Subject, cell: str, result: str = "", seconds: float = 0) -> None:
    """A row; without a result where a cell begins. Processes append to one file, each row in one piece."""
    with path.open("a", newline="") as opened:
        csv.writer(opened).writerow([*subject, cell, result, f"{seconds:.1f}"])


def noted(path: Path, subject: Subject | None = None) -> dict[tuple[str, ...], str]:
    """The newest result of every cell (of a subject) in the order in which they began, by the first of COLUMNS."""
    with path.open(newline="") as opened:
        rows = [tuple(row.values()) for row in csv.DictReader(opened)]
    return {row[:4]: row[4] for row in rows if subject in (None, row[:3])}


class Limits(NamedTuple):
    """Seconds that the first cell of a process may take, which compiles, and a later one; the time to end at."""

    first: float
    cell: float
    end: float


def supervise(subject: Subject, device: str, path: Path, limits: Limits) -> None:
    """Run the cells of a subject in as many processes as it takes, and note of which cell one died."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.smoke",
        "--device",
        device,
        "--results",
        path.parent,
        "--run",
        *subject,
    ]
    behind = ""
    while True:
        process = subprocess.Popen([*command, "--behind", behind])
        wrong = watch(process, path, subject, limits)
        found = noted(path, subject)
        cell = next(reversed(found))[3] if found else "start"
        if wrong and not found.get((*subject, cell)):
            note(path, subject, cell, wrong)
        if not wrong or cell in ("start", behind) or time.time() > limits.end:
            return
        behind = cell


def watch(process: subprocess.Popen, path: Path, subject: Subject, limits: Limits) -> str:
    """Wait for a process, which is killed when it is late; what was wrong with its end."""
    seen, changed, begun = noted(path, subject), time.time(), len(noted(path, subject))
    while process.poll() is None:
        if (now := noted(path, subject)) != seen:
            seen, changed = now, time.time()
        limit = limits.cell if len(seen) > begun + 2 else limits.first  # start and the first cell
        late = "out of time" if time.time() > limits.end else f"did not end in {limit:g} s"
        if time.time() > min(limits.end, changed + limit):
            process.kill()
            process.wait()
            return late
        time.sleep(0.1)
    return f"ended its process ({process.returncode})" if process.returncode else ""


def table(rows: dict[tuple[str, ...], str]) -> list[str]:
    """One line for each layer and each family's passes, with a column for each backend and cell; then the errors."""
    columns = list(dict.fromkeys(backend for backend, *_ in rows))
    kinds = [kind for kind in ("eager", "graph", "stream") if any(cell == kind for *_, cell in rows)]
    width = max(8 * len(kinds), 18)
    lines = [f"{'':36}" + "".join(f"{backend:{width}}" for backend in columns)]
    lines.append(f"{'':36}" + f"{''.join(f'{kind:8}' for kind in kinds):{width}}" * len(columns))
    names = [(family, name) for family in LAYERS for name in LAYERS[family]]
    for family, name in [*names, *((family, "passes") for family in PASS_CASES)]:
        line = f"{f'passes of {family}' if name == 'passes' else name:36}"
        for backend in columns:
            of = {key[3]: result for key, result in rows.items() if key[:3] == (backend, family, name)}
            tried = [result for cell, result in of.items() if cell != "start"]
            told = f"{tried.count(PASS)} of {len(tried)}" if name == "passes" else ""
            line += f"{told or ''.join(f'{verdict(of.get(kind)):8}' for kind in kinds):{width}}"
        lines.append(line.rstrip())
    return [*lines, *told_once(failures(rows))]


def told_once(wrong: dict[tuple[str, ...], str], most: int = 20) -> list[str]:
    """A line for each backend and error, with the first cell that met it."""
    met: dict[tuple[str, str], list[str]] = {}
    for (backend, _, name, cell), result in wrong.items():
        met.setdefault((backend, result), []).append(f"{name}, {cell}")
    lines = [
        f"{backend} {cells[0]}{f' and {len(cells) - 1} others' if len(cells) > 1 else ''}: {result}"[:118]
        for (backend, result), cells in met.items()
    ]
    return lines[:most] + ([f"and {len(lines) - most} other errors"] if len(lines) > most else [])


def failures(rows: dict[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """What did not pass."""
    return {key: result or "was running" for key, result in rows.items() if result != PASS}


def verdict(result: str | None) -> str:
    return "-" if result is None else PASS if result == PASS else "FAIL"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.split(": python")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where smoke.csv goes")
    parser.add_argument("--seconds", type=float, default=60, help="all of it (default 60)")
    parser.add_argument("--run", nargs=3, metavar="WORD", help="one backend, family and layer in this process")
    parser.add_argument("--behind", default="", metavar="CELL", help="with --run: from behind this cell on")
    options = parser.parse_args(arguments)
    path = options.results / "smoke.csv"
    records.check_place(path)
    if options.run:
        return run(Subject(*options.run), options.device, options.behind, path)
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    options.results.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as opened:
        csv.writer(opened).writerow(COLUMNS)
    limits = Limits(options.seconds, options.seconds / 4, time.time() + options.seconds)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda one: supervise(one, options.device, path, limits), subjects(options.device)))
    rows = noted(path)
    print(*table(rows), sep="\n")
    if options.device == "cpu":
        print("on the CPU: no CUDA graph and no side stream can be had here")
    failed, tried = len(failures(rows)), sum(cell != "start" for *_, cell in rows)
    print(f"{failed} failed, {tried} cells were tried")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
