"""Run the demo: python -m benchmarks.demo [--video PATH] [--output PATH]."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import aia_kernels

from .. import clip, measure, network, progress
from . import attention_in_attention, cbam, external_attention, neighbours, table

FAMILIES = attention_in_attention, cbam, external_attention, neighbours
SECONDS = 20  # for the table, about: rows take fewer samples when time runs short
NETWORK = {"rounds": 3, "seconds": 3}  # samples of each of its rows, and seconds after which a row begins no more


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--video", type=Path, default=clip.CLIP, metavar="PATH", help="a video of your own")
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), metavar="PATH", help="the picture of the gates to write"
    )
    parser.add_argument("--slots", type=Path, metavar="PATH", help="the picture of the slots (default: OUTPUT-slots)")
    parser.add_argument("--clips", type=int, default=4, help="clips of 8 segments in the batch (default 4)")
    options = parser.parse_args(arguments)
    options.slots = options.slots or options.output.with_stem(f"{options.output.stem}-slots")
    return options


def describe(options: argparse.Namespace, frames: int, device: str) -> str:
    """What runs on what: the first lines of the output."""
    where = measure.machine(device)
    machine = where["device"] if device == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    segments = attention_in_attention.SEGMENTS
    text = (
        f"{frames} frames of {options.video.name}, {options.clips} clips of {segments} segments; fp32 on {machine}.\n"
        "x: feature maps of these frames, shaped as in published networks, by fixed filters and random convolutions, "
        "not\npretrained. publ.: the published eager flow. fused: aia_kernels, by these backends:"
    )
    for family in aia_kernels.backends.FAMILIES:
        backend = aia_kernels.backends.select(device, torch.float32, family)
        text += f"\n  {family}: {backend}"
        if backend == "reference":
            reasons = [f"{name}: {why}" for name, why in aia_kernels.available_backends(family).items() if why]
            text += f" (no fused backend can run here: {'; '.join(reasons)})"
    return text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        frames = clip.decode(options.video, least=attention_in_attention.SEGMENTS)
    except clip.VideoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = clip.sample_clips(frames, options.clips, attention_in_attention.SEGMENTS)
    stages = {stage: x.to(device) for stage, x in clip.features(images).items()}
    print(describe(options, len(frames), device), "\n")
    print(table.HEADER)
    rows = [row for family in FAMILIES for row in family.rows(stages)]
    start, wrong = time.perf_counter(), 0
    bar = progress.bar(rows, unit="row", leave=False)
    for i, row in enumerate(bar):
        bar.set_description(f"{row.name} {row.stage}")
        left = SECONDS - (time.perf_counter() - start)
        found = table.compare(row, rounds=5, seconds=left / (len(rows) - i) / 2)
        tqdm.write(table.line(found))
        wrong += not table.right(found)
    print(table.FOOTNOTE)
    # Frames of half the size: the network takes a quarter of the time, in every form.
    right = network.report(F.avg_pool2d(images[: network.SEGMENTS].to(device), 2), **NETWORK)
    attention_in_attention.draw(images, next(iter(stages.values())), options.output)
    external_attention.draw(frames[len(frames) // 2], device, options.slots)
    print(f"\nPictures: {options.output.resolve()}\n          {options.slots.resolve()}")
    if wrong:
        print(f"demo: {wrong} of {len(rows)} rows are wrong", file=sys.stderr)
    return 0 if right and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
