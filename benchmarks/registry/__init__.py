"""What is measured, one file per family: the cases with their inputs, the bytes they should move and who competes."""

from . import attention_in_attention, external_attention
from .case import DTYPES, MODES, Case

FAMILIES = {"attention_in_attention": attention_in_attention, "external_attention": external_attention}


def main_clips(family: str) -> dict[tuple[str, str], int]:
    """The batch of the main input of each (name, stage): of its cases the main ones come first."""
    found: dict[tuple[str, str], int] = {}
    for case in FAMILIES[family].cases():
        found.setdefault((case.name, case.stage), case.clips)
    return found


__all__ = ["DTYPES", "FAMILIES", "MODES", "Case", "main_clips"]
