"""A pytest plugin for runs that may be cut short: python -m pytest -p benchmarks.told --told FILE ...

FILE gets a line as each test begins and as it ends, written at once. So it says what was found and which tests were
running, however the run ended. A test that takes longer than --seconds-each, or after which the device is lost, ends
its process; under pytest-xdist another one takes its place. Tests that compile nothing come first. --first-of-each N
keeps N tests, of as many files and functions as there are.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import records

#: What is told of a test that begins, and of how many there are.
BEGUN, COLLECTED = "begun", "collected"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("told")
    group.addoption("--told", metavar="FILE", help="the file of lines: process, test, what became of it, why")
    group.addoption("--seconds-each", type=float, default=60, metavar="S", help="a test may take (default 60)")
    group.addoption("--first-of-each", type=int, metavar="N", help="N tests, the first of each function")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.told:
        config.pluginmanager.register(Teller(Path(config.option.told), config.option.seconds_each))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "triton" in item.nodeid)
    if (most := config.option.first_of_each) is not None:
        kept = first_of_each([item.nodeid for item in items])[:most]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


def first_of_each(nodes: list[str]) -> list[str]:
    """The first test of each function: one of every file, then another one of every file, and so on."""
    functions = {node.split("[")[0]: node for node in reversed(nodes)}
    files: dict[str, list[str]] = {}
    for node in nodes:
        if node in functions.values():
            files.setdefault(node.split("::")[0], []).append(node)
    return [node for rank in itertools.zip_longest(*files.values()) for node in rank if node]


class Teller:
    """Tells of the tests that run in this process, in lines that other processes add to."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds

    def tell(self, node: str, outcome: str, why: str = "") -> None:
        with self.path.open("a") as opened:
            opened.write(f"{os.getpid()}\t{node}\t{outcome}\t{' '.join(why.split())[:200]}\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.tell("", COLLECTED, str(len(session.items)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.tell(item.nodeid, BEGUN)
        late = threading.Timer(self.seconds, self.give_up, (item.nodeid, f"did not end in {self.seconds:g} s"))
        late.start()
        try:
            return (yield)
        finally:
            late.cancel()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if call.when == "call" or not report.passed:
            why = records.failure(call.excinfo.value) if call.excinfo else ""
            if report.failed and lost():
                self.give_up(item.nodeid, f"{why} (the device is lost)")
            self.tell(item.nodeid, report.outcome, why)
        return report

    def give_up(self, node: str, why: str) -> None:
        self.tell(node, "failed", why)
        os._exit(1)


def lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    from . import timing

    return timing.on("cuda").is_lost()


def read(path: Path) -> tuple[dict[str, tuple[str, str]], int]:
    """(what became of it, why) by test, in the order in which they began (BEGUN: it was running at the end); and how
    many never began."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    found = {node: (outcome, why) for _, node, outcome, why in lines}
    _, collected = found.pop("", (COLLECTED, "0"))
    return found, max(int(collected) - len(found), 0)
