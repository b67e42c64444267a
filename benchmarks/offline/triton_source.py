"""What a Triton kernel does with its pointers, read from its source: no GPU and no compiler is asked."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType
from typing import Any, NamedTuple

#: Kernels met so far whose source holds a matrix product, by name.
_multiplying: set[str] = set()


def name_of(kernel: Any) -> str:
    """With its module, as two passes may each have a kernel of one name."""
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


def multiplies(name: str) -> bool:
    """Whether a kernel of that name, which accesses() has met, holds a matrix product."""
    return name in _multiplying


def accesses(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the parameters that a kernel loads from, and of those that it stores to."""
    found = _of_function(kernel.fn)
    if found.product:
        _multiplying.add(name_of(kernel))
    return found.reads, found.writes


class Uses(NamedTuple):
    """Of a function and all that it calls: parameters loaded from, parameters stored to, whether there is a matrix
    product, its parameters in order, and those that an address which it returns is made of."""

    reads: frozenset[str]
    writes: frozenset[str]
    product: bool
    parameters: tuple[str, ...]
    returned: frozenset[str]


@functools.cache
def _of_function(function: FunctionType) -> Uses:
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    parameters = tuple(argument.arg for argument in body.args.args)
    origins = {name: {name} for name in parameters}

    def named(expression: ast.AST) -> set[str]:
        """Parameters that an address is made of; what a call returns is a value, unless it returns an address."""
        if isinstance(expression, ast.Call):
            inner = _inner(expression, function)
            return given_as(_of_function(inner).returned, inner, expression) if inner else set()
        found = set(origins.get(expression.id, ())) if isinstance(expression, ast.Name) else set()
        return found.union(*(named(child) for child in ast.iter_child_nodes(expression)))

    def given_as(names: frozenset[str], inner: FunctionType, call: ast.Call) -> set[str]:
        """Parameters that are given to a called function as some of its own."""
        positional: list[ast.AST] = []
        for argument in call.args:
            starred = isinstance(argument, ast.Starred)
            positional += tuples.get(argument.value.id, []) if starred else [argument]
        given = dict(zip(_of_function(inner).parameters, positional, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords}
        return set().union(*(named(given[name]) for name in names if name in given))

    assigned = _assignments(body)
    tuples = {name: value.elts for name, value in assigned if isinstance(value, ast.Tuple)}
    for _ in assigned:  # an address may go through as many names
        for name, value in assigned:
            origins.setdefault(name, set()).update(named(value))

    reads, writes, returned, product = set(), set(), set(), False
    for node in ast.walk(body):
        if isinstance(node, ast.Return) and node.value is not None:
            returned |= named(node.value)
        if not isinstance(node, ast.Call):
            continue
        if inner := _inner(node, function):
            uses = _of_function(inner)
            reads |= given_as(uses.reads, inner, node)
            writes |= given_as(uses.writes, inner, node)
            product |= uses.product
            continue
        operation = getattr(_resolve(node.func, function), "__name__", "")
        product |= operation == "dot"
        if operation == "load":
            reads |= named(node.args[0])
        elif operation == "store":
            writes |= named(node.args[0])
        elif operation.startswith("atomic"):
            reads |= named(node.args[0])
            writes |= named(node.args[0])
    return Uses(frozenset(reads), frozenset(writes), product, parameters, frozenset(returned))


def _assignments(body: ast.AST) -> list[tuple[str, ast.expr]]:
    """Names and what is assigned to them, tuples of both taken apart."""
    found = []
    for node in ast.walk(body):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign) and node.value is not None:
            pairs = [(node.target, node.value)]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
            elif isinstance(target, ast.Name):
                found.append((target.id, value))
    return found


def _inner(call: ast.Call, function: FunctionType) -> FunctionType | None:
    """The function that is called, if it is compiled for the device and not of Triton's own library."""
    callee = _resolve(call.func, function)
    inner = getattr(callee, "fn", None)
    return inner if isinstance(inner, FunctionType) and not inner.__module__.startswith("triton") else None


def _resolve(expression: ast.expr, function: FunctionType) -> Any:
    """The object that a name or a dotted name means in a function's module, or None."""
    if isinstance(expression, ast.Name):
        return function.__globals__.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(_resolve(expression.value, function), expression.attr, None)
    return None
