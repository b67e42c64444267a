"""The papers' networks, with the published names, parameters and checkpoints. Each is imported on its first use."""

from __future__ import annotations

import importlib
from typing import Any

#: What each module of this package exports.
_EXPORTS = {
    "cbam_resnet": ("CBAMResNet", "cbam_resnet50"),
    "checkpoints": ("CheckpointError", "load_checkpoint", "load_imagenet"),
    "detection": ("ExternalAttentionFPN", "FeaturePyramid"),
    "dilated_resnet": ("DilatedResNet",),
    "eamlp": ("EAMLP", "eamlp_14", "eamlp_19", "eamlp_7"),
    "eanet": ("EANet",),
    "generation": ("Discriminator", "Generator", "SpectralExternalAttention", "gradient_penalty"),
    "linear_attention": ("LinearAttentionHead",),
    "point_cloud": ("PointCloudClassifier", "PointCloudSegmenter"),
    "resnet": ("AIAResNet", "aia_resnet50", "aia_resnet101"),
    "video": ("VideoNet",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
