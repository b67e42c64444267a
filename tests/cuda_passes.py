"""What the tests of the CUDA kernels on the emulator share: the order does not matter, and a lost barrier shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


def same_in_any_order(emulator, everything: Callable) -> None:
    """Assert that the results everything(emulator) are the same bits when blocks and threads run backward."""
    expected = everything(emulator)
    emulator.schedule(backward=True)
    try:
        found = everything(emulator)
    finally:
        emulator.schedule()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def every_barrier_is_needed(emulator, everything: Callable, files: set[str]) -> None:
    """Assert that everything(emulator) meets barriers in these files and no others, and that skipping any one of them
    shows in one order or the other: else the emulator would not notice a missing one."""

    def same_without(barrier: str, backward: bool) -> bool:
        emulator.schedule(backward, barrier)
        try:
            return all(torch.equal(a, b) for a, b in zip(everything(emulator), expected, strict=True))
        except RuntimeError:  # threads part ways
            return False
        finally:
            emulator.schedule()

    emulator.schedule()
    expected = everything(emulator)
    barriers = emulator.barriers()
    found = {Path(barrier.split(":")[0]).name for barrier in barriers}
    assert found == files
    unneeded = {b for b in barriers if same_without(b, False) and same_without(b, True)}
    assert not unneeded
