"""Inputs on which a module whose forward is unknown may run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

#: The shape of each input of a module, or the number that it is.
Shapes = tuple[tuple[int, ...] | int, ...]

_BATCH = 4

#: Heights and widths of maps, of which those are taken that are no size of a parameter.
_SPATIAL = ((3, 4), (5, 7), (9, 11), (13, 15), (17, 19))


#: What arguments are called that tell tokens the height and the width of their map.
_HEIGHT, _WIDTH = ("h", "height"), ("w", "width")

#: What arguments are called that tell frames the length of their clip.
_FRAMES = ("t", "n_segment", "num_segments", "segments", "n_frames", "num_frames", "frames", "clip_len")

#: The weight of a gate of Attention in Attention.
_GATE = (1, 2, 3, 3, 3)


def has_gates(module: nn.Module) -> bool:
    """Whether all parameters of a module may be those of gates of Attention in Attention, and some are."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    return _GATE in shapes and all(shape == _GATE or shape in ((), (1,)) for shape in shapes)


def holds_gates(module: nn.Module) -> bool:
    """Whether a module, or a module that it holds itself, has the parameters of gates."""
    if type(module).__module__.startswith("torch."):  # a container
        return False
    own = any(p is not None and tuple(p.shape) == _GATE for p in module._parameters.values())
    return own or has_gates(module) or any(map(has_gates, module.children()))


def has_both_gates(module: nn.Module) -> bool:
    """Whether the parameters of a module may be those of CBAM's two gates, and of nothing else."""
    return _gates_of_cbam(module) == (1, 2)


def holds_a_gate_of_cbam(module: nn.Module) -> bool:
    """Whether a module holds one that may be a gate of CBAM, and nothing else."""
    own = (child for child in module.children() if not type(child).__module__.startswith("torch."))
    return any(_gates_of_cbam(child) in ((1, 0), (0, 2)) for child in own)


