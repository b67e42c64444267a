"""The promises of README for external attention's layers; those of its functions stand in test_promises_*.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from agreement import EXACT, assert_forward_mode, assert_grad_and_vmap, assert_same, assert_within_budget
from conftest import some_of
from external_layers import MAIN, inputs, layer, step
from kept_memory import kept_bytes
from processes import WORLD, launch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aia_kernels import ExternalAttention2d, backends, testing


class TestPromises:
    """The promises of README, for the layers; those of the functions have files of their own."""

    @pytest.mark.parametrize("name", MAIN)
    def test_autocast(self, name, backend_on):
        """Parameters in float32, activations in either type; gradients have the type of their leaves."""
        backend, device = backend_on
        module = layer(name, torch.float32, device)
        for dtype in (torch.float32, torch.bfloat16):
            x, grad_y = inputs(name, dtype, device)
            with torch.autocast(device, torch.bfloat16):
                y = module(x)
                results = testing.run(module, x, grad_y.to(y.dtype), backend)
                assert_within_budget(testing.compare(module, x, grad_y.to(y.dtype), backend, low=module))
            assert y.dtype == (dtype if name == "block" else torch.bfloat16)
            assert results["grad x"].dtype == dtype
            assert {value.dtype for key, value in results.items() if key not in ("y", "grad x")} == {torch.float32}

    # What the plain layer and the block are made of has tests of its own in test_promises_compile.py.
    @some_of("name", MAIN, "multi-head")
    def test_full_graph_with_dynamic_batch(self, name, traced_on):
        torch._dynamo.reset()
        module = layer(name, device=traced_on[1])
        expected = copy.deepcopy(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for batch in (2, 3, 5):
            x, grad_y = inputs(name, device=traced_on[1], batch=batch)
            found = {key.replace("_orig_mod.", ""): value for key, value in step(compiled, x, grad_y).items()}
            assert_same(found, step(expected, x, grad_y))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
        torch._dynamo.reset()

    @some_of("name", MAIN)
    def test_inductor(self, name, traced_on):
        torch._dynamo.reset()
        module = layer(name, device=traced_on[1])
        expected = copy.deepcopy(module)
        x, grad_y = inputs(name, device=traced_on[1])
        found = step(torch.compile(module, fullgraph=True), x, grad_y)
        found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
        assert_same(found, step(expected, x, grad_y))
        torch._dynamo.reset()

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    @pytest.mark.parametrize("name", MAIN)
    def test_exported(self, name, strict, backend_on):
        module = layer(name, device=backend_on[1])
        batch = torch.export.Dim("batch", max=64)
        example = inputs(name, device=backend_on[1])[:1]
        program = torch.export.export(copy.deepcopy(module), example, dynamic_shapes=({0: batch},), strict=strict)
        x, grad_y = inputs(name, device=backend_on[1], batch=3, seed=1)
        assert_same(step(program.module(), x, grad_y), step(module, x, grad_y))

    @pytest.mark.parametrize("name", MAIN)
    def test_functorch(self, name, backend_on):
        module = layer(name, device=backend_on[1]).eval()
        xs = torch.stack([inputs(name, device=backend_on[1], seed=seed)[0] for seed in range(3)])
        assert_grad_and_vmap(module, xs)

    @pytest.mark.parametrize("name", MAIN)
    def test_forward_mode(self, name, backend_on):
        assert_forward_mode(layer(name, device=backend_on[1]).eval(), *inputs(name, device=backend_on[1]))

    @pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
    @pytest.mark.parametrize("name", [*MAIN, "dropout"])
    def test_checkpoint(self, name, reentrant, backend_on):
        """The bits of the plain step; with dropout, the same mask in the second forward."""
        _, device = backend_on
        module = layer("multi-head" if name == "dropout" else name, torch.float32, device)
        if name == "dropout":
            module.attn_drop.p = module.proj_drop.p = 0.4
        other = copy.deepcopy(module)
        x, grad_y = inputs("multi-head" if name == "dropout" else name, torch.float32, device)
        other_x = x.clone().requires_grad_()
        torch.manual_seed(3)
        expected = step(module, x, grad_y)
        torch.manual_seed(3)
        checkpoint(other, other_x, use_reentrant=reentrant).backward(grad_y)
        assert torch.equal(expected["grad x"], other_x.grad)
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", MAIN)
    def test_same_bits_twice(self, name, dtype, compiled_on):
        backend, device = compiled_on
        module = layer(name, dtype, device)
        x, grad_y = inputs(name, dtype, device)
        first, second = (testing.run(module, x, grad_y, backend) for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), key

    # The target: 1.6 |X| in float32. The published flow keeps the inputs of two convolutions, BN and ReLU: over 4 |X|.
    @pytest.mark.parametrize("sizes", [(1, 512, 65, 65), (4, 512, 32, 32)], ids=str)
    def test_bytes_that_the_block_keeps_for_backward(self, sizes, compiled_on):
        module = ExternalAttention2d(512).to(compiled_on[1])
        x = torch.randn(sizes, device=compiled_on[1], requires_grad=True)
        assert kept_bytes(module, x) < 1.6 * x.numel() * x.element_size()

    @pytest.mark.parametrize("name", MAIN)
    def test_nothing_is_kept_without_gradients(self, name, backend_on):
        module = layer(name, device=backend_on[1]).requires_grad_(False)
        assert module(inputs(name, device=backend_on[1])[0]).grad_fn is None


def joint_block() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    module = layer("block")
    x, grad_y = inputs("block", batch=5)
    return module, x, grad_y


def synchronized(rank: int, backend: str) -> None:
    """Uneven shards of a batch on two processes against the whole batch on one, folded and compiled."""
    for split, compiled in ((3, False), (1, False), (3, True)):
        if compiled and backend == "reference":
            continue  # torch does not trace the differentiable all_reduce of the reference
        module, x, grad_y = joint_block()
        expected = testing.run(module, x, grad_y, "reference")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        mine = slice(0, split) if rank == 0 else slice(split, None)
        leaf = x[mine].clone().requires_grad_()
        with backends.use_backend(backend):
            call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
            y = call(leaf)
            y.backward(grad_y[mine])
        torch.testing.assert_close(y, expected["y"][mine], **EXACT)
        torch.testing.assert_close(leaf.grad, expected["grad x"][mine], **EXACT)
        for key, p in module.named_parameters():
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, expected[f"grad {key}"], **EXACT)
        for key, b in module.named_buffers():
            if b.is_floating_point():
                torch.testing.assert_close(b, expected[key], **EXACT)


def data_parallel(rank: int, backend: str) -> None:
    """DistributedDataParallel finds every parameter used, those without effect too."""
    for name in MAIN:
        module = layer(name).eval()  # fixed statistics: the joint batch is then the sum of its parts
        x, grad_y = inputs(name, batch=4)
        expected = testing.run(module, x, grad_y, "reference")
        wrapped = nn.parallel.DistributedDataParallel(module)
        with backends.use_backend(backend):
            for _ in range(2):  # a parameter that was left out would be missed at the second step
                module.zero_grad()
                wrapped(x[2 * rank : 2 * rank + 2]).backward(grad_y[2 * rank : 2 * rank + 2])
        for key, p in module.named_parameters():
            torch.testing.assert_close(WORLD * p.grad, expected[f"grad {key}"], **EXACT)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_two_processes(tmp_path):
    launch(tmp_path, {"external_attention": (synchronized, data_parallel)})
