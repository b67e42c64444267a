"""Layers in two gloo processes: DDP, FSDP2 and DTensor give the numbers of one process with the whole batch.

One pair of processes does everything: starting them costs more than what they compute. Each piece of work reports under
its own name, so that a failure names the use and the layer.
"""

from __future__ import annotations

import copy
import datetime
import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from uses_layers import CLIPS, EXACT, LAYERS, WITHOUT_DROPOUT, layer, left_by, towards

import aia_kernels
from aia_kernels import functional

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo process groups", allow_module_level=True)

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

WORLD = 2
DOUBLE = torch.float64


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


@functools.cache
def mesh_of_two_axes() -> DeviceMesh:
    return init_device_mesh("cpu", (1, WORLD))


def spread(x: Tensor, *placements, on: DeviceMesh | None = None) -> Tensor:
    return distribute_tensor(x.detach(), on or mesh(), placements)


def replicated(module: nn.Module, on: DeviceMesh | None = None) -> nn.Module:
    return distribute_module(copy.deepcopy(module), on or mesh())


def whole(name: str, samples: int = 4) -> Tensor:
    """A batch of so many samples, each of some frames for layers on clips."""
    of = LAYERS[name]
    frames = 3 if len(of.sizes) == 4 and of.sizes[0] == 6 else 1
    x = torch.randn((samples * frames, *of.sizes[1:]), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    return of.stored(x)


def own(rank: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(WORLD)[rank]


def plain(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A step of a copy in one process."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    y = module(x)
    y.backward(towards(y))
    return left_by(module, x, y)


def assert_close(found: Tensor, expected: Tensor, key: str) -> None:
    torch.testing.assert_close(found, expected, **EXACT, msg=lambda m: f"{key}: {m}")


def assert_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, key)


def with_loose_end(name: str) -> nn.Module:
    """The layer, and a parameter that takes no part where DDP is to find it."""
    module = layer(name, DOUBLE).eval()
    module.loose = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
    return module


DDP = {
    "as it comes": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def data_parallel(rank: int, name: str, settings: dict) -> None:
    """In evaluation, where a batch is the sum of its parts; three steps, as a static graph is what the first was."""
    unused = settings.get("find_unused_parameters")
    module = with_loose_end(name) if unused else layer(name, DOUBLE).eval()
    expected = plain(module, x := whole(name))
    grad_y = own(rank, towards(expected["y"]))
    wrapped = DistributedDataParallel(module, **settings)
    for _ in range(3):
        wrapped.zero_grad()
        leaf = own(rank, x).detach().requires_grad_()
        y = wrapped(leaf)
        y.backward(grad_y)
        assert_close(y, own(rank, expected["y"]), "y")
        assert_close(leaf.grad, own(rank, expected["grad x"]), "grad x")
        for key, p in module.named_parameters():
            if key != "loose":
                assert_close(WORLD * p.grad, expected[f"grad {key}"], key)


class Network(nn.Module):
    """Two of a layer, one after the other where y fits, with a scale between: what FSDP wraps."""

    def __init__(self, name: str):
        super().__init__()
        self.first = layer(name, DOUBLE).eval()
        self.scale = nn.Parameter(torch.full((1,), 0.5, dtype=DOUBLE))
        self.second = layer(name, DOUBLE).eval() if not name.startswith(("Token", "CaaM")) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale)


FSDP = {"FSDP2": {}, "FSDP2, offloaded": {"offload": True}, "FSDP2, checkpointed": {"checkpointed": True}}


def fully_sharded(rank: int, name: str, offload: bool = False, checkpointed: bool = False) -> None:
    """Parameters in shards, gathered around each layer; offload: the shards live on the CPU."""

    network = Network(name)
    expected = plain(network, x := whole(name))
    if checkpointed:
        kinds = type(network.first), type(network.second)
        apply_activation_checkpointing(network, check_fn=lambda m: isinstance(m, kinds) and m is not network)
    policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    for module in (network.first, network.second, network):
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh(), offload_policy=policy)
    for _ in range(2):
        network.zero_grad()
        leaf = own(rank, x).detach().requires_grad_()
        y = network(leaf)
        y.backward(own(rank, towards(expected["y"])))
        assert_close(y, own(rank, expected["y"]), "y")
        assert_close(leaf.grad, own(rank, expected["grad x"]), "grad x")
        for key, p in network.named_parameters():
            key = key.replace("_checkpoint_wrapped_module.", "")
            assert_close(WORLD * p.grad.full_tensor(), expected[f"grad {key}"], key)


def gathered(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {key: t if t is None else t.detach().full_tensor() for key, t in left_by(module, x, y).items()}


def distributed(rank: int, name: str, train: bool, placement, samples: int = 4) -> None:
    """Batch norms in training have the statistics of all samples, and move by them."""
    module = layer(name, DOUBLE).train(train)
    expected = plain(module, x := whole(name, samples))
    module, x = replicated(module), spread(x, placement).requires_grad_()
    y = module(x)
    assert y.placements == x.placements and y.shape == expected["y"].shape
    y.backward(spread(towards(expected["y"]), Replicate()))  # as the gradients of sums come
    assert x.grad.placements == x.placements
    assert_step(gathered(module, x, y), expected)


def through_the_reference(rank: int, name: str) -> None:
    with aia_kernels.use_backend("reference"):
        distributed(rank, name, True, Shard(0))


def on_two_axes(rank: int, name: str) -> None:
    """One axis of the mesh holds replicas, the other shards."""
    module = layer(name, DOUBLE)
    expected = plain(module, x := whole(name))
    placed = {"on": mesh_of_two_axes()}
    module, x = replicated(module, **placed), spread(x, Replicate(), Shard(0), **placed).requires_grad_()
    y = module(x)
    y.backward(spread(towards(expected["y"]), Replicate(), Shard(0), **placed))
    assert_step(gathered(module, x, y), expected)


def without_running_statistics(rank: int, name: str) -> None:
    """Norms that use their batch in evaluation too: the whole batch there as well."""
    module = layer(name, DOUBLE).eval()
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    expected = plain(module, x := whole(name))
    module, x = replicated(module), spread(x, Shard(0)).requires_grad_()
    y = module(x)
    y.backward(spread(towards(expected["y"]), Shard(0)))
    assert_step(gathered(module, x, y), expected)


def synchronized(rank: int, name: str) -> None:
    """A network converted for SyncBatchNorm: the mesh says who shares, and each sample counts once."""
    module = layer(name, DOUBLE)
    expected = plain(module, x := whole(name))
    for placement in (Shard(0), Replicate()):
        other = replicated(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)))
        shards = spread(x, placement).requires_grad_()
        y = other(shards)
        y.backward(spread(towards(expected["y"]), Shard(0)))
        assert_step(gathered(other, shards, y), expected)


