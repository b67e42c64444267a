"""When a layer may read the parameters of a submodule instead of calling it, and what it reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..algorithms import cbam_layer
from ..algorithms.unit import Buffers
from ..common.tracing import is_observed
from ..functional import cbam_calls, plain, unit_calls
from ..functional.sharded import is_distributed, is_plain
from ..reference import Norm
from ..reference.norm import is_number_of_batches

#: Modules, each with its forward as torch has it.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dropout, nn.Sequential),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    )
}
_PLAIN_FORWARDS = frozenset(_FORWARDS.values())
#: Those whose parameters an ordinary call reads.
_READ_AT_ONCE = frozenset((nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm))


def must_be_called(module: nn.Module) -> bool:
    """Whether a submodule must be called, as reading its parameters is not enough. It has hooks, or all modules have;
    or its forward is not that of its kind; or a weight is a tensor of another kind, which may know the products of its
    layer and no other (a DTensor is one that the functions of this package know).

    A parametrized weight needs no call: the attribute is the computed one. Quantized, adapted or patched layers do.
    """
    # This runs for every submodule in every call, so nothing here is a call that need not be one; and torch.compile
    # guards what is asked for in every compiled call: a table of functions one by one, values of a dictionary by name.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    kind = type(module)
    if _FORWARDS.get(kind) is not kind.forward and kind.forward not in _PLAIN_FORWARDS:
        return True
    if "forward" in module.__dict__ or _has_any_global_hook():
        return True
    parameters = module._parameters
    for name in ("weight", "bias"):  # the forwards above know no others
        p = parameters.get(name)
        if p is not None and type(p) is not nn.Parameter and _knows_one_product(p):
            return True
    return False


def _knows_one_product(p: Any) -> bool:
    return not is_plain(p) and is_traceable_wrapper_subclass(p) and not is_distributed(p)


def held(module: nn.Module, name: str) -> Any:
    """A parameter, a buffer or a submodule of a module. nn.Module looks for each in Python, which takes half a
    microsecond; what is computed, as a parametrized weight is, stands in none of its dictionaries. Where torch.compile
    looks, each dictionary would be guarded."""
    if torch.compiler.is_compiling():
        return getattr(module, name)
    for of_kind in (module._parameters, module._buffers, module._modules):
        if name in of_kind:
            return of_kind[name]
    return getattr(module, name)


_CONVOLUTIONS = frozenset((nn.Conv1d, nn.Conv2d))
#: Kernel, stride, padding and groups of convolutions that are one matrix product per position.
_POINTWISE = frozenset(((1,) * n, (1,) * n, (0,) * n, 1) for n in (1, 2))


def _type_of_ordinary(x: Tensor) -> torch.dtype | None:
    """The type of the x of an ordinary call, which nobody records, transforms or casts; None where it is another."""
    if is_observed() or _has_any_global_hook():  # first, as torch.compile would guard each later check
        return None
    if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
        return None
    if is_functorch_wrapped_tensor(x):  # left behind by a transform
        return None
    return x.dtype if x.dtype in plain.FLOATING else None


def _has_own_call(module: nn.Module) -> bool:
    """Whether a module of one of the kinds of _FORWARDS has hooks, or another forward than its kind."""
    of, kind = module.__dict__, type(module)
    if of["_forward_hooks"] or of["_forward_pre_hooks"] or of["_backward_hooks"] or of["_backward_pre_hooks"]:
        return True
    return _FORWARDS[kind] is not kind.forward or "forward" in of


def read_at_once(x: Tensor, modules: Iterable[nn.Module]) -> list[Any] | None:
    """Weight and bias of each submodule of an ordinary call, one after the other: each submodule is torch's own and
    nobody's hook stands on it, all is of one floating-point type, and no call is recorded, transformed or cast. None
    where this cannot be told at once; that says nothing yet.

    The checks of must_be_called and plain.serves in one room. They take little in a loop of their own, and four times
    that between operators, whose code has pushed theirs out of the caches: there it is the size of a check that costs.
    """
    if (dtype := _type_of_ordinary(x)) is None:
        return None
    found: list[Any] = []
    for module in modules:
        kind, of = type(module), module.__dict__
        if kind not in _READ_AT_ONCE or _has_own_call(module):
            return None
        if kind in _CONVOLUTIONS and (of["kernel_size"], of["stride"], of["padding"], of["groups"]) not in _POINTWISE:
            return None
        parameters = of["_parameters"]
        for name in ("weight", "bias"):
            if name not in parameters:
                return None
            p = parameters[name]
            if p is not None and (type(p) is not nn.Parameter or p.dtype is not dtype or not p.is_cpu):
                return None
            found.append(p)
    return found


#: Kernel, stride, padding, dilation, groups and padding_mode of the convolution of a gate as published.
_OF_GATE = (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, "zeros"
_WEIGHT = 1, 2, 3, 3, 3


@functools.cache
def _names_of_gates(letters: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{letter}_conv", f"{letter}_bn") for letter in letters)


def read_gates_at_once(
    x: Tensor, modules: Mapping[str, nn.Module | None], letters: str, use_bn: bool
) -> unit_calls.GatesRead | None:
    """What an ordinary call of a unit of Attention in Attention reads of its submodules: as read_at_once, and the sizes
    of parameters fit, and all BNs are set alike, with fixed statistics or with running ones that move."""
    if (dtype := _type_of_ordinary(x)) is None:
        return None
    parameters: list[Any] = []
    fixed: list[Any] = []
    running: list[Any] = []
    eps: list[float] = []
    alike = None
    try:  # a name that is not there: a submodule was removed, or computes its parameters
        for of_conv, of_bn in _names_of_gates(letters):
            conv = modules[of_conv]
            of = conv.__dict__
            set_as = of["kernel_size"], of["stride"], of["padding"], of["dilation"], of["groups"], of["padding_mode"]
            own = of["_parameters"]
            weight = own["weight"]
            if type(conv) is not nn.Conv3d or set_as != _OF_GATE or own["bias"] is not None or _has_own_call(conv):
                return None
            if type(weight) is not nn.Parameter or weight.dtype is not dtype or not weight.is_cpu:
                return None
            if weight.shape != _WEIGHT:
                return None
            if not use_bn:
                parameters += weight, None, None
                fixed += None, None
                eps.append(0.0)
                continue
            bn = modules[of_bn]
            of = bn.__dict__
            own, buffers = of["_parameters"], of["_buffers"]
            scale, shift, mean, var = own["weight"], own["bias"], buffers["running_mean"], buffers["running_var"]
            settings = of["training"], of["momentum"], of["track_running_stats"]
            alike = alike or settings
            if type(bn) is not nn.BatchNorm3d or settings != alike or _has_own_call(bn):
                return None
            for p, kind in ((scale, nn.Parameter), (shift, nn.Parameter), (mean, Tensor), (var, Tensor)):
                if p is None and kind is nn.Parameter:
                    continue
                if type(p) is not kind or p.dtype is not dtype or not p.is_cpu or p.numel() != 1:
                    return None
            parameters += weight, scale, shift
            fixed += mean, var
            running += mean, var, buffers["num_batches_tracked"]
            eps.append(of["eps"])
    except KeyError:
        return None
    training, momentum, tracks = alike or (False, 0.0, True)
    batch = (training,) * len(eps)
    if not training:
        return unit_calls.GatesRead(parameters, Buffers(fixed), batch, eps, 0.0)
    if not tracks or type(momentum) is not float or not all(map(is_number_of_batches, running[2::3])):
        return None
    return unit_calls.GatesRead(parameters, Buffers((), running), batch, eps, momentum)


#: Stride, dilation, groups and padding_mode of the convolution of CBAM's spatial gate as published.
_OF_MAP = (1, 1), (1, 1), 1, "zeros"
_LAYERS_OF_MLP = (nn.Flatten, nn.Linear, nn.ReLU, nn.Linear)
#: Where the parameters of the spatial gate would stand.
_NO_GATE = None, None, None


def is_hooked(module: nn.Module) -> bool:
    """Whether a module that is not called would miss it: it has hooks, or a forward of its own."""
    of = module.__dict__
    hooks = of["_forward_hooks"] or of["_forward_pre_hooks"] or of["_backward_hooks"] or of["_backward_pre_hooks"]
    return bool(hooks) or "forward" in of


def read_cbam_at_once(x: Tensor, mlp: nn.Module, conv: nn.Module | None, bn: Any) -> cbam_calls.CbamRead | None:
    """What an ordinary call of CBAM reads of its submodules: as read_at_once, and BN has fixed statistics or running
    ones that move. conv: None without a spatial gate."""
    if (dtype := _type_of_ordinary(x)) is None:
        return None
    parameters: list[Any] = []
    layers: tuple[Any, ...] = (*mlp._modules.values(),)
    if type(mlp) is not nn.Sequential or (*map(type, layers),) != _LAYERS_OF_MLP:
        return None
    if any(map(is_hooked, (mlp, *layers))):
        return None
    try:  # a name that is not there: a submodule computes its parameters
        for layer in layers[1::2]:
            own = layer.__dict__["_parameters"]
            parameters += own["weight"], own["bias"]
        if conv is None:
            parameters += _NO_GATE
            return _of_ordinary(parameters, dtype, cbam_layer.Buffers(), False, 0.0)
        of = conv.__dict__
        set_as, (k, width) = (of["stride"], of["dilation"], of["groups"], of["padding_mode"]), of["kernel_size"]
        own = of["_parameters"]
        if type(conv) is not nn.Conv2d or set_as != _OF_MAP or own["bias"] is not None or is_hooked(conv):
            return None
        if k != width or not k % 2 or of["padding"] != (k // 2, k // 2) or own["weight"].shape != (1, 2, k, k):
            return None
        of = bn.__dict__
        if type(bn) is not nn.BatchNorm2d or is_hooked(bn):
            return None
        buffers = of["_buffers"]
        fixed = buffers["running_mean"], buffers["running_var"]
        parameters += own["weight"], of["_parameters"]["weight"], of["_parameters"]["bias"]
        for p in (*fixed, *parameters[5:]):
            if p is not None and p.numel() != 1:
                return None
        if fixed[0] is None or fixed[1] is None or {type(fixed[0]), type(fixed[1])} != {Tensor}:
            return None
        if not of["training"]:
            return _of_ordinary(parameters, dtype, cbam_layer.Buffers(fixed), False, of["eps"])
        tracked, momentum = buffers["num_batches_tracked"], of["momentum"]
        if not of["track_running_stats"] or type(momentum) is not float or not is_number_of_batches(tracked):
            return None
        return _of_ordinary(parameters, dtype, cbam_layer.Buffers((), (*fixed, tracked), momentum), True, of["eps"])
    except KeyError:
        return None


def _of_ordinary(
    parameters: list[Any], dtype: torch.dtype, buffers: cbam_layer.Buffers, batch: bool, eps: float
) -> cbam_calls.CbamRead | None:
    """What was read, if all parameters are torch's own, on the CPU and of one type."""
    for p in parameters:
        if p is not None and (type(p) is not nn.Parameter or p.dtype is not dtype or not p.is_cpu):
            return None
    return cbam_calls.CbamRead(parameters, buffers, batch, eps)


