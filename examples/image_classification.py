"""Classification with EAMLP, a network without convolutions and without self-attention: handwritten digits.

The 1797 digits (8 x 8 pixels) come with scikit-learn. They are enlarged to 32 x 32, which the two stages of tokens turn
into 64, 16 and at last 4 tokens. Training sees three quarters of them, each batch moved by a few pixels.

    python examples/image_classification.py          # under two minutes on two CPU cores; picture in classification.png
"""

from __future__ import annotations

import side_by_side
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import aia_kernels
from aia_kernels.models import EAMLP

plt = side_by_side.plt
SIDE = 32
MARGIN = 4


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 32, 32] of mean 0 and deviation 1, and their digits [1797]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    inner = SIDE - 2 * MARGIN
    images = F.pad(F.interpolate(images, size=(inner, inner), mode="bilinear"), (MARGIN,) * 4)
    return (images - images.mean()) / images.std(), torch.from_numpy(digits.target)


def make() -> nn.Module:
    # The mean of all tokens, as the published class token needs more pictures than these to learn anything.
    return EAMLP(SIDE, 1, num_classes=10, embed_dim=64, depth=2, token_dim=32, global_pool="avg")


def main() -> None:
    options = side_by_side.arguments(__doc__.split("\n")[0], "classification.png")
    images, digits = (t.to(options.device) for t in load())
    fourth = torch.arange(len(images), device=options.device) % 4 == 0
    unseen, truth = images[fourth], digits[fourth]
    images, digits = images[~fourth], digits[~fourth]
    if options.quick:
        unseen, truth = unseen[:40], truth[:40]
    steps = options.steps or (4 if options.quick else 600)
    generator = torch.Generator().manual_seed(options.seed)
    batches = torch.randint(len(images), (steps, 32), generator=generator)
    moves = torch.randint(-2, 3, (steps, 2), generator=generator)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        batch = batches[step].to(options.device)
        moved = images[batch].roll(tuple(moves[step].tolist()), (2, 3))
        return F.cross_entropy(model(moved), digits[batch], label_smoothing=0.05)

    runs = side_by_side.train(make, loss_of, steps, 7e-3, options, nudged=True)
    side_by_side.report(runs, "external_attention", options.device)
    predictions = {}
    for name in side_by_side.BACKENDS:
        with torch.no_grad(), aia_kernels.use_backend(side_by_side.BACKENDS[name]):
            predictions[name] = torch.cat([runs[name].model(batch).argmax(1) for batch in unseen.split(64)])
        accuracy = (predictions[name] == truth).float().mean()
        print(f"{name:>9}: {accuracy:.1%} of {len(truth)} unseen digits right")
    draw(runs, unseen, truth, predictions["fused"], options)


def draw(runs, images: Tensor, truth: Tensor, predicted: Tensor, options) -> None:
    """Unseen digits with what the fused network reads, mistakes first."""
    order = (predicted == truth).int().sort(stable=True).indices.tolist()
    rows, columns = 5, 8
    figure = plt.figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    wrong = int((predicted != truth).sum())
    left.suptitle(
        f"read by the fused network: {wrong} mistakes in {len(truth)} unseen digits, shown first", fontsize=11
    )
    for axes, i in zip(left.subplots(rows, columns).flat, order, strict=False):
        right_answer = bool(predicted[i] == truth[i])
        axes.imshow(images[i, 0].cpu().numpy(), cmap="gray_r")
        text = str(predicted[i].item()) if right_answer else f"{predicted[i].item()}, is {truth[i].item()}"
        axes.set_title(text, fontsize=10, color="black" if right_answer else "#c0392b", pad=2)
        axes.set(xticks=[], yticks=[])
    side_by_side.draw_losses(right.subplots(), runs)
    side_by_side.save(figure, options)


if __name__ == "__main__":
    main()
