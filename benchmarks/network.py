"""Measure a ResNet-50 for video: without units, with units as published, with fused units; in all and stage by stage.

Numbers first. The published form in float64 is the truth: its logits, the output of each of its stages on the input
that it has in the network, and, on small frames, the gradients of a training step. Fused numbers that are further from
it than twice the published ones in float32, rounding aside, get no ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aia_kernels
from aia_kernels.models import AIAResNet
from aia_kernels.models.resnet import TEMPORAL, UNITS

from . import clip, measure, progress, providers, records, registry, timing
from .published import attention_in_attention, temporal_shift

FORMS = ("plain", "published", "fused")
LAYERS, CLASSES, SEGMENTS = (3, 4, 6, 3), 174, 8
WHOLE = "network"
#: Rounding in float32: of outputs, sums of a few thousand terms, and of gradients, where a batch norm or a maximum that
#: is decided otherwise moves more. Under autocast, of the products' operands in bfloat16.
LIMITS = {"outputs": 1e-5, "gradients": 2e-3}
AUTOCAST_LIMITS = {"outputs": 2e-2, "gradients": 5e-2}
HEADER = (
    f"{'':9}{'error':^16} {'eval, ms':^31} {'training step, ms':^31} {'kept, MB':^13}\n"
    f"{'':9}{'publ.':>8}{'fused':>8} "
    + f"{'plain':>7}{'publ.':>9}{'fused':>8}{'ratio':>7} " * 2
    + f"{'publ.':>6}{'fused':>7}"
)
FOOTNOTE = """
plain: without units. publ.: units as published, eager. ratio: published to fused. The parameters are random and the
same in all forms. error: max |value - truth| / max |truth| of the output in eval mode, the truth being the published
form in float64, each stage on the true input. Times: medians of samples taken in turns; those of stages with the
gradient of their input. Kept: memory held between forward and backward, input included.
"""


def build(form: str, unit: str, temporal: str, segments: int, layers: tuple[int, ...] = LAYERS) -> AIAResNet:
    """The network in one of FORMS, with the same parameters in all of them."""
    torch.manual_seed(0)
    network = AIAResNet(layers, CLASSES, segments, unit, temporal)
    if form == "published":
        for block, attribute, fused in units_of(network):
            slow = attention_in_attention.UNITS[type(fused).__name__](segments)
            slow.load_state_dict(fused.state_dict())
            setattr(block, attribute, slow)
            if block.shift is not None:
                block.shift = temporal_shift.TemporalShift(segments, block.shift.fold_div)
    if form == "plain":
        bare = AIAResNet(layers, CLASSES, segments, None, temporal)
        state = network.state_dict()
        bare.load_state_dict({key: state[key] for key in bare.state_dict()})
        return bare
    return network


def units_of(network: AIAResNet) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every unit of a network with the block and the attribute that hold it."""
    blocks = [block for block in network.modules() if hasattr(block, "units")]
    return [(block, attribute, getattr(block, attribute)) for block in blocks for attribute in block.units]


def stages_of(network: AIAResNet) -> dict[str, nn.Module]:
    """The network as a sequence of stages."""
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    head = nn.Sequential(network.avgpool, nn.Flatten(), network.fc)
    return {"stem": stem, **{name: getattr(network, name) for name in network.stages}, "head": head}


