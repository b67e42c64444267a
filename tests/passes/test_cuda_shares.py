"""How the blocks of a gate pass share its maps (csrc/cuda/shares.h): no block works much longer than the others."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from aia_kernels.common import maps

STAGES = {"56x56": (64, 56), "28x28": (128, 28), "14x14": (256, 14), "7x7": (512, 7)}
CLIPS = 8


class Share(NamedTuple):
    """Of one map: items, the work of one in halves of a plane, blocks; tiles of a plane, and the most neighbouring
    chunks that an item can have."""

    items: int
    work: int
    blocks: int
    tiles: int
    chunks: int


def shares(emulator, dims, backward: bool, blocks: int) -> list[Share]:
    found, _ = emulator.call("shares", CLIPS, list(dims), backward, blocks)
    return [Share(*of_map) for of_map in found]


def fewest_blocks(length: int, share: Share, work: int) -> int:
    """That come to the end of a map of so many planes with so much work, over all ways to cut it: a block does whole
    items, each of which has the planes of a chunk, half a plane to begin and, where there are several chunks, half a
    plane at their ends."""
    fewest = math.inf
    for chunk in range(1, length + 1):
        chunks = -(-length // chunk)
        of_item = 2 * chunk + 1 + (chunks > 1)
        if of_item <= work:
            for together in range(1, min(share.chunks, chunks) + 1):
                items = CLIPS * share.tiles * -(-chunks // together)
                fewest = min(fewest, -(-items // (work // of_item)))
    return fewest


@pytest.mark.parametrize("blocks", [108, 132], ids=["A100", "H200"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("order", maps.ORDERS)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_slowest_block(emulator, stage, order, backward, blocks):
    c, h = stage
    for t in (8, 12, 16, 24, 32):
        for context in (maps.CHANNEL, maps.SPACETIME):
            dims = [length for of_map in maps.map_dims((CLIPS, t, c, h, h), context, order) for length in of_map]
            found = shares(emulator, dims, backward, blocks)
            used = sum(share.blocks for share in found)
            slowest = max(-(-share.items // share.blocks) * share.work for share in found)
            mean = sum(share.items * share.work for share in found) / used
            assert used <= blocks
            if slowest > 1.25 * mean:  # then no way to cut the maps has a faster one
                fewest = [fewest_blocks(n, share, slowest - 1) for n, share in zip(dims[::3], found, strict=True)]
                assert sum(fewest) > blocks, (t, context, found)


def test_small_maps_get_many_blocks(emulator):
    """As many as there are, although one would have room for more planes than two side by side."""
    (share,) = shares(emulator, (32, 7, 7), False, 132)
    assert share[:3] == (CLIPS * 32 // 2, 2 * 1 + 2, CLIPS * 32 // 2)
