"""Checkpoints into networks: from a file or a dictionary, every key accounted for before a parameter changes."""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

Source = str | PathLike | Mapping[str, object]

#: What wrappers (DataParallel and DistributedDataParallel, torch.compile) put before the keys of what they wrap.
PREFIXES = ("module.", "_orig_mod.")
#: Under which names published checkpoints hold the state dict beside other things; EANet's, "net".
KEYS = ("state_dict", "model", "net")


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit a model. The message and the attributes list all the keys that do not.

    Args:
        missing: Keys of the model that the checkpoint lacks.
        extra: Keys of the checkpoint that the model lacks.
        misshaped: Keys that both have with different shapes, each with what came and what is expected.
    """

    def __init__(self, missing: Iterable[str], extra: Iterable[str], misshaped: Mapping[str, str]):
        self.missing, self.extra, self.misshaped = list(missing), list(extra), list(misshaped)
        lines = ["the checkpoint does not fit the model, and nothing was loaded"]
        shapes = [f"{key}: {shapes}" for key, shapes in misshaped.items()]
        for label, keys in (("missing", self.missing), ("extra", self.extra), ("mis-shaped", shapes)):
            if keys:
                lines += [f"{len(keys)} {label}:", *(f"  {key}" for key in keys)]
        super().__init__("\n".join(lines))


def load_checkpoint(model: nn.Module, source: Source, allowed: Iterable[str] = ()) -> None:
    """Load a checkpoint of the same network: every key of the model must be in it, and no other.

    Wrappers do not matter: "module." and "_orig_mod." are taken off the keys, and a wrapped model is loaded inside.
    Parameters and buffers keep their identity, type and device.

    A file is read without running anything that stands in it. Trainers write their arguments or numpy's numbers beside
    the weights, and torch.load refuses the classes of these. If you trust the file, name them in allowed.

    Args:
        model: The network, or a wrapper around it.
        source: The path of a file that torch.save wrote, or what was saved: a state dict, or a dictionary that holds
            one as "state_dict", "model" or "net".
        allowed: Names of classes and functions that may be called to read the file, such as "argparse.Namespace" and
            "numpy.dtype".

    Raises:
        CheckpointError: Keys are missing, extra or mis-shaped; it lists them, and nothing was loaded.
        pickle.UnpicklingError: The file holds classes that are not allowed; it lists them.
        TypeError, ValueError: The source holds no state dict, or allowed names what does not exist.
    """
    _fill(_unwrapped(model), read_state(source, allowed), optional=lambda key: False)


def load_imagenet(model: nn.Module, source: Source, allowed: Iterable[str] = ()) -> list[str]:
    """Load the weights of an ImageNet ResNet, named as torchvision's, into one of the ResNets of this package.

    Nothing is downloaded. The classifier ``fc`` is loaded where the model has one of the same shape and left as it is
    elsewhere. The units may be missing, and so may num_batches_tracked, which old files lack.

    Args:
        model: An AIAResNet, a DilatedResNet, a VideoNet or a wrapper around one.
        source: As for load_checkpoint.
        allowed: As for load_checkpoint.

    Returns:
        The keys of the model that were not loaded.

    Raises:
        CheckpointError: Other keys are missing, extra or mis-shaped; nothing was loaded.
        pickle.UnpicklingError, TypeError, ValueError: As load_checkpoint.
    """
    model = _unwrapped(model)
    network = getattr(model, "base_model", model)
    state, own = read_state(source, allowed), network.state_dict()
    classifier = {key: value for key, value in state.items() if key.startswith("fc.")}
    if any(key not in own or own[key].shape != value.shape for key, value in classifier.items()):
        state = {key: value for key, value in state.items() if key not in classifier}
    _fill(network, state, lambda key: key.startswith("fc.") or "eft" in key or key.endswith("num_batches_tracked"))
    prefix = "" if network is model else "base_model."
    return [key for key in model.state_dict() if key.removeprefix(prefix) not in state]


def read_state(source: Source, allowed: Iterable[str] = ()) -> dict[str, Tensor]:
    """Read the state dict of a source, without the prefixes of wrappers.

    Args:
        source: As for load_checkpoint.
        allowed: As for load_checkpoint.

    Returns:
        Tensors by key; those of a file are on the CPU.

    Raises:
        pickle.UnpicklingError: The file holds classes that are not allowed; it lists them.
        TypeError, ValueError: The source holds no state dict, or allowed names what does not exist.
    """
    if not isinstance(source, Mapping | str | PathLike):
        raise TypeError(f"source: got {type(source).__name__}, expected the path of a checkpoint or a dictionary")
    found = source if isinstance(source, Mapping) else _load(source, list(allowed))
    for name in KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not _is_state(found):
        where = "the dictionary" if isinstance(source, Mapping) else source
        raise TypeError(f"source: {where} holds no state dict; expected one, or one under {', '.join(map(repr, KEYS))}")
    state = dict(found)
    while state and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _load(source: str | PathLike, allowed: list[str]) -> Any:
    """What torch.save wrote, calling nothing but what is allowed by name."""
    try:
        with torch.serialization.safe_globals(list(_named(allowed))):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(source):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        else:  # an old file: torch names only the first
            refused = re.findall(r"GLOBAL (\S+) was not an allowed global", str(error))
        refused = sorted(set(refused) - set(allowed))
        if not refused:
            raise pickle.UnpicklingError(f"source: {source} is no checkpoint that torch.load reads: {error}") from None
        raise pickle.UnpicklingError(
            f"source: {source} holds, beside tensors, {', '.join(refused)}, which torch.load refuses: loading them "
            f"runs what the file says. If you trust the file, pass allowed={refused}"
        ) from None


def _named(allowed: list[str]) -> Iterator[tuple[Any, str]]:
    """The classes and functions of these names, as torch's list of safe globals takes them."""
    for name in allowed:
        module, _, attribute = name.rpartition(".")
        try:
            yield getattr(importlib.import_module(module), attribute), name
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"allowed: got {name!r}, expected the name of a class or function: {error}") from None
        if name == "numpy.dtype":  # each type of numbers has a class of its own, which a file does not name
            dtypes = importlib.import_module("numpy.dtypes")
            yield from ((getattr(dtypes, kind), f"numpy.dtypes.{kind}") for kind in dtypes.__all__)


def _is_state(found: object) -> bool:
    return isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _fill(model: nn.Module, state: Mapping[str, Tensor], optional: Callable[[str], bool]) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in state and not optional(key)]
    extra = [key for key in state if key not in own]
    misshaped = {
        key: f"got {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    }
    if missing or extra or misshaped:
        raise CheckpointError(missing, extra, misshaped)
    model.load_state_dict(state, strict=False)
