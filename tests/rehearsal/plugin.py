"""pytest -p rehearsal.plugin: of the tests, those that need a GPU, on the devices of a rehearsal.

A test fails where the runtime complains.
"""

from __future__ import annotations

import rehearsal.installed  # before torch is imported

# isort: split
import json
from collections import Counter

import pytest
import torch

import rehearsal
from aia_kernels.backends import extension
from rehearsal import framework

framework.install()
torch.cuda.init()  # the allocator obeys from then on
extension.LIBRARY = rehearsal.LIBRARY_FILE

#: Launches of the library's kernels, and of torch's, which did not run.
ran: Counter[str] = Counter()
unrun: Counter[str] = Counter()


def _needs_gpu(item: pytest.Item) -> bool:
    """Whether a test has "cuda" for a parameter, alone or beside a backend, or is about nothing else."""
    if item.path.stem in ("test_rehearsal", "test_promises_cuda_graphs"):
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any("cuda" in (value if isinstance(value, tuple) else [value]) for value in values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _needs_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _needs_gpu(item)])
    items[:] = kept
    for item in items:
        if "inductor" in item.name:
            item.add_marker(pytest.mark.skip(reason="Inductor's code for CUDA is Triton's, which needs a driver"))


@pytest.fixture(autouse=True)
def no_complaint(request):
    """Every tensor lies between guards of its own, but where graphs are captured: they need torch's own pools."""
    torch.cuda.memory.caching_allocator_enable("cuda_graphs" in request.module.__name__)
    rehearsal.complaints(), rehearsal.launches()
    yield
    torch.cuda.synchronize()
    for launch in rehearsal.launches():
        (ran if launch.ran else unrun)[launch.kernel] += 1
    complaints = rehearsal.complaints()
    assert not complaints, "\n".join(complaints[:5])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of a worker of pytest-xdist, for its controller
        session.config.workeroutput["rehearsal"] = json.dumps([ran, unrun])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for total, found in zip((ran, unrun), json.loads(node.workeroutput["rehearsal"]), strict=True):
        total.update(found)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("rehearsal")
    terminalreporter.write_line(f"launches of {len(ran)} kernels of the library, run: {sum(ran.values())}")
    for name, count in sorted(ran.items()):
        terminalreporter.write_line(f"  {count:7} {name}")
    terminalreporter.write_line(f"launches of torch's kernels, not run: {dict(unrun) or 'none'}")