def with_hooks(rank: int, name: str) -> None:
    """Submodules that must be called are torch's own on DTensors, and the layer around them has the same numbers."""
    module = layer(name, DOUBLE)
    expected = plain(module, x := whole(name))
    module, x = replicated(module), spread(x, Shard(0)).requires_grad_()
    seen = []
    next(module.children()).register_forward_hook(lambda *_: seen.append(1))
    y = module(x)
    y.backward(spread(towards(expected["y"]), Shard(0)))
    assert seen
    assert_step(gathered(module, x, y), expected)


def among_others(rank: int, name: str) -> None:
    """Between operations of torch's own, and a loss whose gradient DTensor places as it likes."""
    module = layer(name, DOUBLE).eval()
    x = whole(name).requires_grad_()
    module(x.relu()).square().mean().backward()
    other, shards = replicated(module), spread(x, Shard(0)).requires_grad_()
    other(shards.relu()).square().mean().backward()
    assert_close(shards.grad.full_tensor(), x.grad, "grad x")
    for (key, p), q in zip(other.named_parameters(), module.parameters(), strict=True):
        assert_close(p.grad.full_tensor(), q.grad, key)


def compiled(rank: int, name: str) -> None:
    torch._dynamo.reset()
    module = layer(name, DOUBLE)
    expected = plain(module, x := whole(name))
    module, x = replicated(module), spread(x, Shard(0)).requires_grad_()
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    y.backward(spread(towards(expected["y"]), Shard(0)))
    assert_step(gathered(module, x, y), expected)


