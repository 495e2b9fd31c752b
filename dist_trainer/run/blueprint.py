"""What a config comes to before a folder, a device or an image is touched: `plan` reports it, `train` builds on it."""

from dataclasses import dataclass

import torch
from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment
from dist_trainer.data.index import ShardIndex
from dist_trainer.engine.evaluate import center_crop
from dist_trainer.errors import UserError
from dist_trainer.models import build_model
from dist_trainer.models.trial import try_images
from dist_trainer.plan import Duration, Plan
from dist_trainer.run.data import build_augment, plan_of
from dist_trainer.tricks.averaging import chosen_metric
from dist_trainer.tricks.freezing import freeze
from dist_trainer.tricks.learning_rate import LearningRate
from dist_trainer.tricks.losses import Loss, build_loss
from dist_trainer.tricks.mixing import Mixing
from dist_trainer.tricks.optimizers import build_optimizer
from dist_trainer.tricks.sync_bn import check_sync_bn


@dataclass(frozen=True)
class Every:
    """How often things happen; None: only at the end."""

    log: Duration | None
    eval: Duration | None
    checkpoint: Duration | None

    @classmethod
    def of(cls, config: TrainConfig) -> "Every":
        """Raises UserError naming the key of what is no duration."""

        def parse(name: str, text: str | None) -> Duration | None:
            if text is None:
                return None
            duration = Duration.parse(text, f"{name}.every")
            if not duration.amount:
                raise UserError(f"{name}.every: {text}: write null for never but at the end")
            return duration

        return cls(
            log=parse("log", config.log.every),
            eval=parse("eval", config.eval.every),
            checkpoint=parse("checkpoint", config.checkpoint.every),
        )


@dataclass(frozen=True)
class Parts:
    """`ema_start` is the step at which the moving average begins."""

    plan: Plan
    every: Every
    learning_rate: LearningRate
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    augment: Augment
    mixing: Mixing
    ema_start: int


def build_parts(config: TrainConfig, train: ShardIndex | int, num_classes: int, world: int) -> Parts:
    """For an index, or so many training samples, on `world` ranks. Raises UserError for whatever cannot be."""
    if config.data.retry.deadline >= config.run.timeout:
        raise UserError(
            f"run.timeout: {config.run.timeout:g} s must be longer than data.retry.deadline, "
            f"{config.data.retry.deadline:g} s, for which a rank may wait for storage"
        )
    plan = plan_of(config, train, world)
    augment = build_augment(config, plan)
    center_crop(config.eval)
    config.engine.check()
    if config.model.sync_bn:
        check_sync_bn(plan)
        if config.model.freeze:
            raise UserError(
                "model.sync_bn: frozen batch-norm layers see no other ranks; set it to false with model.freeze"
            )
    rate = LearningRate(config.lr, plan)
    model = build_model(config.model, num_classes, config.run.seed)
    freeze(model, config.model.freeze)
    for size in image_sizes(config, augment, train):
        try_images(model, config.model.name, (config.data.channels, *size), num_classes)
    return Parts(
        plan=plan,
        every=Every.of(config),
        learning_rate=rate,
        model=model,
        optimizer=build_optimizer(config.optimizer, model, rate.peak, config.engine.zero),
        loss=build_loss(config.loss),
        augment=augment,
        mixing=Mixing(config.mixing, plan, config.run.seed, side_of(config, train)),
        ema_start=check_weights(config, plan),
    )


def side_of(config: TrainConfig, train: ShardIndex | int) -> int | None:
    """Pixels of the shorter side of what the network sees in training, where that is certain."""
    if config.augment.transforms or config.data.stages:
        return None
    if config.augment.crop is not None:
        return config.augment.crop.start_size or config.augment.crop.size
    if isinstance(train, int):
        return None
    return min(int(train.samples[name].max()) for name in ("width", "height"))  # one size; 0 where it is not known


def image_sizes(config: TrainConfig, augment: Augment, train: ShardIndex | int) -> set[tuple[int, int]]:
    """(height, width) of what the network sees in training and in evaluation, as far as that is known beforehand."""
    sizes = {(size, size) for size in {config.eval.crop, *augment.sizes} if size is not None}
    if isinstance(train, ShardIndex) and not (config.augment.crop or config.augment.transforms or config.data.stages):
        sizes.add((int(train.samples["height"][0]), int(train.samples["width"][0])))
    return sizes


def check_weights(config: TrainConfig, plan: Plan) -> int:
    """The step at which the moving average begins. Raises UserError for what cannot be averaged or re-estimated."""
    config.ema.check()
    start = round(plan.steps(Duration.parse(config.ema.start, "ema.start")))
    if start >= plan.total_steps:
        raise UserError(f"ema.start: {config.ema.start} is step {start}, and the run has {plan.total_steps}")
    if config.precise_bn.num_slots(plan.micro_batch, plan.num_samples) and config.data.source == "stream":
        raise UserError("precise_bn.num_samples: needs an index to draw from; data.source: stream has none")
    ema = ["val_ema/top1"] if config.ema.decay is not None else []
    if config.averaging.metric == "auto" or config.averaging.top_k < 0:
        chosen_metric(config.averaging, ["val/top1", *ema])
    return start
