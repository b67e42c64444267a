"""Point clouds: the classifier and the part segmenter of PCT (arXiv 2012.09688) with external attention.

As the paper does it (arXiv 2105.02358): PCT with its self-attention replaced. Names of parameters are
PCT's, so whatever is not attention can be loaded from its checkpoints. Points are [B, 3, N]; the networks do not depend
on their order, but for where farthest point sampling starts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ExternalAttention
from ..modules.submodules import must_be_called


def farthest_points(xyz: Tensor, samples: int) -> Tensor:
    """Indices [B, samples] of points of xyz [B, N, 3], each as far as can be from those before it; the first is 0."""
    b, n, _ = xyz.shape
    if not 1 <= samples <= n:
        raise ValueError(f"samples: got {samples}, expected 1 to the number of points, {n}")
    chosen = xyz.new_zeros((b, samples), dtype=torch.long)
    nearest = xyz.new_full((b, n), torch.inf)
    for i in range(1, samples):
        last = take(xyz, chosen[:, i - 1 : i])
        nearest = torch.minimum(nearest, (xyz - last).square().sum(2))
        chosen[:, i] = nearest.argmax(1)
    return chosen


def take(features: Tensor, index: Tensor) -> Tensor:
    """Features [B, N, C] at an index [B, ...]: [B, ..., C]."""
    batch = torch.arange(len(index), device=index.device).view(-1, *(1,) * (index.ndim - 1))
    return features[batch, index]


def sample_and_group(xyz: Tensor, features: Tensor, samples: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Samples of a cloud, each with its surroundings: PCT's neighbour embedding before its convolutions.

    xyz: [B, N, 3]; features: [B, N, C]. Returns the positions [B, samples, 3] and, for each of their nearest
    neighbours, its features less those of the sample, and those of the sample: [B, samples, neighbours, 2 C].
    """
    with torch.no_grad():
        centres = farthest_points(xyz, samples)
        positions = take(xyz, centres)
        nearest = torch.cdist(positions, xyz).topk(neighbours, largest=False, sorted=False).indices
    own = take(features, centres)[:, :, None].expand(-1, -1, neighbours, -1)
    return positions, torch.cat((take(features, nearest) - own, own), dim=3)


class LocalEmbedding(nn.Module):
    """Two pointwise convolutions and the maximum over neighbours: [B, S, neighbours, c_in] -> [B, c_out, S]."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv1d(c_in, c_out, 1, bias=False)
        self.conv2 = nn.Conv1d(c_out, c_out, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(c_out)
        self.bn2 = nn.BatchNorm1d(c_out)

    def forward(self, groups: Tensor) -> Tensor:
        x = groups.flatten(0, 1).mT
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return x.amax(2).unflatten(0, groups.shape[:2]).mT


class OffsetExternalAttention(nn.Module):
    """PCT's layer with external memories: y = x + relu(after_norm(trans_conv(x - EA(x)))). x, y: [B, C, N]."""

    def __init__(self, channels: int, k: int = 64):
        super().__init__()
        self.attention = ExternalAttention(channels, k)
        self.trans_conv = nn.Conv1d(channels, channels, 1)
        self.after_norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        offset = x - self.attention(x.mT).mT
        return x + F.relu(self.after_norm(self.trans_conv(offset)))