class Autocast(nn.Module):
    """A module whose forward runs under autocast to bfloat16, and whose backward, as is recommended, does not."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x)


def wrapping(autocast: bool, compiled: bool) -> Callable[[nn.Module], nn.Module]:
    """What is done to a module of each form before it is called."""

    def wrap(module: nn.Module) -> nn.Module:
        module = Autocast(module) if autocast else module
        return torch.compile(module, dynamic=False) if compiled else module

    return wrap


def distance(found: Tensor, truth: Tensor) -> float:
    error = ((found.double() - truth).abs().max() / truth.abs().max()).item()
    return error if error == error else float("inf")


@torch.no_grad()
@providers.exact_products()
def output_errors(
    networks: dict[str, AIAResNet], images: Tensor, wrap: Callable[[nn.Module], nn.Module], by_stage: bool
) -> tuple[dict, dict[str, Tensor]]:
    """{part: {form: error}} in eval mode of what is wrapped, and the true input of each stage in float32."""
    truth = copy.deepcopy(networks["published"]).double().eval()
    x, inputs, errors = images.double(), {}, {}
    forms = {form: stages_of(networks[form].eval()) for form in ("published", "fused")}
    for name, stage in stages_of(truth).items() if by_stage else ():
        inputs[name] = x.float()
        x = stage(inputs[name].double())
        errors[name] = {form: distance(wrap(stages[name])(inputs[name]), x) for form, stages in forms.items()}
    logits = truth(images.double())
    return {WHOLE: {form: distance(wrap(networks[form])(images), logits) for form in forms}} | errors, inputs


@providers.exact_products()
def gradient_errors(
    networks: dict[str, AIAResNet], images: Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> dict[str, float]:
    """Errors of all parameters' gradients of a training step together, in the l2 norm, on frames of 64x64."""
    small = F.interpolate(images, size=(64, 64), mode="area")

    def gradients(network: AIAResNet, x: Tensor) -> Tensor:
        network = copy.deepcopy(network).to(x.dtype).train()
        (network if x.dtype == torch.float64 else wrap(network))(x).square().mean().backward()
        return torch.cat([p.grad.double().flatten() for p in network.parameters()])

    truth = gradients(networks["published"], small.double())
    return {f: ((gradients(networks[f], small) - truth).norm() / truth.norm()).item() for f in ("published", "fused")}


def training_step(module: nn.Module, x: Tensor, grad_y: Tensor | None) -> Callable[[], None]:
    """Forward in training mode and backward: of a stage, also to its input; of the network, from the mean square."""
    module.train()
    x = x.detach().requires_grad_(grad_y is not None)

    def run() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        if grad_y is None:
            y.square().mean().backward()
        else:
            y.backward(grad_y)

    return run


def measure_network(
    images: Tensor,
    unit: str,
    temporal: str,
    segments: int,
    layers: tuple[int, ...],
    rounds: int,
    seconds: float,
    stages: bool,
    autocast: bool,
    compiled: bool,
) -> tuple[dict[str, dict], bool]:
    """What each part costs in each form, {part: {"error": ..., "eval": ..., "step": ..., "kept": ...}}, by form; and
    whether the numbers of the fused form are right. Without ``stages`` the whole network is the only part."""
    device = images.device.type
    wrap, limits = wrapping(autocast, compiled), AUTOCAST_LIMITS if autocast else LIMITS
    networks = {form: build(form, unit, temporal, segments, layers).to(device) for form in FORMS}
    if not images.is_contiguous():
        for convolution in (m for network in networks.values() for m in network.modules() if type(m) is nn.Conv2d):
            convolution.to(memory_format=torch.channels_last)  # the units' are of another rank
    total = 3 + 2 * (len(layers) + 3 if stages else 1)
    with progress.bar(total=total, unit="measurement", leave=False) as bar:
        bar.set_description("numbers")
        errors, inputs = output_errors(networks, images, wrap, stages)
        bar.update(2)
        gradients = gradient_errors(networks, images, wrap)
        bar.update()
        right = gradients["fused"] <= 2 * gradients["published"] + limits["gradients"]
        right &= all(e["fused"] <= 2 * e["published"] + limits["outputs"] for e in errors.values())
        parts = {
            form: {part: wrap(module) for part, module in ({WHOLE: network} | stages_of(network)).items()}
            for form, network in networks.items()
        }
        found = {part: {"error": errors[part], "kept": {}} for part in (errors if stages else (WHOLE,))}
        for part, measured in found.items():
            x = images if part == WHOLE else inputs[part]
            with torch.no_grad():
                y = parts["plain"][part].eval()(x)
            grad_y = None if part == WHOLE else torch.randn_like(y)
            for mode in ("eval", "step"):
                bar.set_description(f"{part}, {mode}")
                runs = {}
                for form in FORMS:
                    module = parts[form][part]
                    call = measure.evaluation(module, x) if mode == "eval" else training_step(module, x, grad_y)
                    # Modules of one form share their parameters and modes: the mode is set again before each sample.
                    runs[form] = call, lambda module=module, mode=mode: _mode(module, mode == "step")
                measured[mode] = timing.interleave(runs, rounds, seconds, device)
                bar.update()
            for form in FORMS:
                failed = any(measured[mode][form].error for mode in ("eval", "step"))
                measured["kept"][form] = math.nan if failed else measure.kept_bytes(parts[form][part], x)
    return found, right