def can_be_read(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a submodule is of a kind and need not be called: its parameters and settings say what it does."""
    return isinstance(module, kind) and not must_be_called(module)


def plain_is_faster(x: Tensor, parameters: Iterable[Tensor | None], *work: int) -> bool:
    """Whether a layer of external attention is left to plain PyTorch: there is too little to fuse
    (backends.plain_is_faster), and PyTorch takes x and the parameters as they are (plain.serves).

    Args:
        x: Not empty, of sizes that fit.
        parameters: All that the layer has read.
        work: The arguments of choices.fusing_pays: rows, slots, products, calls.
    """
    return plain.serves(x, *parameters) and backends.plain_is_faster(x.device, *work)


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a module is a convolution that is one matrix product per position: a kernel of one, all else plain."""
    return (
        isinstance(conv, _ConvNd)
        and conv.groups == 1
        and max(conv.kernel_size) == max(conv.stride) == 1
        and (type(conv.padding) is str or max(conv.padding) == 0)  # "same" and "valid" are none then
    )


def is_gate_convolution(conv: nn.Module, with_bias: bool = False) -> bool:
    """Whether a module is the convolution of a gate as published: 3x3x3, zeros around, no bias unless that is allowed,
    all else plain."""
    return (
        isinstance(conv, nn.Conv3d)
        and (conv.kernel_size, conv.padding_mode) == ((3, 3, 3), "zeros")
        and (conv.padding == "same" or conv.padding == (1, 1, 1))
        and tuple(conv.stride) == tuple(conv.dilation) == (1, 1, 1)
        and conv.groups == 1
        and (with_bias or conv.bias is None)
    )


def norm_of(bn: _BatchNorm) -> Norm:
    """The parameters, buffers, mode and settings of a batch norm."""
    group = None
    if isinstance(bn, nn.SyncBatchNorm) and bn.training:
        group = _group_to_synchronize(bn)
    parameters, buffers = bn._parameters, bn._buffers
    if len(parameters) == 2 and len(buffers) == 3:  # as nn.Module looks for each in Python
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, tracked = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    else:
        weight, bias, mean, var, tracked = (held(bn, name) for name in Norm._fields[:5])
    return Norm(weight, bias, mean, var, tracked, bn.training, bn.momentum, bn.eps, bn.track_running_stats, group)


def _group_to_synchronize(bn: nn.SyncBatchNorm) -> Any:
    """The process group whose members share the statistics, None where there is nobody to share with."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