def checkpointed(rank: int, name: str) -> None:
    """Selectively, in evaluation: a second forward must not move what the first did."""
    module = layer(name, DOUBLE).eval()
    expected = plain(module, x := whole(name))
    module, x = replicated(module), spread(x, Shard(0)).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    y = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    y.backward(spread(towards(expected["y"]), Shard(0)))
    assert_step(gathered(module, x, y), expected)


def second_derivatives(rank: int, name: str) -> None:
    """In evaluation: the gradient of the gradient's norm."""
    module, x = layer(name, DOUBLE).eval(), whole(name).requires_grad_()
    other, shards = replicated(module), spread(x, Shard(0)).requires_grad_()
    (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    first.square().sum().backward()
    (sharded,) = torch.autograd.grad(other(shards).sin().sum(), shards, create_graph=True)
    sharded.square().sum().backward()
    assert_close(shards.grad.full_tensor(), x.grad, "grad x")
    for (key, p), q in zip(other.named_parameters(), module.parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.grad.full_tensor(), q.grad, key)


def without_gradients(rank: int, name: str) -> None:
    module, x = layer(name, DOUBLE).eval(), whole(name)
    with torch.no_grad():
        assert_close(replicated(module)(spread(x, Shard(0))).full_tensor(), module(x), "y")


def an_empty_batch(rank: int, name: str) -> None:
    y = replicated(layer(name, DOUBLE))(spread(whole(name)[:0], Shard(0)))
    assert y.shape[0] == 0 and y.to_local().shape == y.shape


def masks_of_dropout(rank: int) -> None:
    """Replicas draw one mask, shards each their own, whatever the processes' generators say; those go on as if a
    single number had been drawn."""
    module = replicated(aia_kernels.ExternalAttention(6, S=5).double())
    row = torch.randn(1, 11, 6, generator=torch.Generator().manual_seed(3), dtype=DOUBLE).expand(4, -1, -1)

    def drawn(placement) -> list[Tensor]:
        torch.manual_seed(rank)
        x = spread(row.contiguous(), placement)
        with torch.no_grad():
            y = functional.external_attention(x, module.mk.weight, module.mv.weight, dropout=0.5).to_local()
        of_all = [torch.empty_like(y) for _ in range(WORLD)]
        dist.all_gather(of_all, y)
        return of_all

    assert torch.equal(*drawn(Replicate()))
    rows = torch.cat(drawn(Shard(0)))
    assert all((a - b).abs().max() > 0 for i, a in enumerate(rows) for b in rows[:i])
    after = torch.rand(1)
    torch.manual_seed(rank)
    torch.randint(2**62, ())
    assert torch.equal(torch.rand(1), after)


def gradients_of_dropout(rank: int) -> None:
    """y is linear in the values, so their gradient times them is the sum of y: forward and backward had one mask."""
    module = replicated(aia_kernels.ExternalAttention(6, S=5).double())
    x = spread(whole("ExternalAttention"), Shard(0))
    y = functional.external_attention(x, module.mk.weight, module.mv.weight, dropout=0.5)
    y.sum().backward()
    value = module.mv.weight
    assert_close((value.grad.full_tensor() * value.full_tensor()).sum(), y.full_tensor().sum(), "sum of y")


def padding(rank: int) -> None:
    module, x = layer("ExternalAttention", DOUBLE), whole("ExternalAttention")
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, 3:] = mask[3, :2] = True
    expected = functional.external_attention(x, module.mk.weight, module.mv.weight, padding_mask=mask)
    other = replicated(module)
    settings = {"padding_mask": spread(mask, Shard(0))}
    found = functional.external_attention(spread(x, Shard(0)), other.mk.weight, other.mv.weight, **settings)
    assert_close(found.full_tensor(), expected, "y")


