"""Time samples: on a GPU of CUDA graphs over rotating inputs, on the CPU of plain calls; the same road through both.

On a GPU a sample is the time per call of a graph that holds one call on each of several input sets, together larger
than three times the L2, so that no call finds its input in the cache; no launch from Python is in it. What a user of
eager mode waits for is the wall time, sampled beside it. On the CPU the two are one.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from . import records

#: How long a sample lasts at least.
SAMPLE = 0.02

#: Most calls in a graph: one of the published flow is some hundred launches.
MOST_CALLS = 200

Call = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager]


@dataclass
class Samples:
    """Seconds per call, one entry a sample, how they were taken ("graph" or "calls") and the wall time in eager."""

    seconds: list[float]
    timed: str = "calls"
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class Processor:
    """The CPU: plain calls. A rehearsal rotates inputs and samples wall times all the same."""

    timed = "calls"

    @property
    def samples_wall(self) -> bool:
        return records.rehearsing()

    def input_sets(self, nbytes: int) -> int:
        """How many input sets of so many bytes to rotate."""
        return 2 if records.rehearsing() else 1

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Call each once; what it gives takes a sample, seconds per call."""

        def run() -> None:
            for call in calls:
                call()

        repeats = max(1, round(SAMPLE / _seconds(run)))
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return lambda: timer.timeit(repeats).mean / len(calls)

    def wall(self, calls: Sequence[Call]) -> float:
        """Seconds per call from Python, the device's work included."""
        done = 0
        self.wait()
        begin = time.perf_counter()
        while not done or time.perf_counter() - begin < SAMPLE:
            calls[done % len(calls)]()
            done += 1
        self.wait()
        return (time.perf_counter() - begin) / done

    def wait(self) -> None:
        """Until the device has nothing left to do."""

    def release(self) -> None:
        """Give back the memory of what was prepared."""


class CudaGraphs(Processor):
    """A CUDA device: all calls captured in one graph, its replays timed by events."""

    timed = "graph"
    samples_wall = True

    def input_sets(self, nbytes: int) -> int:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return min(3 * l2 // nbytes + 1, MOST_CALLS)

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles kernels and makes handles, which a capture must not
            for call in calls[:2]:
                call()
        current.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replays(times: int) -> float:
            begin.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / times

        replays(1)
        repeats = max(1, round(SAMPLE / replays(1)))
        return lambda: replays(repeats) / len(calls)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()


def on(device: str) -> Processor:
    return CudaGraphs() if device == "cuda" else Processor()


def interleave(
    runs: dict[str, tuple[Call | Sequence[Call], Context]], rounds: int, seconds: float, device: str
) -> dict[str, Samples]:
    """Samples of several runs taken in turns, so that drift of the machine meets all alike.

    ``runs`` maps a name to (call, context), context() being entered around its samples, or to several calls that do the
    same on rotating inputs. No further round is begun once ``seconds`` have passed, but there is always one.
    """
    processor, prepared, found = on(device), {}, {}
    for name, (calls, context) in runs.items():
        calls = [calls] if callable(calls) else list(calls)
        found[name] = Samples([], processor.timed)
        with context():
            try:
                sample = processor.prepare(calls)
            except RuntimeError as error:
                if processor.timed == "calls":
                    raise
                tqdm.write(f"{name} cannot be captured in a graph, its wall time stands for it: {error}", sys.stderr)
                found[name].timed, sample = "calls", lambda calls=calls: processor.wall(calls)
        prepared[name] = sample, calls, context
    start = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for name, (sample, calls, context) in prepared.items():
            with context():
                found[name].seconds.append(sample())
                if processor.samples_wall:
                    found[name].wall.append(processor.wall(calls))
    prepared.clear()
    processor.release()
    return found


def _seconds(run: Call) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
