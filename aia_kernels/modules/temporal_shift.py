"""The temporal shift as a module, without parameters or buffers."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


class TemporalShift(nn.Module):
    """C // fold_div channels from the next frame, as many from the previous, the others in place (arXiv 1811.08383).

    x and y: [B * num_segments, C, H, W] or [B, C, T, H, W]; see functional.temporal_shift.
    """

    def __init__(self, num_segments: int = 8, fold_div: int = 8):
        super().__init__()
        self.num_segments = num_segments
        self.fold_div = fold_div

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, fold_div={self.fold_div}"

    def forward(self, x: Tensor) -> Tensor:
        return functional.temporal_shift(x, self.num_segments, self.fold_div)