def _mode(module: nn.Module, training: bool) -> contextlib.AbstractContextManager:
    module.train(training)
    return contextlib.nullcontext()


def line(part: str, found: dict, right: bool) -> str:
    cells = f"{part:9}" + "".join(f"{found['error'][form]:8.0e}" for form in ("published", "fused")) + " "
    for mode in ("eval", "step"):
        plain, slow, fast = (milliseconds(found[mode][form]) for form in FORMS)
        cells += f"{plain:7.1f}{slow:9.1f}{fast:8.1f}" + (f"{slow / fast:6.2f}x " if right else "  wrong ")
    return cells + f"{found['kept']['published'] / 1e6:6.0f}{found['kept']['fused'] / 1e6:7.0f}"


def report(images: Tensor, unit: str = "CinST", temporal: str = "tsn", segments: int = SEGMENTS, **settings) -> bool:
    """Measure and print the table of frames [clips * segments, 3, H, W]; whether the numbers are right."""
    return _report(images, unit, temporal, segments, **settings)[1]


def _report(
    images: Tensor,
    unit: str,
    temporal: str,
    segments: int,
    layers: tuple[int, ...] = LAYERS,
    rounds: int = 5,
    seconds: float = 10,
    stages: bool = True,
    autocast: bool = False,
    compiled: bool = False,
) -> tuple[dict, bool]:
    n, _, h, w = images.shape
    backend = aia_kernels.backends.select(images.device.type, torch.float32, "attention_in_attention")
    about = f"{temporal}, {n} frames of {h}x{w}, {precision_of(autocast)}; fused: {backend}"
    about += "; all compiled" if compiled else ""
    print(f"{name_of(layers)} with {unit} in every block, {about}.\n")
    found, right = measure_network(
        images, unit, temporal, segments, layers, rounds, seconds, stages, autocast, compiled
    )
    print(HEADER, *(line(part, cells, right) for part, cells in found.items()), sep="\n")
    print(FOOTNOTE)
    for mode, text in (("eval", "eval"), ("step", "a training step")):
        times = found[WHOLE][mode]
        plain, slow, fast = (milliseconds(times[form]) for form in FORMS)
        print(f"Slower than without units, {text}: published {slow / plain - 1:.0%}, fused {fast / plain - 1:.0%}.")
    if not right:
        print("The fused numbers are wrong.", file=sys.stderr)
    samples = [(form, cells[mode][form]) for cells in found.values() for mode in registry.MODES for form in FORMS]
    failed = {form: times.error for form, times in samples if times.error}
    for form, error in failed.items():
        print(f"{form} cannot be timed: {error}", file=sys.stderr)
    return found, right and not failed


def milliseconds(samples: timing.Samples) -> float:
    """The median; NaN where the form raised."""
    return math.nan if samples.error else samples.median * 1e3


def precision_of(autocast: bool) -> str:
    return "bf16 autocast" if autocast else "fp32"


def name_of(layers: tuple[int, ...]) -> str:
    return f"ResNet-{3 * sum(layers) + 2}"


