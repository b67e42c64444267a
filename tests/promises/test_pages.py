"""What the pages name exists: links, sections, targets of make, modules that are run, files, the package's names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/media/*.md")])

if not PAGES:
    pytest.skip("the pages are not here, only the package", allow_module_level=True)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """The lines of a page that stand in code or between backticks."""
    text = page.read_text()
    indented = re.findall(r"^(?:    |\t)(\S.*)$", text, re.MULTILINE)
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [*indented, *fenced, *re.findall(r"`([^`\n]+)`", text)]


def resolves(name: str) -> bool:
    """Whether a dotted name that begins with the package's is a module or an attribute, of a class too."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@each_page
def test_links_lead_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, section = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (section and section not in sections(target)):
            lost.append(link)
    assert not lost


@each_page
def test_commands_exist(page):
    """Targets of make, modules after ``python -m`` and scripts."""
    lost = []
    for line in commands(page):
        lost += [target for target in re.findall(r"\bmake ([a-z][a-z-]*)", line) if target not in TARGETS]
        for module in re.findall(r"\bpython\d? -m ([\w.]+)", line):
            here = module.split(".")[0] in ("aia_kernels", "benchmarks")
            if here and importlib.util.find_spec(module) is None:
                lost.append(module)
        lost += [path for path in re.findall(r"\bpython\d? ([\w./]+\.py)", line) if not (ROOT / path).exists()]
    assert not lost


@each_page
def test_paths_exist(page):
    """Those with a folder of the project in front, and no placeholder in them."""
    folders = "|".join(("aia_kernels", "benchmarks", "csrc", "docs", "examples", "tests", r"\.ci", r"\.github"))
    found = [re.findall(rf"^(?:{folders})/[\w./-]*$", name) for name in re.findall(r"`([^`\n]+)`", page.read_text())]
    assert not [path for paths in found for path in paths if not (ROOT / path).exists()]


@each_page
def test_names_of_the_package_exist(page):
    """Between backticks, and what examples in Python import or take from the package."""
    text = page.read_text()
    names = set(re.findall(r"`(aia_kernels(?:\.\w+)+)[`(]", text))
    for code in CODE.findall(text):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("aia_kernels"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("aia_kernels."):
                names.add(ast.unparse(node))
    assert not sorted(name for name in names if not resolves(name))


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_checks_find_something():
    readme = ROOT / "README.md"
    assert any(line.startswith("make test ") for line in commands(readme))
    assert CODE.search(readme.read_text()) and "](docs/" in readme.read_text()
    assert resolves("aia_kernels.modules.CinST.forward") and not resolves("aia_kernels.modules.NoSuchLayer")
