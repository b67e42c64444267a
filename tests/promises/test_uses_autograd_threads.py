"""The backend of a layer whose backward runs in one of autograd's own threads, as that of CUDA tensors does.

On the CPU autograd stays in the thread that calls it, but for backward passes that call one another too deep.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import skip_unless_runnable
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from uses_layers import assert_close, assert_same_bits, batch, in_new_threads, layer, left_by, main_layers, towards

import aia_kernels
from aia_kernels import backends

#: Beyond so many backward passes within one another autograd takes a thread of its own for the next.
DEPTH = 61

reentrant_or_not = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Deeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, call: Callable[[], None], depth: int) -> Tensor:
        ctx.settings = call, depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        call, depth = ctx.settings
        with torch.enable_grad():
            in_a_thread_of_autograd(call, depth - 1) if depth else call()
        return grad, None, None


def in_a_thread_of_autograd(call: Callable[[], None], depth: int = DEPTH) -> None:
    Deeper.apply(torch.zeros((), requires_grad=True), call, depth).backward()


def here(call: Callable[[], None]) -> None:
    call()


@pytest.fixture(params=[("reference", "cpu"), ("cpu", "reference")], ids=" in a process of ".join)
def chosen(request, monkeypatch) -> str:
    """The backend of the block, where the process has chosen another one."""
    skip_unless_runnable("cpu", "cpu")
    monkeypatch.setattr(backends, "_process_choice", request.param[1])
    return request.param[0]


@pytest.fixture
def selected(monkeypatch) -> list[str]:
    """The backends that were selected, one for each call of a layer."""
    found, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda *kind: found.append(select(*kind)) or found[-1])
    return found


def test_the_thread_is_another_one():
    threads = []
    in_a_thread_of_autograd(lambda: threads.append(threading.get_ident()))
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@reentrant_or_not
@main_layers
def test_checkpoint(name, reentrant, chosen, selected):
    """backward() inside the block: the layer that is called again takes the choice of the block."""

    def step(where: Callable) -> dict[str, Tensor]:
        module, x = layer(name), batch(name).requires_grad_()
        torch.manual_seed(2)
        with aia_kernels.use_backend(chosen):
            y = checkpoint(module, x, use_reentrant=reentrant)
            where(lambda: y.backward(towards(y)))
        return left_by(module, x, y)

    assert_same_bits(step(in_a_thread_of_autograd), step(here))
    assert set(selected) == {chosen}


@reentrant_or_not
@pytest.mark.parametrize("where", [here, in_a_thread_of_autograd, in_new_threads])
def test_checkpoint_of_a_function_with_a_block(where, reentrant, chosen, selected):
    """backward() may then be called anywhere."""
    module, x = layer("CinST"), batch("CinST").requires_grad_()

    def function(x: Tensor) -> Tensor:
        with aia_kernels.use_backend(chosen):
            return module(x)

    y = checkpoint(function, x, use_reentrant=reentrant)
    where(lambda: y.backward(towards(y)))
    assert x.grad is not None
    assert selected == 2 * [chosen]


@pytest.mark.parametrize("where", [in_a_thread_of_autograd, in_new_threads])
@main_layers
def test_gradients_keep_to_the_backend_of_the_call(name, where, chosen, selected):
    """backward() outside the block."""

    def step(where: Callable) -> dict[str, Tensor]:
        module, x = layer(name), batch(name).requires_grad_()
        torch.manual_seed(2)
        with aia_kernels.use_backend(chosen):
            y = module(x)
        where(lambda: y.backward(towards(y)))
        return left_by(module, x, y)

    assert_same_bits(step(where), step(here))
    assert selected == 2 * [chosen]


@pytest.mark.parametrize("where", [in_a_thread_of_autograd, in_new_threads])
@main_layers
def test_second_gradients_keep_to_the_backend_of_the_call(name, where, chosen, selected):
    """Of float64, as autograd adds up in the order in which a thread has made the graph."""

    def step(where: Callable) -> dict[str, Tensor]:
        module, x = layer(name, torch.float64), batch(name, torch.float64).requires_grad_()
        torch.manual_seed(2)
        with aia_kernels.use_backend(chosen):
            y = module(x)
        grad_y = towards(y).requires_grad_()

        def backward() -> None:
            (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
            grad_x.square().sum().backward()

        where(backward)
        return left_by(module, x, y) | {"grad of grad_y": grad_y.grad}

    assert_close(step(where), step(here))
    assert selected == 2 * [chosen]


def test_blocks_in_a_thread_of_autograd(monkeypatch):
    monkeypatch.setattr(backends, "_process_choice", "triton")
    found = []

    def note() -> None:
        found.append(backends.chosen_backend())

    def enter_blocks() -> None:
        note()
        with aia_kernels.use_backend("cpu"):
            note()
            with aia_kernels.use_backend("auto"):
                note()
            note()
        note()

    with aia_kernels.use_backend("reference"):
        in_a_thread_of_autograd(enter_blocks)
    in_a_thread_of_autograd(enter_blocks)
    inside = ["cpu", "auto", "cpu"]
    assert found == ["reference", *inside, "reference", "triton", *inside, "triton"]


def test_blocks_of_tasks_that_take_turns(monkeypatch):
    """The first task leaves its block while the second is in its own: a block is its task's, and nothing stays."""
    monkeypatch.setattr(backends, "_process_choice", "triton")
    found = []
    tasks = [contextvars.copy_context() for _ in range(2)]
    blocks = [aia_kernels.use_backend(name) for name in ("reference", "cpu")]
    for task, block in zip(tasks, blocks, strict=True):
        task.run(block.__enter__)
    assert backends.chosen_backend() == "triton"
    assert [task.run(backends.chosen_backend) for task in tasks] == ["reference", "cpu"]
    for task, block in zip(tasks, blocks, strict=True):
        task.run(block.__exit__, None, None, None)
    in_a_thread_of_autograd(lambda: found.append(backends.chosen_backend()))
    assert found == ["triton"]
