"""The data of a run: found or indexed on one rank, opened on all, streamed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment
from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.config import DataConfig
from dist_trainer.data.decode import decoder_line
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.order import Kind
from dist_trainer.data.read import Bad, Reader
from dist_trainer.data.samples import choose_samples
from dist_trainer.data.stream import EvalStream, FixedSampleStream, TrainStream, cores_note
from dist_trainer.data.unindexed import SAID
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.world import World
from dist_trainer.engine.evaluate import EvalConfig, center_crop
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.plan import BatchConfig, Plan
from dist_trainer.shards.classes import bind_classes, compare_classes, read_classes, without_samples
from dist_trainer.shards.prepare import is_class_sorted, match_classes, numbering_note, open_index, prepare_index
from dist_trainer.storage.storage import Storage
from dist_trainer.tricks.precise_bn import PreciseBnConfig


@dataclass(frozen=True)
class RunData:
    """The indices of a run's data, mapped into memory."""

    train: ShardIndex
    """With data.source: stream, which has no index, the validation index, for its classes."""
    val: ShardIndex

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    @property
    def without_samples(self) -> dict[str, list[str]]:
        """Names of the classes that no training sample has; of those that have some, which no validation sample has."""
        missing = without_samples(self.train)
        return {"data.train": missing, "data.val": [name for name in without_samples(self.val) if name not in missing]}

    def for_outputs(self, names: Sequence[str], file: str) -> "RunData":
        """These data with their labels in the order of the outputs of a network, whose class names `file` lists.

        Raises UserError for classes that it does not know.
        """
        if compare_classes(self.train.class_names, names) == "same":
            return self
        source = f"{file}, the classes of the weights"
        return RunData(
            bind_classes("data.train", self.train, names, source), bind_classes("data.val", self.val, names, source)
        )

    @property
    def fingerprint(self) -> str:
        """The training set's part of the run's identity."""
        return self.train.fingerprint[:16]

    @property
    def val_fingerprint(self) -> str:
        """The validation set's, which may change between starts."""
        return self.val.fingerprint[:16]


def open_data(config: TrainConfig, world: World, terminal: Terminal) -> RunData:
    """Find the training and validation index, or make them, and open them on every rank (collective).

    Raises UserError for data that are missing, damaged or changed, and for two sets that do not fit each other.
    """
    found = on_main(world, lambda: _find_indices(config))
    for note in found["notes"]:
        terminal.say(note)
    opened = {name: open_index(path).expect(fingerprint) for name, (path, fingerprint) in found["indices"].items()}
    val = opened["val"]
    train = opened.get("train", val)
    if config.data.classes is not None:
        train = bind_classes("data.train", train, found["classes"], f"data.classes: {config.data.classes}")
        val = bind_classes("data.val", val, found["classes"], f"data.classes: {config.data.classes}")
    return RunData(train, match_classes(train, val, subset=config.eval.classes == "subset"))


def _find_indices(config: TrainConfig) -> dict[str, Any]:
    """{"indices": {"train": (path, fingerprint), "val": ...}, "classes": those of data.classes, "notes": lines for the
    user}; on one rank.
    """
    data = config.data
    fallback = config.run.root / ".index"
    names = ("train", "val") if data.source == "index" else ("val",)
    found = {
        name: prepare_index(
            f"data.{name}",
            getattr(data, name),
            options=data.storage_options,
            retry=data.retry,
            fallback=fallback,
            allow_empty=name == "val" and config.eval.classes == "subset",
        )
        for name in names
    }
    classes = None if data.classes is None else _listed_classes(data)
    notes = [note for _, note in found.values() if note]
    opened = {name: ShardIndex.load(Path(path), verify=False) for name, (path, _) in found.items()}
    if "train" in opened and classes is None and (note := numbering_note(opened["train"], opened["val"])):
        notes.append(note)
    notes += [decoder_line()] if config.augment.crop is not None else []
    notes += [SAID] if data.source == "stream" else []
    indices = {name: (path, opened[name].fingerprint) for name, (path, _) in found.items()}
    return {"indices": indices, "classes": classes, "notes": notes}


