"""CBAM as functions: check, choose a path, call. The paths are those of Attention in Attention.

The backend ``reference`` takes its own formula on all four; so do channel gates with other pools than "avg" and "max",
which have no pass, and "auto" on a CPU where there is too little to fuse (backends.choices). A DTensor is taken shard
by shard (sharded.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..algorithms import cbam as algorithm
from ..algorithms import cbam_layer as layer
from ..algorithms.cbam import Parameters, Plan
from ..algorithms.unit import statistics_of
from ..common.autocast import autocast_dtype
from ..common.dtypes import accumulate_dtype
from ..common.layouts import with_dense_maps, with_exchanged
from ..common.tracing import is_traced, needs_reference
from ..operators.cbam import cbam_forward
from ..reference import MLP, Gate, Norm
from ..reference import cbam as reference
from ..reference.cbam import POOLS
from ..reference.norm import uses_batch
from . import sharded
from .cbam_calls import FAMILY, called
from .checks import check_tensor
from .plain import WIDE
from .running_statistics import update_running_statistics
from .unit_calls import moving

POOL_TYPES = ("avg", "max")


def cbam(x: Tensor, mlp: MLP | None, gate: Gate | None, pool_types: Sequence[str] = POOL_TYPES) -> Tensor:
    """CBAM (arXiv 1807.06521): y = x * g_c(x) * g_s(x * g_c), a gate of channels and then one of positions.

    Running statistics are updated where the norm says so.

    Args:
        x: [B, C, H, W], contiguous or channels_last. Other strides cost a copy. float32, bfloat16, float16 or float64.
        mlp: The channel gate: g_c = sigmoid(sum over pools of mlp(pool of x over H and W)). None: there is none.
        gate: The spatial gate: g_s = sigmoid(BN(conv(maximum and mean of x * g_c over C))), its weight [1, 2, k, k]
            with an odd k, and its norm or None. None: there is none; one of the two must be there.
        pool_types: What the channel gate pools with: "avg", "max", "mix" (the mean of these two), "lp" (p = 2) or
            "lse". The last two are computed in plain PyTorch.

    Returns:
        y, shaped and stored as x, in its type.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    if sharded.is_distributed(x):
        return sharded.cbam(cbam, x, mlp, gate, pool_types)
    return _cbam(x, mlp, gate, pool_types, confounder=False)[0]


def causal_cbam(
    x: Tensor, mlp: MLP | None, gate: Gate | None, pool_types: Sequence[str] = POOL_TYPES
) -> tuple[Tensor, Tensor]:
    """CaaM's pair (arXiv 2108.08782): causal = y of cbam, and confounder = x - y, from one read of x.

    Args:
        x: As of cbam.
        mlp: As of cbam.
        gate: As of cbam.
        pool_types: As of cbam.

    Returns:
        The causal and the confounder, each shaped and stored as x, in its type.

    Raises:
        TypeError, ValueError, RuntimeError: As cbam.
    """
    if sharded.is_distributed(x):
        return sharded.cbam(causal_cbam, x, mlp, gate, pool_types)
    causal, confounder = _cbam(x, mlp, gate, pool_types, confounder=True)
    return causal, confounder


def channel_gate_of_few_operators(x: Tensor, mlp: Sequence[Tensor | None], pool_types: Sequence[str]) -> Tensor:
    """x * g_c of a small call, in PyTorch's operators, of parameters that nothing is to be asked about any more: an
    ordinary call of a module (modules.submodules.read_at_once) whose sizes fit.

    Args:
        x: [B, C, H, W], not empty; in a narrow type what comes of each operator is rounded, as in the reference.
        mlp: The fields of MLP.
        pool_types: As of cbam.
    """
    weight_1, bias_1, weight_2, bias_2 = mlp
    b, c, *plane = x.shape
    of_plane = {"avg": F.avg_pool2d, "max": F.max_pool2d}  # shorter than reductions, and fast in both layouts
    found = [of_plane[name](x, plane) if name in of_plane else POOLS[name](x) for name in _checked_pools(pool_types)]
    pooled = [t.view(b, c) for t in found]
    if x.dtype in WIDE:  # all as one product, which in narrow types takes longer than one for each
        pooled = [torch.stack(pooled, 1)]
    of_pools = [F.linear(F.linear(t, weight_1, bias_1).relu(), weight_2, bias_2) for t in pooled]
    total = of_pools[0].sum(1) if x.dtype in WIDE else functools.reduce(torch.add, of_pools)
    return x * total.sigmoid().view(b, c, 1, 1)


