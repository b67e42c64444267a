"""How things are measured: layers as callables, bytes kept for backward, errors, the machine. Times: timing.py."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import records


def evaluation(unit: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the unit in eval mode without gradients."""
    unit.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return unit(x)

    return run


def training_step(unit: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], Tensor]:
    """Forward in training mode and backward to x and the parameters, every gradient allocated anew as for a user."""
    unit.train()
    x = x if x.requires_grad else x.detach().requires_grad_()

    def run() -> Tensor:
        x.grad = None
        unit.zero_grad(set_to_none=True)
        y = unit(x)
        y.backward(grad_y)
        return y

    return run


def results(unit: nn.Module, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """y in eval mode, y of a training step, and every gradient, by name. The unit's buffers stay as they were."""
    state = {key: value.clone() for key, value in unit.state_dict().items()}
    poison(x)
    found = {"y eval": evaluation(unit, x)()}
    leaf = x.detach().requires_grad_()
    poison(x)
    y = training_step(unit, leaf, grad_y)()
    found |= {"y": y.detach(), "grad x": leaf.grad}
    found |= {f"grad {name.removeprefix('_orig_mod.')}": p.grad for name, p in unit.named_parameters()}
    unit.load_state_dict(state)
    return found


def poison(x: Tensor) -> None:
    """Fill some blocks of the size of x with NaN and free them.

    The next outputs are likely to be allocated there, so that an element which a kernel forgets to write shows; without
    this, it may hold the right value, left by another provider.
    """
    blocks = [torch.full_like(x, math.nan) for _ in range(4)]
    del blocks


def errors(
    found: dict[str, Tensor], truth: dict[str, Tensor], near_ties: Callable[[int], int] = lambda elements: 0
) -> dict[str, float]:
    """max |found - truth| / max |truth| of y, of the gradient of x, and of all parameters' gradients taken together.

    Together, because the gradient of a BN's bias is one number, a sum that may cancel to nothing: its own size would
    be no measure. "grad x" leaves out the worst near_ties(elements) elements, "grad x, all" none. Infinite where a
    value is not finite.
    """
    groups: dict[str, list[str]] = {}
    for name in truth:
        groups.setdefault(name if name in ("y eval", "y", "grad x") else "grad parameters", []).append(name)
    worst = {}
    for group, names in groups.items():
        scale = max(truth[name].abs().max().item() for name in names)
        differences = [(found[name].double() - truth[name]).abs().flatten() for name in names]
        error = max(difference.max().item() for difference in differences) / scale
        worst[group] = error if math.isfinite(error) else math.inf
        if group == "grad x":
            worst["grad x, all"] = worst[group]
            if math.isfinite(error) and (spared := near_ties(found[group].numel())):
                worst[group] = differences[0].topk(spared + 1).values[-1].item() / scale
    return worst


def kept_bytes(unit: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward: distinct storages, x among them, parameters not."""
    parameters = {p.untyped_storage().data_ptr() for p in unit.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unit = unit.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = unit(x.detach().requires_grad_())
    del y
    return sum(kept.values())


def machine(device: str) -> dict[str, str | int]:
    """The columns that say where and with what a row was measured."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return records.REHEARSAL if records.rehearsing() else "cpu"


def commit() -> str:
    """The commit that is checked out, "-dirty" if files differ from it; empty outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return ""
    return described.stdout.strip()


def cpu_model() -> str:
    """The CPU's name and its widest vectors, e.g. "AMD EPYC, AVX512"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
