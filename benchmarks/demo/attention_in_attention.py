"""Attention in Attention in the demo: every unit on every stage, and a picture of two gates over a clip's frames."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aia_kernels

from ..published import attention_in_attention as published
from ..registry.attention_in_attention import near_ties
from .table import Row, gradient_for, same_parameters

SEGMENTS = 8
PICTURED = {"C": "channel gate", "CinST": "spacetime gate"}


def pair(name: str, device: str) -> dict[str, nn.Module]:
    """The unit in both forms with the same parameters: the published initialization, seed 0."""
    torch.manual_seed(0)
    slow = published.UNITS[name](SEGMENTS)
    return same_parameters(slow, getattr(aia_kernels, name)(num_segments=SEGMENTS), device)


def rows(stages: dict[str, Tensor]) -> list[Row]:
    """Every unit on the feature maps [B * T, C, H, W] of every stage."""
    return [
        Row(name, stage, partial(pair, name), x, gradient_for(x), near_ties)
        for stage, x in stages.items()
        for name in published.UNITS
    ]


def gate_map(unit: nn.Module, x: Tensor) -> Tensor:
    """The gate of y = x * G [T, H, W] of the first clip: G averaged over C with the weights x^2.

    For a channel gate, which is the same for every channel, that is the gate itself.
    """
    with torch.no_grad():
        y = unit.train()(x)
    x, y = (tensor[:SEGMENTS].double() for tensor in (x, y))
    return ((x * y).sum(1) / (x * x).sum(1).clamp_min(1e-12)).cpu()


def draw(images: Tensor, x: Tensor, path: Path) -> None:
    """The pictured gates of the first clip of images [B * T, 3, H, W], whose feature maps are x."""
    device = x.device.type
    maps = {f"{label}\n({name})": gate_map(pair(name, device)["fused"], x) for name, label in PICTURED.items()}
    draw_maps(images[:SEGMENTS], maps, path)


def draw_maps(images: Tensor, maps: dict[str, Tensor], path: Path) -> None:
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
