"""Layers on DTensors: a batch in shards, one for each process, with replicated parameters.

Samples depend on one another only through the statistics of batch norms, and the passes can share these over a process
group. So each process computes on the samples that it holds. Its gradient of a parameter is one term of a sum, which
DTensor calls Partial. A DTensor that is sharded over another axis is refused.

Nothing here imports torch.distributed.tensor before somebody has made a DTensor.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import MLP, Gate, Norm, Unit
from ..reference.norm import uses_batch

#: The types of tensors that are of no class of their own.
PLAIN = frozenset((Tensor, nn.Parameter))


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor or a parameter, and of no class of its own."""
    return type(value) in PLAIN


def is_distributed(value: Any) -> bool:
    """Whether a value is a DTensor."""
    if is_plain(value):
        return False
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(value, loaded.DTensor)


def refuse_distributed(name: str, value: Any) -> None:
    """Refuse a parameter that is a DTensor where x is none."""
    if is_distributed(value):
        raise TypeError(f"{name}: got a DTensor, expected a plain tensor, as x is (or x as a DTensor too)")


def attention_in_attention(
    function: Callable[..., Tensor], x: Tensor, unit: Unit, gates: Sequence[Gate], num_segments: int
) -> Tensor:
    """functional.attention_in_attention, which is ``function``, on a DTensor x [B * T, C, H, W] or [B, C, T, H, W]."""
    batch = _Batch("x", x, num_segments if x.ndim == 4 else 1)
    own = [
        Gate(batch.parameter(f"weight of gate {letter}", weight), batch.norm(f"gate {letter}", norm))
        for letter, (weight, norm) in zip(unit.letters, gates, strict=True)
    ]
    return batch.joined(function(batch.own(x), unit.name, own, num_segments))


def temporal_shift(function: Callable[..., Tensor], x: Tensor, num_segments: int, fold_div: int) -> Tensor:
    """functional.temporal_shift on a DTensor x [B * T, C, H, W] or [B, C, T, H, W]."""
    batch = _Batch("x", x, num_segments if x.ndim == 4 else 1)
    return batch.joined(function(batch.own(x), num_segments, fold_div))


def cbam(function: Callable[..., Any], x: Tensor, mlp: MLP | None, gate: Gate | None, pool_types: Sequence[str]) -> Any:
    """functional.cbam or causal_cbam, which is ``function``, on a DTensor x [B, C, H, W]."""
    batch = _Batch("x", x)
    if mlp is not None:
        mlp = MLP(*(batch.parameter(f"{name} of mlp", p) for name, p in zip(MLP._fields, mlp, strict=True)))
    if gate is not None:
        gate = Gate(batch.parameter("weight of gate", gate.weight), batch.norm("gate", gate.norm))
    found = function(batch.own(x), mlp, gate, pool_types)
    return tuple(map(batch.joined, found)) if isinstance(found, tuple) else batch.joined(found)


def double_normalize(
    function: Callable[..., Tensor], logits: Tensor, padding_mask: Tensor | None, process_group: Any, **settings: Any
) -> Tensor:
    """functional.double_normalize on DTensor logits [B, ..., N, M]."""
    batch = _Batch("logits", logits, has_samples=logits.ndim > 2)
    mask = batch.mask(padding_mask, process_group)
    return batch.joined(function(batch.own(logits), padding_mask=mask, **settings))


def external_attention(
    function: Callable[..., Tensor],
    x: Tensor,
    parameters: dict[str, Tensor | None],
    padding_mask: Tensor | None,
    process_group: Any,
    dropout: float,
    **settings: Any,
) -> Tensor:
    """functional.external_attention on a DTensor x [B, N, d]; parameters by their names."""
    batch = _Batch("x", x)
    mask = batch.mask(padding_mask, process_group)
    own = {
        name: batch.parameter(name, p) if p is None or p.ndim < 4 else batch.samples(name, p)
        for name, p in parameters.items()
    }
    with batch.random_numbers() if dropout else contextlib.nullcontext():
        return batch.joined(function(batch.own(x), **own, padding_mask=mask, dropout=dropout, **settings))


def external_attention_block(
    function: Callable[..., Tensor],
    x: Tensor,
    key: Tensor,
    value: Tensor,
    norm: Any,
    tensors: dict[str, Any],
    **settings: Any,
) -> Tensor:
    """functional.external_attention_block on a DTensor x [B, C, H, W]; tensors: value_bias and residual."""
    batch = _Batch("x", x)
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f"norm: got {type(norm).__name__}, expected a reference.Norm or None, as x is a DTensor")
    own = batch.parameter("key", key), batch.parameter("value", value), batch.norm("norm", norm)
    residual = tensors["residual"]
    if not isinstance(residual, bool):
        residual = batch.samples("residual", residual)
    bias = batch.parameter("value_bias", tensors["value_bias"])
    return batch.joined(function(batch.own(x), *own, value_bias=bias, residual=residual, **settings))


def linear_attention(
    function: Callable[..., Tensor],
    x: Tensor,
    parameters: dict[str, Any],
    padding_mask: Tensor | None,
    process_group: Any,
    settings: dict[str, Any],
) -> Tensor:
    """A function of functional/linear_attention.py on a DTensor x; parameters by their names, biases a list of them."""
    batch = _Batch("x", x)
    mask = batch.mask(padding_mask, process_group)
    own: dict[str, Any] = {name: batch.parameter(name, p) for name, p in parameters.items() if name != "biases"}
    if "biases" in parameters:
        own["biases"] = [batch.parameter("biases", p) for p in parameters["biases"]]
    masks = {} if mask is None else {"padding_mask": mask}
    return batch.joined(function(batch.own(x), **own, **masks, **settings))


