"""Every public function and class says what it takes, what it returns and what it raises."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
import torch

PACKAGES = ("", ".convert", ".functional", ".models", ".modules", ".reference")
MODULES = (".backends", ".models.checkpoints", ".testing")  # without a list of what they export


def exported(name: str) -> list[object]:
    module = importlib.import_module(f"aia_kernels{name}")
    if name in PACKAGES:
        return [getattr(module, export) for export in module.__all__]
    public = (value for export, value in vars(module).items() if not export.startswith("_"))
    return [value for value in public if getattr(value, "__module__", "") == module.__name__]


#: Under its full name, each function and class; what several packages export stands here once.
PUBLIC = {
    f"{value.__module__}.{value.__qualname__}": value
    for name in (*PACKAGES, *MODULES)
    for value in exported(name)
    if inspect.isroutine(value) or inspect.isclass(value)
}
#: And the methods of the classes but those that torch or Python asks for, which the class describes.
PUBLIC |= {
    f"{kind.__module__}.{kind.__qualname__}.{name}": method
    for kind in PUBLIC.values()
    if inspect.isclass(kind)
    for name, method in vars(kind).items()
    if inspect.isroutine(method) and not name.startswith("_")
    if not any(hasattr(base, name) for base in kind.__mro__ if not base.__module__.startswith("aia_kernels"))
}
ROUTINES = [name for name, value in PUBLIC.items() if inspect.isroutine(value)]
LAYERS = [name for name, value in PUBLIC.items() if inspect.isclass(value) and issubclass(value, torch.nn.Module)]


def constructor_of(value) -> tuple[object, list[str]]:
    """What describes the arguments of a call, the class that has the constructor where it is one, and their names."""
    if inspect.isroutine(value):
        return value, [name for name in inspect.signature(value).parameters if name != "self"]
    if issubclass(value, torch.autograd.Function):  # called through apply
        return value, list(inspect.signature(value.forward).parameters)[1:]
    owner = next(kind for kind in value.__mro__ if {"__init__", "__new__"} & vars(kind).keys())
    return owner, [name for name in inspect.signature(value).parameters if not name.startswith("_")]


def written(value, read) -> str:
    """What read finds in a function or class, and in the classes of this package that it extends."""
    kinds = value.__mro__ if inspect.isclass(value) else (value,)
    return "\n".join(read(kind) or "" for kind in kinds if kind.__module__.startswith("aia_kernels"))


def block(text: str, title: str) -> str:
    """What stands below a title, as far as it is indented."""
    return "\n".join(re.findall(rf"^(?:{title}):\n((?: .*\n?|\n)*)", text, re.MULTILINE))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_what_it_is_and_what_it_takes(name):
    described, parameters = constructor_of(PUBLIC[name])
    text = inspect.getdoc(described)
    said = re.findall(r"^ {4}\*{0,2}(\w+): \S", block(text, "Args|Attributes"), re.MULTILINE)
    assert said == parameters, f"{name} describes {said}, and takes {parameters}"
    assert PUBLIC[name].__doc__, f"{name} has no docstring of its own"


@pytest.mark.parametrize("name", ROUTINES)
def test_a_public_function_says_what_it_returns(name):
    returned = inspect.signature(PUBLIC[name]).return_annotation
    assert returned is not inspect.Signature.empty, f"{name} has no type for what it returns"
    told = block(inspect.getdoc(PUBLIC[name]), "Returns")
    assert bool(told) == (returned != "None"), f"{name} returns {returned}, and says {told!r}"


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_says_what_its_forward_takes(name):
    text = re.sub(r"^\w+:\n(?: .*\n?|\n)*", "", written(PUBLIC[name], inspect.getdoc), flags=re.MULTILINE)
    missing = [p for p in inspect.signature(PUBLIC[name].forward).parameters if not re.search(rf"\b{p}\b", text)]
    assert missing == ["self"], f"{name} does not say what these are: {missing}"
    assert re.search(r" \[B.*, .*\breturns\b", text, re.DOTALL), f"{name} does not say what its forward returns"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_can_raise_says_so(name):
    raises = re.search(r"^ +raise \w|\b_?check\w*\(", written(PUBLIC[name], inspect.getsource), re.MULTILINE)
    told = block(written(PUBLIC[name], inspect.getdoc), "Raises")
    assert told or not raises, f"{name} does not say what it raises: {raises[0].strip()}"
