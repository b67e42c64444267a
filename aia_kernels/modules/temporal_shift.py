"""The temporal shift as a module, without parameters or buffers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional
from .recorded import one_call


class TemporalShift(nn.Module):
    """C // fold_div channels from the next frame, as many from the previous, the others in place (arXiv 1811.08383).

    It takes x [B * num_segments, C, H, W] or [B, C, T, H, W] and returns y, shaped and stored as x: see
    functional.temporal_shift.

    Args:
        num_segments: T, the frames of a clip. Not used where x has five axes.
        fold_div: At least 2; a share of 2 / fold_div of the channels moves.
    """

    def __init__(self, num_segments: int = 8, fold_div: int = 8):
        super().__init__()
        self.num_segments = num_segments
        self.fold_div = fold_div

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, fold_div={self.fold_div}"

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_call(self, TemporalShift.forward, x)
        return functional.temporal_shift(x, self.num_segments, self.fold_div)