class _Batch:
    """How the samples of x lie on a mesh. What one process refuses, every process refuses, so that none waits for
    another.
    """

    def __init__(self, name: str, x: Tensor, samples: int = 1, has_samples: bool = True):
        """samples: how many entries of axis 0 make one sample. has_samples: whether axis 0 is that of samples."""
        self.name, self.x, self.mesh, self.placements = name, x, x.device_mesh, tuple(x.placements)
        if not all(p.is_replicate() or (has_samples and p.is_shard(0)) for p in self.placements):
            expected = "Shard(0), by samples, or Replicate()" if has_samples else "Replicate()"
            raise ValueError(f"{name}: got a DTensor placed {self.placements}, expected {expected} on each mesh axis")
        self.sharded = [i for i, p in enumerate(self.placements) if p.is_shard() and self.mesh.size(i) > 1]
        lengths = [x.shape[0]]
        for axis in self.sharded:
            lengths = [part for length in lengths for part in _parts(length, self.mesh.size(axis))]
        if x.shape[0] and (0 in lengths or any(length % samples for length in lengths)):
            of_frames = f", each of {samples} frames," if samples > 1 else ""
            raise ValueError(
                f"{name}: got a DTensor of shape {tuple(x.shape)} whose shards have {lengths} entries of axis 0, "
                f"expected whole samples{of_frames} on every process, one at least"
            )

    def own(self, x: Tensor) -> Tensor:
        """The samples of this process."""
        return x.to_local(grad_placements=self.placements)

    def parameter(self, name: str, p: Tensor | None) -> Tensor | None:
        """A replicated parameter, whose gradient is a sum over the shards."""
        from torch.distributed.tensor import Partial, Replicate

        if p is None:
            return None
        self._check(name, p, [Replicate()] * self.mesh.ndim)
        return p.to_local(grad_placements=[Partial() if a.is_shard() else Replicate() for a in self.placements])

    def samples(self, name: str, tensor: Tensor) -> Tensor:
        """The part of another tensor that belongs to the samples of this process."""
        self._check(name, tensor, self.placements)
        return self.own(tensor)

    def mask(self, mask: Tensor | None, process_group: Any) -> Tensor | None:
        if process_group is not None:
            raise ValueError(f"process_group: got one beside a DTensor, expected None: {self.name} names its own mesh")
        if mask is None:
            return None
        self._check("padding_mask", mask, self.placements)
        return mask.to_local()

    def norm(self, name: str, norm: Norm | None) -> Norm | None:
        """The norm with the statistics of the batch, where it uses them, taken over all shards."""
        if not isinstance(norm, Norm):
            return norm
        weight, bias = (self.parameter(f"BN's {field} of {name}", getattr(norm, field)) for field in ("weight", "bias"))
        with torch.no_grad():  # the buffers themselves, to be moved in place
            names = ("running_mean", "running_var", "num_batches_tracked")
            buffers = [self.parameter(f"BN's {field} of {name}", getattr(norm, field)) for field in names]
        own = norm._replace(weight=weight, bias=bias, process_group=None, **dict(zip(names, buffers, strict=True)))
        if not (uses_batch(norm) and self.sharded and self.x.numel()):
            return own
        if len(self.sharded) > 1:
            raise ValueError(
                f"{self.name}: got a DTensor placed {self.placements}, sharded on several axes of its mesh, expected "
                f"one: the statistics of {name} are shared over one process group"
            )
        # Without running statistics a norm uses the batch in evaluation too, and only a training one shares.
        return own._replace(process_group=self.mesh.get_group(self.sharded[0]), training=True)

    @contextlib.contextmanager
    def random_numbers(self) -> Iterator[None]:
        """A generator for each shard, the same in all processes that hold it, whatever their own generators say."""
        from torch.distributed import broadcast

        seed = torch.randint(2**62, (), device="cpu").to(self.x.device)
        for axis in range(self.mesh.ndim):
            broadcast(seed, group=self.mesh.get_group(axis), group_src=0)
        shard = 0
        for axis in self.sharded:
            shard = shard * self.mesh.size(axis) + self.mesh.get_local_rank(axis)
        device = self.x.device
        generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
        state = generator.get_state()
        generator.manual_seed(int(seed) + shard)
        try:
            yield
        finally:
            generator.set_state(state)

    def joined(self, y: Tensor) -> Tensor:
        """The y of all processes. Axis 0 is the outermost in memory, so its length is in no stride."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.x.shape[0], *y.shape[1:]))
        return DTensor.from_local(y, self.mesh, self.placements, run_check=False, shape=shape, stride=y.stride())

    def _check(self, name: str, tensor: Tensor, placements: Sequence[Any]) -> None:
        placements = tuple(placements)
        if not is_distributed(tensor):
            kind = "a plain tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {kind}, expected a DTensor placed {placements}, as {self.name} is a DTensor")
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name}: got a DTensor on {tensor.device_mesh}, expected the mesh of {self.name}, {self.mesh}"
            )
        if tuple(tensor.placements) != placements:
            raise ValueError(f"{name}: got a DTensor placed {tuple(tensor.placements)}, expected {placements}")


def _parts(length: int, count: int) -> list[int]:
    """The lengths into which DTensor splits an axis, as torch.chunk does, with zeros where nothing is left."""
    step = -(-length // count)
    return [max(0, min(step, length - i * step)) for i in range(count)]
