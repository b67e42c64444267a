"""A model that has the published layers, made fast; and one that has the fused layers, made plain PyTorch again.

These exchange the class of a layer and nothing else: its parameters, buffers, submodules, settings, mode and hooks stay
the objects they were. So state dicts and optimizers stay valid, a layer that is used in several places is exchanged in
all of them, and wrappers (DataParallel, DistributedDataParallel, torch.compile) go on with what they wrap.

Published layers are known by their submodules (published.py), and become the fused layers. External attention that is
written in any other way is known by what flows (flow.py), and its forward is rewritten.
"""

from .compiler import fuse_backend
from .fusion import fuse
from .layers import convert
from .plain import to_reference
from .report import Converted, LeftAlone, Report

__all__ = ["Converted", "LeftAlone", "Report", "convert", "fuse", "fuse_backend", "to_reference"]
