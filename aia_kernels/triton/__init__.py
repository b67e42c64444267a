"""Triton backend: the nine passes of aia_kernels.ops, for CUDA devices and for the Triton interpreter.

Maps keep the storage order of x with the pooled letter struck out.
"""

from .gate import gate_activate, gate_backward, gate_backward_reduce, gate_conv
from .pool import pool, unpool, unpool_reduce
from .recalibrate import recalibrate, recalibrate_reduce

__all__ = [
    "gate_activate",
    "gate_backward",
    "gate_backward_reduce",
    "gate_conv",
    "map_order",
    "pool",
    "recalibrate",
    "recalibrate_reduce",
    "unpool",
    "unpool_reduce",
]


def map_order(order: str) -> str:
    """The order of a map's axes for a storage order of x (see aia_kernels.maps)."""
    return order
