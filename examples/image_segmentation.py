"""Segmentation with EANet: find and name handwritten digits on top of photographs.

The digits (8 x 8 pixels) and the two photographs come with scikit-learn; scenes are made of them on the spot. Networks
train on one half of the digits and the left side of the photographs and are tested on the others.

    python examples/image_segmentation.py            # under two minutes on two CPU cores; picture in segmentation.png
"""

from __future__ import annotations

import numpy as np
import side_by_side
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import aia_kernels
from aia_kernels.models import EANet

plt = side_by_side.plt
SIDE = 64
CLASSES = 11  # background, then the digits


def make_scenes(number: int, test: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images [number, 3, 64, 64] in 0 to 1 and labels [number, 64, 64]: three digits on a crop of a photograph."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    inks = torch.from_numpy(digits.images[int(test) :: 2] / 16.0)
    names = digits.target[int(test) :: 2]
    photographs = [p[:, 320:] if test else p[:, :320] for p in load_sample_images().images]
    images = np.empty((number, SIDE, SIDE, 3), np.float32)
    labels = np.zeros((number, SIDE, SIDE), np.int64)
    for image, label in zip(images, labels, strict=True):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(side - SIDE) for side in photograph.shape[:2])
        image[:] = photograph[top : top + SIDE, left : left + SIDE] / 255.0
        shade = 0.6 if image.mean() > 0.5 else 1.4  # digits darker than bright places, and brighter than dark ones
        for quarter in rng.permutation(4)[:3]:
            which, side = rng.integers(len(inks)), int(rng.integers(24, SIDE // 2 + 1))
            ink = F.interpolate(inks[which][None, None], size=(side, side), mode="bilinear")[0, 0].numpy()
            corner = np.array(divmod(quarter, 2)) * SIDE // 2 + rng.integers(SIDE // 2 - side + 1, size=2)
            place = tuple(slice(start, start + side) for start in corner)
            image[place] += ink[..., None] * (shade * rng.uniform(0.1, 0.7, 3) - image[place])
            label[place][ink > 0.4] = names[which] + 1
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def make_backbone() -> nn.Module:
    """Maps [B, 96, 16, 16]: EANet takes any module that returns maps."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


@torch.no_grad()
def test(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Predictions [number, 64, 64], and the intersection over union, averaged over classes."""
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(32)])
    pairs = torch.bincount((labels * CLASSES + predicted).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return predicted, (pairs.diagonal() / union.clamp(min=1)).mean().item()


def main() -> None:
    options = side_by_side.arguments(__doc__.split("\n")[0], "segmentation.png")
    number = 24 if options.quick else 1024
    steps = options.steps or (4 if options.quick else 450)
    images, labels = (t.to(options.device) for t in make_scenes(number, test=False, seed=1))
    unseen, truth = (t.to(options.device) for t in make_scenes(16 if options.quick else 128, test=True, seed=2))
    batches = torch.randint(number, (steps, 16), generator=torch.Generator().manual_seed(options.seed))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        batch = batches[step].to(options.device)
        return model(images[batch], labels[batch]).mean()

    def make() -> nn.Module:
        return EANet(CLASSES, make_backbone(), channels=96, width=96)

    runs = side_by_side.train(make, loss_of, steps, 6e-3, options, nudged=True)
    side_by_side.report(runs, "external_attention", options.device)
    predictions = {}
    for name in side_by_side.BACKENDS:
        with aia_kernels.use_backend(side_by_side.BACKENDS[name]):
            predictions[name], iou = test(runs[name].model, unseen, truth)
        print(f"{name:>9}: mean intersection over union {iou:.3f} on unseen digits and photographs")
    draw(runs, unseen, truth, predictions, options)


def draw(runs, images: Tensor, truth: Tensor, predictions: dict[str, Tensor], options) -> None:
    shown = 5
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    rows = {"scene": None, "truth": truth, **predictions}
    grid = left.subplots(len(rows), shown)
    for row, (name, masks) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(name, fontsize=11)
        for i, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.imshow(images[i].permute(1, 2, 0).clamp(0, 1).cpu().numpy(), alpha=1.0 if masks is None else 0.35)
            if masks is not None:
                mask = masks[i].cpu().numpy()
                shades = np.ma.masked_equal(mask, 0)
                colours = axes.imshow(shades, cmap="tab10", vmin=0.5, vmax=10.5, interpolation="nearest")
    bar = left.colorbar(colours, ax=grid, ticks=range(1, CLASSES), fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels([str(digit) for digit in range(10)])
    side_by_side.draw_losses(right.subplots(), runs)
    side_by_side.save(figure, options)


if __name__ == "__main__":
    main()
