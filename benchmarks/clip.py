"""A real video as feature maps: decoding with PyAV, sampling segments, and a fixed pyramid of ResNet-50's shapes.

The pyramid is not a trained network. Its first stage is a bank of Gabor and colour-opponent filters, the others are
random convolutions with a fixed seed, each followed by a normalization per channel: signals with the statistics of
natural video where a unit stands in the network, after a BatchNorm and before the ReLU.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = Path(__file__).resolve().parent / "media" / "big_buck_bunny.mp4"
SIZE = 224
LONGEST = 300


class VideoError(Exception):
    """One sentence: what is wrong with a video and what is expected."""


def decode(path: Path | str, least: int = 8) -> Tensor:
    """The first LONGEST frames of a video, uint8 [N, 3, H, W], the shorter side scaled to 256."""
    try:
        import av
    except ImportError as error:
        raise VideoError('decoding needs PyAV; install it with: pip install "aia_kernels[demo]"') from error
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"no such file: {path}")
    frames = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video stream")
            for frame in container.decode(video=0):
                scale = 256 / min(frame.width, frame.height)
                width, height = round(frame.width * scale), round(frame.height * scale)
                small = frame.reformat(width, height, "rgb24", interpolation="AREA")
                frames.append(torch.from_numpy(small.to_ndarray()).permute(2, 0, 1))
                if len(frames) == LONGEST:
                    break
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be decoded as video: {error.strerror}") from error
    if len(frames) < least:
        raise VideoError(f"{path} has {len(frames)} frames; at least {least} are needed, one for each segment")
    return torch.stack(frames)


def sample_clips(frames: Tensor, clips: int, segments: int = 8, seed: int = 0) -> Tensor:
    """Clips of a video, float32 in [0, 1], [clips * segments, 3, 224, 224].

    Each takes one frame from each of ``segments`` equal parts. The first is the plain one: middle frames, centre crop.
    The others shift the frames, crop at random and flip, and all carry a grain of about one grey level, without which
    still parts of a compressed video repeat bit by bit and the maximum over time would have no unique place.
    """
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = frames.shape
    batch = []
    for clip in range(clips):
        phase, top, left, flip = torch.rand(4, generator=generator).tolist() if clip else (0.5, 0.5, 0.5, 1.0)
        index = [min(n - 1, int((segment + phase) * n / segments)) for segment in range(segments)]
        y, x = round(top * (height - SIZE)), round(left * (width - SIZE))
        taken = frames[index, :, y : y + SIZE, x : x + SIZE].float() / 255
        batch.append(taken.flip(-1) if flip < 0.5 else taken)
    images = torch.cat(batch)
    return images + torch.randn(images.shape, generator=generator) / 255


def filter_bank() -> Tensor:
    """64 filters 7x7 on RGB [64, 3, 7, 7]: 8 directions x (3 wavelengths x 2 phases of grey, 2 colour opponents)."""
    grid = torch.arange(-3.0, 4.0)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2) / (2 * 2.0**2))
    grey, red_green, blue_yellow = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])
    kinds = [(grey, wavelength, phase) for wavelength in (3.0, 5.0, 8.0) for phase in (0.0, math.pi / 2)]
    kinds += [(red_green, 8.0, 0.0), (blue_yellow, 8.0, 0.0)]
    bank = []
    for direction in range(8):
        along = x * math.cos(direction * math.pi / 8) + y * math.sin(direction * math.pi / 8)
        for colour, wavelength, phase in kinds:
            wave = envelope * torch.cos(2 * math.pi * along / wavelength + phase)
            bank.append(colour[:, None, None] * (wave - wave.mean()))
    bank = torch.stack(bank)
    return bank / bank.flatten(1).norm(dim=1)[:, None, None, None]


def normalize(x: Tensor) -> Tensor:
    """Zero mean and unit variance of every channel: a BatchNorm2d at its initialization, in training."""
    return F.batch_norm(x, None, None, training=True)


def features(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Feature maps of the four stages, by name ("64x56x56", ...), from images [N, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(seed)
    x = normalize(F.conv2d(images - 0.5, filter_bank(), stride=2, padding=3))
    x = normalize(F.max_pool2d(x, 3, stride=2, padding=1))
    stages = [x]
    for _ in range(3):
        channels = x.shape[1]
        weight = torch.randn(2 * channels, channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * channels))
        x = normalize(F.conv2d(F.relu(x), weight, stride=2, padding=1))
        stages.append(x)
    return {"x".join(map(str, x.shape[1:])): x for x in stages}