class PointTransformer(nn.Module):
    """PCT's trunk: two pointwise convolutions, four layers of offset attention, and the outputs of all four.

    x: [B, c_in, N]; the result: [B, 4 * channels, N]. k is the number of slots.
    """

    def __init__(self, c_in: int, channels: int, k: int = 64):
        super().__init__()
        self.conv1 = nn.Conv1d(c_in, channels, 1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm1d(channels)
        self.sa1, self.sa2, self.sa3, self.sa4 = (OffsetExternalAttention(channels, k) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        outputs = []
        for layer in (self.sa1, self.sa2, self.sa3, self.sa4):
            x = layer(x)
            outputs.append(x)
        return torch.cat(outputs, dim=1)


def _fused(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(c_in, c_out, 1, bias=False), nn.BatchNorm1d(c_out), nn.LeakyReLU(0.2))


class PointCloudClassifier(nn.Module):
    """PCT for classification: it takes x [B, 3, N] and returns logits [B, n_classes].

    N is at least samples[0], and no stage has fewer points than neighbours.

    Args:
        n_classes: The number of classes.
        samples: How many points are left after the first and the second neighbour embedding, by farthest point
            sampling.
        neighbours: How many points each of these looks at, of those that are left.
        k: The slots of the attention.
        dropout: The probability of dropout in the head.

    Raises:
        ValueError: A size is none of these; in forward, x has another shape or too few points.
    """

    def __init__(
        self,
        n_classes: int = 40,
        samples: tuple[int, int] = (512, 256),
        neighbours: int = 32,
        k: int = 64,
        dropout: float = 0.5,
    ):
        super().__init__()
        if n_classes < 1:
            raise ValueError(f"n_classes: got {n_classes}, expected at least 1")
        if not 1 <= neighbours <= samples[0]:
            raise ValueError(f"neighbours: got {neighbours}, expected 1 to samples[0] = {samples[0]}")
        self.samples, self.neighbours = tuple(samples), neighbours
        self.conv1 = nn.Conv1d(3, 64, 1, bias=False)
        self.conv2 = nn.Conv1d(64, 64, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(64)
        self.gather_local_0 = LocalEmbedding(128, 128)
        self.gather_local_1 = LocalEmbedding(256, 256)
        self.pt_last = PointTransformer(256, 256, k)
        self.conv_fuse = _fused(1280, 1024)
        self.linear1 = nn.Linear(1024, 512, bias=False)
        self.bn6 = nn.BatchNorm1d(512)
        self.dp1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(512, 256)
        self.bn7 = nn.BatchNorm1d(256)
        self.dp2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(256, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        _check_points(x, self.samples[0])
        xyz = x.mT
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        for samples, embed in zip(self.samples, (self.gather_local_0, self.gather_local_1), strict=True):
            xyz, groups = sample_and_group(xyz, x.mT, samples, self.neighbours)
            x = embed(groups)
        x = self.conv_fuse(torch.cat((self.pt_last(x), x), dim=1)).amax(2)
        x = self.dp1(F.leaky_relu(self.bn6(self.linear1(x)), 0.2))
        x = self.dp2(F.leaky_relu(self.bn7(self.linear2(x)), 0.2))
        return self.linear3(x)


class PointCloudSegmenter(PointTransformer):
    """PCT for part segmentation: every point looks at all others, and none is left out.

    It takes x [B, 3, N] and category, what each cloud is, [B] (int64) or one-hot [B, n_categories], as PCT is told it.
    It returns logits [B, n_parts, N].

    Args:
        n_parts: The number of parts.
        n_categories: The number of categories.
        channels: Those of the trunk, 128 in PCT.
        k: The slots of the attention.
        dropout: The probability of dropout in the head.

    Raises:
        ValueError: A size is below 1; in forward, x or category has another shape.
    """

    def __init__(
        self, n_parts: int = 50, n_categories: int = 16, channels: int = 128, k: int = 64, dropout: float = 0.5
    ):
        super().__init__(3, channels, k)
        for name, number in (("n_parts", n_parts), ("n_categories", n_categories)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        self.n_categories = n_categories
        self.conv_fuse = _fused(4 * channels, 1024)
        self.label_conv = _fused(n_categories, 64)
        self.convs1 = nn.Conv1d(1024 * 3 + 64, 512, 1)
        self.dp1 = nn.Dropout(dropout)
        self.convs2 = nn.Conv1d(512, 256, 1)
        self.convs3 = nn.Conv1d(256, n_parts, 1)
        self.bns1 = nn.BatchNorm1d(512)
        self.bns2 = nn.BatchNorm1d(256)

    def forward(self, x: Tensor, category: Tensor) -> Tensor:  # type: ignore[override]
        _check_points(x, 1)
        if category.ndim == 1:
            category = F.one_hot(category, self.n_categories)
        if category.shape != (len(x), self.n_categories):
            expected = f"[{len(x)}] or [{len(x)}, {self.n_categories}]"
            raise ValueError(f"category: got shape {tuple(category.shape)}, expected {expected}")
        label = self.label_conv(category.to(x.dtype)[:, :, None])
        x = self.conv_fuse(super().forward(x))
        whole = torch.cat((x.amax(2, keepdim=True), x.mean(2, keepdim=True), label), dim=1)
        x = self.dp1(F.relu(self.bns1(self._beside(x, whole))))
        x = F.relu(self.bns2(self.convs2(x)))
        return self.convs3(x)

    def _beside(self, x: Tensor, whole: Tensor) -> Tensor:
        """convs1 of the features of each point beside those of the whole cloud: x [B, C, N] and whole [B, D, 1].

        The columns of its weight that see the whole cloud are applied once, not at every point: with two thirds of the
        columns, they are most of the work.
        """
        if must_be_called(self.convs1):
            return self.convs1(torch.cat((x, whole.expand(-1, -1, x.shape[2])), dim=1))
        of_points, of_whole = self.convs1.weight.split((x.shape[1], whole.shape[1]), dim=1)
        return F.conv1d(x, of_points) + F.conv1d(whole, of_whole, self.convs1.bias)


def _check_points(x: Tensor, at_least: int) -> None:
    if x.ndim != 3 or x.shape[1] != 3 or x.shape[2] < at_least:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, 3, N] with N from {at_least}")
