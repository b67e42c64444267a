"""Exported programs decompose to plain ATen: no operator of the package remains, the numbers and gradients do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import external_cases
import pytest
import torch
from conftest import skip_unless_runnable
from torch import nn

import aia_kernels
from aia_kernels import schemas, testing


class Case(NamedTuple):
    """A layer, the sizes of an input for it, how many rows of the input make a sample, and whether it trains."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    rows: int = 1
    train: bool = False


CASES = {
    "CinST in training": Case(lambda: aia_kernels.CinST(4), (8, 3, 5, 6), 4, True),
    "STinC2": Case(lambda: aia_kernels.STinC2(2), (4, 3, 5, 6), 2),
    "ST without BN": Case(lambda: aia_kernels.ST(2, use_BN=False), (4, 3, 5, 6), 2),
    "plain": Case(lambda: aia_kernels.ExternalAttention(6, 5), (2, 9, 6)),
    "block in training": Case(lambda: aia_kernels.ExternalAttention2d(6, 5), (2, 6, 3, 4), train=True),
    "block": Case(lambda: aia_kernels.ExternalAttention2d(6, 5), (2, 6, 3, 4)),
    "multi-head": Case(lambda: aia_kernels.MultiHeadExternalAttention(6, 2), (2, 9, 6), train=True),
    "double normalization": Case(lambda: external_cases.Normalize(None, eps=1e-6, group=2), (2, 9, 6)),
    "temporal shift": Case(lambda: aia_kernels.TemporalShift(4), (8, 16, 3, 2), 4),
    "CBAM in training": Case(lambda: aia_kernels.CBAM(6, 2), (2, 6, 3, 5), train=True),
    "CBAM": Case(lambda: aia_kernels.CBAM(6, 2), (2, 6, 3, 5)),
    "channel gate": Case(lambda: aia_kernels.ChannelGate(6, 2), (2, 6, 3, 5)),
}


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        *((name, torch.contiguous_format) for name in CASES),
        ("STinC2", torch.channels_last),
        ("block in training", torch.channels_last),
    ],
    ids=str,
)
def test_plain_aten(name, memory):
    case = CASES[name]
    skip_unless_runnable("cpu", "cpu")
    module = testing.randomise(case.make()).double().train(case.train)
    batch = case.rows * torch.export.Dim("samples", max=64)
    with aia_kernels.use_backend("cpu"):
        example = torch.randn(case.sizes, dtype=torch.float64).contiguous(memory_format=memory)
        program = torch.export.export(copy.deepcopy(module), (example,), dynamic_shapes=({0: batch},))
    assert schemas.NAMESPACE in operators(program)
    decomposed = program.run_decompositions(aia_kernels.decompositions())
    assert operators(decomposed) == {"aten"}
    # What a forward keeps for its backward is not computed.
    assert not any("empty" in str(node.target) and "like" not in str(node.target) for node in decomposed.graph.nodes)
    exported, results = decomposed.module(), []
    for other in (exported, module):
        x = torch.randn(3 * case.rows, *case.sizes[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.contiguous(memory_format=memory).requires_grad_()
        y = other(x)
        y.sin().sum().backward()
        found = {"y": y, "grad x": x.grad} | {key: p.grad for key, p in other.named_parameters()}
        results.append(found | dict(other.named_buffers()))
    assert results[0].keys() == results[1].keys()
    assert results[0]["y"].stride() == results[1]["y"].stride()
    for key, value in results[1].items():
        found = results[0][key]
        # float64 sums in another order. A bias without effect has no gradient here and one of zero there.
        expected = torch.zeros_like(found) if value is None else value
        found = torch.zeros_like(expected) if found is None else found
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_beside_the_decompositions_of_torch():
    """The documented way to core ATen."""
    skip_unless_runnable("cpu", "cpu")
    model = nn.Sequential(nn.Conv2d(3, 6, 1), aia_kernels.ExternalAttention2d(6, 5), aia_kernels.C(2)).eval()
    x = torch.randn(4, 3, 5, 6)
    with aia_kernels.use_backend("cpu"):
        program = torch.export.export(model, (x,))
        expected = model(x)
    table = torch.export.default_decompositions()
    table.update(aia_kernels.decompositions())
    core = program.run_decompositions(table)
    called = {node.target for node in core.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    called.discard(torch.ops.aten._assert_tensor_metadata.default)  # a check that export adds
    assert all(torch.Tag.core in operator.tags for operator in called)
    # Five roundings of float32 on numbers of order one.
    torch.testing.assert_close(core.module()(x), expected, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_process_group_stay():
    """ATen has no exchange between processes."""
    table = aia_kernels.decompositions()
    x, weight, affine = torch.randn(2, 2, 3, 4, 5), torch.randn(1, 2, 3, 3, 3), torch.ones(1, 2)
    operator = torch.ops.aia_kernels.unit_forward.default
    assert table[operator](x, weight, affine, None, "C", "cpu", [True], [1e-5], ["a group"]) is NotImplemented
    tokens, key, value = torch.randn(2, 9, 6), torch.randn(1, 5, 6), torch.randn(1, 6, 5)
    operator = torch.ops.aia_kernels.external_attention_forward.default
    arguments = tokens, key, value, None, None, None, 5, 0.0, "a group", 1.0, "cpu"
    assert table[operator](*arguments) is NotImplemented


def test_every_forward_operator_has_one():
    """A layer that torch.export can record and that no one can run elsewhere would be a trap."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    forwards = {name for space, name in names if space == schemas.NAMESPACE and name.endswith("_forward")}
    found = {operator.name().removeprefix(f"{schemas.NAMESPACE}::") for operator in aia_kernels.decompositions()}
    assert found == forwards | {"temporal_shift_by"}