def _listed_classes(data: DataConfig) -> list[str]:
    assert data.classes is not None
    try:
        return list(read_classes(data.classes, Storage(data.storage_options, data.retry)))
    except OSError as error:
        raise UserError(f"data.classes: {data.classes}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"data.classes: {error}") from None


def order_of(config: DataConfig, train: ShardIndex) -> Kind:
    """The order that data.order says, or that fits the data."""
    if config.order != "auto":
        return config.order
    return "full" if is_class_sorted(train) else "window"


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What a run reads."""

    train: TrainStream
    val: EvalStream
    train_eval: EvalStream | None
    """Training samples that are scored beside the validation set."""
    bn_samples: FixedSampleStream | None
    """Training samples from which batch-norm is re-estimated."""
    notes: list[str]
    """Lines for the user."""

    def between_batches(self, call: Callable[[], None]) -> None:
        """Call it after every batch of all but training; what it raises ends that iteration."""
        for stream in self._fixed:
            stream.between = call

    def close(self) -> None:
        """End the loader workers of all but training, whose loader ends with its loop."""
        for stream in self._fixed:
            stream.close()

    @property
    def _fixed(self) -> list[EvalStream | FixedSampleStream]:
        return [stream for stream in (self.val, self.train_eval, self.bn_samples) if stream is not None]


def open_streams(config: TrainConfig, data: RunData, plan: Plan, augment: Augment, world: World) -> Streams:
    """Raises UserError for settings that do not fit the data."""
    kind, seed = order_of(config.data, data.train), config.run.seed
    train = TrainStream(data.train, plan, config.data, augment, kind, seed, world)
    is_sorted = kind == "full" and config.data.order == "auto"
    notes = ["data.order: full, since the training set is sorted by class"] if is_sorted else []
    return Streams(
        train=train,
        val=EvalStream(data.val, config.data, center_crop(config.eval), config.eval.batch, world),
        train_eval=train_eval_stream(config.eval, config.data, data.train, seed, world),
        bn_samples=bn_sample_stream(
            config.precise_bn, config.eval, config.batch, config.data, augment, data.train, seed, world
        ),
        notes=notes + [note for note in (train.warning(config.data), cores_note(config.data, world)) if note],
    )


def bn_sample_stream(
    config: PreciseBnConfig,
    evaluation: EvalConfig,
    batch: BatchConfig,
    data: DataConfig,
    augment: Augment,
    train: ShardIndex,
    seed: int,
    world: World,
) -> FixedSampleStream | None:
    """The training samples from which batch-norm is re-estimated, where that is configured. Raises UserError."""
    size = batch.micro_batch
    num_batches = config.num_slots(size, len(train))
    if not num_batches:
        return None
    transform = augment if config.transform == "train" else center_crop(evaluation)
    return FixedSampleStream(train, data, transform, num_batches, size, seed, world)


def train_eval_stream(
    config: EvalConfig, data: DataConfig, train: ShardIndex, seed: int, world: World
) -> EvalStream | None:
    """The training samples that are scored beside the validation set. Raises UserError."""
    if config.train_samples < 0:
        raise UserError(f"eval.train_samples: {config.train_samples} is negative; 0 scores none")
    if not config.train_samples or data.source == "stream":  # a stream has no index to draw from
        return None
    chosen = choose_samples(train, min(config.train_samples, len(train)), seed)
    return EvalStream(train, data, center_crop(config), config.batch, world, chosen)


def repaired_samples(index: ShardIndex, config: DataConfig, bad_samples: BadSampleLog) -> list[int]:
    """Known bad samples that have been repaired: their bytes match the index again."""
    reader = Reader(index, options=config.storage_options, retry=config.retry, cache=config.cache)
    ids = np.array([bad.sample for bad in bad_samples.known if bad.kind == "crc"], np.int64)
    return [sample for sample, data in zip(ids.tolist(), reader.read(ids), strict=True) if not isinstance(data, Bad)]
