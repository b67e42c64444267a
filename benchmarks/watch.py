"""Knows which call of a measurement is running and since when, so that one that never ends is reported and left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_running: list[tuple[str, str, float]] = []


@contextlib.contextmanager
def running(provider: str, stage: str) -> Iterator[None]:
    """Inside, a stage of a provider is running."""
    _running.append((provider, stage, time.monotonic()))
    try:
        yield
    finally:
        _running.pop()


def start(seconds: float, late: Callable[[str, str], None]) -> threading.Event:
    """From now on, until the event is set, a thread calls late(provider, stage) once when a stage runs longer: with the
    outermost provider, which has the others run, and the innermost stage, which is what takes so long.

    A thread, for the one that waits for the device runs no Python until the device is done.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(min(1.0, seconds / 4)):
            stages = [one for one in _running if one[0]]  # a case as a whole may take its time
            if stages and time.monotonic() - stages[-1][2] > seconds:
                late(stages[0][0], stages[-1][1])
                return

    threading.Thread(target=watch, daemon=True).start()
    return ended
