"""A model that has the published layers, made fast; and one that has the fused layers, made plain PyTorch again.

Both exchange the class of a layer and nothing else: its parameters, buffers, submodules, settings, mode and hooks stay
the objects they were. So state dicts and optimizers stay valid, a layer that is used in several places is exchanged in
all of them, and wrappers (DataParallel, DistributedDataParallel, torch.compile) go on with what they wrap.
"""

from .fuse import convert
from .plain import to_reference
from .report import Converted, LeftAlone, Report

__all__ = ["Converted", "LeftAlone", "Report", "convert", "to_reference"]
