"""What the tests of the CUDA passes share: where the passes run, in which order, and that a lost barrier shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aia_kernels import backends


def on(device: str, values):
    """Values with the tensors among them on a device."""
    if isinstance(values, (list, tuple)):
        return type(values)(on(device, value) for value in values)
    return values.to(device) if isinstance(values, torch.Tensor) else values


def tensors_of(values) -> list[torch.Tensor]:
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors_of(value)]
    return [values] if isinstance(values, torch.Tensor) else []


class Device:
    """The operators on the GPU, for CPU tensors."""

    def __getattr__(self, name: str):
        operator = getattr(torch.ops.aia_kernels, name).default

        def call(*arguments):
            moved = on("cuda", arguments)
            results = operator(*moved)
            if operator._schema.is_mutable:
                for tensor, after in zip(tensors_of(arguments), tensors_of(moved), strict=True):
                    tensor.copy_(after)
            return on("cpu", results)

        return call

    def map_order(self, order: str) -> str:
        return order


def chosen(request, monkeypatch):
    """The passes that a fixture with "emulator" and "cuda" for parameters asks for, for CPU tensors."""
    monkeypatch.setattr("pass_cases.DEVICE", "cpu")
    if request.param == "emulator":
        return request.getfixturevalue("emulator")
    if (reason := backends.available_backends()["cuda"]) is not None:
        pytest.skip(reason)
    return Device()


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
    assert {Path(barrier.split(":")[0]).name for barrier in barriers} == files
    unneeded = {b for b in barriers if same_without(b, False) and same_without(b, True)}
    assert not unneeded
