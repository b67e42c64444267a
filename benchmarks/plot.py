"""Draw the rows that benchmarks.run wrote: python -m benchmarks.plot [--results DIR]"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

from . import registry

matplotlib.use("agg")
from matplotlib import pyplot

COLOURS = {
    "published": "#b8b8b8",
    "reference": "#8a8f98",
    "compile": "#d9a441",
    "cpu": "#2a6fbb",
    "triton": "#2f9e63",
    "cuda": "#7a4fb5",
}
FUSED = ("cuda", "triton", "cpu")
KEY = ("kind", "name", "stage", "clips", "dtype", "layout", "mode", "provider", "device")
MODE_NAMES = {"eval": "eval", "step": "training step"}


def read(path: Path) -> list[dict]:
    """The newest row of each key, with a time, of the device measured last."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {tuple(row[column] for column in KEY): row for row in rows}
    return [row for row in newest.values() if row["median_ms"] and row["device"] == rows[-1]["device"]]


def caption(rows: list[dict]) -> str:
    row = rows[-1]
    machine = row["device"] if row["device"] != "cpu" else f"{row['cpu']}, {row['threads']} threads"
    return f"{machine}; torch {row['torch']}; {row['date'][:10]}"


def select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[column] == str(value) for column, value in wanted.items())]


def ordered(found, order) -> list:
    """The members of ``found`` in the order given, others last."""
    return sorted(set(found), key=lambda value: (list(order).index(value) if value in order else len(order), value))


def bars(axis, rows: list[dict], column: str, providers: list[str], stages: list[str]) -> None:
    """Groups of bars, one group a stage and one bar a provider, each with its number above."""
    width = 0.84 / len(providers)
    for i, provider in enumerate(providers):
        for j, stage in enumerate(stages):
            for row in select(rows, provider=provider, stage=stage):
                value = float(row[column])
                place = j + (i - (len(providers) - 1) / 2) * width
                axis.bar(place, value, width * 0.92, color=COLOURS[provider], label=provider)
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                axis.annotate(
                    text, (place, value), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=6.5
                )
    axis.set_xticks(range(len(stages)), stages, fontsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)


