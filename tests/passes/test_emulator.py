"""The host emulator itself: blocks that run together, and what it says of kernels that do not wait for one another."""

from __future__ import annotations

import numpy
import pytest

THREADS = 4


@pytest.fixture
def scheduled(emulator):
    """The emulator, which runs in its usual order again afterwards."""
    emulator.schedule()
    yield emulator
    emulator.schedule()


def values_of(blocks: int) -> numpy.ndarray:
    return numpy.arange(blocks * THREADS, dtype=numpy.float32)


def turn_among_blocks(emulator, blocks: int, waiting: int | None = None) -> numpy.ndarray:
    arguments = blocks, blocks if waiting is None else waiting, values_of(blocks)
    return emulator.call("turn_among_blocks", *arguments)[1][-1].reshape(blocks, THREADS)


def turn_in_clusters(emulator, blocks: int, cluster: int, unused_bytes: int = 0) -> numpy.ndarray:
    arguments = blocks, cluster, unused_bytes, values_of(blocks)
    return emulator.call("turn_in_clusters", *arguments)[1][-1].reshape(blocks, THREADS)


def turn_in_warps(emulator) -> numpy.ndarray:
    return emulator.call("turn_in_warps", numpy.arange(64, dtype=numpy.float32))[1][-1]


@pytest.mark.parametrize("backward", [False, True])
def test_warps_of_a_block(scheduled, backward):
    scheduled.schedule(backward)
    threads = numpy.arange(64)
    assert (turn_in_warps(scheduled) == 64 * (threads ^ 3) + threads[::-1]).all()


@pytest.mark.parametrize("backward", [False, True])
def test_blocks_that_run_together(scheduled, backward):
    scheduled.schedule(backward)
    given = values_of(6).reshape(6, THREADS)
    assert (turn_among_blocks(scheduled, 6) == 2 * (numpy.roll(given, 1, 0) + 1)).all()
    found = turn_in_clusters(scheduled, 6, 3).reshape(2, 3, THREADS)
    assert (found == numpy.roll(given.reshape(2, 3, THREADS), -1, 1)[..., ::-1] + 1).all()
    assert (turn_in_clusters(scheduled, 6, 1) == given[:, ::-1] + 1).all()


@pytest.mark.parametrize(
    "turn",
    [
        turn_in_warps,  # a barrier of the warp does not stand for the block's after it
        lambda emulator: turn_among_blocks(emulator, 6),
        lambda emulator: turn_in_clusters(emulator, 4, 2),
    ],
)
def test_a_missing_barrier_shows(scheduled, turn):
    def same_without(barrier: str, backward: bool) -> bool:
        scheduled.schedule(backward, barrier)
        try:
            return (turn(scheduled) == expected).all()
        except RuntimeError:
            return False

    expected = turn(scheduled)
    barriers = scheduled.barriers()
    assert len(barriers) == 2
    for barrier in barriers:
        assert not (same_without(barrier, False) and same_without(barrier, True)), barrier


def test_a_barrier_that_not_all_blocks_reach(scheduled):
    with pytest.raises(RuntimeError, match="not all blocks reach"):
        turn_among_blocks(scheduled, 4, waiting=3)


@pytest.mark.parametrize("sizes", [(32, 32), (4, 3), (4, 2, 227 << 10)])
def test_clusters_that_do_not_fit(scheduled, sizes):
    with pytest.raises(RuntimeError, match="do not fit"):
        turn_in_clusters(scheduled, *sizes)


def test_more_blocks_than_fit_together(scheduled):
    with pytest.raises(RuntimeError, match="do not fit"):
        turn_among_blocks(scheduled, 7)
