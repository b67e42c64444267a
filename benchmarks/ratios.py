"""How many times faster than the published flow each layer is, over the sizes that networks have: rows and a heat map.

    python -m benchmarks.ratios [--layers NAMES] [--every K] [--compiled] [--dtype T] [--layout L] [--results DIR]

One thread, eval and a training step, fp32 and contiguous if nothing else is asked for. Both forms are sampled in turns,
by processor time, which a busy machine disturbs least. A cell below one is a size at which a user would lose. What
aia_kernels/backends/choices.py goes by was found here. Numbers are not checked: the tests and benchmarks.run do that.
The whole space takes about half an hour; every fifth size, which meets each sample size, token count and map with some
of the widths, a fifth of it. With --compiled both forms are compiled by torch.compile, half a minute a size.

The C library gives freed memory back to the system and takes it again, as its thresholds have it. That is as dear as
the work itself where y has megabytes, and falls on one form or the other by chance. So it is told to keep what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure, plot, progress, records
from .providers import build, on_backend
from .registry import DTYPES, MODES, Case
from .registry.attention_in_attention import UnitCase
from .registry.case import LAYOUTS, Place, main_form
from .registry.cbam import STAGES, GatesCase, place
from .registry.external_attention import LayerCase
from .registry.linear_attention import MemoryCase

COLUMNS = [
    *("layer", "settings", "sizes", "dtype", "layout", "flow", "mode"),
    *("ratio", "low", "high", "published_ms", "fused_ms"),
    *("device", "cpu", "threads", "torch", "triton", "commit", "date"),
]
#: Processor seconds of a sample, at least; the turns that each form gets, at most; and seconds after which no further
#: turn begins once each form has had three.
SAMPLE, ROUNDS, PATIENCE = 0.004, 7, 1.0
#: Multiplications and bytes of x beyond which a size is left out: the published flow would take many seconds.
MOST_PRODUCTS, MOST_BYTES = 3e10, 300e6

#: Samples and tokens in each.
TOKENS = ((1, 1), (1, 50), (8, 197), (64, 49), (1, 4096), (8, 4096), (1, 65536), (1, 1_000_000))
WIDTHS = (16, 64, 256, 512, 1024)
SLOTS = (1, 8, 64, 512)
#: Maps of the block: samples, height, width.
MAPS = ((1, 2, 2), (8, 7, 7), (1, 16, 16), (1, 33, 31), (1, 65, 65), (4, 64, 64), (1, 256, 256))
#: Published heads of widths: EAMLP's own networks are among them.
HEADS = (
    (64, 1),
    (64, 4),
    (256, 4),
    (256, 8),
    (256, 32),
    (384, 6),
    (384, 12),
    (384, 32),
    (768, 12),
    (768, 24),
    (1024, 8),
)
#: Clips, frames, height and width of a unit's input.
CLIPS = ((1, 1, 7, 7), (1, 8, 7, 7), (8, 8, 7, 7), (1, 8, 14, 14), (8, 8, 14, 14), (1, 8, 28, 28), (8, 4, 28, 28))
CLIPS += ((1, 8, 56, 56), (8, 8, 56, 56), (1, 8, 112, 112), (8, 1, 28, 28))
CHANNELS = (8, 64, 256, 512, 2048)
#: Batches and maps of CBAM beside the stages of ResNet-50: channels, height, width.
BATCHES = (1, 8, 32)
FEATURES = (*STAGES.values(), (16, 4, 4), (64, 8, 8), (64, 14, 14), (256, 7, 7), (64, 112, 112))


#: Square maps of linear attention, whose published code takes no other; of efficient attention key features, heads and
#: features of values of a width.
SQUARES = ((1, 4), (1, 8), (8, 8), (1, 16), (8, 16), (1, 32), (8, 32), (1, 64), (1, 128))
CHANNELS_OF_MAPS = (16, 64, 128, 256, 512)
EFFICIENT = ((8, 1, 1), (2, 8, 2), (4, 4, 4))


class Cell(NamedTuple):
    """One size of one layer: its name, what it is built with and the sizes of x as the map names them, and the case."""

    layer: str
    settings: str
    sizes: str
    case: Case


def cells() -> Iterator[Cell]:
    """Every size of the space that can be measured in seconds."""
    plain = [({"d_model": d, "S": s}, f"{d}, {s}") for d, s in itertools.product(WIDTHS, SLOTS)]
    multi_head = [({"dim": d, "num_heads": h}, f"{d}, {h}") for d, h in HEADS]
    block = [({"c": c, "k": k}, f"{c}, {k}") for c, k in itertools.product(WIDTHS, (8, 64))]
    for layer, places in (("ExternalAttention", plain), ("MultiHeadExternalAttention", multi_head)):
        for (arguments, settings), (b, n) in itertools.product(places, TOKENS):
            yield from _cell(layer, arguments, settings, (b, n, next(iter(arguments.values()))), f"{b} x {n}")
    for (arguments, settings), (b, h, w) in itertools.product(block, MAPS):
        yield from _cell("ExternalAttention2d", arguments, settings, (b, arguments["c"], h, w), f"{b} x {h}x{w}")
    for c, (b, n) in itertools.product(CHANNELS_OF_MAPS, SQUARES):
        yield from _on_maps("PositionLinearAttention", {"in_places": c}, str(c), (b, c, n, n))
        yield from _on_maps("ChannelLinearAttention", {}, str(c), (b, c, n, n))
        for k, heads, v in EFFICIENT:
            arguments = {"in_channels": c, "key_channels": c // k, "head_count": heads, "value_channels": c // v}
            yield from _on_maps("EfficientAttention", arguments, f"{c}, {c // k}, {heads}, {c // v}", (b, c, n, n))
    for unit, c, (b, t, h, w) in itertools.product(("C", "ST", "CinST", "STinC", "STinC2"), CHANNELS, CLIPS):
        case = UnitCase(unit, "", b, "fp32", "contiguous", (c, h, w), t)
        if case.x_bytes <= MOST_BYTES:
            yield Cell(unit, str(c), f"{b} x {t}x{h}x{w}", case)
    for b, (c, h, w) in itertools.product(BATCHES, FEATURES):
        gates = main_form(GatesCase, "", place(b, c, h, w))
        if gates.x_bytes <= MOST_BYTES:
            yield Cell("CBAM", str(c), f"{b} x {h}x{w}", gates)


def _cell(layer: str, arguments: dict, settings: str, sizes: tuple[int, ...], name: str) -> Iterator[Cell]:
    case = main_form(LayerCase, "", Place(layer, arguments, sizes))
    width = next(iter(arguments.values()))
    tokens, columns = math.prod(sizes) // width, case.slots[0]
    if tokens * width * (columns + 8 * width) <= MOST_PRODUCTS and 4 * tokens * max(columns, width) <= MOST_BYTES:
        yield Cell(layer, settings, name, case)


def _on_maps(layer: str, arguments: dict, settings: str, sizes: tuple[int, ...]) -> Iterator[Cell]:
    case = main_form(MemoryCase, "", Place(layer, arguments, sizes))
    b, c, h, w = sizes
    if 3 * math.prod(sizes) * c <= MOST_PRODUCTS and case.x_bytes <= MOST_BYTES:
        yield Cell(layer, settings, f"{b} x {h}x{w}", case)


def measured(cell: Cell, mode: str, compiled: bool = False) -> tuple[list[float], list[float]]:
    """Processor seconds of a call of the published and of the fused layer, a sample of each a turn."""
    provider, x = on_backend("auto"), cell.case.make_input()
    torch.manual_seed(0)
    layers: list[Any] = [cell.case.published().to(x.dtype), build(provider, cell.case, "cpu")]
    with provider.context():
        if compiled:
            torch.compiler.reset()
            layers = [torch.compile(layer, dynamic=False) for layer in layers]
        if mode == "eval":
            calls = [measure.evaluation(layer, x) for layer in layers]
        else:
            grad_y = torch.ones_like(layers[0](x).detach())
            calls = [measure.training_step(layer, x, grad_y) for layer in layers]
        for call in (*calls, *calls):
            call()
        counts = [max(1, round(SAMPLE / max(_seconds(call, 1), 1e-6))) for call in calls]
        taken: tuple[list[float], list[float]] = [], []
        begin = time.process_time()
        for done in range(ROUNDS):
            if done >= 3 and time.process_time() - begin > PATIENCE:
                break
            turn = [*zip(calls, counts, taken, strict=True)]
            for call, count, seconds in turn[:: -1 if done % 2 else 1]:  # neither is always the one behind the other
                seconds.append(_seconds(call, count))
    return taken


def _seconds(call: Callable[[], object], count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - begin) / count


def row(cell: Cell, mode: str, compiled: bool = False) -> dict:
    """What is written of a cell: the ratio of the medians, and the quartiles of the ratios turn by turn."""
    published, fused = measured(cell, mode, compiled)
    low, _, high = statistics.quantiles((a / b for a, b in zip(published, fused, strict=True)), n=4)
    medians = [statistics.median(seconds) for seconds in (published, fused)]
    return {
        **{"layer": cell.layer, "settings": cell.settings, "sizes": cell.sizes},
        **{"dtype": cell.case.dtype, "layout": cell.case.layout},
        **{"flow": "compiled" if compiled else "eager", "mode": mode},
        **{"ratio": f"{medians[0] / medians[1]:.2f}", "low": f"{low:.2f}", "high": f"{high:.2f}"},
        **{"published_ms": f"{1e3 * medians[0]:.4f}", "fused_ms": f"{1e3 * medians[1]:.4f}"},
    }


def keep_freed_memory() -> None:
    """Tell the C library not to give memory back, where it is one that can be told (glibc)."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.split("\n\n")[0])
    known = list(dict.fromkeys(cell.layer for cell in cells()))
    parser.add_argument("--layers", nargs="+", choices=known, default=known, metavar="LAYER")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="measure each Kth size alone")
    parser.add_argument("--compiled", action="store_true", help="compare both forms behind torch.compile")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="of maps and clips")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    where = measure.machine("cpu")
    wanted = [cell for cell in cells() if cell.layer in chosen.layers][:: max(1, chosen.every)]
    kind = {"compiled": chosen.compiled, chosen.dtype: chosen.dtype != "fp32"}
    kind[chosen.layout] = chosen.layout != "contiguous"
    file = chosen.results / "_".join(("ratios", *(name for name, said in kind.items() if said)))
    file = file.with_suffix(".csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for cell in progress.bar(wanted):
            case = dataclasses.replace(cell.case, dtype=chosen.dtype, layout=chosen.layout)
            for mode in MODES:
                writer.writerow(row(cell._replace(case=case), mode, chosen.compiled) | where)
            opened.flush()
    plot.ratios(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
