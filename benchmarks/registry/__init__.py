"""What is measured, one file per family: the cases with their inputs, the bytes they should move and who competes."""

from . import attention_in_attention, external_attention
from .case import DTYPES, MODES, Case

FAMILIES = {"attention_in_attention": attention_in_attention, "external_attention": external_attention}

__all__ = ["DTYPES", "FAMILIES", "MODES", "Case"]
