"""Arguments of the raw operators and ways to change them, to see what is refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from aia_kernels.common import maps

B, T, C, H, W = 2, 3, 4, 5, 6
CHANNEL, SPACETIME = (maps.packed_size((B, T, C, H, W), context) for context in (maps.CHANNEL, maps.SPACETIME))
DIMS = [3, 5, 6]
M = math.prod(DIMS)
NO_DEVICE = "the first argument must be on a CUDA device"
#: What a refusal raises.
REFUSED = (RuntimeError, ValueError)


def implementation(key: str, name: str, arguments: list) -> Any:
    """The result of an operator's implementation for one type of device, whatever its arguments are."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return getattr(torch.ops.aia_kernels, name).default.redispatch(keys, *arguments)


def good() -> dict[str, list]:
    """Arguments that each operator takes, fresh and no two in one place."""
    x = torch.randn
    gate = torch.rand
    index = torch.zeros(B, SPACETIME, dtype=torch.uint8)
    weight, norm, one = x(1, 2, 3, 3, 3), gate(1, 4), torch.ones(1)
    statistics, features = torch.tensor([[0.0, 1.0, 1 / (B * M)]]), (x(B, 2, SPACETIME), index, 3)
    inner = gate(B, CHANNEL), 1, x(B, 2, CHANNEL), torch.zeros(B, CHANNEL, dtype=torch.uint8), 1
    return {
        "pool": [x(B, T, C, H, W), 3, gate(B, CHANNEL), 1],
        "unpool": [x(B, T, C, H, W), gate(B, SPACETIME), *features, *inner],
        "unpool_reduce": [x(B, T, C, H, W), *features, 1],
        "recalibrate": [x(B, T, C, H, W), gate(B, SPACETIME), 3],
        "recalibrate_reduce": [x(B, T, C, H, W), x(B, T, C, H, W), 3],
        "temporal_shift": [x(B, T, C, H, W), 2, False],
        "gate": [x(B, 2, M), [weight], [one], [one.clone()], [None], [None], [1e-5], [True], DIMS],
        "gate_again": [x(B, 2, M), [weight], norm, DIMS],
        "gate_backward_reduce": [x(B, M), x(B, M), norm, DIMS],
        "gate_backward": [x(B, M), x(B, M), norm, x(1, 2), statistics, x(B, 2, M), [weight], DIMS],
        "move_statistics_": [[x(5)], [gate(5)], [torch.tensor(0)], [0.5 * gate(5, 3)], 0.1],
        "column_statistics": [x(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)],
        "double_norm_": [x(2, 6, 8), x(2, 8), 4, 1e-9, torch.zeros(2, 6, dtype=torch.bool)],
        "double_norm_backward_reduce": [x(2, 6, 8), gate(2, 6, 8), 4],
        "double_norm_backward_": [x(2, 6, 8), gate(2, 6, 8), gate(2, 6, 2), x(2, 8), 4],
        "residual_relu_": [x(2, 6, 8), x(2, 6, 8), x(8)],
        "residual_relu_backward": [x(2, 6, 8), torch.zeros(12, dtype=torch.uint8)],
        **_of_cbam(),
        **_of_memories(),
    }


def _of_cbam() -> dict[str, list]:
    x = torch.randn
    of_channels = torch.rand(B, C), x(B, 2, C), torch.zeros(B, C, dtype=torch.int32)
    of_positions = torch.rand(B, 1, H, W), x(B, 2, H, W), torch.zeros(B, H, W, dtype=torch.int32)
    gates = torch.rand(B, C), torch.rand(B, 1, H, W)
    pooled, first, second = x(B, 2, C), x(3, C), x(C, 3)
    return {
        "cbam_pool_positions": [x(B, C, H, W)],
        "cbam_pool_channels": [x(B, C, H, W), torch.rand(B, C)],
        "cbam_recalibrate": [x(B, C, H, W), *gates, True],
        "cbam_recalibrate_reduce": [x(B, C, H, W), x(B, C, H, W), x(B, C, H, W), *gates],
        "cbam_unpool_reduce": [x(B, C, H, W), x(B, 2, H, W), torch.zeros(B, H, W, dtype=torch.int32)],
        "cbam_unpool": [x(B, C, H, W), x(B, C, H, W), *of_channels, *of_positions],
        "cbam_channel_gate": [pooled, first, x(3), second, x(C)],
        "cbam_channel_gate_backward": [x(B, C), pooled, x(B, 2, 3), x(B, C), first, second],
        "cbam_convolve": [x(B, 2, H, W), x(1, 2, 3, 3)],
        "cbam_convolve_backward": [x(B, 1, H, W), x(B, 2, H, W), x(1, 2, 3, 3)],
    }


def _of_memories() -> dict[str, list]:
    """Two heads of three features and a constant, six tokens."""
    x, padding = torch.randn, torch.zeros(B, 6, dtype=torch.bool)
    of_phi = x(B, 12, 6), 0, 2, padding
    divisor = 1 + torch.rand(B, 8), x(1), 1e-6
    return {
        "memory_keys": [*of_phi, None, False],
        "memory_queries": [*of_phi, *divisor],
        "memory_queries_backward_": [x(B, 20, 6), *of_phi, *divisor, x(B, 8, 6)],
        "memory_keys_backward_": [x(B, 20, 6), *of_phi, x(B, 8, 6), x(B, 8), None],
    }


@contextlib.contextmanager
def launches_refused() -> Iterator[None]:
    """No Triton kernel starts: what would have started one raises."""
    from aia_kernels.triton import tiles

    with mock.patch.object(tiles, "launch", side_effect=RuntimeError(NO_DEVICE)):
        yield


def wide(axis: int) -> Callable[[Tensor], Tensor]:
    """The same sizes, cut out of a tensor that is longer along an axis: fault 2's slice of channels is one."""
    return lambda t: torch.cat((t, t), axis).narrow(axis, 0, t.shape[axis])


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(dtype)


def put(value) -> Callable[[Any], Any]:
    return lambda _: value


def changed(arguments: list, place: int | tuple[int, int], change: Callable) -> list:
    """The arguments with one of them, or one entry of a list among them, changed."""
    arguments = list(arguments)
    if isinstance(place, int):
        arguments[place] = change(arguments[place])
    else:
        arguments[place[0]] = changed(arguments[place[0]], place[1], change)
    return arguments


def places(arguments: list) -> list[int | tuple[int, int]]:
    """Where the tensors are among arguments."""
    found = []
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            found.append(i)
        elif isinstance(value, list):
            found += [(i, j) for j, entry in enumerate(value) if isinstance(entry, Tensor)]
    return found


def of(arguments: list, place: int | tuple[int, int]) -> Tensor:
    return arguments[place] if isinstance(place, int) else arguments[place[0]][place[1]]
