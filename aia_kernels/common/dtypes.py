"""The types that the layers compute in."""

from __future__ import annotations

import torch

#: The types of activations that every backend takes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of maps, gates and accumulators for an input type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
