"""The rows that benchmarks.run wrote as a Markdown table: python -m benchmarks.table FAMILY [--readme PATH]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import records, registry
from .records import select

FUSED = ("cuda", "triton", "cpu", "reference")
#: The folder beside the rows for those of a run in which every flow was held to AVX2 (docs/benchmarks.md).
HELD = "avx2"
TITLES = {"compile": "torch.compile", "compile-max": "max-autotune", "sdpa": "self-attention"}


def header_of(family: str) -> tuple[str, str]:
    """The titles of a layer and of its input."""
    return "unit" if family == "attention_in_attention" else "layer", "x"


def milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    value = float(row["median_ms"])
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def fused_of(rows: list[dict]) -> dict | None:
    """The row of the first fused provider among those of one layer, input and mode."""
    by_provider = {row["provider"]: row for row in rows}
    return next((by_provider[name] for name in FUSED if name in by_provider), None)


def ratio(fused: dict | None) -> str:
    return f"**{float(fused['speedup']):.1f}**" if fused else ""


def cells(rows: list[dict], others: list[str], held: list[dict]) -> list[str]:
    """The cells of one layer on one input: for each mode published, others, fused, ratio, that of the rows ``held``, if
    there are any; then what is kept."""
    found, kept = [], []
    for mode in registry.MODES:
        of_mode = select(rows, mode=mode)
        fused, published = fused_of(of_mode), next(iter(select(of_mode, provider="published")), None)
        found += [milliseconds(next(iter(select(of_mode, provider=name)), None)) for name in ("published", *others)]
        quartiles = f" ({float(fused['q25_ms']):.1f}–{float(fused['q75_ms']):.1f})" if fused and mode == "step" else ""
        found += [milliseconds(fused) + quartiles, ratio(fused)]
        found += [ratio(fused_of(select(held, mode=mode)))] if held else []
        kept = [f"{float(row['kept_x']):.2f}" for row in (published, fused) if row and row["kept_x"]]
    return [*found, " → ".join(kept)]


def main_rows(family: str, rows: list[dict]) -> list[dict]:
    """Those of the main input of every layer: fp32, contiguous, eight clips."""
    main = [row for row in select(rows, dtype="fp32", layout="contiguous") if row["kind"] != "sweep"]
    clips = registry.main_clips(family)
    return [row for row in main if int(row["clips"]) == clips.get((row["name"], row["stage"]), int(row["clips"]))]


def lines(family: str, rows: list[dict], held: list[dict]) -> list[str]:
    """The table of the main input of every layer, with the ratios of rows that are held to AVX2 (HELD), if any."""
    main, held = main_rows(family, rows), main_rows(family, held)
    others = [name for name in TITLES if select(main, provider=name)]
    titles = [TITLES[name] for name in others]
    ratios = ["ratio", "with AVX2"] if held else ["ratio"]
    header = [*header_of(family), "eval: published", *titles, "fused", *ratios]
    header += ["step: published", *titles, "fused (quartiles)", *ratios, "kept, in x"]
    table = [header, ["---"] * len(header)]
    where = {(case.name, case.stage): case.where for case in registry.FAMILIES[family].cases()}
    for name, stage in dict.fromkeys((row["name"], row["stage"]) for row in main):
        of_layer = [select(found, name=name, stage=stage) for found in (main, held)]
        table.append([name, where.get((name, stage), stage), *cells(of_layer[0], others, of_layer[1])])
    return [f"| {' | '.join(line)} |" for line in table]


#: What benchmarks.run prints of its rows: a measured time beside what was counted and predicted.
BESIDE = {
    "median_ms": "ms",
    "wall_ms": "eager, ms",
    "launches": "launches",
    "moved_mb": "MB moved",
    "predicted_ms": "predicted, ms",
    "of_roof": "of the roof",
}


def beside(rows: list[dict]) -> list[str]:
    """Rows with a count in Markdown, one a line; columns that none of them has are left out."""
    counted = [row for row in rows if row["launches"] != ""]
    columns = [column for column in BESIDE if any(row[column] != "" for row in counted)]
    where = ("name", "stage", "clips", "dtype", "layout", "mode", "provider")
    found = [[*where, *(BESIDE[column] for column in columns)], ["---"] * (len(where) + len(columns))]
    found += [[str(row[column]) for column in (*where, *columns)] for row in counted]
    return [f"| {' | '.join(line)} |" for line in found] if counted else []


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a table in a page."""
    return f"<!-- table: {name} -->\n", "\n<!-- end of table -->"


def write_into(path: Path, name: str, text: str) -> bool:
    """Write a table into a page, between its marks; False, with a word about it, where the page has none."""
    page, (start, end) = path.read_text(), marks(name)
    if start not in page:
        print(f"no {start.strip()} in {path}", file=sys.stderr)
        return False
    before, rest = page.split(start, 1)
    path.write_text(before + start + text + end + rest.split(end, 1)[1])
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.split(": python")[0])
    parser.add_argument("family", choices=tuple(registry.FAMILIES))
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, metavar="PATH", help="write the table there, between its marks")
    options = parser.parse_args(arguments)
    path = records.path(options.results, options.family)
    if not path.is_file():
        print(f"no rows in {path}: run python -m benchmarks.run first", file=sys.stderr)
        return 2
    held = records.path(options.results / HELD, options.family)
    text = "\n".join(lines(options.family, records.read(path), records.read(held) if held.is_file() else []))
    if options.readme is None:
        print(text)
        return 0
    return 0 if write_into(options.readme, options.family, text) else 2


if __name__ == "__main__":
    sys.exit(main())
