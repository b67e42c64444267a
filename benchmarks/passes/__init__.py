"""The raw passes of a backend, each as a call with real arguments: what run --passes measures. One file per family."""

from __future__ import annotations

from torch import Tensor

from ..registry import Case
from . import attention_in_attention, cbam, external_attention
from .raw import RawPass

FAMILIES = {
    "attention_in_attention": attention_in_attention,
    "external_attention": external_attention,
    "cbam": cbam,
}


def calls(backend: str, case: Case, x: Tensor, grad_y: Tensor) -> dict[str, RawPass]:
    """The passes of a backend on the input x of a case, by name; grad_y is shaped and stored as x."""
    return FAMILIES[case.family].calls(backend, case, x, grad_y)
