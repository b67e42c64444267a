"""The demo: the units on a real video, fused and as published, in one table and one picture.

Run it as python -m benchmarks.demo [--video PATH] [--output PATH].
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import aia_kernels

from . import clip, measure, published

UNITS = tuple(published.UNITS)
SEGMENTS = 8
PICTURED = {"C": "channel gate", "CinST": "spacetime gate"}
SECONDS = 100  # for the table, about: rows take fewer samples when time runs short
HEADER = (
    f"{'':17}  {'max error of y':^15}  {'... of gradients':^15}  {'eval, ms':^22}  {'training step, ms':^22}"
    f"  {'kept, MB':^12}\n{'unit':6} {'x':10}  {'publ.':>7} {'fused':>7}  {'publ.':>7} {'fused':>7}"
    f"  {'publ.':>7} {'fused':>7} {'ratio':>6}  {'publ.':>7} {'fused':>7} {'ratio':>6}  {'publ.':>6} {'fused':>5}"
)
FOOTNOTE = """
Errors: max |value - truth| / max |truth|, the truth being the published flow in float64. Where two candidates for a
maximum tie up to rounding, float32 and float64 choose differently, in either form: for that, one in 500 elements of the
gradient of a large x is left out. Times: medians of samples taken in turns. Kept: memory held between forward and
backward, x included.
"""


def right(found: dict) -> bool:
    """Whether the fused errors are at most twice the published ones, or at rounding level.

    1e-5 for values and 2e-4 for gradients: sums of millions of float32 terms and, rarely, a maximum at a near tie.
    """
    limits = {"y": 1e-5, "grads": 2e-4}
    return all(found[f"{q} fused"] <= 2 * found[f"{q} published"] + limit for q, limit in limits.items())


def line(found: dict) -> str:
    """One row of the table; wrong numbers get no ratio."""
    cells = f"{found['unit']:6} {found['stage']:10}"
    for quantity in ("y", "grads"):
        cells += f"  {found[f'{quantity} published']:7.1e} {found[f'{quantity} fused']:7.1e}"
    for mode in ("eval", "step"):
        slow, fast = found[f"{mode} published"], found[f"{mode} fused"]
        cells += f"  {slow * 1e3:7.1f} {fast * 1e3:7.2f} " + (f"{slow / fast:5.1f}x" if right(found) else " wrong")
    return cells + f"  {found['kept published'] / 1e6:6.1f} {found['kept fused'] / 1e6:5.1f}"


def pair(name: str, device: str) -> dict[str, nn.Module]:
    """The unit in both forms with the same parameters: the published initialisation, seed 0."""
    torch.manual_seed(0)
    slow = published.UNITS[name](SEGMENTS)
    fast = getattr(aia_kernels, name)(num_segments=SEGMENTS)
    fast.load_state_dict(slow.state_dict())
    return {"published": slow.to(device), "fused": fast.to(device)}


def compare(name: str, stage: str, x: Tensor, rounds: int, seconds: float) -> dict:
    """One row: errors of the fused unit against the published flow in float64, times and kept bytes of both."""
    device = x.device.type
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    units = pair(name, device)
    truth = measure.results(pair(name, device)["published"].double(), x.double(), grad_y.double())
    found = {"unit": name, "stage": stage}
    for form, unit in units.items():
        errors = measure.errors(measure.results(unit, x, grad_y), truth)
        found[f"y {form}"] = max(errors["y"], errors["y eval"])
        found[f"grads {form}"] = max(errors["grad x"], errors["grad parameters"])
    del truth
    for mode in ("eval", "step"):
        runs = {}
        for form, unit in units.items():
            call = measure.evaluation(unit, x) if mode == "eval" else measure.training_step(unit, x, grad_y)
            runs[form] = (call, contextlib.nullcontext)
        for form, times in measure.interleave(runs, rounds, seconds, device).items():
            found[f"{mode} {form}"] = times.median
    return found | {f"kept {form}": measure.kept_bytes(unit, x) for form, unit in units.items()}


def gate_map(unit: nn.Module, x: Tensor) -> Tensor:
    """The gate of y = x * G [T, H, W] of the first clip: G averaged over C with the weights x^2.

    For a channel gate, which is the same for every channel, that is the gate itself.
    """
    with torch.no_grad():
        y = unit.train()(x)
    x, y = (tensor[:SEGMENTS].double() for tensor in (x, y))
    return ((x * y).sum(1) / (x * x).sum(1).clamp_min(1e-12)).cpu()


def draw(images: Tensor, maps: dict[str, Tensor], path: Path) -> None:
    """Frames [T, 3, H, W] above, and below them one row of heat maps for each named gate [T, h, w]."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frames = images.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    grey = frames.mean(-1)
    rows, columns = 1 + len(maps), len(frames)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.72 * columns + 1.5, 1.75 * rows + 0.6), layout="constrained", squeeze=False
    )
    for t in range(columns):
        axes[0, t].imshow(frames[t])
        axes[0, t].set_title(f"segment {t + 1}", fontsize=11)
    for r, gate in enumerate(maps.values(), start=1):
        low, high = torch.quantile(gate.flatten(), torch.tensor([0.01, 0.99], dtype=gate.dtype)).tolist()
        full = F.interpolate(gate[:, None], size=grey.shape[1:], mode="bicubic", align_corners=False)[:, 0].numpy()
        for t in range(columns):
            axes[r, t].imshow(grey[t], cmap="gray", vmin=0, vmax=1)
            heat = axes[r, t].imshow(full[t], cmap="inferno", vmin=low, vmax=high, alpha=0.72)
        bar = figure.colorbar(heat, ax=axes[r, :], fraction=0.02, pad=0.01)
        bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=8)
    for r, label in enumerate(("frames", *maps)):
        axes[r, 0].set_ylabel(label, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--video", type=Path, default=clip.CLIP, metavar="PATH", help="a video of your own")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="PATH", help="the picture to write")
    parser.add_argument("--clips", type=int, default=8, help="clips of 8 segments in the batch (default 8)")
    return parser.parse_args(arguments)


def describe(options: argparse.Namespace, frames: int, device: str) -> str:
    """What runs on what: the first lines of the output."""
    where, backend = measure.machine(device), aia_kernels.backends.select(device, torch.float32)
    machine = where["device"] if device == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    text = (
        f"{frames} frames of {options.video.name}, {options.clips} clips of {SEGMENTS} segments; fp32 on {machine}.\n"
        "x: feature maps of these frames, shaped as in ResNet-50, by fixed filters and random convolutions: not "
        "pretrained.\n"
        f"publ.: the published eager flow. fused: aia_kernels, backend {backend}."
    )
    if backend == "reference":
        reasons = [f"{name}: {why}" for name, why in aia_kernels.available_backends().items() if why]
        text += "\nNo fused backend can run here, so the fused columns show the reference. " + "; ".join(reasons)
    return text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        frames = clip.decode(options.video, least=SEGMENTS)
    except clip.VideoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = clip.sample_clips(frames, options.clips, SEGMENTS)
    stages = {stage: x.to(device) for stage, x in clip.features(images).items()}
    print(describe(options, len(frames), device), "\n")
    print(HEADER)
    rows = [(name, stage) for stage in stages for name in UNITS]
    start, wrong = time.perf_counter(), 0
    bar = tqdm(rows, unit="row", leave=False, dynamic_ncols=True)
    for i, (name, stage) in enumerate(bar):
        bar.set_description(f"{name} {stage}")
        left = SECONDS - (time.perf_counter() - start)
        found = compare(name, stage, stages[stage], rounds=5, seconds=left / (len(rows) - i) / 2)
        tqdm.write(line(found))
        wrong += not right(found)
    x = next(iter(stages.values()))
    maps = {f"{label}\n({name})": gate_map(pair(name, device)["fused"], x) for name, label in PICTURED.items()}
    draw(images[:SEGMENTS], maps, options.output)
    print(FOOTNOTE)
    print(f"Picture: {options.output.resolve()}")
    if wrong:
        print(f"demo: {wrong} of {len(rows)} rows are wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
