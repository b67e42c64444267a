"""Draw the rows that benchmarks.run wrote: python -m benchmarks.plot [--results DIR]"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from pathlib import Path

import matplotlib

from . import records, registry
from .records import ordered, select

matplotlib.use("agg")
from matplotlib import pyplot

COLOURS = {
    "published": "#b8b8b8",
    "reference": "#8a8f98",
    "compile": "#d9a441",
    "compile-max": "#b07d1e",
    "sdpa": "#b5655a",
    "cpu": "#2a6fbb",
    "triton": "#2f9e63",
    "cuda": "#7a4fb5",
}
FUSED = ("cuda", "triton", "cpu")
BUDGET = "#c0392b"
#: Layers side by side in a picture of ratios.
LAYERS_ACROSS = 5
#: Inches that a bar and a letter of a label take.
BAR, LETTER = 0.19, 0.07
MODE_NAMES = {"eval": "eval", "step": "training step"}


def caption(rows: list[dict]) -> str:
    row = rows[-1]
    machine = (
        row["device"]
        if row["device"] != "cpu"
        else f"{row['cpu']}, {row['threads']} thread{'s' * (str(row['threads']) != '1')}"
    )
    clock = "; processor time" if row.get("timed") == "processor" else ""
    return f"{machine}{clock}; torch {row['torch']}; {row['date'][:10]}"


def lines_of(stage: str) -> list[str]:
    """The lines of a label."""
    return stage.replace(", ", ",\n").replace(" ", "\n", 1).split("\n")


def upright(stages: list[str], room: float) -> float:
    """Inches that labels take below their axis if they do not fit into so many inches each; 0 where they lie."""
    longest = LETTER * max(len(line) for stage in stages for line in lines_of(stage))
    return longest if longest > room else 0.0


def bars(
    axis, rows: list[dict], column: str, providers: list[str], stages: list[str], copies: dict | None, room: float
) -> None:
    """Groups of bars, one group a stage and one bar a provider, each with its number above.

    copies: megabytes that a copy of x moves, by stage; where given, a dashed line shows the budget in copies. room:
    inches for each group.
    """
    width = 0.84 / len(providers)
    for j, stage in enumerate(stages):
        for i, provider in enumerate(providers):
            for row in select(rows, provider=provider, stage=stage):
                if not row[column]:
                    continue
                value, place = float(row[column]), j + (i - (len(providers) - 1) / 2) * width
                axis.bar(place, value, width * 0.92, color=COLOURS[provider], label=provider)
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                axis.annotate(
                    text, (place, value), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=6.5
                )
        moved = [float(row["budget_mb"]) for row in select(rows, stage=stage) if row["provider"] in providers]
        if copies and moved and moved[0]:
            level = moved[0] / copies[stage]
            axis.plot([j - 0.46, j + 0.46], [level, level], color=BUDGET, linewidth=1, linestyle="--")
    labels, rotation = ["\n".join(lines_of(stage)) for stage in stages], 90 if upright(stages, room) else 0
    axis.set_xticks(range(len(stages)), labels, fontsize=7.5, rotation=rotation)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)


def copied(rows: list[dict]) -> dict[str, float]:
    """Megabytes that a copy of x moves, by stage."""
    return {row["stage"]: float(row["budget_mb"]) for row in rows if "copy" in (row["name"], row["provider"])}


def grid(rows: list[dict], names: list[str], stages: list[str], column: str, label: str, path: Path) -> None:
    """A panel for each layer (across) and mode (down). In column "copies" dashed lines show the budget."""
    names = ordered((r["name"] for r in rows), names)
    drawn = ["reference", "compile", "compile-max", *FUSED[::-1]] if column == "speedup" else list(COLOURS)
    providers = [p for p in drawn if select(rows, provider=p)]
    at = {name: ordered((r["stage"] for r in select(rows, name=name)), stages) for name in names}
    widths = [max(0.9 + BAR * len(at[name]) * len(providers), 0.3 + 1.4 * LETTER * len(name)) for name in names]
    texts = [*providers, *["budget: x-sized traffic at the speed of a copy"] * (column == "copies")]
    least = max(LETTER * len(caption(rows)), sum(0.6 + 1.2 * LETTER * len(text) for text in texts)) - 1.2
    widths = [width * max(1.0, least / sum(widths)) for width in widths]
    rooms = [(width - 0.4) / len(at[name]) for width, name in zip(widths, names, strict=True)]
    below = max(upright(at[name], room) for name, room in zip(names, rooms, strict=True))
    figure, axes = pyplot.subplots(
        2,
        len(names),
        figsize=(1.2 + sum(widths), 5.8 + 2 * below),
        sharey="row",
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
    )
    for panels, mode in zip(axes, registry.MODES, strict=True):
        for axis, name, room in zip(panels, names, rooms, strict=True):
            found = select(rows, name=name, mode=mode)
            bars(axis, found, column, providers, at[name], copied(found) if column == "copies" else None, room)
            axis.margins(y=0.12)
            if column == "copies":
                axis.set_yscale("log")
            else:
                axis.axhline(1, color="#555555", linewidth=0.8)
            if mode == registry.MODES[0]:
                axis.set_title(name, fontsize=11)
        panels[0].set_ylabel(f"{label}\n{MODE_NAMES[mode]}", fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    if column == "copies":
        handles.append(pyplot.Line2D([], [], color=BUDGET, linestyle="--"))
    figure.legend(handles, texts, loc="outside upper center", ncols=len(texts), frameon=False, fontsize=9)
    save(figure, rows, path)


def variants(rows: list[dict], cases: list[registry.Case], path: Path) -> None:
    """Speedup of the fused backend over the published flow for every batch, type and layout: one number a cell.

    The batch is named only where one stage comes with several, the layer only where it shares a stage with others.
    """
    provider = next((p for p in FUSED if select(rows, provider=p)), None)
    fused = select(rows, provider=provider)
    names = ordered(((r["name"], r["stage"]) for r in fused), list(dict.fromkeys((c.name, c.stage) for c in cases)))
    batches = len({(case.stage, case.clips) for case in cases}) > len({case.stage for case in cases})

    def variant(clips, dtype: str, layout: str) -> str:
        return f"{clips} clip{'s' * (str(clips) != '1')}, {dtype}, {layout}" if batches else f"{dtype}, {layout}"

    known = list(dict.fromkeys(variant(c.clips, c.dtype, c.layout) for c in cases))
    inputs = ordered((variant(r["clips"], r["dtype"], r["layout"]) for r in fused), known)
    if len(inputs) < 2:
        return
    stages = [stage for _, stage in names]
    labels = stages if len(set(stages)) == len(stages) else [f"{name} {stage}" for name, stage in names]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(2.2 + 0.52 * len(names), 2.4 + 0.56 * len(inputs)), layout="constrained", sharex=True
    )
    for axis, mode in zip(axes, registry.MODES, strict=True):
        cells = [[float("nan")] * len(names) for _ in inputs]
        for row in select(fused, mode=mode):
            if row["speedup"]:
                i = inputs.index(variant(row["clips"], row["dtype"], row["layout"]))
                cells[i][names.index((row["name"], row["stage"]))] = float(row["speedup"])
        norm = matplotlib.colors.LogNorm(1, 30, clip=True)
        image = axis.imshow(cells, cmap="YlGnBu", norm=norm, aspect="auto")
        for i, line in enumerate(cells):
            for j, value in enumerate(line):
                if value == value:
                    colour = "white" if norm(value) > 0.6 else "black"
                    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
                    axis.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
        axis.set_yticks(range(len(inputs)), inputs, fontsize=8)
        axis.set_xticks(range(len(names)), labels, fontsize=8, rotation=90)
        axis.set_title(f"{provider}, {MODE_NAMES[mode]}: times faster than published", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, fraction=0.015, pad=0.01).ax.tick_params(labelsize=8)
    save(figure, rows, path)


def sweep(rows: list[dict], path: Path) -> None:
    """Time of a call and memory kept for the backward pass over the number of tokens, both on logarithmic axes."""
    providers = [p for p in COLOURS if select(rows, provider=p)]
    panels = [
        ("eval", "median_ms", "eval, ms"),
        ("step", "median_ms", "training step, ms"),
        ("step", "kept_mb", "kept for the backward pass, MB"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 3.9), layout="constrained")
    for axis, (mode, column, label) in zip(axes, panels, strict=True):
        tops = []
        for provider in providers:
            points = sorted((int(r["stage"]), float(r[column])) for r in select(rows, provider=provider, mode=mode))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[provider], label=provider, markersize=3.5)
                tops.append(points[0])
        tokens = sorted({int(r["stage"]) for r in rows})
        start = min(value for _, value in tops) / 2
        line = [start * n / tokens[0] for n in tokens]
        axis.plot(tokens, line, ":", color="#555555", linewidth=1, label="proportional to the tokens")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=label)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e6e6e6", linewidth=0.7)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(texts), frameon=False, fontsize=9)
    save(figure, rows, path)


def passes(rows: list[dict], stages: list[str], path: Path) -> None:
    """Time of every raw pass in plain copies of x, with its traffic at the speed of a copy."""
    names = ordered((r["name"] for r in rows if r["name"] not in ("copy", "clone")), [])
    stages = ordered((r["stage"] for r in rows), stages)
    providers = [p for p in ("reference", *FUSED[::-1]) if select(rows, provider=p)]
    across = min(4, len(names))
    down = -(-len(names) // across)
    width = max(3.1, 0.5 + 0.3 * len(stages) * len(providers))
    figure, axes = pyplot.subplots(
        down, across, figsize=(width * across, 2.2 * down + 0.6), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        bars(axis, select(rows, name=name), "copies", providers, stages, copied(rows), (width - 0.4) / len(stages))
        axis.margins(y=0.15)
        axis.set_title(name, fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    figure.legend(handles, providers, loc="outside upper center", ncols=len(providers), frameon=False, fontsize=9)
    figure.supylabel("time, copies of x", fontsize=9)
    save(figure, rows, path)


def ratios(file: Path) -> None:
    """Heat maps of what benchmarks.ratios wrote: two for each layer, one below the other, next to its CSV."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    at = {layer: [row for row in rows if row["layer"] == layer] for layer in layers}
    sides = {
        layer: [list(dict.fromkeys(row[key] for row in found)) for key in ("settings", "sizes")]
        for layer, found in at.items()
    }
    wide = [
        max(1.6 + 0.42 * len(sizes), 0.3 + 0.08 * len(f"{layer}, training step")) for layer, (_, sizes) in sides.items()
    ]
    high = [1.5 + 0.27 * len(settings) for settings, _ in sides.values()]
    across = min(len(layers), LAYERS_ACROSS)
    lines = [range(start, min(start + across, len(layers))) for start in range(0, len(layers), across)]
    widths = [max(wide[start::across]) for start in range(across)]
    heights = [max(high[j] for j in line) for line in lines for _ in registry.MODES]
    figure, axes = pyplot.subplots(
        len(heights),
        across,
        figsize=(sum(widths), sum(heights)),
        squeeze=False,
        layout="constrained",
        width_ratios=widths,
        height_ratios=heights,
    )
    for axis in axes.flat:
        axis.set_visible(False)
    norm = matplotlib.colors.LogNorm(0.5, 8, clip=True)
    for (i, mode), (j, layer) in itertools.product(enumerate(registry.MODES), enumerate(layers)):
        axis, (settings, sizes) = axes[len(registry.MODES) * (j // across) + i][j % across], sides[layer]
        axis.set_visible(True)
        cells = [[float("nan")] * len(sizes) for _ in settings]
        for row in select(at[layer], mode=mode):
            cells[settings.index(row["settings"])][sizes.index(row["sizes"])] = float(row["ratio"])
        axis.imshow(cells, cmap="YlGnBu", norm=norm, aspect="auto")
        for y, x in itertools.product(range(len(settings)), range(len(sizes))):
            if (value := cells[y][x]) == value:
                # Red where a user would lose more than noise.
                colour = BUDGET if value < 0.95 else "white" if norm(value) > 0.6 else "black"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
        axis.set_yticks(range(len(settings)), settings, fontsize=7)
        axis.set_xticks(range(len(sizes)), sizes, fontsize=7, rotation=90)
        axis.set_title(f"{layer}, {MODE_NAMES[mode]}", fontsize=9, loc="left")
    kind = dict.fromkeys(row[key] for row in rows for key in ("dtype", "layout", "flow"))
    title = f"Times faster than published, by settings (down) and input (across): {', '.join(kind)}"
    figure.suptitle(title, fontsize=11)
    save(figure, rows, file.with_suffix(".png"))


def save(figure, rows: list[dict], path: Path) -> None:
    figure.supxlabel(caption(rows), fontsize=8, color="#666666")
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)
    print(f"wrote {path}")


def draw_layers(family: str, rows: list[dict], folder: Path) -> None:
    """Every picture of a family's layers."""
    cases = registry.FAMILIES[family].cases()
    names, stages = ([getattr(case, key) for case in cases] for key in ("name", "stage"))
    layers = [row for row in rows if row["kind"] != "sweep"]
    if layers:
        plain = select(layers, dtype="fp32", layout="contiguous")
        clips = registry.main_clips(family)
        main = [row for row in plain if int(row["clips"]) == clips.get((row["name"], row["stage"]))] or layers
        grid(main, names, stages, "speedup", "times faster than published", folder / "speedup.png")
        grid(main, names, stages, "copies", "time, plain copies of x", folder / "copies.png")
        variants(layers, [case for case in cases if case.kind != "sweep"], folder / "variants.png")
    if swept := select(rows, kind="sweep"):
        sweep(swept, folder / "sweep.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw what benchmarks.run wrote.")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR")
    results = parser.parse_args(arguments).results
    found = 0
    for family in registry.FAMILIES:
        layers, raw = (records.path(results, family, passes) for passes in (False, True))
        if layers.is_file():
            draw_layers(family, records.read(layers), layers.parent)
        if raw.is_file():
            passes(records.read(raw), [c.stage for c in registry.FAMILIES[family].cases()], raw.with_name("passes.png"))
        found += layers.is_file() + raw.is_file()
    if not found:
        print(f"no rows in {results}: run python -m benchmarks.run first", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
