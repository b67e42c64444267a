"""What is measured, one file per family: the cases with their inputs, the bytes they should move and who competes."""

from . import attention_in_attention, cbam, dot_product_attention, external_attention, linear_attention
from .case import DTYPES, MODES, Case

#: Their modules, by the name of the module of aia_kernels that runs them.
FAMILIES = {
    "attention_in_attention": attention_in_attention,
    "external_attention": external_attention,
    "linear_attention": linear_attention,
    "cbam": cbam,
    "dot_product_attention": dot_product_attention,
}


def main_clips(family: str) -> dict[tuple[str, str], int]:
    """The batch of the main input of each (name, stage): of its cases the main ones come first."""
    found: dict[tuple[str, str], int] = {}
    for case in FAMILIES[family].cases():
        found.setdefault((case.name, case.stage), case.clips)
    return found


#: The type of the main inputs.
MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
#: Among equals, what comes first: the main units, then of the families in this order the rest.
MAIN_UNITS = ("CinST", "STinC")
WORTH = ("external_attention", "attention_in_attention", "linear_attention", "cbam", "dot_product_attention")


def by_worth(cases: list[Case], device: str) -> list[Case]:
    """Cases in the order of what matters on a device: its main inputs (their type, contiguous, the main batch), then
    those with one thing changed, the type first, and so on; the sweeps last. Among equals the main units, then the
    families as WORTH has them."""
    clips = {family: main_clips(family) for family in FAMILIES}

    def key(case: Case) -> tuple:
        batch = clips[case.family].get((case.name, case.stage), case.clips)
        departures = case.dtype != MAIN_DTYPE[device], case.layout != "contiguous", case.clips != batch
        group = -1 if case.name in MAIN_UNITS else WORTH.index(case.family)
        return case.kind == "sweep", sum(departures), [not one for one in departures], group

    return sorted(cases, key=key)


__all__ = ["DTYPES", "FAMILIES", "MODES", "Case", "by_worth", "main_clips"]
