"""A case: one layer on one input, and what the runner must know about it."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import aia_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eval", "step")
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Case(ABC):
    """One layer on one input. ``name`` is the layer's, ``stage`` says where the input occurs, ``clips`` its batch."""

    name: str
    stage: str
    clips: int
    dtype: str
    layout: str
    sizes: tuple[int, ...]
    kind: str = field(default="layer", kw_only=True)

    #: The name of the family, as in aia_kernels.backends.FAMILIES.
    family: ClassVar[str]
    #: Errors that rounding may displace in a large input, by group of measure.errors, beyond the rounding budget.
    displaced: ClassVar[dict[str, float]] = {}

    @property
    def columns(self) -> dict:
        """The columns of a row that tell cases apart."""
        return {column: getattr(self, column) for column in ("kind", "name", "stage", "clips", "dtype", "layout")}

    @property
    def where(self) -> str:
        """The input as a table shows it."""
        return self.stage

    @property
    @abstractmethod
    def x_bytes(self) -> int:
        """|X|: the bytes of the input."""

    @abstractmethod
    def traffic(self, mode: str) -> int:
        """x-sized reads and writes of one call: forward in mode eval, forward and backward in mode step."""

    def budget_bytes(self, mode: str) -> int:
        return self.traffic(mode) * self.x_bytes

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The sizes in which the values of the input are drawn."""

    @abstractmethod
    def arrange(self, values: Tensor) -> Tensor:
        """The input of values of that shape, in the form and the layout of the case."""

    def make_input(self, device: str = "cpu", seed: int = 0) -> Tensor:
        """Standard normal values, which depend on the sizes and the seed alone, not on the layout."""
        generator = torch.Generator().manual_seed(seed)
        return self.arrange(torch.randn(self.shape, generator=generator).to(device, DTYPES[self.dtype]))

    def without_data(self) -> Tensor:
        """The input on the meta device: its sizes, its strides and its type."""
        return self.arrange(torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta"))

    def gradient(self, x: Tensor) -> Tensor:
        """A seeded gradient for y, shaped and stored as it."""
        y = self.empty_result(x)
        return y.copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))

    def empty_result(self, x: Tensor) -> Tensor:
        """A tensor shaped and stored as y: mostly as x."""
        return torch.empty_like(x)

    @abstractmethod
    def published(self) -> nn.Module:
        """The published eager layer, with the parameters that torch.manual_seed decides."""

    @abstractmethod
    def fused(self) -> nn.Module:
        """The same layer of this package."""

    @property
    def compiled_on_cpu(self) -> bool:
        """Whether torch.compile competes on the CPU, where one case takes up to a minute to compile."""
        return False

    def alternatives(self, device: str) -> dict[str, Callable[[], nn.Module]]:
        """Layers that compute something else on the same input, which a user might run instead, by name."""
        return {}

    def near_ties(self, elements: int) -> int:
        """How many elements of a gradient of x with so many may be moved by a decision that rounding turns."""
        return 0


@dataclass(frozen=True)
class SizedCase(Case):
    """A layer of some arguments on tokens [B, N, C] or maps [B, C, H, W], of which ``sizes`` are the sizes."""

    arguments: tuple[tuple[str, int], ...] = ()

    #: The published layers of the family by name; this package's have the same names and arguments.
    layers: ClassVar[dict[str, type[nn.Module]]]

    def __str__(self) -> str:
        kind = "sweep-" if self.kind == "sweep" else ""
        sizes = "x".join(map(str, self.sizes))
        return f"{kind}{self.name}-{self.stage.replace(' ', '-')}-{sizes}-{self.dtype}-{self.layout}"

    @property
    def x_bytes(self) -> int:
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def arrange(self, values: Tensor) -> Tensor:
        return values.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else values

    def published(self) -> nn.Module:
        return self.layers[self.name](**dict(self.arguments))

    def fused(self) -> nn.Module:
        return getattr(aia_kernels, self.name)(**dict(self.arguments))


class Place(NamedTuple):
    """Where a layer stands: its name, its arguments and the sizes of its input, batch first."""

    name: str
    arguments: dict[str, int]
    sizes: tuple[int, ...]


C = TypeVar("C", bound=SizedCase)


def at_places(of: type[C], places: Iterable[tuple[str, Place]]) -> list[C]:
    """Every case of places by their stages, the main ones first: float32, contiguous; then bfloat16, and of maps
    channels_last."""
    places, found = list(places), []
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        for stage, (name, arguments, sizes) in places:
            if layout == LAYOUTS[0] or len(sizes) == 4:
                found.append(of(name, stage, sizes[0], dtype, layout, sizes, tuple(arguments.items())))
    return sorted(found, key=lambda case: (case.dtype != "fp32") + (case.layout != LAYOUTS[0]))


def main_form(of: type[C], stage: str, place: Place, **given: str) -> C:
    """The case of a place in float32, contiguous."""
    name, arguments, sizes = place
    return of(name, stage, sizes[0], "fp32", LAYOUTS[0], sizes, tuple(arguments.items()), **given)