def _cbam(
    x: Tensor, mlp: MLP | None, gate: Gate | None, pool_types: Sequence[str], confounder: bool
) -> tuple[Tensor, ...]:
    pool_types = _checked_pools(pool_types)
    _check(x, mlp, gate)
    if x.numel() == 0:
        return _empty(x, mlp, gate)[: 1 + confounder]
    given, x, norm = x, with_dense_maps(x), None if gate is None else gate.norm
    backend, passes = backends.select(x.device, x.dtype, FAMILY), None
    if backend == "reference" or needs_reference() or not algorithm.POOLS.keys() >= set(pool_types):
        *results, statistics = reference(x, mlp, gate, pool_types)
        results = results[: 1 + confounder]
    else:
        passes = None if is_traced() else backends.passes(backend, FAMILY)
        results, statistics = _through_passes(x, mlp, gate, Plan(passes, pool_types, confounder=confounder), backend)
    if statistics is not None:
        update_running_statistics([norm], [statistics], getattr(passes, "move_statistics_", None))
    return tuple(results if x is given else (with_exchanged(y, given) for y in results))


def _through_passes(
    x: Tensor, mlp: MLP | None, gate: Gate | None, plan: Plan, backend: str
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The results by one of the paths 1 (without passes), 3 and 4, and the statistics [1, 3] of the spatial gate, None
    where no running ones are left to move."""
    norm = gate.norm if gate is not None and gate.norm is not None else Norm()
    batch = gate is not None and gate.norm is not None and uses_batch(norm)
    plan = plan._replace(batch=batch, eps=norm.eps if gate is not None and gate.norm is not None else 0.0)
    if batch and norm.training and norm.process_group is not None:
        plan = plan._replace(group=norm.process_group.group_name)
    of_gate = (None, None, None) if gate is None else (gate.weight, norm.weight, norm.bias)
    learned = *(mlp or (None,) * 4), *of_gate
    fixed = (None, None) if batch or norm.running_mean is None else (norm.running_mean, norm.running_var)
    fixed = tuple(None if p is None else p.detach() for p in fixed)
    if plan.passes is None:
        dtype = accumulate_dtype(x.dtype)
        packed = None if fixed[0] is None else torch.stack([p.to(dtype).reshape(1) for p in fixed], 1)
        settings = plan.pool_types, batch, plan.eps, plan.group, plan.confounder, backend
        y, confounder, *_kept, statistics = cbam_forward(x, *learned, packed, *settings)
        return (y, confounder) if plan.confounder else (y,), statistics if gate is not None else None
    if layer.serves(plan, x, mlp is not None):
        running, momentum = moving([norm]) if batch else ((), 0.0)
        buffers = layer.Buffers(() if fixed[0] is None else fixed, running, momentum)
        *results, kept = called(plan, x, learned, buffers)
        moved = gate is None or not batch or bool(running)
        return results, None if moved else statistics_of(kept, 1, accumulate_dtype(x.dtype))
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *learned)):
        y, confounder, (statistics,) = algorithm.CbamFunction.apply(x, plan, fixed, *learned)
        return (y, confounder) if plan.confounder else (y,), statistics
    results, kept = algorithm.forward(plan, x, Parameters(*learned, *fixed), False)
    return results, kept.statistics


def _empty(x: Tensor, mlp: MLP | None, gate: Gate | None) -> tuple[Tensor, Tensor]:
    """The answer to an empty x: empty results, whose gradients are zero in x and in every parameter."""
    norm = gate.norm if gate is not None else None
    if norm is not None and norm.training and norm.process_group is not None:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a batch: BN shares its statistics with a group")
    parameters = *(mlp or ()), *(gate[:1] if gate is not None else ()), *(norm[:2] if norm is not None else ())
    total = sum(p.sum() for p in parameters if p is not None)
    y = torch.empty_like(x).copy_(x * torch.as_tensor(total).to(x.dtype))
    return y, x - y


def _checked_pools(pool_types: Sequence[str]) -> tuple[str, ...]:
    known = ", ".join(map(repr, POOLS))
    if isinstance(pool_types, str) or not isinstance(pool_types, Sequence):
        raise TypeError(f"pool_types: got {pool_types!r}, expected a sequence of names, of {known}")
    if not pool_types or any(name not in POOLS for name in pool_types):
        raise ValueError(f"pool_types: got {tuple(pool_types)}, expected one name or more, of {known}")
    return tuple(pool_types)


def _check(x: Tensor, mlp: MLP | None, gate: Gate | None) -> None:
    check_tensor("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, H, W]")
    if mlp is None and gate is None:
        raise ValueError("mlp and gate: got None twice, expected one of them at least")
    if mlp is not None and not isinstance(mlp, MLP):
        raise TypeError(f"mlp: got {type(mlp).__name__}, expected an MLP or None")
    if gate is not None and not isinstance(gate, Gate):
        raise TypeError(f"gate: got {type(gate).__name__}, expected a Gate or None")
    if _fit(x, mlp, gate):
        return
    expected: tuple[torch.dtype, ...] = (x.dtype,)
    if (autocast := autocast_dtype(x)) is not None and x.dtype in (torch.float32, autocast):
        # Under autocast parameters stay in float32 and activations come in either type.
        expected = (torch.float32,)
    if mlp is not None:
        _check_mlp(x, mlp, expected)
    if gate is not None:
        _check_gate(x, gate, expected)


def _fit(x: Tensor, mlp: MLP | None, gate: Gate | None) -> bool:
    """Whether all parameters are what they mostly are: plain, of the type of x, beside it and of sizes that fit. What
    does not fit is looked at one by one, and may be right all the same."""
    c, norm = x.shape[1], gate.norm if gate is not None else None
    sizes: list[tuple[Tensor | None, tuple[int, ...]]] = []
    if mlp is not None:
        hidden = len(mlp.weight_1) if sharded.is_plain(mlp.weight_1) and mlp.weight_1.ndim else 0
        sizes += zip(mlp, ((hidden, c), (hidden,), (c, hidden), (c,)), strict=True)
        if not hidden or mlp.weight_2 is None:
            return False
    if gate is not None:
        k = gate.weight.shape[-1] if sharded.is_plain(gate.weight) and gate.weight.ndim else 0
        if k % 2 == 0 or (norm is not None and (not isinstance(norm, Norm) or (uses_batch(norm) and x.numel() == c))):
            return False
        sizes.append((gate.weight, (1, 2, k, k)))
        if norm is not None:
            sizes += zip(norm[:4], ((1,),) * 4, strict=True)
            if (norm.running_mean is None) != (norm.running_var is None):
                return False
    return all(
        p is None or (sharded.is_plain(p) and p.dtype is x.dtype and p.device == x.device and p.shape == shape)
        for p, shape in sizes
    )


def _check_parameter(
    name: str, p: Tensor | None, x: Tensor, types: tuple[torch.dtype, ...], shape: tuple[int, ...] | None
) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: got {type(p).__name__}, expected a tensor")
    sharded.refuse_distributed(name, p)
    if p.device != x.device:
        raise ValueError(f"{name}: got device {p.device}, expected that of x, {x.device}")
    if types and p.dtype not in types:
        told = " or ".join(map(str, dict.fromkeys(types)))
        raise TypeError(f"{name}: got {p.dtype}, expected {told}, as x is {x.dtype}")
    if shape is not None and tuple(p.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(p.shape)}, expected {shape}")


def _check_mlp(x: Tensor, mlp: MLP, types: tuple[torch.dtype, ...]) -> None:
    c = x.shape[1]
    _check_parameter("weight_1 of mlp", mlp.weight_1, x, types, None)
    if mlp.weight_1.ndim != 2 or mlp.weight_1.shape[1] != c or not mlp.weight_1.shape[0]:
        raise ValueError(
            f"weight_1 of mlp: got shape {tuple(mlp.weight_1.shape)}, expected [hidden, C], C = {c} the channels of x"
        )
    hidden = mlp.weight_1.shape[0]
    _check_parameter("weight_2 of mlp", mlp.weight_2, x, types, (c, hidden))
    for name, bias, length in (("bias_1 of mlp", mlp.bias_1, hidden), ("bias_2 of mlp", mlp.bias_2, c)):
        if bias is not None:
            _check_parameter(name, bias, x, types, (length,))


def _check_gate(x: Tensor, gate: Gate, types: tuple[torch.dtype, ...]) -> None:
    weight, norm = gate
    _check_parameter("weight of gate", weight, x, types, None)
    if weight.ndim != 4 or weight.shape[:2] != (1, 2) or weight.shape[2] != weight.shape[3] or not weight.shape[3] % 2:
        raise ValueError(f"weight of gate: got shape {tuple(weight.shape)}, expected (1, 2, k, k) with an odd k")
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise TypeError(f"norm of gate: got {type(norm).__name__}, expected a Norm or None")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("norm of gate: got one of running_mean and running_var, expected both or neither")
    if uses_batch(norm) and not norm.process_group and 0 < x.numel() == x.shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected more than one position for BN in training")
    # A network in half precision may keep its norms in float32, as torch's batch norm takes them.
    wide = *types, accumulate_dtype(x.dtype)
    for field, p in zip(Norm._fields[:4], norm[:4], strict=True):
        if p is not None:
            of_type = () if field.startswith("running") else wide
            _check_parameter(f"{field} of gate's norm", p, x, of_type, None)
            if p.numel() != 1:
                raise ValueError(f"{field} of gate's norm: got shape {tuple(p.shape)}, expected (1,)")
