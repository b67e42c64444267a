"""Double normalization (arXiv 2105.02358, equation 6) in plain PyTorch: over the tokens, then over the slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import accumulate_dtype
from .all_reduce import all_reduce


def log_sum_exp(logits: Tensor, padding: Tensor | None, process_group: Any = None) -> Tensor:
    """The logarithm [..., 1, M] of the sum of exp(logits) over the tokens that are not padding; 0 without a token.

    Over the tokens of all members of a process group if one is given. The maximum is only there against overflow: its
    derivative cancels, so it is taken as a constant.
    """
    shown = logits if padding is None else logits.masked_fill(padding.unsqueeze(-1), -torch.inf)
    maximum = shown.detach().amax(-2, keepdim=True)
    if process_group is not None:
        torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=process_group)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    total = (shown - maximum).exp().sum(-2, keepdim=True)
    if process_group is not None:
        total = all_reduce(total, process_group)
    return maximum + (total + (total == 0)).log()


def double_normalize(
    logits: Tensor, group: int, eps: float = 0.0, padding: Tensor | None = None, process_group: Any = None
) -> Tensor:
    """A = P / (eps + the sum of P over the token's group), P = softmax over tokens (arXiv 2105.02358, equation 6).

    It is computed in accumulate_dtype. Without eps, A is a softmax of log P over the slots. That is right where P
    itself underflows; published code divides 0 by 0 there.

    Args:
        logits: [..., N, M], floating-point. The M columns are consecutive groups of slots.
        group: The number of slots of a group, a divisor of M.
        eps: Added to the sum over slots.
        padding: [..., N], True at tokens that take no part, or None. They weigh nothing, and their A is 0.
        process_group: Its members hold the tokens in shards; None: this process holds all.

    Returns:
        A, in the shape and type of the logits.
    """
    x = logits.to(accumulate_dtype(logits.dtype))
    if padding is not None:
        x = x.masked_fill(padding.unsqueeze(-1), 0.0)
    own = padding is None and process_group is None  # torch's softmax is over the tokens that are here, all of them
    if eps == 0:
        log_p = x.log_softmax(-2) if own else x - log_sum_exp(x, padding, process_group)
        attention = _by_group(log_p, group).softmax(-1)
    else:
        p = x.softmax(-2) if own else (x - log_sum_exp(x, padding, process_group)).exp()
        p = _by_group(p, group)
        attention = p / (eps + p.sum(-1, keepdim=True))
    if attention.ndim > logits.ndim:
        attention = attention.flatten(-2)
    if padding is not None:
        attention = attention.masked_fill(padding.unsqueeze(-1), 0.0)
    return attention.to(logits.dtype)


def _by_group(columns: Tensor, group: int) -> Tensor:
    """[..., M] as [..., M / group, group], or as it is where one group has all columns."""
    return columns if columns.shape[-1] == group else columns.unflatten(-1, (-1, group))
