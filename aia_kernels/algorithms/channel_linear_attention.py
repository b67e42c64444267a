"""Linear attention over channels, forward and backward; the mathematics: reference/linear_attention.py.

With X [C, N], h = X / |X| over channels, S = X h^T [C, C], and sums over channels xi of X and sigma of h, [N] each:

    p = N + h (sigma + eps)        f = gamma / p        M = f S, row by row        y = X + f xi^T + M h

Backward, with G the gradient of y and K = G h^T:

    df = G xi + the sums of the rows of S * K        dgamma = sum of df / p        dp = -df f / p
    dh = M^T G + (f K)^T X + dp (sigma + eps)^T + 1 (dp^T h)
    dX = G + f K h + 1 (f^T G) + (dh - h sum of h * dh) / |X|

These are six products of C^2 N, as many as under autograd. But h and what else is as large as x is made again: kept are
x and, where they are small beside it, S and p.

With fewer positions than channels S h = X R with R = h^T h [N, N] takes C N^2. Backward, with L = X^T (f G),

    df = G xi + the sums of the rows of G * X R        dh = h (L + L^T) + dp (sigma + eps)^T + 1 (dp^T h)
    dX = G + f G R + 1 (f^T G) + (dh - h sum of h * dh) / |X|
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autocast import without_autocast
from ..common.layouts import save, saved, stored_as, unviewed
from ..reference.linear_attention import channel_linear_attention as reference
from .double_backward import backward_is_followed, gradients
from .linear_attention import dtype_of_memory


class Directions(NamedTuple):
    """h and 1 / |X| of x [B, C, N], stored as x: [B, C, N] and [B, 1, N]; and sigma + eps [B, 1, N]."""

    h: Tensor
    inverse: Tensor
    sums: Tensor


class Memory(NamedTuple):
    """S [B, C, C], or R [B, N, N] with fewer positions than channels, and p [B, C, 1]."""

    s: Tensor
    p: Tensor


def forward(x: Tensor, gamma: Tensor | None, eps: float) -> tuple[Tensor, Memory]:
    """y, of the type of x [B, C, N] and stored as it, whose positions or channels are contiguous, and the memory.
    Nothing is changed in place: selective checkpointing may put results that it kept in the place of these.

    All is made in dtype_of_memory: on a GPU bfloat16 is what the products take, and h in float32 would be as many bytes
    as two of x, written and read by each of the operators around them.
    """
    dtype = dtype_of_memory(x)
    wide = x.to(dtype)
    of = _directions(wide, eps)
    memory = _memory(wide, of)
    f = _factor(memory, None if gamma is None else gamma.to(dtype))
    base = torch.addcmul(wide, f, wide.sum(1, keepdim=True))
    if _has_few_positions(x):
        y = torch.addcmul(base, f, _met(wide, memory.s))
    else:
        m = memory.s * f
        y = torch.baddbmm(base.mT, of.h.mT, m.mT).mT if _by_position(x) else torch.baddbmm(base, m, of.h)
    return stored_as(y, wide).to(x.dtype), memory


@without_autocast
def backward(grad: Tensor, x: Tensor, gamma: Tensor | None, eps: float, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """The gradients of x and of gamma [1], for that of y, stored as x. memory: None to make it again."""
    of = _directions(x, eps)
    memory = _memory(x, of) if memory is None else memory
    h, (s, p), f, few = of.h, memory, _factor(memory, gamma), _has_few_positions(x)
    k = None if few else torch.bmm(grad, h.mT)
    of_rows = (grad * _met(x, s) if k is None else s * k).sum(2, keepdim=True)
    df = torch.bmm(grad, x.sum(1, keepdim=True).mT) + of_rows
    grad_gamma = (df / p).sum().view(1)
    dp = (df * f / p).neg_()
    # The two sums that are the same for all rows, and those for all positions, come as a product of two columns.
    rows = torch.cat((dp, torch.ones_like(dp)), 2)
    columns = torch.cat((of.sums, torch.bmm(dp.mT, h)), 1)
    dh = _product(rows, columns, h)
    if k is None:
        scaled = grad * f
        pairs = torch.bmm(x.mT, scaled)
        dh, direct = dh.add_(_met(h, pairs + pairs.mT)), _met(scaled, s)
    else:
        k = k * f
        dh, direct = _added(_added(dh, (s * f).mT, grad), k.mT, x), _product(k, h, h)
    along = (h * dh).sum(1, keepdim=True)
    dh = torch.addcmul(dh, h, along, value=-1.0).mul_(of.inverse)
    return dh.add_(grad).add_(torch.bmm(f.mT, grad)).add_(direct), grad_gamma


def _has_few_positions(x: Tensor) -> bool:
    return x.shape[2] < x.shape[1]


def _directions(x: Tensor, eps: float) -> Directions:
    square = x.square().sum(1, keepdim=True)
    inverse = (square + (square == 0)).rsqrt()
    h = x * inverse
    return Directions(h, inverse, h.sum(1, keepdim=True) + eps)


def _memory(x: Tensor, of: Directions) -> Memory:
    products = torch.bmm(of.h.mT, of.h) if _has_few_positions(x) else torch.bmm(x, of.h.mT)
    return Memory(products, torch.bmm(of.h, of.sums.mT) + x.shape[2])


def _factor(memory: Memory, gamma: Tensor | None) -> Tensor:
    """f [B, C, 1]."""
    return memory.p.reciprocal() if gamma is None else gamma / memory.p


def _by_position(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1


def _product(matrix: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """matrix [B, C, K] times x [B, K, N], stored as like."""
    return torch.bmm(x.mT, matrix.mT).mT if _by_position(like) else torch.bmm(matrix, x)


def _met(x: Tensor, pairs: Tensor) -> Tensor:
    """x [B, C, N] times symmetric pairs [B, N, N], stored as x."""
    return torch.bmm(pairs, x.mT).mT if _by_position(x) else torch.bmm(x, pairs)


def _added(base: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """base plus matrix [B, C, C] times x [B, C, N], into base, which is stored as x and nobody else's."""
    if _by_position(base):
        base.mT.baddbmm_(x.mT, matrix.mT)
    else:
        base.baddbmm_(matrix, x)
    return base


class ChannelLinearAttentionFunction(torch.autograd.Function):
    """y = apply(x, gamma, eps) of maps seen as x [B, C, N], not empty and dense, with exact first and second
    derivatives. gamma is of the type of x."""

    @staticmethod
    def forward(ctx, x, gamma, eps):
        y, memory = forward(x, gamma, eps)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        save(ctx, x, gamma, *(memory if keeps(x) else (None, None)))
        return unviewed(y)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        x, gamma, *kept = saved(ctx)
        if backward_is_followed():
            return *gradients(partial(reference, eps=ctx.eps), (x, gamma), ctx.needs_input_grad[:2], grad), None
        dtype = dtype_of_memory(x)
        wide = stored_as(grad, x).to(dtype), x.to(dtype), None if gamma is None else gamma.to(dtype)
        memory = None if kept[0] is None else Memory(*kept)
        grad_x, grad_gamma = backward(*wide, ctx.eps, memory)
        return grad_x.to(x.dtype), None if gamma is None else grad_gamma.view(gamma.shape).to(gamma.dtype), None


def keeps(x: Tensor) -> bool:
    """Whether the memory is kept: it is small beside x."""
    return 4 * min(x.shape[1:]) <= max(x.shape[1:])
