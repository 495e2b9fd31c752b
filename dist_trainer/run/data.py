"""The data of a run: found or prepared on one rank, opened on all, planned, streamed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decoder_line
from dist_trainer.data.health import Health
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.order import Kind
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.samples import drawn
from dist_trainer.data.stream import DrawnStream, EvalStream, TrainStream, order_samples
from dist_trainer.data.unindexed import SAID
from dist_trainer.distributed.collectives import World
from dist_trainer.engine.evaluate import center_crop
from dist_trainer.errors import UserError
from dist_trainer.plan import Duration, Plan, make_plan
from dist_trainer.shards.prepare import is_class_sorted, match_classes, numbering_note, open_index, prepare_index


@dataclass(frozen=True)
class DataPlace:
    """Where the indices of a run's data are, and what was said of them. Found on one rank, used on all."""

    indices: dict[str, tuple[str, str]]
    """train (not for a stream of tars) and val: path and fingerprint"""
    notes: list[str]


def prepare_data(config: TrainConfig) -> dict[str, Any]:
    """Find the training and validation index, or make them; hold them against their shards. To be called on one rank.

    Returns a DataPlace as a dict. Raises UserError for data that are not there, damaged or changed.
    """
    config.data.check()
    fallback = Path(config.run.dir).expanduser() / ".index"
    names = ("train", "val") if config.data.source == "index" else ("val",)
    found = {
        name: prepare_index(
            f"data.{name}",
            getattr(config.data, name),
            options=config.data.storage_options,
            retry=config.data.retry,
            fallback=fallback,
        )
        for name in names
    }
    notes = [note for _, note in found.values() if note]
    opened = {name: ShardIndex.load(Path(path), verify=False) for name, (path, _) in found.items()}
    indices = {name: (path, opened[name].fingerprint) for name, (path, _) in found.items()}
    if "train" in opened and (note := numbering_note(opened["train"], opened["val"])):
        notes.append(note)
    notes += [decoder_line()] if config.augment.crop is not None else []
    notes += [SAID] if config.data.source == "stream" else []
    return asdict(DataPlace(indices, notes))


def open_data(config: TrainConfig, place: dict[str, Any]) -> tuple[ShardIndex, ShardIndex]:
    """(training, validation) index. Raises UserError when they do not fit each other.

    A stream of tars has no index; the one of validation then stands in its place, for its classes.
    """
    opened = {name: open_index(path).expect(fingerprint) for name, (path, fingerprint) in place["indices"].items()}
    val = opened["val"]
    train = opened.get("train", val)
    return train, match_classes(train, val)


def order_of(config: TrainConfig, train: ShardIndex) -> Kind:
    """The order that data.order says, or that fits the data."""
    if config.data.order != "auto":
        return config.data.order
    return "full" if is_class_sorted(train) else "window"


def plan_of(config: TrainConfig, train: ShardIndex | int, world: int) -> Plan:
    """The plan of a run on `world` ranks over an index, or so many samples. Raises UserError for what cannot be."""
    is_stream = config.data.source == "stream"
    if is_stream and config.augment.repeats > 1:
        raise UserError(f"augment.repeats: {config.augment.repeats} has no effect with data.source: stream")
    samples = train if isinstance(train, int) else order_samples(train, order_of(config, train), config.run.seed)
    return make_plan(
        config.batch,
        Duration.parse(config.duration, "duration"),
        world=world,
        num_samples=(config.data.num_samples or samples) if is_stream else samples,
        tail="carry" if is_stream else config.data.tail,  # a stream has no end to mask
        repeats=config.augment.repeats,
    )


@dataclass(frozen=True)
class Streams:
    """What a run reads: to train, to validate, to see how well the training set is known, to re-estimate batch-norm."""

    train: TrainStream
    val: EvalStream
    train_eval: EvalStream | None
    draw: DrawnStream | None
    notes: list[str]


def open_streams(
    config: TrainConfig, plan: Plan, augment: Augment, train: ShardIndex, val: ShardIndex, world: World
) -> Streams:
    """Raises UserError for what the config says of the data and cannot be."""
    kind = order_of(config, train)
    sorted_set = kind == "full" and config.data.order == "auto"
    stream = TrainStream(train, plan, config.data, augment, kind, config.run.seed, world)
    notes = ["data.order: full, since the training set is sorted by class"] if sorted_set else []
    return Streams(
        train=stream,
        val=EvalStream(val, config.data, center_crop(config.eval), config.eval.batch, world),
        train_eval=build_train_eval(config, train, world),
        draw=build_draw(config, augment, train, world),
        notes=notes + [note for note in [stream.warning(config.data)] if note],
    )


def build_augment(config: TrainConfig, plan: Plan) -> Augment:
    """The training transform. Raises UserError."""
    return Augment(config.augment, config.run.seed, plan, config.data.mean)


def build_draw(config: TrainConfig, augment: Augment, train: ShardIndex, world: World) -> DrawnStream | None:
    """The training samples from which batch-norm is re-estimated, where that is configured. Raises UserError."""
    size, precise = config.batch.micro_batch, config.precise_bn
    num_batches = precise.num_slots(size, len(train))
    if not num_batches:
        return None
    transform = augment if precise.transform == "train" else center_crop(config.eval)
    return DrawnStream(train, config.data, transform, num_batches, size, config.run.seed, world)


def build_train_eval(config: TrainConfig, train: ShardIndex, world: World) -> EvalStream | None:
    """The training samples that are scored beside the validation set. Raises UserError."""
    if config.eval.train_samples < 0:
        raise UserError(f"eval.train_samples: {config.eval.train_samples} is negative; 0 scores none")
    if not config.eval.train_samples or config.data.source == "stream":  # a stream has no index to draw from
        return None
    chosen = drawn(train, min(config.eval.train_samples, len(train)), config.run.seed)
    return EvalStream(train, config.data, center_crop(config.eval), config.eval.batch, world, chosen)


def mended_samples(index: ShardIndex, config: DataConfig, health: Health) -> list[int]:
    """Known bad samples whose bytes are those of the index again."""
    reader = Reader(index, options=config.storage_options, retry=config.retry, cache=config.cache)
    ids = np.array([bad.sample for bad in health.known if bad.kind == "crc"], np.int64)
    return [sample for sample, data in zip(ids.tolist(), reader.read(ids), strict=True) if not isinstance(data, Bad)]
