"""Process groups by name, as registered operators take them (group_name), and what is exchanged over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def resolve(name: str) -> Any:
    """The process group of a name; None for the empty name."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def gather(tensor: Tensor, name: str) -> Tensor:
    """A tensor of every member of a process group, stacked by rank."""
    from torch.distributed import all_gather

    group = resolve(name)
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)


def joint_statistics(members: Tensor) -> Tensor:
    """Statistics of a joint batch from the mean, variance and count of its members [members, n, 3]: Chan's formula."""
    mean, var, count = members.split(1, 2)
    total = count.sum(0)
    joint = (count * mean).sum(0) / total
    joint_var = (count * (var + (mean - joint).square())).sum(0) / total
    return torch.cat((joint, joint_var, total.reciprocal()), 1)
