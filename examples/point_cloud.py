"""Point clouds with external attention in PCT's form: tell shapes apart, then name their parts.

Tables, lamps, mugs and rockets are made on the spot: points on the surfaces of their parts, in random proportions,
turned about the vertical, with noise. One network names the shape, another the part that each point lies on.

    python examples/point_cloud.py                   # under two minutes on two CPU cores; picture in point_cloud.png
"""

from __future__ import annotations

import math

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aia_kernels
from aia_kernels.models import PointCloudClassifier, PointCloudSegmenter

plt = side_by_side.plt
POINTS = 128
#: The shapes, with the names of their parts; parts are numbered through.
SHAPES = {
    "table": ("top", "legs"),
    "lamp": ("foot", "pole", "shade"),
    "mug": ("wall", "bottom", "handle"),
    "rocket": ("nose", "body", "fins"),
}
PARTS = [f"{shape}: {part}" for shape, parts in SHAPES.items() for part in parts]


class Sampler:
    """Points on surfaces, [n, 3], by one generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator)

    def size(self, low: float, high: float) -> float:
        return self.uniform(1, low, high).item()

    def disc(self, n: int, radius: float, z: float) -> Tensor:
        r, angle = radius * self.uniform(n).sqrt(), self.uniform(n, 0, 2 * math.pi)
        return torch.stack((r * angle.cos(), r * angle.sin(), torch.full((n,), z)), 1)

    def tube(self, n: int, low: float, high: float, radius_low: float, radius_high: float) -> Tensor:
        """The wall of a cylinder or, with two radii, of a cone."""
        share, angle = self.uniform(n), self.uniform(n, 0, 2 * math.pi)
        r = radius_low + (radius_high - radius_low) * share
        return torch.stack((r * angle.cos(), r * angle.sin(), low + (high - low) * share), 1)

    def table(self, n: tuple[int, ...]) -> list[Tensor]:
        height, width, depth = self.size(0.8, 1.3), self.size(0.6, 1.0), self.size(0.4, 0.8)
        top = torch.stack((self.uniform(n[0], -width, width), self.uniform(n[0], -depth, depth)), 1)
        top = F.pad(top, (0, 1), value=height)
        leg = torch.randint(4, (n[1],), generator=self.generator)
        corner = torch.stack((leg % 2 * 2 - 1, leg // 2 * 2 - 1), 1) * torch.tensor((width, depth)) * 0.9
        legs = torch.cat((corner, self.uniform(n[1], 0, height)[:, None]), 1)
        return [top, legs]

    def lamp(self, n: tuple[int, ...]) -> list[Tensor]:
        height, foot, shade = self.size(1.2, 1.8), self.size(0.3, 0.5), self.size(0.4, 0.7)
        start = height - self.size(0.4, 0.6)
        return [
            self.disc(n[0], foot, 0.0),
            self.tube(n[1], 0.0, start, 0.04, 0.04),
            self.tube(n[2], start, height, shade, shade * self.size(0.3, 0.7)),
        ]

    def mug(self, n: tuple[int, ...]) -> list[Tensor]:
        height, radius = self.size(0.8, 1.3), self.size(0.4, 0.6)
        angle = self.uniform(n[2], -math.pi / 2, math.pi / 2)
        reach, middle = self.size(0.2, 0.35), height / 2
        handle = torch.stack((radius + reach * angle.cos(), 0 * angle, middle + 0.35 * height * angle.sin()), 1)
        return [self.tube(n[0], 0.0, height, radius, radius), self.disc(n[1], radius, 0.0), handle]

    def rocket(self, n: tuple[int, ...]) -> list[Tensor]:
        height, radius, tip = self.size(0.9, 1.4), self.size(0.2, 0.35), self.size(0.4, 0.7)
        which = torch.randint(3, (n[2],), generator=self.generator) * (2 * math.pi / 3)
        out = radius + self.uniform(n[2], 0, self.size(0.25, 0.45))
        fins = torch.stack((out * which.cos(), out * which.sin(), self.uniform(n[2], 0, 0.35)), 1)
        return [
            self.tube(n[0], height, height + tip, radius, 0.0),
            self.tube(n[1], 0.0, height, radius, radius),
            fins,
        ]

    def cloud(self, shape: str) -> tuple[Tensor, Tensor]:
        """Points [3, POINTS] in a ball of radius 1, in random order, and the numbers of their parts [POINTS]."""
        names = SHAPES[shape]
        n = [POINTS // len(names)] * (len(names) - 1)
        parts = getattr(self, shape)((*n, POINTS - sum(n)))
        first = PARTS.index(f"{shape}: {names[0]}")
        labels = torch.cat([torch.full((len(part),), first + i) for i, part in enumerate(parts)])
        turn = self.size(0, 2 * math.pi)
        rotation = torch.tensor([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
        points = torch.cat(parts) @ rotation.T + 0.02 * torch.randn(POINTS, 3, generator=self.generator)
        points = points - points.mean(0)
        order = torch.randperm(POINTS, generator=self.generator)
        return (points / points.norm(dim=1).max())[order].T, labels[order]


def make_clouds(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [number, 3, POINTS], shapes [number] and parts [number, POINTS]."""
    sampler = Sampler(seed)
    shapes = torch.arange(number) % len(SHAPES)
    points, parts = zip(*(sampler.cloud(list(SHAPES)[shape]) for shape in shapes), strict=True)
    return torch.stack(points), shapes, torch.stack(parts)


