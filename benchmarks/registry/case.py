"""A case: one layer on one input, and what the runner must know about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eval", "step")


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
        """A seeded gradient for y, shaped and stored as x."""
        generator = torch.Generator().manual_seed(1)
        return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))

    @abstractmethod
    def published(self) -> nn.Module:
        """The published eager layer, with the parameters that torch.manual_seed decides."""

    @abstractmethod
    def fused(self) -> nn.Module:
        """The same layer of this package."""

    @property
    @abstractmethod
    def compiled_on_cpu(self) -> bool:
        """Whether torch.compile competes on the CPU, where one case takes up to a minute to compile."""

    def alternatives(self, device: str) -> dict[str, Callable[[], nn.Module]]:
        """Layers that compute something else on the same input, which a user might run instead, by name."""
        return {}

    def near_ties(self, elements: int) -> int:
        """How many elements of a gradient of x with so many may be moved by a decision that rounding turns."""
        return 0
