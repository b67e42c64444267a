"""What folding saves in a layer of external attention, and whether that pays, by counting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import choices
from ..common.tracing import is_statically
from ..functional.external_attention import compiler_fuses

#: Of EANet's block, in choices.CALL_COST: what its passes must save in a step and in evaluation. The moments of A are
#: many small operators, and beside operators that fold too the passes save traffic of x, which costs little in cache.
STEP_CALLS, EVALUATION_CALLS = 3, 5


def products_saved(heads: int, slots: int, first: tuple[int, int], last: tuple[int, int], tokens: int | None) -> int:
    """The multiplications that it saves to fold the projections beside the memories into these, with heads that share
    the memories. On a CPU the form of fewer multiplications was the faster one, in eval and for a step.

        folded      tokens * heads slots (d + o), and once slots (w d + o v) for both matrices
        by heads    tokens * (w (d + slots) + v (o + slots))

    Args:
        first: [w, d], the sizes of the projection before the keys.
        last: [o, v], those of the projection behind the values.
        tokens: Of all samples. None while a program is recorded that holds for any number of them. Then, and where
            torch.compile does not know enough of it, the multiplications are those of one token, and what is done once
            does not count.
    """
    (w, d), (o, v) = first, last
    per_token = w * (d + slots) + v * (o + slots) - heads * slots * (d + o)
    if tokens is None:
        return per_token
    saved = per_token * tokens - slots * (w * d + o * v)
    return saved if is_statically(saved >= 0) or is_statically(saved < 0) else per_token


def block_products_saved(x: Tensor, weights: Sequence[Tensor]) -> int:
    """The multiplications that it saves to fold the pointwise convolutions of EANet's block, in the order in which they
    are applied, or, below 0, costs."""
    k, c = weights[1].shape[:2]
    return (len(weights) - 2) * c * c * (x.numel() // c - k)


def block_folding_pays(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Of a small call, by counting: folding leaves out c^2 multiplications per position and projection, and costs c^2 k
    each. One sample takes products of matrices either way. Of several, folding takes the fewer operators in evaluation,
    and the more in a backward."""
    saved = block_products_saved(x, weights)
    if x.shape[0] == 1:
        return saved > 0
    return saved * choices.PLAIN_CALLS > (choices.CALL_COST if torch.is_grad_enabled() else -choices.CALL_COST)


def block_fusing_costs(x: Tensor, slots: int, compiled: bool = False) -> bool:
    """Whether the passes of EANet's block save less than they cost. Operators of PyTorch may fold too; what is left to
    save is traffic of maps as large as x, and the map of the attention has to be made for it."""
    calls = STEP_CALLS if torch.is_grad_enabled() else EVALUATION_CALLS
    positions, columns = x.numel() // x.shape[1], max(0, x.shape[1] - slots)
    if compiled:
        return compiler_fuses(x, positions, columns, 0, calls)
    return backends.plain_is_faster(x.device, positions, columns, 0, calls)
