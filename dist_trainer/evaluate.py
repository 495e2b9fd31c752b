"""Exact validation: integer counts, one packed sum, the same integers on any world."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.stream import EvalStream
from dist_trainer.errors import UserError
from dist_trainer.inference import Inference


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the validation set is scored."""

    every: str | None = "1ep"
    """How often to validate; null: only at the end."""
    batch: int = 256
    """Samples per forward and rank."""
    resize: int | None = None
    """Resize the shorter side to so many pixels first."""
    crop: int | None = None
    """Then cut a square of so many pixels from the centre."""


@dataclass(frozen=True)
class EvalResult:
    correct1: int
    correct5: int
    num_samples: int
    loss: float
    """Mean cross-entropy, without label smoothing."""

    @property
    def metrics(self) -> dict[str, float]:
        """top1 and top5 as fractions, loss."""
        return {
            "top1": self.correct1 / self.num_samples,
            "top5": self.correct5 / self.num_samples,
            "loss": self.loss,
        }


def center_crop(config: EvalConfig) -> CenterCrop:
    for name in ("batch", "resize", "crop"):
        value: Any = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"eval.{name}: {value} is not positive")
    return CenterCrop(config.resize, config.crop)


def evaluate(engine: Inference, stream: EvalStream) -> EvalResult:
    """Score every sample of `stream` once, on all ranks together (collective).

    The module is in evaluation mode meanwhile and in its former mode afterwards. Raises RuntimeError unless exactly all
    samples were counted.
    """
    # correct1, correct5, counted, loss: float64 holds integers exactly up to 2**53
    sums = torch.zeros(4, dtype=torch.float64, device=engine.world.device)
    was_training = engine.module.training
    engine.module.eval()
    try:
        for batch in stream:
            logits = engine.logits(batch.images)
            labels, weight = batch.labels.to(logits.device), batch.weight.to(logits.device)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none")
            seen = weight > 0  # masks, no indexing by them: that would wait for the device at every batch
            correct1, correct5 = (hits[:, 0] & seen).sum(), (hits.any(dim=1) & seen).sum()
            sums += torch.stack([correct1, correct5, seen.sum(), torch.where(seen, loss, 0.0).double().sum()])
    finally:
        engine.module.train(was_training)
    dist.all_reduce(sums)
    top1, top5, counted, loss_sum = sums.tolist()
    if int(counted) != stream.num_samples:
        raise RuntimeError(
            f"validation counted {int(counted)} of {stream.num_samples} samples: a bug, please report it"
        )
    return EvalResult(int(top1), int(top5), int(counted), loss_sum / stream.num_samples)
