"""Slots to batches. A batch is a pure function of its address; ranks and loader workers only divide the addresses.

Nothing here counts, remembers or shuffles per rank: torch's DataLoader hands addresses to workers in turn and gives
their batches back in order, and after a restart the loop asks for the next address.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_trainer.comm import STOP_SIGNALS, World, cores, die_with_parent
from dist_trainer.data.augment import Augment, AugmentConfig, CenterCrop
from dist_trainer.data.decode import decode
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.order import EpochOrder, OrderSpec
from dist_trainer.data.read import TarReader
from dist_trainer.errors import LocalError, UserError
from dist_trainer.plan import Plan


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is decoded."""

    train: str
    """Training tars: a folder, one tar, or a brace pattern."""
    val: str
    """Validation tars, likewise."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per rank. auto: the cores that this job really has, less one per rank that computes."""
    order: Literal["window", "full", "none"] = "window"
    """window mixes blocks of neighbouring samples, full permutes every sample, none keeps the tars' order."""
    channels: Literal[1, 3] = 3
    """Decode to grey (1) or RGB (3)."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per channel, of pixels in [0, 1]."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Per channel, of pixels in [0, 1]."""


@dataclass(frozen=True)
class EvalAddress:
    """Validation batch `number`: samples [number * size, (number + 1) * size); a ghost counts nothing."""

    number: int
    size: int
    ghost: bool = False


@dataclass(frozen=True)
class SlotAddress:
    """Slot `slot` of training step `step`; a ghost stands in for a slot that this rank does not own."""

    step: int
    slot: int
    ghost: bool = False


@dataclass
class Batch:
    """One micro-batch. `weight` is 0 where a place holds a substitute; `problem` says why a batch could not be made."""

    images: torch.Tensor
    """uint8 [m, C, H, W]"""
    labels: torch.Tensor
    """int64 [m]"""
    weight: torch.Tensor
    """float32 [m], 0 or 1"""
    ids: torch.Tensor
    """int64 [m], sample numbers in the index"""
    address: SlotAddress | EvalAddress
    problem: str | None = None

    @property
    def ghost(self) -> bool:
        return self.address.ghost

    def pin_memory(self) -> "Batch":
        """DataLoader calls this on CUDA."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            weight=self.weight.pin_memory(),
        )


class _Samples(Dataset[Batch]):
    """Batches by address. Files open in the process that reads; a fault becomes the batch's `problem`."""

    def __init__(self, index: ShardIndex, channels: int) -> None:
        self._index, self._channels = index, channels
        self._reader: TarReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def _place(self, address: Any) -> tuple[np.ndarray, np.ndarray, int]:
        """(sample ids, weights, epoch)"""
        raise NotImplementedError

    def _transform(self, image: torch.Tensor, epoch: int, sample: int) -> torch.Tensor:
        raise NotImplementedError

    def _finish(self, images: torch.Tensor, epoch: int, ids: np.ndarray) -> torch.Tensor:
        return images

    def __getitem__(self, address: Any) -> Batch:
        ids, weight, epoch = self._place(address)
        problem = None
        try:
            images = self._finish(self._load(ids, epoch), epoch, ids)
        except UserError as error:
            problem, images = str(error), torch.zeros(0, dtype=torch.uint8)
        return Batch(
            images=images,
            labels=torch.from_numpy(self._index.samples["label"][ids].astype(np.int64)),
            weight=torch.from_numpy(weight.astype(np.float32) * (not address.ghost)),
            ids=torch.from_numpy(ids),
            address=address,
            problem=problem,
        )

    def _load(self, ids: np.ndarray, epoch: int) -> torch.Tensor:
        if self._reader is None:
            self._reader = TarReader(self._index)
        images: torch.Tensor | None = None
        for place, (sample, data) in enumerate(zip(ids.tolist(), self._reader.read(ids), strict=True)):
            try:
                image = self._transform(decode(data, self._channels), epoch, sample)
            except Exception as error:  # a transform of the user's may raise anything
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{self._index.describe(sample)}: {reason}") from None
            if image.dtype != torch.uint8:
                raise UserError(f"augment.transforms: gave {image.dtype} pixels; they must stay torch.uint8")
            if images is None:
                images = torch.empty((len(ids), *image.shape), dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{self._index.describe(sample)}: {tuple(image.shape)} pixels beside {tuple(images.shape[1:])} "
                    "in one batch; set augment.crop and eval.crop, which give every image one size"
                )
            images[place] = image
        assert images is not None
        return images


