"""The double normalization in operators of PyTorch, over any axes, where P may be too small for a number.

With mass, the sum of P over slots, A = P / mass is 0 / 0 where P is 0 in all slots of a token. Three forms are safe:

* two softmaxes, the second of log P over slots. Nothing is divided, but each element takes two exponentials.
* P / mass after a look at the least mass. That is one exponential, but a recorded program cannot look at a value.
* One exponential, and no look. With u = L - its maximum over tokens, and r the maximum of u over the slots of a token:

      E = exp(u - r)        s = sum over tokens of E exp(r)        A = (E / s) / (sum over slots of E / s)

  E exp(r) is P s. In each token E is 1 once, and s lies between 1 and the number of tokens: so no divisor is 0. These
  are more operators, all of which a compiler makes one loop of.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Below this sum a term of it may have been too small to be a normal number.
SAFE_MASS = {torch.float32: 2.0**-60, torch.float64: 2.0**-512}
#: Elements up to which a second exponential takes less than to sum, to look at the sums and to divide, three calls of
#: 10 us in all: they met between 8,000 and 16,000, with tokens side by side and with slots (docs/benchmarks.md).
SMALL_MAP = 12_000


def by_two_softmaxes(logits: Tensor, tokens: int, slots: int) -> Tensor:
    """A of logits, without eps; tokens and slots are their axes. Of 16 bits it is float32, as below: the first softmax
    converts what it reads, which takes less than a conversion of its own."""
    return logits.log_softmax(tokens, dtype=_accumulated(logits)).softmax(slots)


def _accumulated(logits: Tensor) -> torch.dtype | None:
    """The type in which logits are normalized, None for their own."""
    return torch.float32 if logits.dtype.itemsize < 4 else None


def by_sums(logits: Tensor, tokens: int, slots: int, eps: float, kept: bool) -> tuple[Tensor, Tensor]:
    """A and mass of logits. kept: A backward follows, so nothing is written over what an operator returned."""
    p = logits.softmax(tokens, dtype=_accumulated(logits))
    mass = p.sum(slots, keepdim=True)
    if eps:
        mass = mass + eps
    elif not mass.amin().item() >= SAFE_MASS[p.dtype]:
        return by_two_softmaxes(logits, tokens, slots), mass
    return p / mass if kept else p.div_(mass), mass


def for_a_compiler(logits: Tensor, tokens: int, slots: int, eps: float) -> Tensor:
    """A of logits, float32 or float64, as a program that is compiled."""
    if eps:
        p = logits.softmax(tokens)
        return p / (p.sum(slots, keepdim=True) + eps)
    if torch.is_grad_enabled():
        return by_two_softmaxes(logits, tokens, slots)
    u = logits - logits.amax(tokens, keepdim=True)
    r = u.amax(slots, keepdim=True)
    e = (u - r).exp()
    e = e / (e * r.exp()).sum(tokens, keepdim=True)
    return e / e.sum(slots, keepdim=True)
