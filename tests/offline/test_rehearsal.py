"""The CUDA backend on devices that are not there: streams, devices, memory, clusters; and faults that must be seen.

`make rehearse-cuda` runs these with a torch that is built for CUDA. What a fault changes is looked for everywhere.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import external_cases
import pytest
import rehearsal
import torch
from conftest import ROOT
from external_cases import SIZES
from rehearsal import faults
from rehearsal.build import FULL_SIZE, LIBRARY
from torch import Tensor, nn

import aia_kernels
from aia_kernels.reference import UNITS
from aia_kernels.testing import Shape, make_input, randomise

rehearsed = pytest.mark.skipif(
    "rehearsal.installed" not in sys.modules, reason="make rehearse-cuda runs it, with a torch that is built for CUDA"
)

SHAPE = Shape(2, 4, 8, 6, 8)
FORMS = [form for form in external_cases.FORMS if form != "dropout"]


def layer_of(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, x, and a gradient of y, on the CPU."""
    if name in UNITS:
        module = randomise(getattr(aia_kernels, name)(SHAPE.t))
        return module, *(make_input(SHAPE, torch.float32, seed=seed) for seed in (0, 1))
    sizes = SIZES["one sample"]
    module = external_cases.make(name, sizes, torch.float32)
    x = external_cases.make_input(name, sizes, torch.float32)
    return module, x, external_cases.make_grad(name, sizes, torch.float32)


def training_step(module: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of x and of the parameters."""
    x.requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), grad_y)]


def step(module: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """A training step, and y in evaluation."""
    found = training_step(module, x, grad_y)
    with torch.no_grad():
        return [*found, copy.deepcopy(module).eval()(x)]


class Where(NamedTuple):
    device: int = 0
    side: bool = False
    current: int = 0


WHERE = {
    "default stream": Where(),
    "side stream": Where(side=True),
    "device 1": Where(1, current=1),
    "device 1, the other current": Where(1),
    "side stream of device 1, the other current": Where(1, True),
}


@pytest.fixture
def on_cuda():
    """The cuda backend, and memory from torch's pools, so that no free waits for a device."""
    torch.cuda.memory.caching_allocator_enable(True)
    with aia_kernels.use_backend("cuda"):
        yield


@rehearsed
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("name", [*UNITS, *FORMS])
def test_where(name, where):
    """A step launches on the current stream of its tensors' device, whichever device is current."""
    module, x, grad_y = layer_of(name)
    with aia_kernels.use_backend("reference"):
        expected = step(copy.deepcopy(module), x.clone(), grad_y)
    device = torch.device("cuda", where.device)
    module, x, grad_y = module.to(device), x.to(device), grad_y.to(device)
    stream = torch.cuda.Stream(device) if where.side else torch.cuda.default_stream(device)
    torch.cuda.synchronize(device)
    rehearsal.launches()
    with torch.cuda.stream(stream), torch.cuda.device(where.current):  # the former makes its device current
        found = step(module, x, grad_y)
    stream.synchronize()
    launches = rehearsal.launches()
    elsewhere = [one for one in launches if (one.device, one.stream) != (where.device, rehearsal.stream_number(stream))]
    assert launches and not elsewhere, f"launches on another stream or device: {elsewhere}"
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max())), "not those of the reference"


@rehearsed
@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("name", [name for name in UNITS if name != "STinC2"])  # it calls torch between its passes
def test_nothing_waits(name):
    """A training step only queues its launches."""
    module, x, grad_y = (value.cuda() for value in layer_of(name))
    torch.cuda.synchronize()
    rehearsal.launches()
    found = training_step(module, x, grad_y)
    waiting, launches = rehearsal.waiting(), len(rehearsal.launches())
    assert found and waiting >= launches > 0, f"{waiting} of {launches} launches wait"


@rehearsed
@pytest.mark.parametrize("name", [*UNITS, *FORMS])
def test_memory(name):
    """Steps leave no memory behind."""
    module, x, grad_y = (value.cuda() for value in layer_of(name))
    with aia_kernels.use_backend("cuda"):
        step(module, x, grad_y)
        gc.collect()
        before = rehearsal.used_bytes()
        for _ in range(3):
            step(module, x, grad_y)
        gc.collect()
    more = rehearsal.used_bytes() - before
    assert more == 0, f"{more} bytes more after three steps"


@rehearsed
@pytest.mark.parametrize("name", UNITS)
def test_guards(name):
    """A step with memory of which every byte is looked at; the plugin fails a test where the runtime complains."""
    module, x, grad_y = (value.cuda() for value in layer_of(name))
    with aia_kernels.use_backend("cuda"):
        step(module, x, grad_y)


@rehearsed
@pytest.mark.parametrize("name", ["C", "ST", "CinST", "STinC"])
def test_clusters(name):
    """A size of ResNet's last stage is evaluated in one launch in clusters, with more shared memory than by default."""
    module = randomise(getattr(aia_kernels, name)(8)).eval()
    x = torch.randn(8, 512, 7, 7)
    with torch.no_grad():
        with aia_kernels.use_backend("reference"):
            expected = module(x)
        module, x = module.cuda(), x.cuda()
        rehearsal.launches()
        with aia_kernels.use_backend("cuda"):
            y = module(x)
    (launch,) = rehearsal.launches()
    assert launch.cluster > 1 and launch.dynamic > 48 << 10
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


#: Inputs of ResNet's stages: 8 clips of 8 frames.
STAGES = (Shape(8, 8, 64, 56, 56), Shape(8, 8, 128, 28, 28), Shape(8, 8, 256, 14, 14), Shape(8, 8, 512, 7, 7))


@pytest.mark.skipif("AIA_REHEARSAL_RECORD" not in os.environ, reason="test_full_size runs it")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", STAGES, ids=lambda shape: f"{shape.c}x{shape.h}x{shape.w}")
@pytest.mark.parametrize("name", UNITS)
def test_launches_of_full_size(name, shape, dtype, layout):
    """Nothing runs: the plugin fails a test where an H100 would refuse a launch."""
    module = randomise(getattr(aia_kernels, name)(shape.t)).to("cuda", dtype)
    x = make_input(shape, dtype, layout).cuda()
    with aia_kernels.use_backend("cuda"):
        step(module, x, torch.empty_like(x))
    assert {launch.ran for launch in rehearsal.launches()} == {False}


def outcome_of(library: Path, test: str, **environment: str) -> subprocess.CompletedProcess:
    """Tests of this file, as pytest's -k takes them, with a library in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "rehearsal.plugin", __file__]
    environment |= {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["AIA_REHEARSAL_LIBRARY"] = str(library)
    return subprocess.run(
        [*command, "-k", test], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@rehearsed
def test_full_size():
    """The launches of networks' sizes, by kernels with a GPU's numbers of blocks and threads."""
    result = outcome_of(FULL_SIZE, "test_launches_of_full_size", AIA_REHEARSAL_RECORD="1")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@rehearsed
@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault_is_seen(name):
    fault = faults.FAULTS[name]
    result = outcome_of(faults.folder_of(name) / LIBRARY, fault.test)
    assert result.returncode == 1 and fault.words in result.stdout, result.stdout + result.stderr


def test_faults_are_still_faults():
    """The texts that they change are in the sources."""
    if not (ROOT / "csrc").exists():
        pytest.skip("the sources are not here, only the package")
    assert all(fault.text() for fault in faults.FAULTS.values())
