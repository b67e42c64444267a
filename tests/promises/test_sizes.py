"""A function can be read at once and a call of it understood: at most 80 lines and 12 parameters."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = "aia_kernels", "benchmarks", "csrc", "tests", "examples"

LINES, PARAMETERS = 80, 12

#: The functions that are larger, each with its reason.
EXCEPTIONS = {
    "parameters": {("aia_kernels/models/eamlp.py", "__init__"): "the published constructor has these"},
    "lines": {("tests/emulator/module.cpp", "PYBIND11_MODULE"): "a list of functions"},
}

#: What a function of Triton's language is decorated with. Its parameters are pointers, sizes and strides, one by one.
KERNEL = ("triton.jit", "tiles.launched")

#: A function of C++ as clang-format leaves it, of a namespace or of a class in one: its head, and the body up to a
#: brace under the first letter of the head.
DEFINITION = re.compile(
    r"^( {0,2})(?!(?:namespace|struct|class|enum|extern)\b)(?P<head>[A-Za-z_][^;{}]*\)[^;{}]*){ *\n(?:.*\n)*?\1}",
    re.MULTILINE,
)
#: What a head is read without: comments and lines of the preprocessor.
ASIDE = re.compile(r"//.*|^ *#(?:.*\\\n)*.*", re.MULTILINE)
#: In a head, what has commas beside the parameters: arguments of templates and bounds of a launch.
ARGUMENTS = re.compile(r"<[^<>()]*>|\b__launch_bounds__\([^()]*\)")


class Size(NamedTuple):
    """Of a whole definition, its docstring too. Parameters are those with a name; a kernel of Triton has none."""

    name: str
    lines: int
    parameters: int


def python_sizes(source: str) -> Iterator[Size]:
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any(ast.unparse(decorator) in KERNEL for decorator in function.decorator_list)
            of = function.args
            parameters = 0 if kernel else len(of.posonlyargs + of.args + of.kwonlyargs)
            yield Size(function.name, function.end_lineno - function.lineno + 1, parameters)


def cpp_sizes(source: str) -> Iterator[Size]:
    for match in DEFINITION.finditer(ASIDE.sub("", source)):
        head, inner = match["head"], None
        while inner != head:
            inner, head = head, ARGUMENTS.sub("", head)
        before, _, rest = head.partition("(")
        commas = depth = 0
        for letter in rest:
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if depth < 0:
                break
            commas += letter == "," and depth == 0
        yield Size(before.split()[-1], match[0].count("\n") + 1, commas + (rest[0] != ")"))


SIZES = {".py": python_sizes, **dict.fromkeys((".h", ".cpp", ".cuh", ".cu"), cpp_sizes)}
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.suffix in SIZES]


@functools.cache
def all_sizes() -> list[tuple[str, Size]]:
    return [
        (path.relative_to(ROOT).as_posix(), size) for path in SOURCES for size in SIZES[path.suffix](path.read_text())
    ]


@pytest.mark.parametrize("measure, most", [("lines", LINES), ("parameters", PARAMETERS)])
def test_every_function_is_small(measure, most):
    found = {(path, size.name): size for path, size in all_sizes() if getattr(size, measure) > most}
    assert set(found) == set(EXCEPTIONS[measure]), found


@pytest.mark.parametrize(
    "suffix, source, size",
    [
        (".py", 'def f():\n    """What it is."""\n    return 1', ("f", 3, 0)),
        (".py", "class A:\n    def f(self, a, /, b, *, c=1, **d): ...", ("f", 1, 4)),
        (".py", "@triton.jit\ndef f(a, b): ...", ("f", 1, 0)),
        (".cpp", "// f\nint f() {\n  if (g(1, 2)) {\n  }\n}", ("f", 4, 0)),
        (".cpp", "struct A {\n  void f(int a, int b) const {\n  }\n};", ("f", 2, 2)),
        (".cpp", "struct A {\n  A(int a) : a(a), b(0, 0) {\n  }\n};", ("A", 2, 1)),
        (".cu", "template <class A, int V>\nvoid f(B<A, V> a,  // x, y\n       int b) {    // z\n}", ("f", 4, 2)),
        (".cu", "__global__ void __launch_bounds__(1, 2)\n    f(int a) {\n}", ("f", 3, 1)),
    ],
)
def test_sizes(suffix, source, size):
    assert list(SIZES[suffix](source)) == [size]