def rows(found: dict[str, dict], right: bool, images: Tensor, name: str, segments: int, autocast: bool) -> list[dict]:
    """The rows of the CSV: one for each part, mode and form; the form fused goes by the name of its backend."""
    device = images.device.type
    where, backend = (
        measure.machine(device),
        aia_kernels.backends.select(device, torch.float32, "attention_in_attention"),
    )
    layout = "contiguous" if images.is_contiguous() else "channels_last"
    made = []
    for part, cells in found.items():
        for mode in ("eval", "step"):
            for form in FORMS:
                times = cells[mode][form]
                row = dict.fromkeys(records.COLUMNS, "") | where
                row |= {"kind": "network", "name": name, "stage": part, "clips": len(images) // segments}
                row |= {"dtype": precision_of(autocast), "layout": layout, "mode": mode, "timed": times.timed}
                row |= {"samples": len(times.seconds)}
                row |= {"wall_ms": f"{statistics.median(times.wall) * 1e3:.4f}" if times.wall else ""}
                row |= {"provider": backend if form == "fused" else form}
                if times.error:
                    made.append(row | {"error": times.error})
                    continue
                low, high = times.quartiles
                row |= {"median_ms": f"{times.median * 1e3:.4f}", "q25_ms": f"{low * 1e3:.4f}"}
                row |= {"q75_ms": f"{high * 1e3:.4f}"}
                if form != "plain":
                    row |= {"max_error": f"{cells['error'][form]:.2e}"}
                if form == "fused":
                    row |= {"correct": "yes" if right else "no"}
                    if right and not cells[mode]["published"].error:
                        row["speedup"] = f"{cells[mode]['published'].median / times.median:.2f}"
                if mode == "step":
                    row["kept_mb"] = f"{cells['kept'][form] / 1e6:.3f}"
                made.append(row)
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.split("\n\n")[0])
    parser.add_argument("--unit", choices=[unit for unit in UNITS if unit], default="CinST")
    parser.add_argument("--temporal", choices=TEMPORAL, default="tsn")
    parser.add_argument("--video", type=Path, default=clip.CLIP, metavar="PATH", help="a video of your own")
    parser.add_argument("--clips", type=int, default=2, help="clips of 8 frames of 224x224 (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each form (default 7)")
    parser.add_argument("--seconds", type=float, default=30, help="begin no more samples of a row after (default 30)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, metavar="DIR", help="where the CSV goes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--whole", action="store_true", help="the network in all, not its stages")
    parser.add_argument("--autocast", action="store_true", help="forward under autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="each form compiled, which takes minutes")
    parser.add_argument("--channels-last", action="store_true", help="frames and weights in channels_last")
    parser.add_argument("--random", action="store_true", help="random frames: no video has to be decoded")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a shallow network, small random frames")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = {"rounds": options.rounds, "seconds": options.seconds, "layers": LAYERS, "stages": not options.whole}
    if options.quick:
        segments, images = 2, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        settings |= {"layers": (1, 1), "rounds": 2, "seconds": 1}
    elif options.random:
        segments, generator = SEGMENTS, torch.Generator().manual_seed(0)
        images = torch.rand(options.clips * segments, 3, clip.SIZE, clip.SIZE, generator=generator)
    else:
        segments = SEGMENTS
        try:
            images = clip.sample_clips(clip.decode(options.video, least=segments), options.clips, segments)
        except clip.VideoError as error:
            print(f"network: {error}", file=sys.stderr)
            return 2
    form = torch.channels_last if options.channels_last else torch.contiguous_format
    images = images.to(options.device).contiguous(memory_format=form)
    settings |= {"autocast": options.autocast, "compiled": options.compile}
    # All forms share the code of one forward, and with the default's limit the last of them would stay eager.
    torch._dynamo.config.recompile_limit = 64
    found, right = _report(images, options.unit, options.temporal, segments, **settings)
    name = f"{name_of(settings['layers'])} {options.unit} {options.temporal}" + options.compile * " compiled"
    path = records.path(options.results, "network")
    records.write(path, rows(found, right, images, name, segments, options.autocast))
    print(f"wrote {path}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
