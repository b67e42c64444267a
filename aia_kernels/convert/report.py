"""What a conversion did, what it left alone, and the way back."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Converted(NamedTuple):
    """A layer that was exchanged.

    Attributes:
        names: All its names in the model; the model itself is "".
        before: The name of its class before.
        now: The name of its class now.
    """

    names: tuple[str, ...]
    before: str
    now: str


class LeftAlone(NamedTuple):
    """A layer with the submodules of a published one that was left as it is.

    Attributes:
        names: All its names in the model; the model itself is "".
        kind: The name of its class.
        reason: Why it was left alone, a sentence.
    """

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(repr=False)
class Report:
    """The result of convert and of fuse; it prints well.

    Attributes:
        model: The object that was given.
        converted: The layers that were exchanged; of a graph, the calls.
        left_alone: What comes close to a published layer, or to external attention, and was left as it is.
        already_fused: The names of layers of this package that the model had before.
    """

    model: nn.Module
    converted: list[Converted] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    already_fused: list[str] = field(default_factory=list)
    _ways_back: list[Callable[[], None]] = field(default_factory=list)
    _by: str = "convert"

    def undo(self) -> nn.Module:
        """Give every converted layer its own class back, and a graph its own nodes. What was trained since stays
        trained.

        Returns:
            The model.
        """
        while self._ways_back:
            self._ways_back.pop()()
        return self.model

    def __str__(self) -> str:
        if not (self.converted or self.left_alone or self.already_fused):
            return (
                f"aia_kernels.{self._by}: the model is unchanged; no forward in it divides a softmax by its sum over "
                "another axis or recalibrates a tensor by gates, and no layer has the submodules of a published one"
            )
        lines = [f"aia_kernels.{self._by}: {_count(self.converted)} converted, {_count(self.left_alone)} left alone"]
        if self.already_fused:
            lines[0] += f", {_count(self.already_fused)} fused before"
        if not self.converted:
            lines[0] += "; the model is unchanged"
        for title, entries in (("converted", self.converted), ("left alone", self.left_alone)):
            if entries:
                lines += [f"{title}:", *_grouped(entries)]
        return "\n".join(lines)

    __repr__ = __str__


def _count(entries: list) -> str:
    return f"{len(entries)} layer{'' if len(entries) == 1 else 's'}"


def _grouped(entries: list[Converted] | list[LeftAlone]) -> list[str]:
    """A line for each kind of entry and its names below, a module with several names as ``first = second``."""
    groups: dict[str, list[str]] = {}
    for names, kind, rest in entries:
        head = f"{kind} -> {rest}" if isinstance(entries[0], Converted) else f"{kind}: {rest}"
        groups.setdefault(head, []).append(" = ".join(name or "(the model itself)" for name in names))
    lines = []
    for head, listed in groups.items():
        lines.append(f"  {len(listed)} x {head}")
        lines += textwrap.wrap(", ".join(listed), 116, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All modules of a model, each with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def class_name(module: nn.Module) -> str:
    """The full name of the class of a module."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
