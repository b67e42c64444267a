"""Gloo processes: DDP, SyncBatchNorm and tokens in shards give the numbers of one process with the whole.

One group of processes of each size does everything: starting them costs more than what they compute. Where one of
them fails, its traceback names the work.
"""

from __future__ import annotations

import copy
import itertools

import external_cases
import pytest
import torch
import torch.distributed as dist
from external_cases import FORMS, Sizes
from processes import WORLD, launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import aia_kernels
from aia_kernels import backends, functional, testing
from aia_kernels.reference import UNITS
from aia_kernels.testing import Shape, make_input, randomise

SHAPE = Shape(5, 3, 4, 5, 3)
# float64 sums in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo process groups"
)


def clips_of(rank: int, tensor: torch.Tensor, split: int) -> torch.Tensor:
    """The frames of a rank: the first ``split`` clips go to rank 0, the others to rank 1."""
    return tensor[: split * SHAPE.t] if rank == 0 else tensor[split * SHAPE.t :]


def joint(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x, grad_y = (make_input(SHAPE, torch.float64, seed=seed) for seed in (0, 1))
    return randomise(getattr(aia_kernels, name)(SHAPE.t)).double(), x, grad_y


def synchronized(rank: int, name: str, backend: str, split: int, compiled: bool = False) -> None:
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


def every_synchronized_case(rank: int, backend: str) -> None:
    for name in UNITS:
        for split in (3, 1):
            synchronized(rank, name, backend, split)
    if backend != "reference":  # torch does not trace the differentiable all_reduce of the reference
        synchronized(rank, "CinST", backend, 3, compiled=True)


def data_parallel(rank: int, backend: str) -> None:
    module, x, grad_y = joint("STinC")
    module.eval()  # fixed statistics: the joint batch is then the sum of its parts
    expected = testing.run(copy.deepcopy(module), x, grad_y, "reference")
    wrapped = DistributedDataParallel(module)
    with backends.use_backend(backend):
        wrapped(clips_of(rank, x, 3)).backward(clips_of(rank, grad_y, 3))
    for key, p in module.named_parameters():
        torch.testing.assert_close(WORLD * p.grad, expected[f"grad {key}"], **EXACT)


def refuses_an_empty_batch(rank: int, backend: str) -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(aia_kernels.C(2))
    with pytest.raises(ValueError, match="expected a batch"):
        module(torch.randn(0, 3, 4, 5))


SHARDS = {2: (9, 4), 3: (2, 10, 1)}


def assert_agree(found: dict, expected: dict, told: str) -> None:
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], **EXACT, msg=lambda m, key=key: f"{told}, {key}: {m}")


def sharded(rank: int, form: str, backend: str, lengths: tuple[int, ...], masked: bool, compiled: bool = False) -> None:
    """The rank's tokens alone, beside the same tokens of the whole."""
    sizes = Sizes(2, 1, 13, 6, 8)
    kind, settings = FORMS[form]
    mask = torch.zeros(2, 13, dtype=torch.bool)
    if masked:
        mask[0, 7:] = mask[1, :2] = True  # of some shards every token
    x, grad = external_cases.make_input(form, sizes), external_cases.make_grad(form, sizes)
    whole = testing.randomise(kind(sizes, padding_mask=mask, **settings)).double()
    expected = testing.run(whole, x, grad, "reference")
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    shard = testing.randomise(kind(sizes, padding_mask=mask[:, own], **settings)).double()
    shard.settings["process_group"] = dist.group.WORLD
    leaf = x[:, own].clone().requires_grad_()
    with backends.use_backend(backend):
        call = torch.compile(shard, fullgraph=True, backend="aot_eager") if compiled else shard
        y = call(leaf)
        y.backward(grad[:, own])
    told = f"rank {rank} of {lengths}, {form}, masked {masked}"
    assert_agree({"y": y.detach(), "grad x": leaf.grad}, {k: expected[k][:, own] for k in ("y", "grad x")}, told)
    for p in shard.parameters():
        dist.all_reduce(p.grad)
    assert_agree({f"grad {key}": p.grad for key, p in shard.named_parameters()}, expected, told)


def every_sharded_case(rank: int, backend: str) -> None:
    lengths = SHARDS[dist.get_world_size()]
    forms = [form for form in FORMS if form not in ("block", "dropout")]
    # A third member changes the exchange alone, not what is done with its results.
    for form in forms if len(lengths) == WORLD else ("normalize in groups", "shared heads"):
        for masked in (False, True):
            sharded(rank, form, backend, lengths, masked)
    if backend != "reference":
        sharded(rank, "groups", backend, lengths, True, compiled=True)