def attended(key=None, **settings) -> Tensor:
    module = replicated(layer("ExternalAttention", DOUBLE))
    x = spread(whole("ExternalAttention"), Shard(0))
    return functional.external_attention(x, module.mk.weight if key is None else key, module.mv.weight, **settings)


def called(name: str, x: Tensor, module=replicated) -> Tensor:
    return module(layer(name, DOUBLE))(x)


def of_plain_parameters(module: nn.Module) -> nn.Module:
    return module


MASK = torch.zeros(4, 11, dtype=torch.bool)
SHARDED = r"x: got a DTensor placed \(Shard\(dim={}\),\), expected Shard\(0\), by samples, or Replicate\(\)"
PLAIN_BESIDE = "{}: got a plain tensor, expected a DTensor placed"
DISTRIBUTED_BESIDE = "{}: got a DTensor, expected a plain tensor, as x is"
#: What no layer does with DTensors: the error, its message and the call.
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "channels": (ValueError, SHARDED.format(1), lambda: called("CinST", spread(whole("CinST"), Shard(1)))),
    "height": (ValueError, SHARDED.format(2), lambda: called("STinC", spread(whole("STinC"), Shard(2)))),
    "time": (ValueError, SHARDED.format(2), lambda: called("STinC2, 5d", spread(whole("STinC2, 5d"), Shard(2)))),
    "shift, channels": (ValueError, SHARDED.format(1), lambda: called("TemporalShift", spread(whole("C"), Shard(1)))),
    "block, channels": (
        ValueError,
        SHARDED.format(1),
        lambda: called("ExternalAttention2d", spread(whole("ExternalAttention2d"), Shard(1))),
    ),
    "tokens": (ValueError, SHARDED.format(1), lambda: called("MultiHead", spread(whole("MultiHead"), Shard(1)))),
    "logits, tokens": (
        ValueError,
        "logits: got a DTensor placed .*dim=1",
        lambda: called("double_normalize", spread(whole("double_normalize"), Shard(1))),
    ),
    "logits without samples": (
        ValueError,
        r"logits: got .*Shard\(dim=0\).* expected Replicate\(\)",
        lambda: functional.double_normalize(spread(whole("double_normalize")[0], Shard(0))),
    ),
    "a partial x": (
        ValueError,
        r"x: got .*Partial\(sum\).* expected",
        lambda: called("C", DTensor.from_local(whole("C"), mesh(), [Partial()])),
    ),
    "another axis on the second axis of a mesh": (
        ValueError,
        r"x: got .*Shard\(dim=1\)",
        lambda: called("C", spread(whole("C"), Replicate(), Shard(1), on=mesh_of_two_axes()), of_plain_parameters),
    ),
    "another mesh": (
        ValueError,
        "weight of gate C: got a DTensor on .* expected the mesh of x",
        lambda: called("C", spread(whole("C"), Shard(0)), lambda m: replicated(m, mesh_of_two_axes())),
    ),
    "half a clip": (
        ValueError,
        r"\[5, 4\] entries .* each of 3 frames",
        lambda: called("ST", spread(whole("ST", 3), Shard(0))),
    ),
    "shift, half a clip": (
        ValueError,
        r"\[5, 4\] entries .* each of 3 frames",
        lambda: called("TemporalShift", spread(whole("TemporalShift", 3), Shard(0))),
    ),
    "nothing for one": (
        ValueError,
        r"\[1, 0\] entries",
        lambda: called("ExternalAttention", spread(whole("ExternalAttention", 1), Shard(0))),
    ),
    "a plain x": (
        TypeError,
        DISTRIBUTED_BESIDE.format("memory_key"),
        lambda: called("ExternalAttention", whole("ExternalAttention")),
    ),
    "unit, a plain x": (TypeError, DISTRIBUTED_BESIDE.format("weight of gate C"), lambda: called("C", whole("C"))),
    "plain parameters": (
        TypeError,
        PLAIN_BESIDE.format("memory_key"),
        lambda: called("MultiHead", spread(whole("MultiHead"), Shard(0)), of_plain_parameters),
    ),
    "unit, plain parameters": (
        TypeError,
        PLAIN_BESIDE.format("weight of gate C"),
        lambda: called("C", spread(whole("C"), Shard(0)), of_plain_parameters),
    ),
    "block, plain parameters": (
        TypeError,
        PLAIN_BESIDE.format("key"),
        lambda: called("ExternalAttention2d", spread(whole("ExternalAttention2d"), Shard(0)), of_plain_parameters),
    ),
    "a sharded memory": (
        ValueError,
        r"memory_key: got a DTensor placed \(Shard\(dim=0\),\), expected \(Replicate\(\),\)",
        lambda: attended(spread(torch.randn(4, 6, dtype=DOUBLE), Shard(0))),
    ),
    "a plain mask": (TypeError, PLAIN_BESIDE.format("padding_mask"), lambda: attended(padding_mask=MASK)),
    "a replicated mask": (
        ValueError,
        r"padding_mask: got .*Replicate\(\).* expected \(Shard\(dim=0\),\)",
        lambda: attended(padding_mask=spread(MASK, Replicate())),
    ),
    **{
        f"x of {name}": (
            TypeError,
            "x: got a DTensor, expected a plain tensor" if name != "CATT" else "h: got a DTensor, expected a plain",
            lambda name=name: called(name, spread(whole(name), Shard(0))),
        )
        for name in ("CATT", "CaaM", "Halo")
    },
    "a process group": (
        ValueError,
        "process_group: got one beside a DTensor, expected None",
        lambda: attended(process_group=dist.group.WORLD),
    ),
}


