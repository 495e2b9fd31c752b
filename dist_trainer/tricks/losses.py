"""Losses: functions of (logits, targets) that give one value per sample; the engine takes the weighted sum."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dist_trainer.by_name import Named, build
from dist_trainer.errors import UserError
from dist_trainer.tricks.mixing import Mix

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""float32 logits [m, K] and int64 labels [m] to float32 [m]. One with the attribute `soft_targets = True` gets float32
probabilities [m, K] instead of labels if samples are mixed."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(Named):
    """What is minimised."""

    name: str = "cross_entropy"
    """cross_entropy; bce (one yes-or-no question per class); or package.module:Name: called with args, gives
    f(float32 [m, K], int64 labels [m]) -> [m]."""
    args: dict[str, Any] = field(default_factory=dict)
    """bce: target_threshold (targets above it become 1, others 0) and sum_classes (over the classes the sum, not the
    mean: losses and gradients num_classes times as large). Or what your own loss takes."""
    label_smoothing: float = 0.0
    """Targets (1 - e) * onehot + e / K (Szegedy et al. 2015, section 7), once, also of mixed samples. Not for your own
    loss."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Softmax cross-entropy per sample."""

    label_smoothing: float = 0.0
    soft_targets: ClassVar[bool] = True

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy:
    """Sigmoid cross-entropy of every class, per sample their mean or sum (Wightman et al. 2021, section 2, and timm's).

    The mean's gradient is far smaller than cross_entropy's: for 1,000 classes 63 times with equal logits, and about K
    times once the classes that are not there are known. LAMB and Adam undo that; for sgd choose the sum or a larger
    rate. With a threshold, a class that makes up more than this of a mixed sample is wholly in it.
    """

    label_smoothing: float = 0.0
    target_threshold: float | None = None
    sum_classes: bool = False
    soft_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.target_threshold is not None and not 0.0 <= self.target_threshold < 1.0:
            raise ValueError(f"target_threshold {self.target_threshold} is not in [0, 1)")

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.dim() == 1:
            targets = one_hot(targets, logits)
        targets = targets * (1.0 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        if self.target_threshold is not None:
            targets = (targets > self.target_threshold).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.sum(1) if self.sum_classes else losses.mean(1)


LOSSES: dict[str, Any] = {"cross_entropy": CrossEntropy, "bce": BinaryCrossEntropy}


def build_loss(config: LossConfig) -> Loss:
    """Raises UserError for a loss that cannot be built."""
    if not 0.0 <= config.label_smoothing < 1.0:
        raise UserError(f"loss.label_smoothing: {config.label_smoothing} is not in [0, 1)")
    if config.name in LOSSES:
        if "label_smoothing" in config.args:
            raise UserError("loss.args.label_smoothing: is set by loss.label_smoothing; remove it")
        config = replace(config, args={**config.args, "label_smoothing": config.label_smoothing})
    elif config.label_smoothing and ":" in config.name:
        raise UserError(f"loss.label_smoothing: belongs to {' and '.join(LOSSES)}; {config.name} takes loss.args")
    loss: Loss = build("loss", config, LOSSES, kind="loss")
    return loss


def one_hot(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """int64 labels [m] as float32 [m, K]."""
    return torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)


def weighted_sum(
    loss: Loss, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, mix: Mix
) -> torch.Tensor:
    """Sum (scalar) of a micro-batch's losses: of weight * loss, with weights mixed as targets are.

    Sample i, with partner j, gives s * w_i * loss(y_i) + (1 - s) * w_j * loss(y_j), s being `mix.share`: a sample of
    weight 0 has no say, though its pixels are in its partner's picture, and the weights' sum stays. That is so for any
    loss of labels. One of `soft_targets` is asked once, for the mean of both targets with the sum of their weights,
    which is the same where it is linear in its targets (cross_entropy, bce without a threshold).

    float32 logits [m, K], int64 labels [m], float32 weight [m].
    """
    if mix.share == 1.0:
        return torch.dot(loss(logits, labels), weight)
    own, others = mix.share * weight, (1.0 - mix.share) * mix.partners(weight)
    if not getattr(loss, "soft_targets", False):
        return torch.dot(loss(logits, labels), own) + torch.dot(loss(logits, mix.partners(labels)), others)
    targets, total = one_hot(labels, logits), own + others
    targets = own[:, None] * targets + others[:, None] * mix.partners(targets)
    return torch.dot(loss(logits, targets / total.clamp_min(1e-12)[:, None]), total)
