"""Two gloo processes: DDP and SyncBatchNorm give the numbers of one process with the joint batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import skip_unless_runnable
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import aia_kernels
from aia_kernels import backends, testing
from aia_kernels.reference import UNITS
from aia_kernels.testing import Shape, make_input, randomise

SHAPE = Shape(5, 3, 4, 5, 3)
WORLD = 2
# float64 sums in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo process groups"
)


def clips_of(rank: int, tensor: torch.Tensor, split: int) -> torch.Tensor:
    """The frames of a rank: the first ``split`` clips go to rank 0, the others to rank 1."""
    return tensor[: split * SHAPE.t] if rank == 0 else tensor[split * SHAPE.t :]


def start(rank: int, store: str, work, *arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    work(rank, *arguments)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def launch(tmp_path, work, *arguments) -> None:
    mp.spawn(start, (str(tmp_path / "store"), work, *arguments), nprocs=WORLD)


def joint(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x, grad_y = (make_input(SHAPE, torch.float64, seed=seed) for seed in (0, 1))
    return randomise(getattr(aia_kernels, name)(SHAPE.t)).double(), x, grad_y


def synchronised(rank: int, name: str, backend: str, split: int, compiled: bool = False) -> None:
    module, x, grad_y = joint(name)
    expected = testing.run(module, x, grad_y, "reference")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    leaf = clips_of(rank, x, split).clone().requires_grad_()
    with backends.use_backend(backend):
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        y = call(leaf)
        y.backward(clips_of(rank, grad_y, split))
    found = {"y": y.detach(), "grad x": leaf.grad}
    local = {key: clips_of(rank, expected[key], split) for key in found}
    for key, p in module.named_parameters():
        dist.all_reduce(p.grad)
        found[f"grad {key}"], local[f"grad {key}"] = p.grad, expected[f"grad {key}"]
    for key, b in module.named_buffers():
        if b.is_floating_point():
            found[key], local[key] = b, expected[key]
    for key, value in found.items():
        told = f"rank {rank}, {name}, {split} clips on rank 0, {key}"
        torch.testing.assert_close(value, local[key], **EXACT, msg=lambda m, told=told: f"{told}: {m}")


def every_synchronised_case(rank: int, backend: str) -> None:
    """All in one pair of processes: starting one costs more than what it computes."""
    for name in UNITS:
        for split in (3, 1):
            synchronised(rank, name, backend, split)
    if backend != "reference":  # torch does not trace the differentiable all_reduce of the reference
        synchronised(rank, "CinST", backend, 3, compiled=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_synchronised_batch_norm_equals_the_joint_batch(backend, tmp_path):
    skip_unless_runnable(backend, "cpu")
    launch(tmp_path, every_synchronised_case, backend)


def data_parallel(rank: int, backend: str) -> None:
    module, x, grad_y = joint("STinC")
    module.eval()  # fixed statistics: the joint batch is then the sum of its parts
    expected = testing.run(copy.deepcopy(module), x, grad_y, "reference")
    wrapped = DistributedDataParallel(module)
    with backends.use_backend(backend):
        wrapped(clips_of(rank, x, 3)).backward(clips_of(rank, grad_y, 3))
    for key, p in module.named_parameters():
        torch.testing.assert_close(WORLD * p.grad, expected[f"grad {key}"], **EXACT)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_distributed_data_parallel(backend, tmp_path):
    skip_unless_runnable(backend, "cpu")
    launch(tmp_path, data_parallel, backend)


def refuses_an_empty_batch(rank: int) -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(aia_kernels.C(2))
    with pytest.raises(ValueError, match="expected a batch"):
        module(torch.randn(0, 3, 4, 5))


def test_empty_batch_under_synchronised_batch_norm_is_refused(tmp_path):
    launch(tmp_path, refuses_an_empty_batch)
