"""What Triton 3.6 and 3.7, which torch 2.11 to 2.13 bring, cannot compile, though 3.9 and the interpreter do: read off
the source of the kernels, as one version alone is installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "aia_kernels" / "triton"
FOUND = {
    "tl.zeros([C.block], ACC)": "C.block",
    "tl.full([BT, M.BN], 0, ACC)": "M.BN",
    "PARTS: tl.constexpr = tl.cdiv(F, BF)": "tl.cdiv(F, BF)",
}
LEFT = [
    "tl.zeros([BM, 1], ACC)",
    "PARTS: tl.constexpr = (F + BF - 1) // BF",
    "blocks = tl.cdiv(n, BT)",
    "INDEX: tl.constexpr = tl.int32",
]


def in_kernels(tree: ast.Module) -> Iterator[ast.AST]:
    """What is compiled by Triton."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
            if decorators & {"triton.jit", "tiles.launched", "launched"}:
                yield from ast.walk(function)


def not_compiled(nodes: Iterator[ast.AST]) -> Iterator[ast.expr]:
    """Fields of a named tuple in the list of a shape, which are integers of Python there; and calls of Triton's
    functions as constants, which are values there."""
    for node in nodes:
        if isinstance(node, ast.List):
            yield from (entry for entry in node.elts if isinstance(entry, ast.Attribute))
        elif isinstance(node, ast.AnnAssign) and isinstance(call := node.value, ast.Call):
            yield from [call] if ast.unparse(call.func).startswith("tl.") else []


@pytest.mark.parametrize("line", FOUND)
def test_it_is_found(line):
    assert [ast.unparse(node) for node in not_compiled(ast.walk(ast.parse(line)))] == [FOUND[line]]


@pytest.mark.parametrize("line", LEFT)
def test_all_else_is_left(line):
    assert [*not_compiled(ast.walk(ast.parse(line)))] == []


def test_no_kernel_has_it():
    kernels = {path.name: [*in_kernels(ast.parse(path.read_text()))] for path in sorted(FOLDER.glob("*.py"))}
    assert sum(map(bool, kernels.values())) >= 10
    found = [(name, ast.unparse(node)) for name, nodes in kernels.items() for node in not_compiled(iter(nodes))]
    assert found == []