def grid(rows: list[dict], column: str, label: str, providers: list[str], path: Path, budget: bool) -> None:
    """A panel for each unit (across) and mode (down) of the main input: 8 clips, fp32, contiguous."""
    main = select(rows, clips=8, dtype="fp32", layout="contiguous") or rows
    units = ordered((r["name"] for r in main), registry.UNITS)
    stages = ordered((r["stage"] for r in main), registry.STAGES)
    providers = [p for p in providers if select(main, provider=p)]
    size = (1.2 + (0.9 + 0.19 * len(stages) * len(providers)) * len(units), 5.8)
    figure, axes = pyplot.subplots(2, len(units), figsize=size, sharey="row", squeeze=False, layout="constrained")
    for panels, mode in zip(axes, registry.MODES, strict=True):
        for axis, unit in zip(panels, units, strict=True):
            bars(axis, select(main, name=unit, mode=mode), column, providers, stages)
            axis.margins(y=0.12)
            if budget:
                axis.set_yscale("log")
                axis.axhline(registry.traffic(unit, mode) / 2, color="#c0392b", linewidth=1, linestyle="--")
            else:
                axis.axhline(1, color="#555555", linewidth=0.8)
            if mode == registry.MODES[0]:
                axis.set_title(unit, fontsize=11)
        panels[0].set_ylabel(f"{label}\n{MODE_NAMES[mode]}", fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    names = list(providers)
    if budget:
        handles.append(pyplot.Line2D([], [], color="#c0392b", linestyle="--"))
        names.append("budget: x-sized traffic at the speed of a copy")
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    save(figure, rows, path)


def variants(rows: list[dict], path: Path) -> None:
    """Speedup of the fused backend over the published flow for every clip count, type and layout: one number a cell."""
    provider = next((p for p in FUSED if select(rows, provider=p)), None)
    fused = select(rows, provider=provider)
    names = ordered(((r["name"], r["stage"]) for r in fused), [(u, s) for u in registry.UNITS for s in registry.STAGES])
    inputs = ordered(
        ((r["clips"], r["dtype"], r["layout"]) for r in fused),
        [(str(c), d, lay) for c in registry.CLIPS for d in registry.DTYPES for lay in registry.LAYOUTS],
    )
    if len(inputs) < 2:
        return
    figure, axes = pyplot.subplots(
        2, 1, figsize=(2.2 + 0.52 * len(names), 1.8 + 0.56 * len(inputs)), layout="constrained", sharex=True
    )
    for axis, mode in zip(axes, registry.MODES, strict=True):
        cells = [[float("nan")] * len(names) for _ in inputs]
        for row in select(fused, mode=mode):
            if row["speedup"]:
                i = inputs.index((row["clips"], row["dtype"], row["layout"]))
                cells[i][names.index((row["name"], row["stage"]))] = float(row["speedup"])
        norm = matplotlib.colors.LogNorm(1, 30, clip=True)
        image = axis.imshow(cells, cmap="YlGnBu", norm=norm, aspect="auto")
        for i, line in enumerate(cells):
            for j, value in enumerate(line):
                if value == value:
                    colour = "white" if norm(value) > 0.6 else "black"
                    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
        labels = [f"{c} clip{'s' * (c != '1')}, {d}, {layout}" for c, d, layout in inputs]
        axis.set_yticks(range(len(inputs)), labels, fontsize=8)
        axis.set_xticks(range(len(names)), [f"{unit} {stage}" for unit, stage in names], fontsize=8, rotation=90)
        axis.set_title(f"{provider}, {MODE_NAMES[mode]}: times faster than published", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, fraction=0.015, pad=0.01).ax.tick_params(labelsize=8)
    save(figure, rows, path)


def passes(rows: list[dict], path: Path) -> None:
    """Time of every raw pass in plain copies of x, with its x-sized traffic at the speed of a copy."""
    names = ordered((r["name"] for r in rows if r["name"] not in ("copy", "clone")), [])
    stages = ordered((r["stage"] for r in rows), registry.STAGES)
    providers = [p for p in ("reference", *FUSED[::-1]) if select(rows, provider=p)]
    across = 4
    down = -(-len(names) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(3.1 * across, 2.2 * down + 0.6), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        bars(axis, select(rows, name=name), "copies", providers, stages)
        axis.margins(y=0.15)
        axis.set_title(name, fontsize=9)
        budget = sum(registry.PASS_TRAFFIC.get(name.split()[0], ())) / 2
        if budget:
            axis.axhline(budget, color="#c0392b", linewidth=1, linestyle="--")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    figure.legend(handles, providers, loc="outside upper center", ncols=len(providers), frameon=False, fontsize=9)
    figure.supylabel("time, copies of x", fontsize=9)
    save(figure, rows, path)


def save(figure, rows: list[dict], path: Path) -> None:
    figure.supxlabel(caption(rows), fontsize=8, color="#666666")
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw what benchmarks.run wrote.")
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results", metavar="DIR")
    results = parser.parse_args(arguments).results
    found = {name: results / f"{name}.csv" for name in ("units", "passes") if (results / f"{name}.csv").is_file()}
    if not found:
        print(f"no units.csv or passes.csv in {results}: run python -m benchmarks.run first", file=sys.stderr)
        return 2
    if "units" in found:
        rows = read(found["units"])
        label = "times faster than published"
        grid(rows, "speedup", label, ["reference", "compile", *FUSED[::-1]], results / "speedup.png", budget=False)
        grid(rows, "copies", "time, plain copies of x", list(COLOURS), results / "copies.png", budget=True)
        variants(rows, results / "variants.png")
    if "passes" in found:
        passes(read(found["passes"]), results / "passes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
