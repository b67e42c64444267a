"""Triton backend, for CUDA devices and for the Triton interpreter: the passes of attention in attention, of CBAM, of
attention by a memory per sample and of the temporal shift (aia_kernels.schemas), and of external attention the
elementary ones (schemas.DOUBLE_NORM_PASSES) and the fused ones (aia_kernels.algorithms.external_attention_passes).

Maps keep the storage order of x with the pooled letter struck out.
"""

from ..algorithms.folds import fold, fold_back, fold_sums
from .cbam import (
    cbam_pool_channels,
    cbam_pool_positions,
    cbam_recalibrate,
    cbam_recalibrate_reduce,
    cbam_unpool,
    cbam_unpool_reduce,
)
from .double_norm import column_statistics, double_norm_, double_norm_backward_, double_norm_backward_reduce
from .gate import gate, gate_again
from .gate_backward import gate_backward, gate_backward_reduce
from .logits import attention_gradient, empty_attention, logits, normalize
from .memory_keys import memory_keys, memory_keys_backward_
from .memory_queries import memory_queries, memory_queries_backward_
from .pool import pool, unpool, unpool_reduce
from .recalibrate import recalibrate, recalibrate_reduce
from .residual import empty_signs, signed
from .running_statistics import move_statistics_
from .shift import temporal_shift
from .token_sums import moments, value_gradient
from .values import logits_gradient, values

__all__ = [
    "attention_gradient",
    "cbam_pool_channels",
    "cbam_pool_positions",
    "cbam_recalibrate",
    "cbam_recalibrate_reduce",
    "cbam_unpool",
    "cbam_unpool_reduce",
    "column_statistics",
    "double_norm_",
    "double_norm_backward_",
    "double_norm_backward_reduce",
    "empty_attention",
    "empty_signs",
    "fold",
    "fold_back",
    "fold_sums",
    "gate",
    "gate_again",
    "gate_backward",
    "gate_backward_reduce",
    "logits",
    "logits_gradient",
    "map_order",
    "memory_keys",
    "memory_keys_backward_",
    "memory_queries",
    "memory_queries_backward_",
    "moments",
    "move_statistics_",
    "normalize",
    "pool",
    "recalibrate",
    "recalibrate_reduce",
    "signed",
    "temporal_shift",
    "unpool",
    "unpool_reduce",
    "value_gradient",
    "values",
]


def map_order(order: str) -> str:
    """The order of a map's axes for a storage order of x (see aia_kernels.maps)."""
    return order
