"""External attention in the demo: its layers on the features of frames, and a picture of a few slots over one frame.

The picture needs memories that mean something without training. They are prototypes: the centres of a k-means
clustering of simple features of the frame's pixels (smoothed colour, texture, position), so that a slot answers to one
kind of region. What is drawn is the attention map of an ExternalAttention2d that holds them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aia_kernels

from .. import clip
from ..published import external_attention as published
from ..registry.external_attention import decided
from .table import Row, gradient_for, same_parameters

HEIGHT = 96
SLOTS, DRAWN = 10, 6
SHARPNESS = 12.0


def pair(name: str, arguments: dict[str, int], device: str) -> dict[str, nn.Module]:
    """The layer in both forms with the same parameters: the published initialization, seed 0."""
    torch.manual_seed(0)
    return same_parameters(published.LAYERS[name](**arguments), getattr(aia_kernels, name)(**arguments), device)


class InOtherWords(nn.Module):
    """External attention as a network has it that knows nothing of this package: names and activation of its own."""

    def __init__(self, channels: int, slots: int = 64):
        super().__init__()
        self.query, self.memory = nn.Conv2d(channels, channels, 1), nn.Linear(channels, slots, bias=False)
        self.out = nn.Sequential(nn.Conv2d(slots, channels, 1), nn.Conv2d(channels, channels, 1, bias=False))
        self.norm, self.act = nn.BatchNorm2d(channels), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.query(x).flatten(2).transpose(1, 2)
        scores = torch.softmax(self.memory(tokens), dim=1)
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-9)
        return self.act(x + self.norm(self.out(scores.transpose(1, 2).unflatten(2, (height, width)))))


def converted(channels: int, device: str) -> dict[str, nn.Module]:
    """The layer in other words, as it is and after aia_kernels.convert."""
    torch.manual_seed(0)
    own, fast = InOtherWords(channels), InOtherWords(channels)
    layers = same_parameters(own, fast, device)
    aia_kernels.convert(fast)
    return layers


def widened(x: Tensor, channels: int, size: int) -> Tensor:
    """Feature maps brought to ``size`` x ``size`` positions and, by a fixed random projection, to more channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, x.shape[1], 1, 1, generator=generator) / x.shape[1] ** 0.5
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return clip.normalize(F.conv2d(x, weight.to(x)))


def rows(stages: dict[str, Tensor]) -> list[Row]:
    """EANet's block, EAMLP's layer and the plain form at their published sizes; a layer in other words, converted."""
    maps = widened(stages["64x56x56"][:2], 512, 65)
    patches = widened(stages["256x14x14"][:8], 384, 14)
    inputs = {
        "block": ("512x65x65", "ExternalAttention2d", {"c": 512}, maps[:1]),
        "multi-head": ("196x384", "MultiHeadExternalAttention", {"dim": 384, "num_heads": 6}, patches.flatten(2).mT),
        "plain": ("4225x512", "ExternalAttention", {"d_model": 512}, maps.flatten(2).mT),
    }
    found = []
    for name, (stage, layer, arguments, x) in inputs.items():
        make, x = partial(pair, layer, arguments), x.contiguous()
        grad_y = gradient_for(x)
        if name == "block":
            grad_y = decided(grad_y, make(x.device.type)["published"], x)
        found.append(Row(name, stage, make, x, grad_y))
    x = maps[:1].contiguous()
    return [*found, Row("converted", "512x65x65", partial(converted, 512), x, gradient_for(x))]


