"""Cases and inputs for the tests of CBAM's passes; plain_cbam.py in float64 gives the right answers.

Error bounds are those of pass_cases.py: every pass is linear in each of its inputs, so a sum of n products is off by at
most (n + 8) roundings of the accumulation type on the sum of the products' magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import pass_cases
import torch
from pass_backends import CPU, CUDA
from torch import Tensor

from aia_kernels.common.dtypes import accumulate_dtype


class Maps(NamedTuple):
    """A shape B, C, H, W; channels_last or contiguous."""

    shape: tuple[int, int, int, int]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32


#: Rows longer than a vector and shorter, whole vectors and not; degenerate axes; more rows than four.
MAPS = {
    "prime": Maps((2, 5, 7, 11)),
    "prime, channels_last": Maps((2, 5, 7, 11), True),
    "one channel": Maps((2, 1, 3, 4)),
    "one position": Maps((3, 37, 1, 1)),
    "one position, channels_last": Maps((3, 37, 1, 1), True),
    "one element": Maps((2, 1, 1, 1)),
    "one row": Maps((1, 6, 1, 19)),
    "one column, channels_last": Maps((1, 18, 23, 1), True),
    "less than a vector": Maps((1, 3, 1, 3), True),
    "whole vectors": Maps((1, 32, 4, 8)),
    "whole vectors, channels_last": Maps((1, 32, 4, 8), True),
    "stage 5": Maps((1, 70, 7, 7)),
    "bf16": Maps((2, 6, 5, 7), False, torch.bfloat16),
    "bf16, channels_last": Maps((1, 35, 3, 5), True, torch.bfloat16),
    "fp16": Maps((1, 9, 6, 6), False, torch.float16),
    "fp16, channels_last": Maps((2, 17, 2, 3), True, torch.float16),
    "fp64": Maps((2, 5, 3, 7), False, torch.float64),
    "fp64, channels_last": Maps((1, 21, 4, 3), True, torch.float64),
}

#: For the CPU: several units, several tiles one below the other, and side by side.
TILES = {
    "several units": Maps((1, 5, 120, 130)),
    "tiles side by side": Maps((1, 6, 70, 71)),
    "tiles below each other": Maps((1, 75, 41, 49)),
    "tiles of positions, channels_last": Maps((1, 40, 70, 60), True),
    "tiles of channels, channels_last": Maps((1, 4200, 7, 6), True),
}

#: For CUDA: several chunks of rows, teams of several warps, several tiles; fours where there are no eights.
CHUNKS = {
    "chunks": Maps((2, 130, 4, 5)),
    "chunks, channels_last": Maps((1, 20, 13, 11), True),
    "several warps": Maps((1, 2, 40, 52)),
    "several warps, channels_last": Maps((1, 1030, 1, 2), True),
    "fours of bf16": Maps((2, 9, 6, 6), False, torch.bfloat16),
    "fours of fp16, channels_last": Maps((1, 12, 5, 7), True, torch.float16),
}
#: And tensors that begin between vectors.
SLICES = {name: (MAPS | CHUNKS)[name] for name in ("whole vectors", "fours of bf16", "fp64, channels_last")}

#: What Triton's interpreter takes in every run.
FEW = ("prime", "prime, channels_last", "one position", "bf16, channels_last", "fp64")
INTERPRETED = {name: MAPS[name] for name in FEW}
OTHERS = {name: case for name, case in MAPS.items() if name not in FEW}

#: Which cases run where: in every run, and in sweeps.
ON_CUDA = (CUDA, INTERPRETED | CHUNKS), (("emulator, between vectors",), SLICES)
EVERY = (CPU, MAPS | TILES), *ON_CUDA, (("triton",), INTERPRETED)
SWEPT = ((("triton", *CUDA), OTHERS),)


def stored(values: Tensor, case: Maps) -> Tensor:
    """Values [B, C, H, W] in the type and the layout of a case, on the device."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return values.to(case.dtype).to(pass_cases.DEVICE).contiguous(memory_format=layout)


def maps_of(case: Maps) -> Tensor:
    return stored(torch.randn(case.shape, dtype=torch.float64), case)


def numbers(x: Tensor, *shape: int) -> Tensor:
    """Numbers for x in its accumulation type."""
    return torch.randn(shape, dtype=accumulate_dtype(x.dtype)).to(x.device)


def gates_of(x: Tensor) -> tuple[Tensor, Tensor]:
    b, c, h, w = x.shape
    return numbers(x, b, c).sigmoid(), numbers(x, b, 1, h, w).sigmoid()


def features_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both pooled features, and indices that point anywhere: of channels, then of positions."""
    b, c, h, w = x.shape
    of_channels = numbers(x, b, 2, c), torch.randint(h * w, (b, c), dtype=torch.int32).to(x.device)
    return *of_channels, numbers(x, b, 2, h, w), torch.randint(c, (b, h, w), dtype=torch.int32).to(x.device)
