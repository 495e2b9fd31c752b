"""Host memory that batches take between loader processes and the device: computed before a run, held against /dev/shm.

A loader process makes up to AHEAD batches that nobody has asked for, each in shared memory. On a GPU a thread
copies them to pinned memory, whose allocator takes the next power of two. While an evaluation runs, the batches of
training stay where they are.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.augment import Augment
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.stream import AHEAD, num_workers
from dist_trainer.distributed.world import World
from dist_trainer.errors import LocalError, plural, readable_size
from dist_trainer.run.blueprint import image_sizes

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class HandOver:
    """Bytes per rank, at most."""

    shared: int
    """In /dev/shm."""
    shared_at_once: int
    """Of them, what is certainly there at some time: a batch of each loader process."""
    pinned: int
    """On a GPU."""


def hand_over(
    config: TrainConfig, model: nn.Module, augment: Augment, train: ShardIndex | int, workers: int
) -> HandOver | None:
    """For `workers` loader processes per stream of a rank. None where the size of images is not known beforehand."""
    training = image_sizes(config.augment, config.data, None, augment, train)
    evaluation = {(config.eval.crop, config.eval.crop)} if config.eval.crop else training
    if not training or not evaluation:
        return None
    pixel, micro_batch = config.data.channels, config.batch.micro_batch
    batch = pixel * micro_batch * max(height * width for height, width in training)
    scored = pixel * config.eval.batch * max(height * width for height, width in evaluation)
    if config.precise_bn.num_samples:
        of_bn = batch if config.precise_bn.transform == "train" else scored // config.eval.batch * micro_batch
        scored = max(scored, of_bn)
    loaded = AHEAD * workers + 1 if workers else 0  # and the one that is used
    pinned = (AHEAD * workers + 2) * (_power_of_two(batch) + _power_of_two(scored))
    if config.ema.decay is not None and config.ema.device == "cpu":
        pinned += _power_of_two(sum(p.numel() * p.element_size() for p in model.parameters()))
    return HandOver(loaded * (batch + scored), workers * batch, pinned)


def _power_of_two(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def shared_memory_note(needs: HandOver | None, config: TrainConfig, world: World) -> str | None:
    """A warning where this host's ranks may need more than is free in /dev/shm.

    Raises LocalError where they need more than it has: loader processes would be killed in the middle of the run.
    """
    if needs is None or not needs.shared or not SHARED_MEMORY.is_dir() or world.local_rank:
        return None
    workers, ranks = num_workers(config.data, world), world.local_size
    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    who = f"{plural(workers, 'loader process')} of each of {plural(ranks, 'rank')} hand over batches through"
    remedy = "enlarge it (docker --shm-size, or -v /dev/shm:/dev/shm), lower data.workers, or set it to 0"
    if ranks * needs.shared_at_once > total:
        raise LocalError(
            f"data.workers: {who} {SHARED_MEMORY}, {readable_size(ranks * needs.shared_at_once)} at a time, and it has "
            f"{readable_size(total)}: {remedy}"
        )
    if ranks * needs.shared > free:
        return (
            f"data.workers: {who} {SHARED_MEMORY}, up to {readable_size(ranks * needs.shared)}, and "
            f"{readable_size(free)} are free: {remedy}"
        )
    return None