def _gates_of_cbam(module: nn.Module) -> tuple[int, int] | None:
    """How many convolutions to one map and how many linear maps, from C features to fewer and back, a module has; None
    where it has other parameters than these, their biases and norms of one element."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    maps = [shape for shape in shapes if len(shape) == 4 and shape[0] == 1 and shape[1] in (1, 2) and shape[2] > 1]
    linear = [shape[:2] for shape in shapes if len(shape) > 1 and shape not in maps and math.prod(shape[2:]) == 1]
    rest = [shape for shape in shapes if len(shape) < 2]
    if len(maps) + len(linear) + len(rest) < len(shapes) or (linear and linear[0] != linear[-1][::-1]):
        return None
    biases = (), (1,), *((n,) for shape in linear for n in shape)
    return (len(maps), len(linear)) if all(shape in biases for shape in rest) else None


def likely_shapes(module: nn.Module, inputs: Sequence[str]) -> Iterator[tuple[Shapes, Shapes]]:
    """Shapes that the inputs of a module may have, by their names, the likeliest first: tokens and maps of as many
    features as the parameters suggest. No two axes have the same length, but in square maps, which come last. With each
    of them come shapes with another batch and other tokens, for which a recorded forward must hold as well."""
    if holds_gates(module):
        yield from _clips(module, inputs)
    features = _features(module)
    sizes = {n for p in module.parameters() for n in p.shape} | {*features}
    usable = [(h, w) for h, w in _SPATIAL if not {_BATCH, h, w, h * w} & sizes]
    first, second = (*usable, *_SPATIAL[-2:])[:2]
    yield from zip(
        _arranged(features, inputs, _BATCH, *first), _arranged(features, inputs, _BATCH - 1, *second), strict=True
    )
    for side in dict.fromkeys((*_numbers(module, 2, 16), 8)):  # maps that are cut into windows
        for c in features:
            for last in (True, False):
                sides = ((2 * side, 3 * side), (3 * side, 5 * side))
                shapes = ((b, h, w, c) if last else (b, c, h, w) for b, (h, w) in zip((4, 3), sides, strict=True))
                yield tuple((shape,) * len(inputs) for shape in shapes)  # type: ignore[misc]
    for c in features:  # last, as two of their axes cannot be told apart
        yield tuple(((b, c, h, h),) * len(inputs) for b, (h, _) in ((_BATCH, first), (_BATCH - 1, second)))  # type: ignore[misc]


def _numbers(module: nn.Module, least: int, most: int) -> list[int]:
    """The integers between two bounds that a module, or one that it holds, has for attributes."""
    own = [child for child in module.modules() if not type(child).__module__.startswith("torch.")]
    return list(
        dict.fromkeys(n for child in own for n in vars(child).values() if type(n) is int and least <= n <= most)
    )


def _arranged(features: Sequence[int], inputs: Sequence[str], b: int, h: int, w: int) -> Iterator[Shapes]:
    """Shapes for each number of features, of tokens, maps, points, maps with the features last, volumes and tokens of
    one sample. Without any, of tokens, tokens of two heads and tokens of one sample."""

    def of_all(*shape: int) -> Shapes:
        return tuple(h if name.lower() in _HEIGHT else w if name.lower() in _WIDTH else shape for name in inputs)

    if not features:
        yield from (of_all(*lead, h * w, 7) for lead in ((b,), (b, 2), ()))
    for c in features:
        yield of_all(b, h * w, c)
        yield of_all(b, c, h, w)
        yield of_all(b, c, h * w)
        yield of_all(b, h, w, c)
        yield of_all(b, c, 2, h, w)
        yield of_all(h * w, c)
    for c in features:
        yield of_all(b, h * h, c)  # of a square map


def _clips(module: nn.Module, inputs: Sequence[str]) -> Iterator[tuple[Shapes, Shapes]]:
    """Shapes of frames, of two clips and of three, and of clips [B, T, C, H, W] and [B, C, T, H, W], as long as numbers
    that the module has, and as usual."""
    gates = {child for child in module.modules() if isinstance(child, nn.Conv3d) and has_gates(child)}
    taken = (getattr(child, "in_channels", None) for child in module.modules() if child not in gates)
    features = [*dict.fromkeys(n for n in taken if isinstance(n, int) and n > 1)] or [6]
    for t in dict.fromkeys((*_numbers(module, 2, 64), 8, 16, 12)):
        for c in features:
            for arrange in (_frames, _clips_of_frames, _clips_of_channels):
                yield tuple(  # type: ignore[misc]
                    tuple(t if name.lower() in _FRAMES else arrange(b, t, c, h, w) for name in inputs)
                    for b, h, w in ((2, 5, 7), (3, 9, 11))
                )


def _frames(b: int, t: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return b * t, c, h, w


def _clips_of_frames(b: int, t: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return b, t, c, h, w


def _clips_of_channels(b: int, t: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return b, c, t, h, w


def _features(module: nn.Module) -> list[int]:
    """The numbers of features that the submodules take, in their order, then the lengths of the parameters; then
    multiples of these, by numbers that the module has, and by usual numbers of heads."""
    taken = [getattr(child, "in_features", getattr(child, "in_channels", None)) for child in module.modules()]
    lengths = [n for p in module.parameters() for n in reversed(p.shape) if p.ndim > 1]
    likely = [n for n in dict.fromkeys((*taken, *lengths)) if isinstance(n, int) and n > 1]
    own = [n for n in vars(module).values() if type(n) is int and 1 < n <= 64]
    heads = dict.fromkeys((*own, 2, 4, 8))
    return list(dict.fromkeys((*likely, *(n * count for n in likely[:3] for count in heads))))


def example_of(shapes: Shapes, large: bool = False) -> Callable[[nn.Module, torch.Generator], tuple[Any, ...]]:
    """Makes random inputs of these shapes, or larger ones."""

    def make(module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        scale = 8.0 if large else 1.0
        return tuple(
            shape
            if isinstance(shape, int)
            else scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            for shape in shapes
        )

    return make
