"""The segmentation head with linear attention: what it computes, and that it learns on maps of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import EXACT
from conftest import DEVICES

import aia_kernels
from aia_kernels.models import LinearAttentionHead


@pytest.mark.parametrize("device", DEVICES)
def test_is_the_plain_network(device):
    head = aia_kernels.testing.randomise(LinearAttentionHead(5, 3, width=8, scale=4)).double().to(device).eval()
    plain = aia_kernels.to_reference(copy.deepcopy(head))
    maps = torch.randn(2, 5, 6, 9, dtype=torch.float64, device=device)
    torch.testing.assert_close(head(maps), plain(maps), **EXACT)
    assert head(maps, (12, 18)).shape == (2, 3, 12, 18)


def test_starts_without_attention_and_learns_it():
    torch.manual_seed(0)
    head = LinearAttentionHead(4, 2, width=8)
    x = head.conv(torch.randn(2, 4, 7, 5))
    assert torch.equal(head.position(x), x) and torch.equal(head.channel(x), x)
    # The class of a pixel is that of the brighter half of its image: no convolution of this reach sees it.
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(16, 4, 24, 24, generator=generator)
    labels = (maps[:, 0].mean((1, 2)) > 0).long()
    maps[:, 0] += labels.view(-1, 1, 1) * 0.5
    labels = labels.view(-1, 1, 1).expand(-1, 24, 24)
    optimizer, losses = torch.optim.Adam(head.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(head(maps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert head.position.gamma != 0 and head.channel.gamma != 0


@pytest.mark.parametrize("arguments", [(0, 2), (4, 0), (4, 2, 0), (4, 2, 4, 8)], ids=str)
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match="got"):
        LinearAttentionHead(*arguments)
