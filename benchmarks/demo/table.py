"""The demo's table: a row for each layer and input, fused beside published."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import measure, timing

HEADER = (
    f"{'':21}  {'max error of y':^15}  {'... of gradients':^15}  {'eval, ms':^22}  {'training step, ms':^22}"
    f"  {'kept, MB':^12}\n{'layer':10} {'x':10}  {'publ.':>7} {'fused':>7}  {'publ.':>7} {'fused':>7}"
    f"  {'publ.':>7} {'fused':>7} {'ratio':>6}  {'publ.':>7} {'fused':>7} {'ratio':>6}  {'publ.':>6} {'fused':>5}"
)
FOOTNOTE = """
Errors: max |value - truth| / max |truth|, the truth being the published flow in float64. Where two candidates for a
maximum tie up to rounding, float32 and float64 choose differently, in either form: for that, one in 500 elements of the
gradient of a large x is left out, and where the sum before the block's ReLU is almost zero, y has no gradient. Times:
medians of samples taken in turns. Kept: memory held between forward and backward, x included. converted: a layer in
wording of its own, to which aia_kernels.convert was applied.
"""


class Row(NamedTuple):
    """One row: the layer's name, that of its input, the layer in both forms with equal parameters, x and a gradient."""

    name: str
    stage: str
    pair: Callable[[str], dict[str, nn.Module]]
    x: Tensor
    grad_y: Tensor
    near_ties: Callable[[int], int] = lambda elements: 0


def gradient_for(x: Tensor) -> Tensor:
    """A seeded gradient for an output shaped as x."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)


def same_parameters(slow: nn.Module, fast: nn.Module, device: str) -> dict[str, nn.Module]:
    """Both forms of a layer with the parameters of the published one."""
    fast.load_state_dict(slow.state_dict())
    return {"published": slow.to(device), "fused": fast.to(device)}


def right(found: dict) -> bool:
    """Whether the fused errors are at most twice the published ones, or at rounding level.

    1e-5 for values and 2e-4 for gradients: sums of millions of float32 terms and, rarely, a maximum at a near tie.
    """
    limits = {"y": 1e-5, "grads": 2e-4}
    return all(found[f"{q} fused"] <= 2 * found[f"{q} published"] + limit for q, limit in limits.items())


def line(found: dict) -> str:
    """One row of the table; wrong numbers get no ratio."""
    cells = f"{found['layer']:10} {found['stage']:10}"
    for quantity in ("y", "grads"):
        cells += f"  {found[f'{quantity} published']:7.1e} {found[f'{quantity} fused']:7.1e}"
    for mode in ("eval", "step"):
        slow, fast = found[f"{mode} published"], found[f"{mode} fused"]
        cells += f"  {slow * 1e3:7.1f} {fast * 1e3:7.2f} " + (f"{slow / fast:5.1f}x" if right(found) else " wrong")
    return cells + f"  {found['kept published'] / 1e6:6.1f} {found['kept fused'] / 1e6:5.1f}"


def compare(row: Row, rounds: int, seconds: float) -> dict:
    """Errors of both forms against the published flow in float64, their times and the bytes that they keep."""
    x, grad_y, device = row.x, row.grad_y, row.x.device.type
    layers = row.pair(device)
    truth = measure.results(row.pair(device)["published"].double(), x.double(), grad_y.double())
    found = {"layer": row.name, "stage": row.stage}
    for form, layer in layers.items():
        errors = measure.errors(measure.results(layer, x, grad_y), truth, row.near_ties)
        found[f"y {form}"] = max(errors["y"], errors["y eval"])
        found[f"grads {form}"] = max(errors["grad x"], errors["grad parameters"])
    del truth
    for mode in ("eval", "step"):
        runs = {}
        for form, layer in layers.items():
            call = measure.evaluation(layer, x) if mode == "eval" else measure.training_step(layer, x, grad_y)
            runs[form] = (call, contextlib.nullcontext)
        for form, times in timing.interleave(runs, rounds, seconds, device).items():
            found[f"{mode} {form}"] = times.median
    return found | {f"kept {form}": measure.kept_bytes(layer, x) for form, layer in layers.items()}