def main() -> None:
    options = side_by_side.arguments(__doc__.split("\n")[0], "point_cloud.png")
    number = 16 if options.quick else 1024
    steps = options.steps or (3 if options.quick else 100)
    points, shapes, parts = (t.to(options.device) for t in make_clouds(number, seed=1))
    unseen = tuple(t.to(options.device) for t in make_clouds(8 if options.quick else 128, seed=2))
    batches = torch.randint(number, (steps, 12), generator=torch.Generator().manual_seed(options.seed))

    def shape_loss(model: nn.Module, step: int) -> Tensor:
        batch = batches[step].to(options.device)
        return F.cross_entropy(model(points[batch]), shapes[batch], label_smoothing=0.05)

    def part_loss(model: nn.Module, step: int) -> Tensor:
        batch = batches[step].to(options.device)
        return F.cross_entropy(model(points[batch], shapes[batch]), parts[batch])

    def make_classifier() -> nn.Module:
        return PointCloudClassifier(len(SHAPES), samples=(48, 24), neighbours=8)

    def make_segmenter() -> nn.Module:
        return PointCloudSegmenter(len(PARTS), len(SHAPES), channels=64)

    print("which shape it is")
    classifiers = side_by_side.train(make_classifier, shape_loss, steps, 1e-3, options, nudged=True)
    side_by_side.report(classifiers, "external_attention", options.device)
    print("which part a point lies on")
    segmenters = side_by_side.train(make_segmenter, part_loss, steps, 2e-3, options, nudged=True)
    side_by_side.report(segmenters, "external_attention", options.device)
    for name in ("reference", "fused"):
        with torch.no_grad(), aia_kernels.use_backend(side_by_side.BACKENDS[name]):
            named = classifiers[name].model(unseen[0]).argmax(1)
            found = segmenters[name].model(unseen[0], unseen[1]).argmax(1)
        right = (named == unseen[1]).float().mean(), (found == unseen[2]).float().mean()
        print(f"{name:>9}: {right[0]:.1%} of {len(named)} unseen shapes and {right[1]:.1%} of their points right")
    draw(classifiers, segmenters, unseen, named, found, options)


def draw(classifiers, segmenters, unseen, named: Tensor, found: Tensor, options) -> None:
    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    clouds, curves = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    clouds.suptitle("unseen clouds, coloured by the part that the network says each point lies on", fontsize=11)
    palette = plt.get_cmap("Dark2")
    for i, shape in enumerate(SHAPES):
        axes = clouds.add_subplot(1, len(SHAPES), i + 1, projection="3d")
        x, y, z = unseen[0][i].cpu().numpy()
        first = PARTS.index(f"{shape}: {SHAPES[shape][0]}")
        for j, part in enumerate(SHAPES[shape]):
            own = (found[i] == first + j).cpu().numpy()
            axes.scatter(x[own], y[own], z[own], s=12, color=palette(j), label=part, depthshade=False)
        others = ((found[i] < first) | (found[i] >= first + len(SHAPES[shape]))).cpu().numpy()
        if others.any():
            axes.scatter(x[others], y[others], z[others], s=12, color="black", label="other", depthshade=False)
        answer = list(SHAPES)[named[i]]
        axes.set_title(answer if answer == shape else f"{answer}, is {shape}", fontsize=11)
        axes.set(xlim=(-0.75, 0.75), ylim=(-0.75, 0.75), zlim=(-0.75, 0.75))
        axes.set_box_aspect((1, 1, 1), zoom=1.15)
        axes.set_axis_off()
        axes.view_init(elev=18, azim=-60)
        axes.legend(
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, -0.08),
            ncols=3,
            fontsize=9,
            handletextpad=0.1,
            columnspacing=0.8,
        )
    left, right = curves.subplots(1, 2)
    side_by_side.draw_losses(left, classifiers)
    left.set_title("training loss, shapes", fontsize=11)
    side_by_side.draw_losses(right, segmenters)
    right.set_title("training loss, parts", fontsize=11)
    side_by_side.save(figure, options)


if __name__ == "__main__":
    main()
