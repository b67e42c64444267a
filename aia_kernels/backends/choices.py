"""What ``auto`` goes by: on a GPU a measured table, on a CPU a count of what fusing saves.

The table is choices.csv, which benchmarks/choices.py writes. A row says for a device (by the name torch gives it), a
family and a type in which order the backends are to be tried, with the times that decided it, relative to the best
one's in the same case. A device without a row gets the order of backends.AUTO.

The count is for external attention, whose published flow is a handful of operators: where there is little to save,
calling the fused passes costs more (fusing_pays). benchmarks/ratios.py measures both on either side of the choice.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path

TABLE = Path(__file__).resolve().with_name("choices.csv")
COLUMNS = ["device", "family", "dtype", "order", "times", "worst", "cases", "commit", "date"]


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


@functools.cache
def measured_order(device_name: str, family: str, dtype: str) -> tuple[str, ...] | None:
    """The backends in the order of their measured times, the fastest first, or None where nothing was measured."""
    wanted = {"device": device_name, "family": family, "dtype": dtype}
    rows = [row for row in read() if all(row[column] == value for column, value in wanted.items())]
    return tuple(rows[-1]["order"].split()) if rows else None


#: In multiplications of a matrix product on one core: what a call of the fused passes costs over plain PyTorch, a fifth
#: of a millisecond, and what they save for an element of the attention map, one nanosecond.
CALL_COST, ELEMENT_GAIN = 8_000_000, 30
#: What a few calls of submodules or small operators cost, as a part of CALL_COST: below it products are not counted.
PLAIN_CALLS = 16
#: Of attention by a memory per sample, in the same unit: what a call of its algorithm costs over a flow of a dozen
#: operators, and what it saves for an element of that flow's tensors of all tokens.
FOLDING_COST, TRAFFIC_GAIN = 5_000_000, 100
#: Fewer slots than these do not fill a vector at AVX-512, along which the lanes of the passes lie. PyTorch with the
#: tokens side by side (algorithms/few_slots.py) is faster then, at any size; and a product of fewer columns is slower.
FEW_SLOTS = 16


def fusing_pays(rows: int, slots: int, products: int = 0, calls: float = 1) -> bool:
    """Tell whether the fused passes of external attention are faster than plain PyTorch on a CPU.

    Args:
        rows: Of the attention map, over batch and heads.
        slots: Normalized together in a row.
        products: The multiplications that folding leaves out, less those that it costs.
        calls: What the call costs, in CALL_COST.

    Returns:
        Whether what is saved is worth the cost of the call.
    """
    return gain(rows, slots) + products > calls * CALL_COST


def gain(rows: int, slots: int) -> int:
    """What the passes save over plain PyTorch, in multiplications; arguments as of fusing_pays."""
    return ELEMENT_GAIN * rows * slots if slots >= FEW_SLOTS else 0


def folding_pays(elements: int, products: int, calls: float = 1) -> bool:
    """Tell whether the algorithm of attention by a memory per sample is faster than its published flow on a CPU.

    Args:
        elements: Of x, keys and values that the published flow reads and writes again and again.
        products: The multiplications that folding leaves out, less those that it costs, of a forward.
        calls: What the call costs over those of the flow, in FOLDING_COST.

    Returns:
        Whether what is saved is worth the cost of the call.
    """
    return TRAFFIC_GAIN * elements + products > calls * FOLDING_COST
