"""Slots to batches. A batch is a pure function of its address; ranks and loader workers only divide the addresses.

There is no state per rank: torch's DataLoader gives addresses to workers in turn and returns their batches in order.
After a restart the loop asks for the next address.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_trainer.data.augment import Augment, CenterCrop
from dist_trainer.data.batch import Batch, EvalAddress, SlotAddress
from dist_trainer.data.config import DataConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.order import ClassOrder, Kind, OrderSpec
from dist_trainer.data.parallel import as_worker, start_resource_tracker
from dist_trainer.data.samples import EvalSamples, FixedTrainSamples, TrainSamples, choose_samples
from dist_trainer.data.unindexed import StreamSpec, TarStream
from dist_trainer.distributed.cores import cores
from dist_trainer.distributed.slurm import cores_per_task, is_task
from dist_trainer.distributed.watchdog import beat
from dist_trainer.distributed.world import World
from dist_trainer.errors import LocalError, UserError, plural
from dist_trainer.plan import Plan

AHEAD = 2
"""Batches that a loader process makes before they are asked for (run/hand_over.py says what memory they take)."""


def num_workers(config: DataConfig, world: World) -> int:
    """Loader processes per rank: this rank's share of the cores, less the one that computes."""
    if config.workers == "auto":
        return max(0, min(cores_of_host(world) // world.local_size - 1, 16))
    if config.workers < 0:
        raise UserError(f"data.workers: {config.workers} is negative; 0 loads in the training process, auto decides")
    return config.workers


def cores_note(config: DataConfig, world: World) -> str | None:
    """A line where the ranks of this host and their loader processes want more cores than it has."""
    workers = num_workers(config, world)
    wanted, there = world.local_size * (1 + workers), cores_of_host(world)
    if wanted <= there:
        return None
    with_workers = f" with {plural(workers, 'loader process')} each" if workers else ""
    return (
        f"warning: {plural(world.local_size, 'rank')}{with_workers} on this host want {plural(wanted, 'core')}, and "
        f"there {'is' if there == 1 else 'are'} {there}: they will wait for each other"
    )


def cores_of_host(world: World) -> int:
    """Those that all ranks of this host have together."""
    return min(cores() * world.local_size, cores_per_task() * world.local_size) if is_task() else cores()


def _loader(
    samples: Dataset[Batch], addresses: Iterable[Any] | None, workers: int, world: World
) -> "DataLoader[Batch]":
    if workers:
        start_resource_tracker()
    return DataLoader(
        samples,
        batch_size=None,  # an item is a whole micro-batch
        sampler=addresses,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        # Not fork (fsspec, CUDA and threads break), not forkserver (its server outlives a killed trainer).
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=as_worker,
        persistent_workers=workers > 0,
        pin_memory=world.device.type == "cuda",
    )


def _on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on `device`. On an accelerator one is copied, on a stream of its own, while the one before is used.

    Raises LocalError for a batch that could not be made.
    """
    if device.type == "cpu":
        yield from map(_checked, batches)
        return
    side, ahead = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(side):
            copied = _checked(batch).to(device)
        done = side.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = copied, done
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, done: torch.cuda.Event) -> Batch:
    """Make the compute stream wait for the copy, and keep the memory until that stream has used it."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(done)
    for tensor in (batch.images, batch.labels, batch.weight):
        tensor.record_stream(current)
    return batch


def _checked(batch: Batch) -> Batch:
    beat()
    if batch.problem:
        raise LocalError(batch.problem)
    return batch


def order_samples(index: ShardIndex, kind: Kind, seed: int) -> int:
    """Samples in one epoch of an order: all; if balanced, the largest multiple of the number of classes."""
    return ClassOrder(index.samples["label"], seed).size if kind == "balanced" else len(index)


@dataclass(frozen=True)
class _TrainAddresses:
    """The addresses of one rank, step by step: its slots, then ghosts (its last slot again), `plan.forwards` in all."""

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
    """This rank's training batches, from any step on."""

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        config: DataConfig,
        augment: Augment,
        kind: Kind,
        seed: int,
        world: World,
    ) -> None:
        self._plan, self._world = plan, world
        self._workers = num_workers(config, world)
        self.spec: OrderSpec | StreamSpec
        self._samples: TrainSamples | TarStream
        if config.source == "stream":
            self.spec = StreamSpec(seed)
            self._samples = TarStream(
                config, index.num_classes, augment, plan.micro_batch, seed, world.rank, world.size
            )
        else:
            self.spec = OrderSpec(seed=seed, lanes=plan.samples_per_step // plan.chunk, chunk=plan.chunk, kind=kind)
            self._samples = TrainSamples(index, plan, self.spec, augment, config)
            self._is_cached = self._samples.is_cached
            self._sample_bytes = int(index.sizes.sum()) / len(index)

    def warning(self, config: DataConfig) -> str | None:
        """A warning if the cache cannot hold two windows of each lane of this node's ranks."""
        if not (isinstance(self.spec, OrderSpec) and self.spec.kind == "window" and self._is_cached):
            return None
        lanes = self.spec.lanes * self._world.local_size / self._world.size
        need = 2 * self.spec.window * lanes * self._sample_bytes
        if need <= config.cache.size_bytes:
            return None
        return (
            f"warning: data.cache.size: {config.cache.size} is less than the {need / 1e9:.2g} GB that the ranks of a "
            "node read at a time: blocks will be fetched more than once"
        )

    def steps(self, start: int) -> Iterator[tuple[int, Iterator[Batch]]]:
        """(step, its batches) for every step from `start`; use up the batches before asking for the next step.

        Loading runs ahead across steps and epochs, so an epoch's end drains nothing. Raises LocalError for
        data that cannot be read.
        """
        addresses = _TrainAddresses(self._plan, self._world.rank, start)
        if isinstance(self._samples, TarStream):
            loader = _loader(self._samples.serve(addresses), None, self._workers, self._world)
        else:
            loader = _loader(self._samples, addresses, self._workers, self._world)
        batches = _on_device(loader, self._world.device)
        for step in range(start, self._plan.total_steps):
            yield step, (next(batches) for _ in range(self._plan.forwards))


@dataclass
class _EvalAddresses:
    """Batches r, r + W, r + 2W, ... of one rank; as many on every rank, the surplus ones ghosts."""

    num_batches: int
    size: int
    world: World
    step: int | None = None

    def __iter__(self) -> Iterator[EvalAddress]:
        for first in range(0, self.num_batches, self.world.size):
            number = first + self.world.rank
            ghost = number >= self.num_batches
            yield EvalAddress(self.num_batches - 1 if ghost else number, self.size, ghost, self.step)


class _FixedBatches:
    """This rank's share of `num_batches` batches, the same at every iteration. Loader workers stay alive in between."""

    def __init__(self, samples: Dataset[Batch], num_batches: int, size: int, config: DataConfig, world: World) -> None:
        self.between: Callable[[], None] = lambda: None
        """Called after every batch; what it raises ends the iteration."""
        self._device = world.device
        self._addresses = _EvalAddresses(num_batches, size, world)
        self._loader: DataLoader[Batch] | None = _loader(samples, self._addresses, num_workers(config, world), world)

    def __iter__(self) -> Iterator[Batch]:
        """As many batches on every rank, surplus ones as ghosts. Raises LocalError for one that could not be made."""
        assert self._loader is not None, "closed"
        for batch in _on_device(self._loader, self._device):
            yield batch
            self.between()

    def close(self) -> None:
        """End the loader workers. The garbage collector would wait 5 s in vain for each (torch 2.14): it ends the
        threads that tell them before it calls DataLoader's own end."""
        self._loader = None


class EvalStream(_FixedBatches):
    """Every sample once: of the validation set, or those of the training set that are `chosen` (ids, int64 [n])."""

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        transform: CenterCrop,
        batch: int,
        world: World,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.index, self.num_samples = index, len(index) if chosen is None else len(chosen)
        samples = EvalSamples(index, config, transform, chosen)
        super().__init__(samples, -(-self.num_samples // batch), batch, config, world)


class FixedSampleStream(_FixedBatches):
    """`num_batches` micro-batches of `size` training samples, drawn once; under either transform."""

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        transform: Augment | CenterCrop,
        num_batches: int,
        size: int,
        seed: int,
        world: World,
    ) -> None:
        chosen = choose_samples(index, num_batches * size, seed)
        samples = (
            FixedTrainSamples(index, transform, config, chosen, transform.last_step)
            if isinstance(transform, Augment)
            else EvalSamples(index, config, transform, chosen)
        )
        super().__init__(samples, num_batches, size, config, world)

    def at(self, step: int) -> Iterator[Batch]:
        """The same draws, with the crop size and the ramps of this training step."""
        self._addresses.step = step
        return iter(self)
