"""The units as functions: check, choose a path, call.

The paths of a call that has something to compute:

1. where the call is recorded (torch.compile, torch.export, make_fx, selective checkpointing): the registered operators
   (operators/);
2. under a functorch transform (torch.func.grad, vmap), forward-mode differentiation or torch.jit.trace: the reference;
3. where gradients are wanted: UnitFunction, where the backend has a unit as one operator, and else
   AttentionInAttentionFunction;
4. otherwise: the same, keeping nothing.

The backend ``reference`` takes its own formula on all four. A DTensor is taken shard by shard (sharded.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..algorithms import attention_in_attention as algorithm
from ..algorithms.unit import Buffers, statistics_of
from ..algorithms.unit import Plan as PlanOfUnit
from ..common import maps
from ..common.autocast import autocast_dtype
from ..common.dtypes import accumulate_dtype
from ..common.layouts import as_clips, as_input, with_dense_clips, with_exchanged
from ..common.tracing import is_traced, needs_reference
from ..operators import attention_in_attention as operators
from ..reference import UNITS, Gate, Norm, Unit
from ..reference import attention_in_attention as reference
from ..reference.norm import uses_batch
from . import sharded, unit_calls
from .checks import check_clips
from .running_statistics import update_running_statistics

FAMILY = "attention_in_attention"
WEIGHT_SHAPE = (1, 2, 3, 3, 3)


def C(x: Tensor, c: Gate, num_segments: int = 8) -> Tensor:
    """Channel attention: y = x * g_C(x).

    Args:
        x: As of attention_in_attention.
        c: The gate over C.
        num_segments: As of attention_in_attention.

    Returns:
        y, shaped and stored as x.

    Raises:
        TypeError, ValueError: As attention_in_attention.
    """
    return attention_in_attention(x, "C", (c,), num_segments)


def ST(x: Tensor, t: Gate, h: Gate, w: Gate, num_segments: int = 8) -> Tensor:
    """Spacetime attention: y = x * (g_T(x) + g_H(x) + g_W(x)) / 3.

    Args:
        x: As of attention_in_attention.
        t: The gate over T.
        h: The gate over H.
        w: The gate over W.
        num_segments: As of attention_in_attention.

    Returns:
        y, shaped and stored as x.

    Raises:
        TypeError, ValueError: As attention_in_attention.
    """
    return attention_in_attention(x, "ST", (t, h, w), num_segments)


def CinST(x: Tensor, c: Gate, t: Gate, h: Gate, w: Gate, num_segments: int = 8) -> Tensor:
    """Channel attention inside spacetime attention: y = x * G_ST(x * g_C(x)).

    Args:
        x: As of attention_in_attention.
        c: The gate over C.
        t: The gate over T.
        h: The gate over H.
        w: The gate over W.
        num_segments: As of attention_in_attention.

    Returns:
        y, shaped and stored as x.

    Raises:
        TypeError, ValueError: As attention_in_attention.
    """
    return attention_in_attention(x, "CinST", (c, t, h, w), num_segments)


def STinC(x: Tensor, c: Gate, t: Gate, h: Gate, w: Gate, num_segments: int = 8) -> Tensor:
    """Spacetime attention inside channel attention: y = x * g_C(x * G_ST(x)).

    Args:
        x: As of attention_in_attention.
        c: The gate over C.
        t: The gate over T.
        h: The gate over H.
        w: The gate over W.
        num_segments: As of attention_in_attention.

    Returns:
        y, shaped and stored as x.

    Raises:
        TypeError, ValueError: As attention_in_attention.
    """
    return attention_in_attention(x, "STinC", (c, t, h, w), num_segments)


def STinC2(x: Tensor, c: Gate, t: Gate, h: Gate, w: Gate, num_segments: int = 8) -> Tensor:
    """STinC with each spacetime gate averaged over C after its sigmoid.

    Args:
        x: As of attention_in_attention.
        c: The gate over C.
        t: The gate over T.
        h: The gate over H.
        w: The gate over W.
        num_segments: As of attention_in_attention.

    Returns:
        y, shaped and stored as x.

    Raises:
        TypeError, ValueError: As attention_in_attention.
    """
    return attention_in_attention(x, "STinC2", (c, t, h, w), num_segments)


#: By unit, the gates in the order in which it computes them, in which a norm that serves several of them moves.
_ORDERS = {
    unit.name: [i for c in (unit.inner, unit.outer) if c for i in range(len(unit.letters))[unit.rows(c)]]
    for unit in UNITS.values()
}


def attention_in_attention(x: Tensor, unit: str, gates: Sequence[Gate], num_segments: int = 8) -> Tensor:
    """Apply a unit of Attention in Attention (arXiv 2204.09303): y = x * G_outer(x * G_inner(x)).

    Running statistics are updated where a norm says so.

    Args:
        x: [B * T, C, H, W] with T = num_segments, contiguous or channels_last, or [B, C, T, H, W], contiguous or
            channels_last_3d. Other strides cost a copy. float32, bfloat16, float16 or float64.
        unit: "C", "ST", "CinST", "STinC" or "STinC2".
        gates: A Gate for each letter of C, T, H, W that the unit has, in this order: its weight [1, 2, 3, 3, 3], and
            its norm or None.
        num_segments: T, the frames of a clip. Not used where x has five axes.

    Returns:
        y, shaped and stored as x, in its type.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
        RuntimeError: A backend was asked for by name that cannot run, with the reason.
    """
    described = _unit(unit)
    num_segments = check_clips(x, num_segments)
    _check_gates(described, gates)
    if sharded.is_distributed(x):
        return sharded.attention_in_attention(attention_in_attention, x, described, gates, num_segments)
    _validate(x, described, gates, num_segments)
    if x.numel() == 0:
        if any(_group_name(gate.norm) for gate in gates):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected a batch: BN shares its statistics with a group")
        return _empty(x, gates)
    dense = with_dense_clips(x, num_segments)
    backend = backends.select(x.device, x.dtype, FAMILY)
    move = None
    statistics: Sequence[Tensor] | None
    if backend == "reference" or needs_reference():
        y, of_gates = reference(as_clips(dense, num_segments), described, gates)
        y, statistics = as_input(y, x.ndim), of_gates.split(1)
    else:
        passes = None if is_traced() else backends.passes(backend, FAMILY)
        y, statistics = _through_passes(dense, described, gates, num_segments, backend, passes)
        move = passes and passes.move_statistics_
    if statistics is not None:
        order = _ORDERS[unit]
        update_running_statistics([gates[i].norm for i in order], [statistics[i] for i in order], move)
    return y if dense is x else with_exchanged(y, x)


def _through_passes(
    x: Tensor, unit: Unit, gates: Sequence[Gate], num_segments: int, backend: str, passes: Any
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """y and the statistics [1, 3] of each gate by one of the paths 1 (passes is None), 3 and 4; None where no gate uses
    its batch and nothing keeps them, or the running ones have moved."""
    dtype = accumulate_dtype(x.dtype)
    parameters: list[Tensor | None] = []
    fixed: list[Tensor | None] = []
    of_bn: list[tuple[bool, float, str]] = []
    wide = False
    for weight, norm in gates:
        of = norm or _NO_NORM
        own = norm is not None and uses_batch(norm)
        parameters += weight, of.weight, of.bias
        fixed += _fixed(of, own)
        of_bn.append((own, of.eps, _group_name(of)))
        wide = wide or (x.dtype != dtype and any(p is not None and p.dtype != weight.dtype for p in of[:2]))
    parameters, fixed = _resolved(parameters), _resolved(fixed)
    batch, eps, groups = zip(*of_bn, strict=True)
    if unit_calls.has_units(passes, groups):
        running, momentum = unit_calls.moving([gate.norm for gate in gates])
        of_unit = PlanOfUnit(unit, passes, num_segments, batch, eps, momentum)
        y, kept = unit_calls.called(of_unit, x, parameters, Buffers(fixed, running))
        moved = running or not any(batch)
        return y, None if moved else statistics_of(kept, len(gates), dtype).split(1)
    plan = algorithm.Plan(unit, passes, batch, eps, groups, wide)
    wanted = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *parameters))
    if wanted and passes is not None:
        return algorithm.AttentionInAttentionFunction.apply(x, num_segments, plan, fixed, *parameters)
    clips = as_clips(x, num_segments)
    if passes is None:
        if operators.evaluates(unit.name, backend, batch):
            of_gates = zip(*algorithm.gate_parameters(parameters, fixed), strict=True)
            y = operators.unit_evaluate(clips, *map(list, of_gates), unit.name, backend, eps)
            return as_input(y, x.ndim), None
        packed = operators.packed(parameters, fixed, plan.batch, dtype)
        settings = unit.name, backend, plan.batch, plan.eps, plan.groups, operators.index_dtype(clips, unit.name)
        y, *_, statistics = operators.unit_forward(clips, *packed, *settings)
        return as_input(y, x.ndim), statistics.split(1)
    of_gates = algorithm.gate_parameters(parameters, fixed)
    if algorithm.can_evaluate(plan):
        return as_input(algorithm.evaluate(plan, clips, of_gates), x.ndim), None
    result = algorithm.forward(plan, clips, of_gates)
    if not any(batch):  # nothing keeps the statistics
        return as_input(result.y, x.ndim), None
    return as_input(result.y, x.ndim), algorithm.statistics_of(unit, result.inner, result.outer)


#: Stands for the norm of a gate without one.
_NO_NORM = Norm(eps=0.0)


def _resolved(parameters: list[Tensor | None]) -> list[Tensor | None]:
    """The parameters, none of them a view of negatives: torch resolves these in single arguments, but not in lists."""
    return [None if p is None else p.resolve_neg() for p in parameters]


def _fixed(norm: Norm, of_batch: bool) -> tuple[Tensor | None, Tensor | None]:
    """The mean and variance of a norm that does not use the batch's, None where they are 0 and 1 or not used."""
    mean, var = norm.running_mean, norm.running_var
    if of_batch or mean is None or var is None:
        return None, None
    return (mean.detach(), var.detach()) if mean.requires_grad or var.requires_grad else (mean, var)


