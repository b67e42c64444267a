"""A function can be read at once and a call of it understood: at most 80 lines and 12 parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = "aia_kernels", "benchmarks", "tests", "examples"
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]

LINES, PARAMETERS = 80, 12

#: The functions with more parameters, each with its reason.
EXCEPTIONS = {("aia_kernels/models/eamlp.py", "__init__"): "the published constructor has these"}

#: What a function of Triton's language is decorated with. Its parameters are pointers, sizes and strides, one by one.
KERNEL = ("triton.jit", "tiles.launched")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def lines(function: Function) -> int:
    """Of the whole definition, its docstring too."""
    return function.end_lineno - function.lineno + 1


def parameters(function: Function) -> int:
    """That have a name; none for a kernel."""
    if any(ast.unparse(decorator) in KERNEL for decorator in function.decorator_list):
        return 0
    of = function.args
    return len(of.posonlyargs + of.args + of.kwonlyargs)


@pytest.mark.parametrize("size, most", [(lines, LINES), (parameters, PARAMETERS)])
def test_every_function_is_small(size, most):
    found = {
        (path.relative_to(ROOT).as_posix(), function.name): size(function)
        for path in SOURCES
        for function in functions(path.read_text())
        if size(function) > most
    }
    assert set(found) == (set(EXCEPTIONS) if size is parameters else set()), found


@pytest.mark.parametrize(
    "size, source, count",
    [
        (lines, 'def f():\n    """What it is."""\n    return 1', 3),
        (parameters, "class A:\n    def f(self, a, /, b, *, c=1, **d): ...", 4),
        (parameters, "@triton.jit\ndef f(a, b): ...", 0),
    ],
)
def test_sizes(size, source, count):
    assert [size(function) for function in functions(source)] == [count]
