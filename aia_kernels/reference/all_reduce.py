"""A sum over the members of a process group, differentiable as often as wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AllReduce(torch.autograd.Function):
    """The sum is its own transpose: every member's loss depends on what this one gives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.process_group), None


def all_reduce(tensor: Tensor, process_group: Any) -> Tensor:
    """The sum of a tensor of one shape over the members of a group: the same on each, and its gradient theirs added."""
    return _AllReduce.apply(tensor, process_group)