def _group_name(norm: Norm | None) -> str:
    if norm is None or norm.process_group is None or not norm.training:
        return ""
    return norm.process_group.group_name


def _empty(x: Tensor, gates: Sequence[Gate]) -> Tensor:
    """The answer to an empty x: an empty y, whose gradients are zero in x and in every parameter."""
    parameters = [p for gate in gates for p in (gate.weight, *(gate.norm[:2] if gate.norm else ())) if p is not None]
    return torch.empty_like(x).copy_(x * sum(p.sum() for p in parameters).to(x.dtype))


def _unit(unit: str) -> Unit:
    if not isinstance(unit, str) or unit not in UNITS:
        raise ValueError(f"unit: got {unit!r}, expected one of {', '.join(UNITS)}")
    return UNITS[unit]


def _clip_sizes(x: Tensor, num_segments: int) -> tuple[int, ...]:
    b, c, *rest = x.shape
    return (b // num_segments, num_segments, c, *rest) if x.ndim == 4 else (b, rest[0], c, *rest[1:])


def _check_gates(unit: Unit, gates: Sequence[Gate]) -> None:
    if len(gates) != len(unit.letters):
        raise ValueError(f"gates: got {len(gates)}, expected {len(unit.letters)} for unit {unit.name}: {unit.letters}")
    for letter, gate in zip(unit.letters, gates, strict=True):
        if not isinstance(gate, Gate):
            raise TypeError(f"gate {letter}: got {type(gate).__name__}, expected a Gate")


def _is_ordinary(x: Tensor, gates: Sequence[Gate]) -> bool:
    """Whether all parameters are plain, of the type and on the device of x, and of the right sizes, and x has more than
    one value for each map: what _validate finds right, found at a fraction of its cost."""
    dtype, device, on_cpu = x.dtype, x.device, x.is_cpu
    if x.numel() <= max(x.shape):  # at least one map may have a single value
        return False
    for weight, norm in gates:
        if type(weight) not in sharded.PLAIN or weight.dtype is not dtype or weight.shape != WEIGHT_SHAPE:
            return False
        if not (weight.is_cpu if on_cpu else weight.device == device):
            return False
        if norm is None:
            continue
        if (norm.running_mean is None) != (norm.running_var is None):
            return False
        for p in norm[:4]:
            if p is None:
                continue
            if type(p) not in sharded.PLAIN or p.dtype is not dtype or p.numel() != 1:
                return False
            if not (p.is_cpu if on_cpu else p.device == device):
                return False
    return True


def _validate(x: Tensor, unit: Unit, gates: Sequence[Gate], num_segments: int) -> None:
    if autocast_dtype(x) is None and _is_ordinary(x, gates):
        return
    expected = (x.dtype,)
    if (autocast := autocast_dtype(x)) is not None:
        # Under autocast parameters stay in float32 and activations come in either type.
        expected = (torch.float32,) if x.dtype in (torch.float32, autocast) else (x.dtype,)
    # A network in half precision may keep its norms in float32, as torch's batch norm takes them.
    of_norm_expected = (*expected, accumulate_dtype(x.dtype))
    length = maps.lengths(_clip_sizes(x, num_segments))
    for letter, (weight, norm) in zip(unit.letters, gates, strict=True):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight of gate {letter}: got {type(weight).__name__}, expected a tensor")
        if norm and (norm.running_mean is None) != (norm.running_var is None):
            raise ValueError(f"BN of gate {letter}: got one of running_mean and running_var, expected both or neither")
        if norm and uses_batch(norm) and not norm.process_group and 0 < x.numel() == length[letter]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected more than one value per map for BN in training")
        if tuple(weight.shape) != WEIGHT_SHAPE:
            raise ValueError(f"weight of gate {letter}: got shape {tuple(weight.shape)}, expected {WEIGHT_SHAPE}")
        of_norm = zip((f"BN's {field}" for field in Norm._fields), norm[:4], strict=False) if norm else ()
        for name, p in (("weight", weight), *of_norm):
            if p is None:
                continue
            sharded.refuse_distributed(f"{name} of gate {letter}", p)
            if p.device != x.device:
                raise ValueError(f"{name} of gate {letter}: got device {p.device}, expected that of x, {x.device}")
            accepted = expected if p is weight else of_norm_expected
            if "running" not in name and p.dtype not in accepted:
                types = " or ".join(map(str, dict.fromkeys(accepted)))
                raise TypeError(f"{name} of gate {letter}: got {p.dtype}, expected {types}, as x is {x.dtype}")
            if p is not weight and p.numel() != 1:
                raise ValueError(f"{name} of gate {letter}: got shape {tuple(p.shape)}, expected (1,)")
