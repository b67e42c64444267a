"""The choice of backend: who is chosen, who is refused and why, and that the chosen one is the one that runs."""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import skip_unless_runnable
from torch.utils._python_dispatch import TorchDispatchMode

import aia_kernels
from aia_kernels import Norm, backends, functional, schemas
from aia_kernels.algorithms.external_attention_passes import FUSED_PASSES, Passes
from aia_kernels.backends import choices, extension
from aia_kernels.backends.matmul_passes import MatmulPasses

X = torch.randn(4, 3, 4, 5)


class Recorder(TorchDispatchMode):
    """The operators that ran, but for views: on a GPU each is a launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def passes_of(recorder: Recorder) -> set[str]:
    """Names of the operators of this package that ran."""
    space, names = f"{schemas.NAMESPACE}::", recorder.names
    return {name.removeprefix(space) for name in names if name.startswith(space)}


def ran(backend: str) -> set[str]:
    module = aia_kernels.CinST(2)
    with Recorder() as recorder, backends.use_backend(backend):
        module(X.clone().requires_grad_()).sum().backward()
    return passes_of(recorder)


#: The CPU has all passes of a step as two, unless BN shares its statistics with other processes.
ALONE = {*schemas.UNIT_PASSES}


def test_the_chosen_backend_runs():
    assert ran("reference") == set()
    skip_unless_runnable("cpu", "cpu")
    assert ran("cpu") == ran("auto") == ALONE


@pytest.mark.parametrize("name", ["C", "ST", "CinST", "STinC", "STinC2"])
def test_nothing_runs_between_the_passes(name):
    """At small sizes calls are what a unit costs: one each way."""
    skip_unless_runnable("cpu", "cpu")
    module, x, grad_y = getattr(aia_kernels, name)(2), X.clone().requires_grad_(), torch.ones_like(X)
    y = module(x)
    y.backward(grad_y)
    module.zero_grad()
    x.grad = None
    with Recorder() as forward:
        y = module(x)
    with Recorder() as backward:
        y.backward(grad_y)
    module.eval()
    with Recorder() as evaluation, torch.no_grad():
        module(x)
    for recorder, count in ((forward, 1), (backward, 1), (evaluation, 1)):
        assert len(recorder.names) == count, recorder.names
        assert all(operator.startswith(f"{schemas.NAMESPACE}::") for operator in recorder.names)


def test_triton_runs_when_asked(monkeypatch):
    skip_unless_runnable("triton", "cpu")
    passes = backends.passes("triton", "attention_in_attention")
    calls = []
    original = passes.recalibrate
    monkeypatch.setattr(passes, "recalibrate", lambda *args: calls.append(args) or original(*args))
    with backends.use_backend("triton"), torch.no_grad():
        aia_kernels.C(2)(X[:, :2, :2, :2])
    assert len(calls) == 1


def test_auto_takes_the_reference_where_nothing_is_built(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, *_: None if name == "reference" else "it was not built")
    monkeypatch.setattr(backends, "_resolve", backends._resolve.__wrapped__)
    assert backends.select("cpu", torch.float32, "attention_in_attention") == "reference"
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for, but it was not built"):
        aia_kernels.C(2)(X)


def test_every_name_has_a_sentence_or_none():
    available = aia_kernels.available_backends()
    assert tuple(available) == backends.NAMES
    assert available["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in available.values())


def test_unknown_name():
    for choose in (aia_kernels.set_backend, lambda name: aia_kernels.use_backend(name).__enter__()):
        with pytest.raises(ValueError, match=r"unknown backend 'tpu'; expected one of: auto, reference, cpu"):
            choose("tpu")


def test_wrong_device_is_refused():
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' was asked for, but .* runs on cuda"):
        aia_kernels.C(2)(X)


def test_use_backend_is_for_this_thread_and_set_backend_for_all(monkeypatch):
    monkeypatch.setattr(backends, "_process_choice", "auto")
    seen = []
    with backends.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.chosen_backend()))
        thread.start()
        thread.join()
        assert backends.chosen_backend() == "reference"
    assert seen == ["auto"]
    backends.set_backend("reference")
    thread = threading.Thread(target=lambda: seen.append(backends.chosen_backend()))
    thread.start()
    thread.join()
    assert seen == ["auto", "reference"]


@pytest.mark.parametrize("takes", [True, False], ids=["takes a reference", "as torch 2.10"])
def test_the_choice_lives_as_long_as_torch_keeps_it(monkeypatch, takes):
    """A store that lets go of a reference later, whether or not it has taken one, gets one to let go of."""
    choice, kept, given = (threading.get_ident(), "cpu"), [], []

    def stash(_key, stashed):
        if takes:
            kept.append(stashed)

    monkeypatch.setattr(torch._C, "_stash_obj_in_tls", stash)
    monkeypatch.setattr(ctypes, "pythonapi", SimpleNamespace(Py_IncRef=given.append))
    backends._stash(*choice)
    assert kept + [of.value for of in given] == [choice]


def test_devices_are_chosen_for_one_by_one(monkeypatch):
    """Two GPUs of which the first has no kernels in the library, and of which only the second was measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("old", "new")[device.index])
    monkeypatch.setattr(choices, "measured_order", lambda name, *_: ("cuda",) if name == "new" else None)
    monkeypatch.setattr(extension, "cuda_reason", lambda index=None: "it has no kernels" if index == 0 else None)
    for name, answer in (("_triton_missing", None), ("_missing_passes", ()), ("_interpreted", False)):
        monkeypatch.setattr(backends, name, lambda *_, answer=answer: answer)
    for name in ("why_not", "_resolve"):
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))
    for device, expected in enumerate(("triton", "cuda")):
        current.append(device)
        for name in ("cuda", f"cuda:{device}"):
            assert backends.select(name, torch.float32, "attention_in_attention") == expected
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for, but it has no kernels"):
        backends.select("cuda:0", torch.float32, "attention_in_attention")
    assert backends.available_backends()["cuda"] is None


