"""How the blocks of a gate pass share its maps (csrc/cuda/shares.h): no block works much longer than the others."""

from __future__ import annotations

import pytest

from aia_kernels.common import maps

STAGES = {"56x56": (64, 56), "28x28": (128, 28), "14x14": (256, 14), "7x7": (512, 7)}
CLIPS = 8


def shares(emulator, dims, backward: bool, blocks: int) -> list[tuple[int, int, int]]:
    """(items, planes that a block visits for one, blocks) of each map."""
    found, _ = emulator.call("shares", CLIPS, list(dims), backward, blocks)
    return [tuple(of_map) for of_map in found]


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
            used = sum(of_map for _, _, of_map in found)
            slowest = max(-(-items // of_map) * visits for items, visits, of_map in found)
            mean = sum(items * visits for items, visits, _ in found) / used
            assert used <= blocks
            # A block does whole items: where it does few, these come out less even.
            assert slowest <= (1.27 if slowest >= 32 else 1.4) * mean, (t, context, found)


def test_small_maps_get_many_blocks(emulator):
    """A block of their own for each chunk of the shortest length, although one would have room for several."""
    assert shares(emulator, (32, 7, 7), False, 132) == [(CLIPS * 8, 4 + 2, CLIPS * 8)]
