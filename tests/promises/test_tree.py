"""The package's imports run one way, from the public layers down to what they stand on; see docs/how-it-works.md."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import aia_kernels

PACKAGE = Path(aia_kernels.__file__).parent

#: From the bottom up: a module imports from its own layer and from those before it.
LAYERS = (
    "common",
    "reference",
    "fakes",
    "schemas",
    "algorithms",
    "triton",
    "backends",
    "operators",
    "functional",
    "modules",
    "models",
    "convert",
    "testing",
)
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(("aia_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for name, path in NAMES.items()}


def imported(module: str) -> dict[str, int]:
    """The modules of the package that one imports, wherever in its source, with the columns where it says so."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        found |= {name: node.col_offset for name in names if name in MODULES}
    return found


def layer_of(module: str) -> int:
    """The place of a module in LAYERS; that of the package itself and of its command is above them all."""
    part = (*module.split("."), "")[1]
    return LAYERS.index(part) if part not in ("", "__main__") else len(LAYERS)


def test_every_part_of_the_package_has_a_layer():
    assert {module.split(".")[1] for module in MODULES if module != "aia_kernels"} == {*LAYERS, "__main__"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    upward = {name for name in imported(module) if layer_of(name) > layer_of(module)}
    assert not upward, f"{module} imports from layers above it: {sorted(upward)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides_in_a_function(module):
    hidden = {name for name, column in imported(module).items() if column}
    assert not hidden, f"{module} imports inside a function: {sorted(hidden)}"


def test_no_circle():
    """Not even inside a layer; a package that gathers its modules comes after them."""
    above = {module: {name for name in imported(module) if name != "aia_kernels"} - {module} for module in MODULES}
    graphlib.TopologicalSorter(above).prepare()


@pytest.mark.parametrize(
    "module, source, test",
    [
        ("aia_kernels.common.maps", "from ..reference import Norm", test_imports_run_down),
        ("aia_kernels.schemas", "import aia_kernels.backends.choices", test_imports_run_down),
        ("aia_kernels.backends.choices", "def f():\n    from .. import schemas", test_no_import_hides_in_a_function),
    ],
)
def test_a_fault_is_found(module, source, test, monkeypatch, tmp_path):
    (path := tmp_path / "module.py").write_text(source)
    monkeypatch.setitem(MODULES, module, path)
    with pytest.raises(AssertionError, match=module):
        test(module)


def test_a_circle_is_found(monkeypatch, tmp_path):
    (path := tmp_path / "module.py").write_text("from . import layouts")
    monkeypatch.setitem(MODULES, "aia_kernels.common.maps", path)
    with pytest.raises(graphlib.CycleError):
        test_no_circle()


TESTS = Path(__file__).parent.parent
TEST_MODULES = {path.stem: path for path in sorted(TESTS.rglob("test_*.py"))}


def test_no_test_module_imports_another():
    """What tests share stands in helper modules."""
    for name, path in TEST_MODULES.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module}
        assert not found & TEST_MODULES.keys(), f"{name} imports {sorted(found & TEST_MODULES.keys())}"


@pytest.mark.parametrize("source", ["import test_golden as golden", "def f():\n    from test_golden import make"])
def test_an_import_of_a_test_module_is_found(source, monkeypatch, tmp_path):
    (path := tmp_path / "test_shift.py").write_text(source)
    monkeypatch.setitem(TEST_MODULES, "test_shift", path)
    with pytest.raises(AssertionError, match=r"test_shift imports \['test_golden'\]"):
        test_no_test_module_imports_another()