def pixel_features(image: Tensor) -> Tensor:
    """Unit vectors [1, C, H, W] for the pixels of an image [3, H, W] in [0, 1]: colour, texture, position."""
    blurred = F.avg_pool2d(F.pad(image[None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    texture = F.conv2d(F.pad(image[None] - 0.5, (3, 3, 3, 3), mode="replicate"), clip.filter_bank())
    texture = texture.unflatten(1, (8, 8))[:, :, :6].square().sum(1)  # over directions: three wavelengths, two phases
    texture = F.avg_pool2d(F.pad(texture, (4, 4, 4, 4), mode="replicate"), 9, stride=1).sqrt()
    _, height, width = image.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    red, green, blue = blurred.unbind(1)
    colour = clip.normalize(torch.stack((red + green + blue, red - green, red + green - 2 * blue), 1))
    colour = (
        colour * torch.tensor([1.0, 2.0, 2.0])[:, None, None]
    )  # the hue says more of what a pixel is than the light
    parts = [colour, 0.5 * clip.normalize(texture), 0.7 * torch.stack((y, x))[None]]
    return F.normalize(torch.cat(parts, 1), dim=1)


def prototypes(features: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Centres [count, C] of a clustering of the unit vectors of features [1, C, H, W] by k-means on the sphere.

    Begun with the pixels that are farthest from those chosen before, the first being farthest from the mean.
    """
    points = features[0].flatten(1).mT
    nearest, chosen = points @ F.normalize(points.mean(0), dim=0), []
    for _ in range(count):
        chosen.append(points[nearest.argmin()])
        nearest = torch.maximum(nearest, points @ chosen[-1]) if len(chosen) > 1 else points @ chosen[-1]
    centres = torch.stack(chosen)
    for _ in range(rounds):
        members = F.one_hot((points @ centres.mT).argmax(1), count).to(points.dtype)
        centres = F.normalize(members.mT @ points, dim=1)
    return centres


def with_memories(centres: Tensor) -> nn.Module:
    """An ExternalAttention2d whose convolutions are the identity and whose memories are the prototypes [k, C]."""
    count, channels = centres.shape
    block = aia_kernels.ExternalAttention2d(channels, k=count).eval()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2[0]):
            conv.weight.copy_(torch.eye(channels)[:, :, None, None])
        block.conv1.bias.zero_()
        block.linear_0.weight.copy_(SHARPNESS * centres[:, :, None])
        block.linear_1.weight.copy_(centres.mT[:, :, None])
    return block


def attention_map(block: nn.Module, x: Tensor) -> Tensor:
    """The map [k, H, W] that a block computes of x [1, C, H, W]: what its second memory is given.

    The hook that looks at it sends the call through the submodules, by the same kernel of double normalization.
    """
    seen = []
    handle = block.linear_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        block(x)
    handle.remove()
    return seen[0][0].unflatten(1, x.shape[2:]).cpu()


def draw(frame: Tensor, device: str, path: Path) -> None:
    """The attention of the most selective slots over a frame, uint8 [3, H, W]."""
    image = F.interpolate(frame[None].float() / 255, scale_factor=HEIGHT / frame.shape[1], mode="area")[0]
    x = pixel_features(image)
    block = with_memories(prototypes(x, SLOTS))
    attention = attention_map(block.to(device), x.to(device))
    most = attention.flatten(1).square().mean(1).topk(DRAWN).indices
    draw_slots(frame.permute(1, 2, 0).numpy() / 255, attention[most.sort().values], path)


def draw_slots(picture, maps: Tensor, path: Path) -> None:
    """A picture [H, W, 3] and beside it the maps [slots, h, w] as heat maps over it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    height, width = picture.shape[:2]
    columns = 1 + -(-len(maps) // 2)
    figure = pyplot.figure(figsize=(2.5 * (columns + 1) + 0.6, 2.5 * 2 * height / width + 0.75), layout="constrained")
    grid = figure.add_gridspec(2, columns, width_ratios=[2, *[1] * (columns - 1)])
    frame = figure.add_subplot(grid[:, 0])
    frame.imshow(picture)
    frame.set_title("frame", fontsize=11)
    axes = [figure.add_subplot(grid[i // (columns - 1), 1 + i % (columns - 1)]) for i in range(len(maps))]
    full = F.interpolate(maps[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0].numpy()
    for i, axis in enumerate(axes):
        axis.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        heat = axis.imshow(full[i], cmap="inferno", vmin=0, vmax=1, alpha=0.75)
        axis.set_title(f"slot {i + 1}", fontsize=10)
    bar = figure.colorbar(heat, ax=axes, fraction=0.025, pad=0.01)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=8)
    for axis in (frame, *axes):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.supxlabel(
        "External attention: the share of each pixel that a slot takes. The memories are not trained: they are k-means "
        "prototypes of this frame's colour, texture and position.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)
