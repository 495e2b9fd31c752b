"""How fast this machine is at a run's work, before the run: the network, the storage, the loader, the step."""

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.index import ShardIndex
from dist_trainer.data.read import Reader
from dist_trainer.data.stream import TrainStream
from dist_trainer.distributed.collectives import broadcast_json, gather_json
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.errors import LocalError
from dist_trainer.run.blueprint import Blueprint

SECONDS = 4.0
"""For each measurement."""


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def all_reduce_bytes_per_s(world: World, num_bytes: int) -> float | None:
    """Of a float32 sum as large as a step's gradients, by what each link carries: 2 (W - 1) / W of them (collective).

    None on one rank.
    """
    if world.size == 1:
        return None
    values = torch.zeros(max(1, num_bytes // 4), device=world.device)
    dist.all_reduce(values)  # the first one connects
    _synchronise(world)
    start = time.perf_counter()
    dist.all_reduce(values)
    _synchronise(world)
    count = int(broadcast_json(world, min(20, max(1, int(SECONDS / (time.perf_counter() - start + 1e-6))))))
    start = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(values)
    _synchronise(world)
    return count * 2 * (world.size - 1) / world.size * 4 * values.numel() / (time.perf_counter() - start)


def storage_bytes_per_s(config: TrainConfig, index: ShardIndex, world: World) -> float:
    """Of encoded training samples, read by this rank where no other one reads, through the cache as the run would.

    Raises LocalError for a file that cannot be read.
    """
    data = config.data
    reader = Reader(index, options=data.storage_options, retry=data.retry, cache=data.cache)
    start, num_bytes, lots = time.perf_counter(), 0, len(index) // 64 or 1
    for number in np.random.default_rng(world.rank).permutation(lots)[:2000]:
        read = reader.read(np.arange(64 * number, min(64 * (number + 1), len(index))))
        num_bytes += sum(len(each) for each in read if isinstance(each, bytes))
        if time.perf_counter() - start > SECONDS / 2:
            break
    return num_bytes / (time.perf_counter() - start)


def loader_images_per_s(stream: TrainStream, micro_batch: int) -> tuple[list[Batch], float]:
    """(the micro-batches of the first step, images per second of this rank's loader when nothing else runs).

    Raises LocalError for data that cannot be read.
    """
    steps = stream.steps(start=0)
    _, batches = next(steps)
    first = list(batches)
    for batch in first:
        if batch.outage:
            raise LocalError(batch.outage)
    start, count = time.perf_counter(), 0
    for _, batches in islice(steps, 10000):
        for _ in batches:
            count += micro_batch
        if time.perf_counter() - start > SECONDS:
            break
    return first, count / (time.perf_counter() - start) if count else float("inf")


def step_seconds(config: TrainConfig, blueprint: Blueprint, batches: list[Batch], world: World) -> tuple[float, Engine]:
    """(seconds of a training step without its data, the engine that made it) (collective).

    Uncompiled, since compiling takes minutes: `engine.compile` may need more images per second.
    """
    engine = build_engine(
        replace(config.engine, compile=False),
        model=blueprint.model,
        optimizer=blueprint.optimizer,
        loss=blueprint.loss,
        mixing=blueprint.mixing,
        plan=blueprint.plan,
        world=world,
        preprocess=Preprocess.of(config.data, config.model),
        seed=config.run.seed,
    )
    engine.set_lr(0.0)

    def step() -> float:
        start = time.perf_counter()
        for batch in batches:
            engine.forward_backward(batch)
        engine.step()
        _synchronise(world)
        return time.perf_counter() - start

    step()  # chooses kernels, allocates
    slowest = max(gather_json(world, step()))
    if count := min(20, int(SECONDS / slowest)):
        slowest = max(gather_json(world, sum(step() for _ in range(count)) / count))
    return slowest, engine
