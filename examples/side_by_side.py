"""What the examples share: one network trained fused and by the reference, from one seed, and both curves compared."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

import aia_kernels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: The two runs and their backends.
BACKENDS = {"fused": "auto", "reference": "reference"}
#: A third, for comparison: the reference from parameters that are one rounding of float32 away. Training grows such
#: differences, and how far it grows this one says how close the curves of the other two can be.
NUDGED = "nudged"
ROUNDING = 2.0**-23
STYLES = {
    NUDGED: {"color": "#999999", "linewidth": 1.2, "label": "reference, nudged by a rounding"},
    "fused": {"color": "#0072b2", "linewidth": 2.4, "label": "fused"},
    "reference": {"color": "#d55e00", "linewidth": 1.6, "linestyle": (0, (3, 3)), "label": "reference"},
}


@dataclass
class Run:
    """One network in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def arguments(description: str, picture: str) -> argparse.Namespace:
    """--quick, --steps, --device, --seed and --output of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few steps on little data, to see that it runs")
    parser.add_argument("--steps", type=int, help="of training, instead of the example's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(picture), help="where the picture goes (%(default)s)")
    return parser.parse_args()


def train(
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, int], Tensor],
    steps: int,
    lr: float,
    options: argparse.Namespace,
    bar: bool = True,
    nudged: bool = False,
) -> dict[str, Run]:
    """Train two networks that start equal, see the same batches and draw the same dropout, in turns, step by step.

    make builds the network; loss_of takes it and the number of the step. AdamW with one cycle of the learning rate.
    bar: whether to show progress. nudged: whether to train the third run too.
    """
    runs = {}
    for name in (*BACKENDS, *([NUDGED] if nudged else [])):
        torch.manual_seed(options.seed)
        model = make().to(options.device).train()
        if name == NUDGED:
            nudge(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
        runs[name] = Run(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps))
    progress = tqdm(range(steps), unit="step", disable=None if bar else True)
    for i in progress:
        for name, run in runs.items():
            torch.manual_seed(options.seed + 1 + i)
            start = time.perf_counter()
            with aia_kernels.use_backend(BACKENDS.get(name, "reference")):
                loss = loss_of(run.model, i)
                run.optimizer.zero_grad()
                loss.backward()
            run.optimizer.step()
            run.schedule.step()
            run.losses.append(loss.item())  # waits for the device
            run.seconds.append(time.perf_counter() - start)
        progress.set_postfix({name: f"{runs[name].losses[-1]:.4f}" for name in BACKENDS})
    for run in runs.values():
        run.model.eval()
    return runs


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every trained parameter up or down by one rounding."""
    for p in model.parameters():
        if p.requires_grad:
            p.mul_(1 + ROUNDING * (2 * torch.randint_like(p, 2) - 1))


def report(runs: dict[str, Run], family: str, device: str) -> None:
    """Print what ran, how long a step took, and how far the curves are from each other."""
    kind = torch.device(device).type
    print(f"fused backend: {aia_kernels.backends.select(kind, torch.float32, family)} on {device}")
    for name in BACKENDS:
        middle = sorted(runs[name].seconds)[len(runs[name].seconds) // 2]
        print(f"{name:>9}: {1000 * middle:6.1f} ms a step, last loss {runs[name].losses[-1]:.4f}")
    print(f"losses apart: {_apart(runs['fused'], runs['reference'])}")
    if NUDGED in runs:
        print(f"what one rounding of the parameters does to the reference: {_apart(runs[NUDGED], runs['reference'])}")


def _apart(one: Run, other: Run) -> str:
    apart = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    early = min(20, len(apart))
    return f"at most {max(apart[:early]):.1e} in the first {early} steps, {max(apart):.1e} in all"


def draw_losses(axes: plt.Axes, runs: dict[str, Run]) -> None:
    """The curves, all smoothed over a few steps."""
    for name in filter(runs.__contains__, STYLES):
        losses = torch.tensor(runs[name].losses)
        window = max(1, len(losses) // 40)
        smooth = losses.unfold(0, window, 1).mean(1)
        steps = range(window // 2, window // 2 + len(smooth))
        axes.plot(steps, smooth.tolist(), **STYLES[name])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_title("training loss", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def save(figure: plt.Figure, options) -> None:
    figure.savefig(options.output, dpi=130, facecolor="white")
    plt.close(figure)
    print(f"picture: {options.output}")