def in_shares(
    rank: int, module: nn.Module, x: torch.Tensor, grad: torch.Tensor, backend: str, split: int, compiled: bool
) -> None:
    """A step on the own share of a batch, with SyncBatchNorm, gives what the reference gives of the whole."""
    expected = testing.run(module, x, grad, "reference")
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    own = slice(0, split) if rank == 0 else slice(split, None)
    leaf = x[own].clone().requires_grad_()
    with backends.use_backend(backend):
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
        y = call(leaf)
        y.backward(grad[own])
    told = f"rank {rank}, {split} samples on rank 0"
    assert_agree({"y": y.detach(), "grad x": leaf.grad}, {k: expected[k][own] for k in ("y", "grad x")}, told)
    for p in module.parameters():
        dist.all_reduce(p.grad)
    found = {f"grad {key}": p.grad for key, p in module.named_parameters()}
    assert_agree(found | {key: b for key, b in module.named_buffers() if b.is_floating_point()}, expected, told)


def synchronized_block(rank: int, backend: str, split: int, activation: str = "relu", compiled: bool = False) -> None:
    sizes = Sizes(5, 3, 4, 6, 8)
    x, grad = external_cases.make_input("block", sizes), external_cases.make_grad("block", sizes)
    module = external_cases.make("block", sizes)
    module.activation = activation
    in_shares(rank, module, x, grad, backend, split, compiled)


def every_synchronized_block(rank: int, backend: str) -> None:
    for split in (3, 1):
        synchronized_block(rank, backend, split)
    synchronized_block(rank, backend, 3, "gelu")
    if backend != "reference":
        synchronized_block(rank, backend, 3, compiled=True)


def synchronized_gates(rank: int, backend: str, split: int = 3, compiled: bool = False) -> None:
    """CBAM, whose spatial gate shares the statistics of its batch."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 6, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    module = randomise(aia_kernels.CBAM(6, 2)).double()
    in_shares(rank, module, x, grad, backend, split, compiled)


def every_synchronized_gate(rank: int, backend: str) -> None:
    for split in (3, 1):
        synchronized_gates(rank, backend, split)
    if backend != "reference":
        synchronized_gates(rank, backend, 3, compiled=True)


def refuses_an_empty_shard(rank: int, backend: str) -> None:
    with pytest.raises(ValueError, match="a token on every member of process_group"):
        functional.double_normalize(torch.randn(2, 0, 4), process_group=dist.group.WORLD)


def sharded_memory(rank: int, backend: str) -> None:
    """Tokens in shards of 5 and 2: y, the gradients of the shard, and the sum of those of the parameters."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    shapes = {"query": (4, 6), "key": (4, 6), "value": (6, 6), "query_bias": (4,), "key_bias": (4,), "value_bias": (6,)}
    mask = torch.tensor([[0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    own = slice(0, 5) if rank == 0 else slice(5, 7)
    for feature, masked in itertools.product(("l2", "softplus", "softmax"), (False, True)):
        softmax = feature == "softmax"
        all_shapes = shapes | ({"reprojection": (6, 6)} if softmax else {"gamma": (1,)})
        tensors = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in all_shapes.items()}
        function = functional.efficient_attention if softmax else functional.linear_attention
        settings = {} if softmax else {"feature": feature}

        def step(x, grad, mask, function=function, settings=settings, tensors=tensors, **group):
            leaves = {"x": x} | tensors
            leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
            own = {name: t for name, t in leaves.items() if not name.endswith("_bias")}
            biases = [leaves.get(f"{name}_bias") for name in ("query", "key", "value", "reprojection")]
            biases = biases if "reprojection" in own else biases[:3]
            y = function(**own, biases=biases, heads=2, padding_mask=mask, **settings, **group)
            y.backward(grad)
            return y.detach(), {name: t.grad for name, t in leaves.items()}

        with backends.use_backend("reference"):
            y, grads = step(x, grad, mask if masked else None)
        with backends.use_backend(backend):
            shard_mask = mask[:, own] if masked else None
            found, of_shard = step(x[:, own], grad[:, own], shard_mask, process_group=dist.group.WORLD)
        told = f"rank {rank}, {feature}, masked {masked}"
        assert_agree({"y": found, "x": of_shard.pop("x")}, {"y": y[:, own], "x": grads.pop("x")[:, own]}, told)
        for p in of_shard.values():
            dist.all_reduce(p)
        assert_agree(of_shard, grads, told)


WORK = {
    "attention_in_attention": (every_synchronized_case, data_parallel, refuses_an_empty_batch),
    "cbam": (every_synchronized_gate,),
    "external_attention": (every_sharded_case, every_synchronized_block, refuses_an_empty_shard),
    "linear_attention": (sharded_memory,),
}


def test_two_processes(tmp_path):
    launch(tmp_path, WORK)


def test_three_processes(tmp_path):
    launch(tmp_path, {"external_attention": (every_sharded_case,)}, world=3)
