"""What follows from a config before a folder, a device or an image is touched. `plan` reports it, `train` uses it."""

from dataclasses import dataclass

import torch
from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment, AugmentConfig
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.stream import order_samples
from dist_trainer.engine.evaluate import center_crop
from dist_trainer.errors import UserError
from dist_trainer.log.names import ACCURACY, SCORES
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.trial import try_images, try_training
from dist_trainer.plan import Duration, Plan, make_plan
from dist_trainer.run.data import order_of
from dist_trainer.run.promise import check_promise
from dist_trainer.tricks.auxiliary import tie
from dist_trainer.tricks.averaging import chosen_metric
from dist_trainer.tricks.freezing import freeze
from dist_trainer.tricks.learning_rate import LearningRate
from dist_trainer.tricks.losses import Loss, build_loss
from dist_trainer.tricks.mixing import Mixing
from dist_trainer.tricks.optimizers import build_optimizer
from dist_trainer.tricks.sync_bn import check_sync_bn


@dataclass(frozen=True)
class Intervals:
    """How often things happen; None: only at the end."""

    log: Duration | None
    eval: Duration | None
    checkpoint: Duration | None

    @classmethod
    def of(cls, config: TrainConfig) -> "Intervals":
        """Raises UserError that names a key whose value is not a duration."""

        def parse(name: str, text: str | None) -> Duration | None:
            if text is None:
                return None
            duration = Duration.parse(text, f"{name}.every")
            if not duration.amount:
                instead = "1step" if name == "log" else "null for never but at the end"
                raise UserError(f"{name}.every: {text} is no interval; write {instead}")
            return duration

        return cls(
            log=parse("log", config.log.every),
            eval=parse("eval", config.eval.every),
            checkpoint=parse("checkpoint", config.checkpoint.every),
        )


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The parts of a run, checked, on the CPU and not yet connected."""

    plan: Plan
    intervals: Intervals
    learning_rate: LearningRate
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    augment: Augment
    mixing: Mixing
    ema_start: int
    """The step at which the moving average begins."""
    unused: list[str]
    """Names of parameters that get no gradient."""


def make_blueprint(
    config: TrainConfig, train: ShardIndex | int, num_classes: int, world: int, *, on_gpu: bool = False
) -> Blueprint:
    """For an index, or a number of training samples, on `world` ranks. Raises UserError for whatever cannot be."""
    check_timeouts(config)
    plan = plan_run(config, train, world)
    augment = build_augment(config, plan)
    center_crop(config.eval)
    config.engine.check()
    config.log.check(config.wandb)
    config.checkpoint.check(logged_metrics(config))
    config.run.check()
    if config.model.sync_bn:
        check_sync_bn(plan, config.model.freeze)
    rate = LearningRate(config.lr, plan)
    sizes = image_sizes(config.augment, config.data, config.eval.crop, augment, train)
    model = checked_model(config.model, num_classes, config.run.seed, config.data.channels, sizes)
    unused = try_to_train(config, model, num_classes, image_sizes(config.augment, config.data, None, augment, train))
    side = shorter_side(config.augment, config.data, train)
    fused = on_gpu and not config.engine.is_exact
    optimizer = build_optimizer(config.optimizer, model, rate.peak, config.engine.zero, fused=fused)
    check_promise(config, optimizer)
    return Blueprint(
        plan=plan,
        intervals=Intervals.of(config),
        learning_rate=rate,
        model=model,
        optimizer=optimizer,
        loss=build_loss(config.loss),
        augment=augment,
        mixing=Mixing(config.mixing, plan, config.run.seed, side),
        ema_start=check_weights(config, plan),
        unused=unused,
    )


def check_timeouts(config: TrainConfig) -> None:
    """Raises UserError when a rank that waits for storage would count as hung."""
    if config.data.retry.deadline >= config.run.timeout:
        raise UserError(
            f"run.timeout: {config.run.timeout:g} s must be longer than data.retry.deadline, "
            f"{config.data.retry.deadline:g} s, for which a rank may wait for storage"
        )


def plan_run(config: TrainConfig, train: ShardIndex | int, world: int) -> Plan:
    """The plan of a run on `world` ranks over an index, or a number of samples. Raises UserError for what cannot be."""
    is_stream = config.data.source == "stream"
    if is_stream and config.augment.repeats > 1:
        raise UserError(f"augment.repeats: {config.augment.repeats} has no effect with data.source: stream")
    samples = train if isinstance(train, int) else order_samples(train, order_of(config.data, train), config.run.seed)
    return make_plan(
        config.batch,
        Duration.parse(config.duration, "duration"),
        world=world,
        num_samples=(config.data.num_samples or samples) if is_stream else samples,
        tail="carry" if is_stream else config.data.tail,  # a stream has no end to mask
        repeats=config.augment.repeats,
    )


def build_augment(config: TrainConfig, plan: Plan) -> Augment:
    """The training transform. Raises UserError."""
    return Augment(config.augment, config.run.seed, plan, config.data.mean)


def checked_model(
    config: ModelConfig, num_classes: int, seed: int, channels: int, sizes: set[tuple[int, int]]
) -> nn.Module:
    """The network, its frozen parts frozen, tried on images of these sizes (height, width). Raises UserError."""
    model = build_model(config, num_classes, seed)
    freeze(model, config.freeze)
    for size in sizes:
        try_images(model, config.name, (channels, *size), num_classes)
    return model


def try_to_train(config: TrainConfig, model: nn.Module, num_classes: int, sizes: set[tuple[int, int]]) -> list[str]:
    """Names of the parameters that get no gradient from the smallest training images; no stage of ZeRO fails at them.

    Raises UserError for a network that cannot be trained on these images.
    """
    if not sizes:
        return []
    shape, micro_batch = (config.data.channels, *min(sizes)), config.batch.micro_batch
    count = 2 if config.model.sync_bn else micro_batch
    unused = try_training(model, config.model.name, shape, num_classes, count)
    if config.engine.zero == 0:
        parameters = dict(model.named_parameters())
        tie(model, [parameters[name] for name in unused])
    return unused


def shorter_side(augment: AugmentConfig, data: DataConfig, train: ShardIndex | int) -> int | None:
    """Pixels of the shorter side of training images as the network sees them, where that is certain."""
    if augment.transforms or data.stages:
        return None
    if augment.crop is not None:
        return augment.crop.start_size or augment.crop.size
    if isinstance(train, int):
        return None
    return min(int(train.samples[name].max()) for name in ("width", "height"))  # one size; 0 where it is not known


def image_sizes(
    config: AugmentConfig, data: DataConfig, eval_crop: int | None, augment: Augment, train: ShardIndex | int
) -> set[tuple[int, int]]:
    """(height, width) of images in training and in evaluation, as far as they are known beforehand."""
    sizes = {(size, size) for size in {eval_crop, *augment.sizes} if size is not None}
    if isinstance(train, ShardIndex) and not (config.crop or config.transforms or data.stages):
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
    if config.averaging.top_k:
        chosen_metric(config.averaging, logged_metrics(config))
    return start


def logged_metrics(config: TrainConfig) -> list[str]:
    """Metrics of the validation, by name: those of a network with batch-norm."""
    names = ["model", *(["ema"] if config.ema.decay is not None else [])]
    kinds = ["", *(["_bn"] if config.precise_bn.num_samples else [])]
    return [f"{SCORES[name + kind][0]}/{key}" for name in names for kind in kinds for key in ACCURACY]
