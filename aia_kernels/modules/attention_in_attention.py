"""The units as modules: the published names, parameters and initialization, so that published checkpoints load.

Each gate d of C, T, H, W is two real submodules, ``<d>_conv`` (Conv3d 2 -> 1, 3x3x3, padding 1, no bias) and ``<d>_bn``
(BatchNorm3d(1)). They hold its parameters, mode and settings, and may be frozen, converted to SyncBatchNorm or
parametrized as usual. The unit reads them and does not call them. A submodule is called only if it is of another kind,
has other settings (a bias, a dilation) or has hooks; the reference then computes the unit around the calls.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..common.layouts import as_clips, as_input
from ..functional import unit_calls
from ..functional.checks import check_clips
from ..reference import UNITS, Gate, Unit, compose
from .recorded import one_call
from .submodules import can_be_read, held, is_gate_convolution, must_be_called, norm_of, read_gates_at_once


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


class AttentionInAttention(nn.Module):
    """Base of the units: y = x * G_outer(x * G_inner(x)), arXiv 2204.09303.

    It takes x [B * num_segments, C, H, W], contiguous or channels_last, or [B, C, T, H, W], contiguous or
    channels_last_3d, of the types of functional.attention_in_attention, and returns y, shaped and stored as x.

    Args:
        num_segments: T, the frames of a clip. Not used where x has five axes.
        use_BN: Whether each gate has a batch norm after its convolution.

    Raises:
        TypeError, ValueError: In forward, as functional.attention_in_attention.
    """

    unit: Unit
    #: Initializers of the convolutions after their construction, in the published order: it decides the random numbers.
    initializers: tuple[tuple[str, Callable[[Tensor], object]], ...] = ()

    def __init__(self, num_segments: int = 8, use_BN: bool = True):
        super().__init__()
        self.num_segments = num_segments
        self.use_BN = use_BN
        for letter in self.unit.letters:
            self.add_module(f"{letter}_conv", nn.Conv3d(2, 1, kernel_size=3, padding=1, bias=False))
            if use_BN:
                self.add_module(f"{letter}_bn", nn.BatchNorm3d(1))
        for letter, initialize in self.initializers:
            initialize(getattr(self, f"{letter}_conv").weight)

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, use_BN={self.use_BN}"

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, AttentionInAttention.forward, x)
        unit = self.unit
        if (read := read_gates_at_once(x, self._modules, unit.letters, self.use_BN)) is not None:
            y = unit_calls.at_once(x, unit, self.num_segments, read)
            if y is not None:
                return y
        gates = []
        for letter in self.unit.letters:
            conv = held(self, f"{letter}_conv")
            bn = held(self, f"{letter}_bn") if self.use_BN else None
            if (
                must_be_called(conv)
                or not is_gate_convolution(conv)
                or (bn is not None and not can_be_read(bn, _BatchNorm))
            ):
                return self._through_submodules(x)
            gates.append(Gate(held(conv, "weight"), None if bn is None else norm_of(bn)))
        return functional.attention_in_attention(x, self.unit.name, gates, self.num_segments)

    def _through_submodules(self, x: Tensor) -> Tensor:
        check_clips(x, self.num_segments)

        def gate(letter: str, pooled: Tensor) -> Tensor:
            z = getattr(self, f"{letter}_conv")(pooled)
            return (getattr(self, f"{letter}_bn")(z) if self.use_BN else z).sigmoid()[:, 0]

        return as_input(compose(as_clips(x, self.num_segments), self.unit, gate), x.ndim)


class C(AttentionInAttention):
    """Channel attention: y = x * g_C(x)."""

    unit = UNITS["C"]
    initializers = (("C", _kaiming),)


class ST(AttentionInAttention):
    """Spacetime attention: y = x * (g_T(x) + g_H(x) + g_W(x)) / 3."""

    unit = UNITS["ST"]
    initializers = (("T", _kaiming), ("H", _kaiming), ("W", _kaiming))


class CinST(AttentionInAttention):
    """Channel attention inside spacetime attention: y = x * G_ST(x * g_C(x)).

    As published, H_conv is initialized twice and W_conv keeps Conv3d's default.
    """

    unit = UNITS["CinST"]
    initializers = (
        ("C", _kaiming),
        ("T", nn.init.xavier_normal_),
        ("H", nn.init.xavier_normal_),
        ("H", nn.init.xavier_normal_),
    )


class STinC(AttentionInAttention):
    """Spacetime attention inside channel attention: y = x * g_C(x * G_ST(x))."""

    unit = UNITS["STinC"]
    initializers = (("C", nn.init.xavier_normal_), ("T", _kaiming), ("H", _kaiming), ("W", _kaiming))


class STinC2(STinC):
    """STinC with each spacetime gate averaged over the channels after its sigmoid."""

    unit = UNITS["STinC2"]
