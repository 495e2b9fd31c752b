"""Exact validation: integer counts, one packed sum, the same integers on any world."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_trainer.data.augment import CenterCrop
from dist_trainer.data.bad_samples import BadSample, BadSampleLog
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.stream import EvalStream
from dist_trainer.distributed.collectives import gather_json
from dist_trainer.distributed.exact_sums import words
from dist_trainer.distributed.world import World
from dist_trainer.engine.inference import Inference
from dist_trainer.errors import NotNegative, UserError, plural
from dist_trainer.log.console import Terminal
from dist_trainer.plan import DurationText
from dist_trainer.tensors import State


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the validation set is scored."""

    every: DurationText | None = "1ep"
    """How often to validate; null: only at the end."""
    batch: int = 256
    """Samples per forward and rank."""
    resize: int | None = None
    """First resize the shorter side to this many pixels; null: as data.preprocess says."""
    crop: int | None = None
    """Then crop a square of this many pixels from the centre; null: as data.preprocess says."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How they are resized, antialiased; auto: bilinear, or as data.preprocess says."""
    train_samples: NotNegative = 5000
    """Number of training samples that are scored too, always the same ones, with the evaluation's transform. The gap
    between training and validation shows overfitting and underfitting. 0: none."""
    classes: Literal["all", "subset"] = "all"
    """Whether validation must have all classes of training, by name, or may lack some; top-1 is over what is there."""
    bad: Literal["count_wrong", "fail"] = "count_wrong"
    """What happens at a validation sample that cannot be read or decoded: it counts as wrong, with a warning, or the
    run stops."""


@dataclass(frozen=True)
class EvalResult:
    correct1: int
    correct5: int
    num_samples: int
    """All samples, including bad ones, so that lost samples never raise the accuracy."""
    loss: float
    """Mean cross-entropy of the good samples, without label smoothing, whatever the training loss is."""
    bad: tuple[BadSample, ...] = ()
    """Samples that cannot be used; they count as wrong."""
    own: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)
    """This rank's part of `predictions`: ids, predicted classes, confidences."""

    @property
    def metrics(self) -> dict[str, float]:
        """top1 and top5 as fractions, loss."""
        return {
            "top1": self.correct1 / self.num_samples,
            "top5": self.correct5 / self.num_samples,
            "loss": self.loss,
        }


def predictions(result: EvalResult, index: ShardIndex, world: World) -> State:
    """What was predicted for each of the N samples of `index`: label, predicted (int32 [N], -1: bad) and confidence
    (float32 [N], its probability) (collective)."""
    ids, predicted, confidence = result.own
    found = torch.zeros(len(index), dtype=torch.int32)
    sure = torch.zeros(len(index), dtype=torch.float32)
    found[ids], sure[ids] = predicted + 1, confidence  # each sample is one rank's
    dist.all_reduce(found, group=world.host_group)
    dist.all_reduce(sure, group=world.host_group)
    labels = torch.from_numpy(index.samples["label"].astype(np.int32))
    return {"label": labels, "predicted": found - 1, "confidence": sure}


def center_crop(config: EvalConfig) -> CenterCrop:
    for name in ("batch", "resize", "crop"):
        value: Any = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"eval.{name}: {value} is not positive")
    return CenterCrop(config.resize, config.crop, config.interpolation)


def evaluate(engine: Inference, stream: EvalStream) -> EvalResult:
    """Score every sample of `stream` once, on all ranks together (collective).

    The module is in evaluation mode during this, and in its former mode afterwards. Raises UserError, on every rank,
    for unreachable storage, and RuntimeError unless exactly all samples were counted.
    """
    # correct1, correct5, counted, loss in one or two words: float64 holds integers exactly up to 2**53
    sums = torch.zeros(5, dtype=torch.float64, device=engine.world.device)
    bad: list[BadSample] = []
    outages: list[str] = []
    own: list[tuple[torch.Tensor, ...]] = []
    was_training = engine.module.training
    engine.module.eval()
    try:
        for batch in stream:
            logits = engine.logits(batch.images)
            labels, weight = batch.labels.to(logits.device), batch.weight.to(logits.device)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none")
            top = logits.max(dim=1)
            own.append((batch.ids, batch.weight > 0, top.indices, (top.values - logits.logsumexp(dim=1)).exp()))
            seen = weight > 0  # masks instead of indexing, which would wait for the device at every batch
            correct1, correct5 = (hits[:, 0] & seen).sum(), (hits.any(dim=1) & seen).sum()
            bad += batch.bad
            outages += [batch.outage] if batch.outage else []
            total = torch.where(seen, loss, 0.0).double().sum()
            high, low = words(total) if engine.is_exact else (total, torch.zeros_like(total))
            sums += torch.stack([correct1, correct5, seen.sum(), high, low])
    finally:
        engine.module.train(was_training)
    sums = torch.cat([sums, sums.new_tensor([len(bad), len(outages)])])
    dist.all_reduce(sums)
    top1, top5, counted, loss_sum, loss_rest, num_bad, num_outages = sums.tolist()
    if num_outages:
        raise UserError(next(line for rank in gather_json(engine.world, outages) for line in rank))
    if int(counted + num_bad) != stream.num_samples:
        raise RuntimeError(
            f"validation counted {int(counted)} and {int(num_bad)} bad of {stream.num_samples} samples: "
            "a bug, please report it"
        )
    if num_bad:
        met = gather_json(engine.world, [asdict(each) for each in bad])
        bad = sorted((BadSample(**each) for rank in met for each in rank), key=lambda each: each.sample)
    loss = (loss_sum + loss_rest) / max(counted, 1.0)
    return EvalResult(int(top1), int(top5), stream.num_samples, loss, tuple(bad), _own(own))


def _own(batches: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """(ids, predicted classes int32, confidences float32) of this rank's samples, on the host."""
    if not batches:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    ids, seen, predicted, confidence = (torch.cat(each) for each in zip(*batches, strict=True))
    return ids[seen], predicted.cpu()[seen].int(), confidence.cpu()[seen].float()


def report_bad(
    config: EvalConfig, index: ShardIndex, result: EvalResult, listing: Path | None, terminal: Terminal
) -> None:
    """Warn of bad validation samples and list them in `listing` (one rank's). Raises UserError for `eval.bad: fail`."""
    if not result.bad:
        return
    log = BadSampleLog(index, "auto", "val")
    if listing is not None:
        log.write(listing, log.add(result.bad))
    line = (
        f"{plural(len(result.bad), 'bad validation sample')} of {result.num_samples}: "
        f"{BadSampleLog.summary(result.bad)}. Run: dist-trainer shards check {index.location}"
    )
    if config.bad == "fail":
        raise UserError(f"eval.bad: fail: {line}")
    terminal.say(f"warning: they count as wrong: {line}")
