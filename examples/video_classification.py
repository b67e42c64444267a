"""Forwards or backwards? Clips that only the order of their frames tells apart, by TSN and TSM, with and without CinST.

A disk crosses a noisy background, to the right in one class and to the left in the other: every clip is there twice,
played forwards and backwards. Both have the same frames, so that a network which scores frames one by one and averages
the scores (TSN) cannot do better than chance. A unit of Attention in Attention sees several frames, and so does the
temporal shift (TSM).

    python examples/video_classification.py            # under two minutes on two CPU cores; picture in video.png
"""

from __future__ import annotations

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor

import aia_kernels
from aia_kernels.models import AIAResNet, VideoNet

plt = side_by_side.plt
SEGMENTS, SIZE, BATCH = 8, 32, 16
NETWORKS = {
    "TSN": (None, "tsn"),
    "TSN + CinST": ("CinST", "tsn"),
    "TSM": (None, "tsm"),
    "TSM + CinST": ("CinST", "tsm"),
}


def make_clips(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips [2 * pairs, T, 3, H, W] and their classes: motion to the right (0), then the same clips reversed (1)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(pairs, *shape, generator=generator)

    t = torch.arange(SEGMENTS).view(1, -1, 1, 1)
    radius, step = uniform(2.5, 5, 1, 1, 1), uniform(0.5, 2, 1, 1, 1)
    x = uniform(12, 20, 1, 1, 1) + step * (t - (SEGMENTS - 1) / 2)
    y = uniform(6, 26, 1, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disk = torch.sigmoid(2 * (radius - ((columns - x) ** 2 + (rows - y) ** 2).sqrt()))
    noise = 0.3 * torch.randn(pairs, SEGMENTS, 3, SIZE, SIZE, generator=generator)
    forwards = disk.unsqueeze(2) * uniform(0.4, 1.2, 1, 3, 1, 1) + noise
    return torch.cat((forwards, forwards.flip(1))), torch.arange(2).repeat_interleave(pairs)


def make_network(unit: str | None, temporal: str) -> VideoNet:
    """A ResNet of two small stages, a tenth of ResNet-50's depth and a quarter of its width."""
    trunk = AIAResNet((1, 1), num_segments=SEGMENTS, unit=unit, temporal=temporal, width=16)
    return VideoNet(trunk, num_classes=2, dropout=0, partial_bn=False)


@torch.no_grad()
def accuracy(network: VideoNet, clips: Tensor, classes: Tensor) -> float:
    predicted = torch.cat([network(part).argmax(1) for part in clips.split(32)])
    return (predicted == classes).float().mean().item()


def main() -> None:
    options = side_by_side.arguments(__doc__.split("\n")[0], "video.png")
    pairs, steps = (8, options.steps or 3) if options.quick else (256, options.steps or 60)
    clips, classes = (tensor.to(options.device) for tensor in make_clips(pairs, options.seed))
    unseen, truth = (tensor.to(options.device) for tensor in make_clips(pairs // 2, options.seed + 1))
    generator = torch.Generator().manual_seed(options.seed)
    batches = torch.randint(pairs, (steps, BATCH // 2), generator=generator)

    def loss_of(network: VideoNet, step: int) -> Tensor:
        chosen = torch.cat((batches[step], batches[step] + pairs)).to(options.device)
        return F.cross_entropy(network(clips[chosen]), classes[chosen])

    results = {}
    for name, (unit, temporal) in NETWORKS.items():
        print(f"\n{name}")
        runs = side_by_side.train(lambda u=unit, t=temporal: make_network(u, t), loss_of, steps, 5e-3, options)
        side_by_side.report(runs, "attention_in_attention", options.device)
        right = {}
        for form, run in runs.items():
            with aia_kernels.use_backend(side_by_side.BACKENDS[form]):
                right[form] = accuracy(run.model, unseen, truth)
            print(f"{form:>9}: {right[form]:.1%} of {len(truth)} unseen clips right, chance is 50%")
        results[name] = runs, right
    draw(clips[0], results, options)


def draw(clip: Tensor, results: dict, options) -> None:
    """The frames of one clip both ways, the losses of both forms of each network, and what they get right."""
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    film, graphs = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    film.suptitle("the same frames, forwards and backwards", fontsize=11)
    for row, label, frames in zip(film.subplots(2, SEGMENTS), "01", (clip, clip.flip(0)), strict=True):
        row[0].set_ylabel(f"class {label}")
        for axes, frame in zip(row, frames.cpu(), strict=True):
            axes.imshow((0.2 + frame.permute(1, 2, 0) / 1.5).clamp(0, 1))
            axes.set(xticks=[], yticks=[])
    curves, bars = graphs.subplots(1, 2, width_ratios=(1.7, 1))
    for i, (name, (runs, right)) in enumerate(results.items()):
        curves.plot(runs["fused"].losses, color=f"C{i}", linewidth=4, alpha=0.35, label=name)
        curves.plot(runs["reference"].losses, color=f"C{i}", linewidth=1.2)
        bars.barh(name, 100 * right["fused"], color=f"C{i}", alpha=0.35)
        bars.barh(name, 100 * right["reference"], color="none", edgecolor=f"C{i}", linewidth=1.2)
    curves.set(xlabel="step", ylabel="training loss")
    curves.set_title("fused: wide, pale lines; reference: thin ones", fontsize=11)
    curves.legend(frameon=False, loc="lower left")
    bars.axvline(50, color="black", linestyle=":", linewidth=1)
    bars.invert_yaxis()
    bars.set(xlim=(0, 101), xlabel="% of unseen clips (dotted: chance)")
    bars.set_title("right answers; reference: outlines", fontsize=11)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    side_by_side.save(figure, options)


if __name__ == "__main__":
    main()
