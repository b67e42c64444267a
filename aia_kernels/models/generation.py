"""Image generation with external attention: a generator and a discriminator in the form of SAGAN (arXiv 1805.08318).

Residual networks with spectral norm in every layer (arXiv 1802.05957), in which external attention stands where SAGAN
has self-attention, as the paper does it (arXiv 2105.02358), and the gradient penalty of WGAN-GP (arXiv
1704.00028), whose gradient is a second derivative of every layer of the discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..modules import ExternalAttention


class SpectralExternalAttention(nn.Module):
    """y = x + gamma * EA(x) on maps, spectral norm on both memories, and gamma a scalar that starts at 0.

    It takes x [B, c, H, W] and returns y of that shape. It has no batch norm: a penalty on the gradient of each image
    would be one on that of the batch.

    Args:
        c: The channels of x.
        k: The number of slots.
    """

    def __init__(self, c: int, k: int = 64):
        super().__init__()
        self.attention = ExternalAttention(c, k)
        spectral_norm(self.attention.mk)
        spectral_norm(self.attention.mv)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        o = self.attention(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return x + self.gamma * o


def _conv(c_in: int, c_out: int, kernel: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))


class GeneratorBlock(nn.Module):
    """Twice the resolution: conv2(relu(bn2(conv1(up(relu(bn1(x))))))) + shortcut(up(x)).

    x: [B, c_in, H, W]; the result: [B, c_out, 2 H, 2 W].
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv(c_in, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv(c_out, c_out, 3)
        self.shortcut = _conv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.bn1(x)), scale_factor=2.0, mode="nearest")
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        # A 1x1 convolution and the repetition of pixels commute; this order needs a quarter of the products.
        return y + F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest")


class DiscriminatorBlock(nn.Module):
    """Half the resolution: pool(conv2(relu(conv1(relu(x))))) + shortcut(pool(x)), pooling averages of 2x2.

    x: [B, c_in, H, W], H and W even; the result: [B, c_out, H / 2, W / 2]. first: the block that sees the images, which
    has no ReLU before conv1.
    """

    def __init__(self, c_in: int, c_out: int, first: bool = False):
        super().__init__()
        self.first = first
        self.conv1 = _conv(c_in, c_out, 3)
        self.conv2 = _conv(c_out, c_out, 3)
        self.shortcut = _conv(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


def _doublings(image_size: int, attention_at: int) -> int:
    """How often 4 is doubled to make image_size, with attention on one of the resolutions on the way."""
    doublings = int(math.log2(image_size / 4)) if image_size >= 8 else 0
    if doublings < 1 or 4 << doublings != image_size:
        raise ValueError(f"image_size: got {image_size}, expected a power of 2 from 8")
    resolutions = [8 << i for i in range(doublings)]
    if attention_at not in resolutions:
        raise ValueError(f"attention_at: got {attention_at}, expected one of {', '.join(map(str, resolutions))}")
    return doublings


class Generator(nn.Module):
    """Latent vectors to images: it takes z [B, latent] and returns [B, 3, image_size, image_size], in -1 to 1.

    Args:
        latent: The length of a latent vector.
        channels: Those of the maps at image_size; each halving of the resolution doubles them, up to 16 times channels.
        image_size: The height and width of an image in pixels, a power of 2 from 8.
        attention_at: The resolution of the maps that external attention sees, a power of 2 from 8 to image_size.
        k: The slots of the attention.

    Raises:
        ValueError: image_size or attention_at is none of these.
    """

    def __init__(
        self, latent: int = 128, channels: int = 64, image_size: int = 32, attention_at: int = 16, k: int = 64
    ):
        super().__init__()
        doublings = _doublings(image_size, attention_at)
        widths = [channels << min(doublings - i, 4) for i in range(doublings + 1)]
        self.latent = latent
        self.linear = spectral_norm(nn.Linear(latent, widths[0] * 16))
        layers: list[nn.Module] = []
        for i in range(doublings):
            layers.append(GeneratorBlock(widths[i], widths[i + 1]))
            if 8 << i == attention_at:
                layers.append(SpectralExternalAttention(widths[i + 1], k))
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.conv = _conv(widths[-1], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, 4, 4))
        return self.conv(F.relu(self.bn(self.blocks(x)))).tanh()


class Discriminator(nn.Module):
    """Images to scores: it takes images [B, 3, image_size, image_size] and returns [B].

    Args:
        channels: Those of the maps after the first halving of the resolution; each further one doubles them, up to 16
            times channels.
        image_size: The height and width of an image in pixels, a power of 2 from 8.
        attention_at: The resolution of the maps that external attention sees, a power of 2 from 8 and below image_size.
        k: The slots of the attention.

    Raises:
        ValueError: image_size or attention_at is none of these.
    """

    def __init__(self, channels: int = 64, image_size: int = 32, attention_at: int = 16, k: int = 64):
        super().__init__()
        halvings = _doublings(image_size, attention_at)
        if attention_at == image_size:
            raise ValueError(f"attention_at: got {attention_at}, expected less than image_size")
        widths = [3, *(channels << min(i, 4) for i in range(halvings))]
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers.append(DiscriminatorBlock(widths[i], widths[i + 1], first=i == 0))
            if image_size >> (i + 1) == attention_at:
                layers.append(SpectralExternalAttention(widths[i + 1], k))
        self.blocks = nn.Sequential(*layers)
        self.linear = spectral_norm(nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.relu(self.blocks(images)).sum((2, 3))).squeeze(1)


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """The mean of (|d score / d image| - 1)^2 over images between real and fake ones (WGAN-GP, arXiv 1704.00028).

    A point on the line between each pair is drawn by torch's generator of their device. The penalty has a graph: its
    backward goes twice through the discriminator.

    Args:
        discriminator: Takes images and returns a score for each.
        real: [B, ...], the real images.
        fake: The generated images, of the same shape.

    Returns:
        The penalty, a scalar in the type of the images.

    Raises:
        ValueError: The shapes differ.
    """
    if real.shape != fake.shape:
        raise ValueError(f"fake: got shape {tuple(fake.shape)}, expected that of real, {tuple(real.shape)}")
    share = torch.rand((real.shape[0],) + (1,) * (real.ndim - 1), dtype=real.dtype, device=real.device)
    between = (share * real.detach() + (1 - share) * fake.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()
