"""Losses: functions of (logits, labels) that give one value per sample; the engine takes the weighted mean."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dist_trainer.errors import UserError
from dist_trainer.named import Named, build

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LossConfig(Named):
    """What is minimised."""

    name: str = "cross_entropy"
    """cross_entropy, or package.module:Name: called with args, gives f(float32 [m, K], int64 labels [m]) -> [m]."""
    args: dict[str, Any] = field(default_factory=dict)
    """For your own loss."""
    label_smoothing: float = 0.0
    """Targets (1 - e) * onehot + e / K (Szegedy et al. 2015, section 7); cross_entropy only."""


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy per sample, with smoothed labels."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    return loss


def build_loss(config: LossConfig) -> Loss:
    if not 0.0 <= config.label_smoothing < 1.0:
        raise UserError(f"loss.label_smoothing: {config.label_smoothing} is not in [0, 1)")
    if config.name == "cross_entropy":
        if config.args:
            raise UserError(f"loss.args: {config.args}: cross_entropy takes none; smooth with loss.label_smoothing")
        return cross_entropy(config.label_smoothing)
    if config.label_smoothing:
        raise UserError(f"loss.label_smoothing: belongs to cross_entropy; {config.name} takes loss.args")
    loss: Loss = build("loss", config, {"cross_entropy": cross_entropy}, kind="loss")
    return loss
