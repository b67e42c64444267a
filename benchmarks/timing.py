"""Time samples: on a GPU of CUDA graphs over rotating inputs, on the CPU of plain calls; the same code for both.

On a GPU a sample is the time per call of a graph that holds one call on each of several input sets, together larger
than three times the L2, so that no call finds its input in the cache; no launch from Python is in it. What a user of
eager mode waits for is the wall time, sampled beside it. On the CPU the two are one.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from . import records, watch

#: How long a sample lasts at least.
SAMPLE = 0.02

#: Most calls in a graph: one of the published flow is some hundred launches.
MOST_CALLS = 200

Call = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager]


@dataclass
class Samples:
    """Seconds per call, one entry a sample, how they were taken ("graph", "calls", or "processor": calls by processor
    time) and the wall time in eager.

    error: what was raised, where a call raised; then there are no samples, and the median raises it as RuntimeError.
    """

    seconds: list[float]
    timed: str = "calls"
    wall: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def median(self) -> float:
        if self.error:
            raise RuntimeError(self.error)
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
    clock = staticmethod(time.perf_counter)

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
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads(), timer=self.clock)
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

    def is_lost(self) -> bool:
        """Whether nothing can run on the device any more in this process."""
        return False


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
        if not self.is_lost():
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """An illegal access, once it was reported, is the answer to every later call."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


def by_processor_time() -> None:
    """From now on samples on the CPU are of processor time, of all threads together: on a machine that others use, wall
    time is mostly theirs."""
    Processor.timed, Processor.clock = "processor", staticmethod(time.process_time)


def on(device: str) -> Processor:
    return CudaGraphs() if device == "cuda" else Processor()


def interleave(
    runs: dict[str, tuple[Call | Sequence[Call], Context]], rounds: int, seconds: float, device: str
) -> dict[str, Samples]:
    """Samples of several runs taken in turns, so that drift of the machine meets all alike.

    ``runs`` maps a name to (call, context), context() being entered around its samples, or to several calls that do the
    same on rotating inputs. No further round is begun once ``seconds`` have passed, but there is always one. A run that
    raises is left out, its samples hold the error; one after which the device is lost ends the sampling.
    """
    processor, prepared, found = on(device), {}, {}
    for name, (calls, context) in runs.items():
        calls = [calls] if callable(calls) else list(calls)
        found[name] = Samples([], processor.timed)
        with _failing(name, found[name]), context():
            prepared[name] = _prepare(name, calls, processor, found[name]), calls, context
        if found[name].error and processor.is_lost():
            return found
    start = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for name, (sample, calls, context) in list(prepared.items()):
            with _failing(name, found[name]), context():
                found[name].seconds.append(sample())
                if processor.samples_wall:
                    found[name].wall.append(processor.wall(calls))
            if found[name].error:
                del prepared[name]
                if processor.is_lost():
                    return found
    prepared.clear()
    processor.release()
    return found


@contextlib.contextmanager
def _failing(name: str, samples: Samples) -> Iterator[None]:
    try:
        with watch.running(name, "time"):
            yield
    except Exception as error:
        samples.error = records.failure(error)
        samples.seconds.clear()
        samples.wall.clear()
        tqdm.write(f"{name} cannot be timed: {samples.error}", sys.stderr)


def _prepare(name: str, calls: list[Call], processor: Processor, samples: Samples) -> Callable[[], float]:
    """What takes a sample: of a graph or, where the calls cannot be captured in one, their wall time."""
    try:
        return processor.prepare(calls)
    except RuntimeError as error:
        if processor.timed != "graph" or processor.is_lost():
            raise
        tqdm.write(f"{name} cannot be captured in a graph, its wall time stands for it: {error}", sys.stderr)
    samples.timed = "calls"
    return lambda: processor.wall(calls)


def _seconds(run: Call) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
