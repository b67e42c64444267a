"""The published wrapper of a frame network for video: one score a clip, and what its training needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .resnet import AIAResNet

#: The published parameter groups: name, multiplier of the learning rate and of the weight decay.
GROUPS = (
    ("first_conv_weight", 1, 1),
    ("first_conv_bias", 2, 0),
    ("normal_weight", 1, 1),
    ("normal_bias", 2, 0),
    ("BN scale/shift", 1, 0),
    ("custom_ops", 1, 1),
    ("ef_weight", 2, 1),
    ("ef_bias", 4, 0),
    ("lr5_weight", 5, 1),
    ("lr10_bias", 10, 0),
)


class VideoNet(nn.Module):
    """A frame network on clips: the score of a clip is the mean, over its frames, of what the network says about each.

    It takes x [B, T, 3, H, W] with T = base_model.num_segments, or [B, T * 3, H, W], the frames one after the other, as
    the published loader gives them. It returns scores [B, num_classes]. With T a multiple of num_segments a sample has
    several clips, and B counts clips in the scores.

    Keys are the published ones, without the "module." that checkpoints of DataParallel have
    (checkpoints.load_checkpoint takes both). The network is put in training mode.

    Args:
        base_model: Its classifier ``fc`` is replaced: by a new one if dropout is 0, else by dropout, with a new
            classifier outside, ``new_fc``. As published, that starts near zero.
        num_classes: The number of classes.
        dropout: The probability of dropout before the classifier.
        partial_bn: In training the batch norms of the units but the first are frozen: fixed statistics, no gradients.
        ef_lr5: See parameter_groups.
        fc_lr5: See parameter_groups.

    Raises:
        TypeError, ValueError: With the name of the argument, what came and what is expected.
    """

    def __init__(
        self,
        base_model: AIAResNet,
        num_classes: int,
        dropout: float = 0.5,
        partial_bn: bool = True,
        ef_lr5: bool = False,
        fc_lr5: bool = False,
    ):
        super().__init__()
        if not isinstance(base_model, AIAResNet):
            raise TypeError(f"base_model: got {type(base_model).__name__}, expected an AIAResNet")
        if not isinstance(base_model.fc, nn.Linear):
            raise ValueError("base_model: its classifier fc was replaced before, expected one that has it")
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected a number from 0 to below 1")
        self.ef_lr5, self.fc_lr5 = ef_lr5, fc_lr5
        self.base_model = base_model
        classifier = nn.Linear(base_model.fc.in_features, num_classes)
        nn.init.normal_(classifier.weight, 0, 0.001)
        nn.init.zeros_(classifier.bias)
        base_model.fc = classifier if dropout == 0 else nn.Dropout(dropout)
        self.new_fc = None if dropout == 0 else classifier
        self._partial_bn = partial_bn
        self.train()

    @property
    def num_segments(self) -> int:
        return self.base_model.num_segments

    def forward(self, x: Tensor) -> Tensor:
        scores = self.base_model(self._frames(x))
        if self.new_fc is not None:
            scores = self.new_fc(scores)
        return scores.unflatten(0, (-1, self.num_segments)).mean(1)

    def _frames(self, x: Tensor) -> Tensor:
        """x as [frames, 3, H, W]."""
        t = self.num_segments
        if x.ndim == 5 and x.shape[2] == 3 and x.shape[1] % t == 0:
            return x.flatten(0, 1)
        if x.ndim == 4 and x.shape[1] % (3 * t) == 0:
            return x.unflatten(1, (-1, 3)).flatten(0, 1)
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [B, T, 3, H, W] or [B, T * 3, H, W] with T = {t} or a multiple"
        )

    def _frozen_norms(self) -> list[_BatchNorm]:
        """What partial BN freezes. As published: 3-D batch norms, which the units alone have, but the first."""
        return [m for name, m in self.base_model.named_modules() if isinstance(m, _BatchNorm) and "eft" in name][1:]

    def partial_bn(self, enable: bool = True) -> None:
        """Freeze the units' batch norms but the first in training, or train them all.

        Args:
            enable: Whether to freeze them.
        """
        if self._partial_bn and not enable:
            for bn in self._frozen_norms():
                bn.weight.requires_grad_()
                bn.bias.requires_grad_()
        self._partial_bn = enable
        self.train(self.training)

    def train(self, mode: bool = True) -> VideoNet:
        super().train(mode)
        if mode and self._partial_bn:
            for bn in self._frozen_norms():
                bn.eval()
                bn.weight.requires_grad_(False)
                bn.bias.requires_grad_(False)
        return self

    def parameter_groups(self, lr: float | None = None, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Make the published groups for an optimizer, in the published order.

        Groups may be empty, as published, so that the optimizer's checkpoints load. Biases of the classifier have twice
        the learning rate, and no bias and no norm decays. ef_lr5 puts the units' convolutions in a group of twice (sic)
        the learning rate, fc_lr5 the classifier in groups of 5 and 10 times.

        With partial BN, as published, the groups hold no batch norm of the ResNet but the first: these keep their scale
        and shift, though their statistics move.

        Args:
            lr: The learning rate; each group then holds its own multiple of it.
            weight_decay: The weight decay, likewise.

        Returns:
            A dictionary for each group, with params, name, lr_mult and decay_mult.
        """
        groups: dict[str, dict[str, Any]] = {
            name: {"params": [], "name": name, "lr_mult": lr_mult, "decay_mult": decay_mult}
            for name, lr_mult, decay_mult in GROUPS
        }

        def put(group: str, parameter: Tensor | None) -> None:
            if parameter is not None:
                groups[group]["params"].append(parameter)

        stem = self.base_model.conv1, self.base_model.bn1
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm):
                if "eft" in name or module in stem or not self._partial_bn:
                    put("BN scale/shift", module.weight)
                    put("BN scale/shift", module.bias)
            elif isinstance(module, nn.Linear) and self.fc_lr5:
                put("lr5_weight", module.weight)
                put("lr10_bias", module.bias)
            elif isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                kind = "first_conv" if module in stem else "ef" if "eft" in name and self.ef_lr5 else "normal"
                put(f"{kind}_weight", module.weight)
                put(f"{kind}_bias", module.bias)
        for group in groups.values():
            if lr is not None:
                group["lr"] = lr * group["lr_mult"]
            if weight_decay is not None:
                group["weight_decay"] = weight_decay * group["decay_mult"]
        return list(groups.values())