def refused(rank: int, case: str) -> None:
    """Every process raises, so that none waits for another, and says what came and what was expected."""
    error, match, call = REFUSED[case]
    with pytest.raises(error, match=match):
        call()


def sharded_on_two_axes(rank: int) -> None:
    """A mesh of two by two, in a group whose others are not there: batch norms share over one group alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        placed = {"on": init_device_mesh("cpu", (2, 2))}
        x = spread(whole("CinST"), Shard(0), Shard(0), **placed)
        module = replicated(layer("CinST", DOUBLE), **placed)
        with pytest.raises(ValueError, match=r"sharded on several axes .* statistics of gate C"):
            module(x)
        module.eval()
        assert module(x).to_local().shape[0] == CLIPS.t
    finally:
        dist.destroy_process_group()


#: Layers over PyTorch's attention refuse DTensors.
OF_DTENSORS = [name for name in WITHOUT_DROPOUT if not name.startswith(("CATT", "CaaM", "Halo"))]
HAVE_PARAMETERS = [name for name in WITHOUT_DROPOUT if any(True for _ in layer(name).parameters())]
#: Clips in a row of frames cannot be split in the middle, nor does torch's linear take uneven shards (Token).
UNEVEN = [name for name in OF_DTENSORS if LAYERS[name].sizes[0] != 6 and not name.startswith("Token")]
#: Each kind of layer in one storage order: what uses do around a layer.
KINDS = (
    *("C", "ST", "CinST", "STinC, channels_last", "STinC2, 5d", "TemporalShift", "ExternalAttention, transposed"),
    *("ExternalAttention2d, channels_last", "MultiHead", "Token", "double_normalize"),
)
WITH_EVERY_SETTING = ("CinST", "STinC, channels_last", "ExternalAttention", "ExternalAttention2d, channels_last")
HAVE_NORMS = [name for name in WITHOUT_DROPOUT if any(True for _ in layer(name).buffers())]


def settings_for(name: str, table: dict[str, dict]) -> list[tuple[str, dict]]:
    """Every setting of a wrapper for one layer of each family, and for the others the wrapper as it comes."""
    return list(table.items())[: None if name in WITH_EVERY_SETTING else 1]


def everything() -> Iterator[tuple[str, str, Callable[[int], None]]]:
    """(use, layer, work) of the whole suite, in the order of every process, the first before it joins the group."""
    yield "DTensor, refused", "two sharded axes", sharded_on_two_axes
    for name in HAVE_PARAMETERS:
        for told, settings in settings_for(name, DDP):
            yield f"DDP, {told}", name, functools.partial(data_parallel, name=name, settings=settings)
        for use, settings in settings_for(name, FSDP):
            yield use, name, functools.partial(fully_sharded, name=name, **settings)
    for name in OF_DTENSORS:
        for use, *settings in (
            ("DTensor, sharded, training", True, Shard(0)),
            ("DTensor, sharded, evaluation", False, Shard(0)),
            ("DTensor, replicated, training", True, Replicate()),
        ):
            yield use, name, functools.partial(distributed, name=name, train=settings[0], placement=settings[1])
    for name in KINDS:
        for use in (on_two_axes, among_others, without_gradients, an_empty_batch, checkpointed):
            if use is not an_empty_batch or name != "Token":  # of which torch's linear on shards has no view
                yield f"DTensor, {use.__name__}", name, functools.partial(use, name=name)
    for name in ("CinST", "ExternalAttention2d, channels_last"):
        yield "DTensor, compiled", name, functools.partial(compiled, name=name)
    for name in ("CinST", "TemporalShift", "ExternalAttention2d", "MultiHead"):
        yield "DTensor, second derivatives", name, functools.partial(second_derivatives, name=name)
        yield "DTensor, the reference", name, functools.partial(through_the_reference, name=name)
    for name in UNEVEN:
        uneven = {"train": True, "placement": Shard(0), "samples": 3}
        yield "DTensor, unevenly sharded", name, functools.partial(distributed, name=name, **uneven)
    for name in HAVE_NORMS:
        yield "DTensor, no running statistics", name, functools.partial(without_running_statistics, name=name)
        yield "DTensor, SyncBatchNorm", name, functools.partial(synchronized, name=name)
    for name in (name for name in KINDS if name in HAVE_PARAMETERS):
        yield "DTensor, with hooks", name, functools.partial(with_hooks, name=name)
    for use in (masks_of_dropout, gradients_of_dropout, padding):
        yield "DTensor", use.__name__, use
    for case in REFUSED:
        yield "DTensor, refused", case, functools.partial(refused, case=case)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # nothing rests on what torch gives up
    results, (first, *others) = {}, everything()

    def do(use: str, name: str, function: Callable[[int], None]) -> None:
        (folder / f"last {rank}").write_text(f"{use}, {name}")
        try:
            function(rank)
        except Exception:
            results[use, name] = traceback.format_exc()
        else:
            results[use, name] = ""

    do(*first)
    # Where one process fails amid an exchange, the other does not wait for long.
    limit = datetime.timedelta(minutes=2)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=limit)
    for piece in others:
        do(*piece)
    torch.save(results, folder / f"report {rank}")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    # Without the interpreter's teardown: now and then it aborts over a thread that gloo has left behind.
    os._exit(0)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[tuple[str, str], str]]:
    """For each process what became of each piece of work: "" or a traceback."""
    folder = tmp_path_factory.mktemp("uses")
    try:
        mp.spawn(work, (folder,), nprocs=WORLD)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        last = [path.read_text() for path in sorted(folder.glob("last *"))]
        pytest.fail(f"{error}; the last that was begun, by rank: {last}")
    return [torch.load(folder / f"report {rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("use, name", [(use, name) for use, name, _ in everything()])
def test_two_processes(use, name, reports):
    for rank, report in enumerate(reports):
        assert not report[use, name], f"rank {rank}:\n{report[use, name]}"