class TrainSamples(_Samples):
    """Training slots of `plan` in the order of `spec`, augmented."""

    def __init__(self, index: ShardIndex, plan: Plan, spec: OrderSpec, augment: Augment, channels: int) -> None:
        super().__init__(index, channels)
        self._plan, self._spec, self._augment = plan, spec, augment
        self._order: tuple[int, EpochOrder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_order": None}

    def _place(self, address: SlotAddress) -> tuple[np.ndarray, np.ndarray, int]:
        epoch, step = divmod(address.step, self._plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, EpochOrder(self._index.counts, self._spec, epoch))
        order = self._order[1]
        start = step * self._plan.global_batch + address.slot * self._plan.micro_batch
        stop = start + self._plan.micro_batch
        real = order.ids(min(start, order.size), min(stop, order.size))
        # The tail of an epoch is filled with the epoch's first samples at weight 0: batch-norm sees valid pixels.
        filling = order.ids(max(start, order.size) - order.size, max(stop, order.size) - order.size)
        return np.concatenate([real, filling]), np.arange(start, stop) < order.size, epoch

    def _transform(self, image: torch.Tensor, epoch: int, sample: int) -> torch.Tensor:
        return self._augment(image, epoch, sample)

    def _finish(self, images: torch.Tensor, epoch: int, ids: np.ndarray) -> torch.Tensor:
        mirrored = torch.from_numpy(self._augment.flips(epoch, ids))
        images[mirrored] = images[mirrored].flip(-1)
        return images


class EvalSamples(_Samples):
    """Every sample once, in index order, in batches whose content does not depend on the world."""

    def __init__(self, index: ShardIndex, transform: CenterCrop, channels: int) -> None:
        super().__init__(index, channels)
        self._center_crop = transform

    def _place(self, address: EvalAddress) -> tuple[np.ndarray, np.ndarray, int]:
        place = np.arange(address.number * address.size, (address.number + 1) * address.size)
        return place % len(self._index), place < len(self._index), 0

    def _transform(self, image: torch.Tensor, epoch: int, sample: int) -> torch.Tensor:
        return self._center_crop(image)


def _init_worker(worker: int) -> None:
    """A loader worker outlives neither its trainer nor a signal: Slurm and Ctrl-C signal every process of a job."""
    die_with_parent(signal.SIGKILL)
    for name in STOP_SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def num_workers(config: DataConfig, world: World) -> int:
    """Loader processes per rank: this rank's share of the cores, less the one that computes."""
    if config.workers == "auto":
        return max(0, min(cores() // world.local_size - 1, 16))
    if config.workers < 0:
        raise UserError(f"data.workers: {config.workers} is negative; 0 loads in the training process, auto decides")
    return config.workers


def _start_resource_tracker() -> None:
    """Start multiprocessing's helper so that it lives through SIGUSR1 as it does through SIGTERM and SIGINT.

    Slurm signals every process of a job; without its helper, each semaphore of a loader ends in a traceback.
    """
    if threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        resource_tracker.ensure_running()
        signal.signal(signal.SIGUSR1, former)


def _loader(samples: _Samples, addresses: Iterable[Any], workers: int, world: World) -> "DataLoader[Batch]":
    if workers:
        _start_resource_tracker()
    return DataLoader(
        samples,
        batch_size=None,  # an item is a whole micro-batch
        sampler=addresses,
        num_workers=workers,
        # Not fork (fsspec, CUDA and threads break), not forkserver (its server outlives a killed trainer).
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_init_worker,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
    )


def _checked(batch: Batch) -> Batch:
    if batch.problem:
        raise LocalError(batch.problem)
    return batch


@dataclass(frozen=True)
class _TrainAddresses:
    """What one rank runs, step by step: its slots, then ghosts (its last slot again), `plan.forwards` in all."""

    plan: Plan
    rank: int
    start: int

    def __iter__(self) -> Iterator[SlotAddress]:
        owned = self.plan.slots_of(self.rank)
        ghosts = self.plan.forwards - len(owned)
        for step in range(self.start, self.plan.total_steps):
            yield from (SlotAddress(step, slot) for slot in owned)
            yield from [SlotAddress(step, owned[-1], ghost=True)] * ghosts


class TrainStream:
    """This rank's training batches, step by step, from any step on."""

    def __init__(
        self, index: ShardIndex, plan: Plan, config: DataConfig, augment: AugmentConfig, seed: int, world: World
    ) -> None:
        self.spec = OrderSpec(seed=seed, lanes=plan.global_batch // plan.chunk, chunk=plan.chunk, kind=config.order)
        self._plan, self._world = plan, world
        self._samples = TrainSamples(index, plan, self.spec, Augment(augment, seed), config.channels)
        self._workers = num_workers(config, world)

    def steps(self, start: int) -> Iterator[tuple[int, Iterator[Batch]]]:
        """(step, its batches) for every step from `start`; use up the batches before asking for the next step.

        Loading runs ahead across steps and epochs, so an epoch's end drains nothing. Raises LocalError for
        data that cannot be read.
        """
        addresses = _TrainAddresses(self._plan, self._world.rank, start)
        batches = iter(_loader(self._samples, addresses, self._workers, self._world))
        for step in range(start, self._plan.total_steps):
            yield step, (_checked(next(batches)) for _ in range(self._plan.forwards))


@dataclass(frozen=True)
class _EvalAddresses:
    """Batches r, r + W, r + 2W, ... of one rank; as many on every rank, the surplus ones ghosts."""

    num_batches: int
    size: int
    world: World

    def __iter__(self) -> Iterator[EvalAddress]:
        for first in range(0, self.num_batches, self.world.size):
            number = first + self.world.rank
            ghost = number >= self.num_batches
            yield EvalAddress(self.num_batches - 1 if ghost else number, self.size, ghost)


class EvalStream:
    """This rank's share of the validation set; iterate it once per evaluation. Loader workers stay alive between."""

    def __init__(self, index: ShardIndex, config: DataConfig, transform: CenterCrop, batch: int, world: World) -> None:
        self.num_samples = len(index)
        addresses = _EvalAddresses(-(-len(index) // batch), batch, world)
        samples = EvalSamples(index, transform, config.channels)
        self._loader = _loader(samples, addresses, num_workers(config, world), world)

    def __iter__(self) -> Iterator[Batch]:
        """Raises LocalError for data that cannot be read."""
        return (_checked(batch) for batch in self._loader)