def test_environment_variable():
    code = "import aia_kernels.backends as b; print(b.chosen_backend())"
    for value, expected in (("reference", "reference"), ("", "auto")):
        environment = {**os.environ, "AIA_KERNELS_BACKEND": value}
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected
    environment["AIA_KERNELS_BACKEND"] = "tpu"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "unknown backend 'tpu'" in found.stderr


def ran_external(backend: str) -> set[str]:
    x, key, value = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(6, 3), torch.randn(3, 6)
    with Recorder() as recorder, aia_kernels.use_backend(backend):
        functional.external_attention_block(x, key, value, Norm(training=True)).sum().backward()
    return passes_of(recorder)


def test_the_chosen_backend_runs_external_attention():
    assert ran_external("reference") == set()
    skip_unless_runnable("cpu", "cpu", "external_attention")
    assert ran_external("cpu") == ran_external("auto") == set(schemas.DOUBLE_NORM_PASSES + schemas.RESIDUAL_PASSES)


def test_a_backend_that_lacks_a_family_says_so_and_keeps_the_other(monkeypatch):
    missing = {"external_attention": ("double_norm_",)}
    monkeypatch.setattr(backends, "_missing_passes", lambda _key, family: missing.get(family, ()))
    for name in ("why_not", "_resolve"):
        monkeypatch.setattr(backends, name, getattr(backends, name).__wrapped__)
    skip_unless_runnable("cpu", "cpu")
    assert aia_kernels.available_backends("attention_in_attention")["cpu"] is None
    for family in ("external_attention", None):
        assert "passes of external_attention" in aia_kernels.available_backends(family)["cpu"]
    assert backends.select("cpu", torch.float32, "external_attention") == "reference"
    with (
        backends.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' was asked for, but .* yet: double_norm_"),
    ):
        functional.double_normalize(torch.randn(5, 4))


def signatures(passes) -> dict[str, inspect.Signature]:
    """Those of the fused passes of a class or a module, as their caller sees them."""
    found = {}
    for name in FUSED_PASSES:
        signature = inspect.signature(getattr(passes, name))
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        found[name] = signature.replace(parameters=parameters)
    return found


def test_every_compiled_backend_has_every_fused_pass():
    """With the names, the order, the kinds, the defaults and the types that the contract says."""
    assert signatures(MatmulPasses) == signatures(Passes)
    skip_unless_runnable("triton", "cpu", "external_attention")
    assert signatures(backends.passes("triton", "external_attention")) == signatures(Passes)


def test_unknown_family():
    with pytest.raises(ValueError, match="'convolution', expected one of attention_in_attention, external_attention"):
        aia_kernels.available_backends("convolution")
