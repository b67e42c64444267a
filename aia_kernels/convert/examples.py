"""Inputs on which a module whose forward is unknown may run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

#: The shape of each input of a module.
Shapes = tuple[tuple[int, ...], ...]

_BATCH = 4

#: Heights and widths of maps, of which those are taken that are no size of a parameter.
_SPATIAL = ((3, 4), (5, 7), (9, 11), (13, 15), (17, 19))


def likely_shapes(module: nn.Module, inputs: int) -> Iterator[Shapes]:
    """Shapes that inputs of a module may have, the likeliest first: tokens and maps of as many features as the
    parameters suggest. No two axes have the same length."""
    sizes = {n for p in module.parameters() for n in p.shape}
    usable = [(h, w) for h, w in _SPATIAL if not {_BATCH, h, w, h * w} & sizes or (h, w) == _SPATIAL[-1]]
    h, w = usable[0]
    if not sizes:
        yield from (((*lead, h * w, 7),) * inputs for lead in ((_BATCH,), (_BATCH, 2), ()))
    for features in _features(module):
        for shape in (
            (_BATCH, h * w, features),
            (_BATCH, features, h, w),
            (_BATCH, features, h * w),
            (_BATCH, h, w, features),
            (_BATCH, features, 2, h, w),
            (h * w, features),
        ):
            yield (shape,) * inputs


def _features(module: nn.Module) -> list[int]:
    """The numbers of features that the submodules take, in their order, then the lengths of the parameters."""
    taken = [getattr(child, "in_features", getattr(child, "in_channels", None)) for child in module.modules()]
    lengths = [n for p in module.parameters() for n in reversed(p.shape) if p.ndim > 1]
    return [n for n in dict.fromkeys((*taken, *lengths)) if isinstance(n, int) and n > 1]


def example_of(shapes: Shapes, longer: bool = False) -> Callable[[nn.Module, torch.Generator], tuple[Tensor, ...]]:
    """Makes random inputs of these shapes, or of others of the same ranks."""

    def make(module: nn.Module, generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * (8.0 if longer else 1.0)
            for shape in shapes
        )

    return make
