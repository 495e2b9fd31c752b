"""Sides of the step benchmarks: a loop as one writes it without a library, and ours, on the same images in memory.

Both copy the same bytes to the device in the same way: uint8 from the host, pinned where there is a GPU, on the stream
that computes. The bare loop then normalises, runs forward under autocast, loss, backward, SGD's step, and clears the
gradients. Ours does besides: the learning rate, the finite check, loss and counts, world-independent batch-norm
statistics, stop votes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.data.index import SAMPLE, ShardIndex
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.log.meter import Meter
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.run.state import Progress
from dist_trainer.run.step_sums import StepSums
from dist_trainer.tensors import State
from dist_trainer.train import train_step
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.learning_rate import LearningRate, LearningRateConfig
from dist_trainer.tricks.losses import LossConfig, build_loss
from dist_trainer.tricks.mixing import Mixing, MixingConfig
from dist_trainer.tricks.optimizers import OptimizerConfig, build_optimizer, param_groups

MEAN, STD = 0.5, 0.25
OPTIMIZER = OptimizerConfig(args={"momentum": 0.9, "nesterov": True}, weight_decay=5e-4)
HostBatches = list[tuple[torch.Tensor, torch.Tensor]]
"""(images uint8, labels), which take turns; pinned where there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: `batch` samples per rank and step, of `slots` micro-batches."""

    model: str
    batch: int
    pixels: int
    channels: int = 3
    classes: int = 10
    args: dict[str, Any] = field(default_factory=dict)
    slots: int = 1

    def build(self) -> nn.Module:
        return build_model(ModelConfig(name=self.model, args=self.args), self.classes, 0)

    def batches(self, world: World, count: int = 8) -> HostBatches:
        generator, pin = torch.Generator().manual_seed(world.rank), world.device.type == "cuda"
        shape = (self.batch, self.channels, self.pixels, self.pixels)
        return [
            (
                torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, pin_memory=pin),
                torch.randint(0, self.classes, (self.batch,), generator=generator, pin_memory=pin),
            )
            for _ in range(count)
        ]


Steps = Callable[[int], None]
"""Trains that many steps."""


def bare(
    task: Task,
    precision: str,
    world: World,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    ddp: bool,
    fused: bool,
) -> Steps:
    """A plain loop, over torch's DDP where `ddp`."""
    device = world.device
    model = task.build().to(device).to(memory_format=torch.channels_last)
    groups = param_groups(model, OPTIMIZER.weight_decay, OPTIMIZER.no_decay)
    sgd = torch.optim.SGD(groups, lr=0.01, fused=fused, **OPTIMIZER.args)
    network: nn.Module = model
    if ddp:
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def steps(count: int) -> None:
        for step in range(count):
            images, labels = (each.to(device, non_blocking=True) for each in batches[step % len(batches)])
            x = images.to(torch.float32, memory_format=torch.channels_last).mul_(1 / (255 * STD)).sub_(MEAN / STD)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(x)
            F.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
            sgd.step()
            sgd.zero_grad(set_to_none=True)

    return steps


def an_engine(
    task: Task,
    precision: str,
    world: World,
    config: EngineConfig,
    *,
    fused: bool | None = None,
    weights: State | None = None,
) -> tuple[Engine, Plan]:
    """Ours, on random weights or on these. `fused`: None does as a run does."""
    plan = make_plan(
        BatchConfig(global_batch=task.batch * world.size * task.slots, micro_batch=task.batch),
        Duration.parse("1000000step", "duration"),
        world=world.size,
        num_samples=task.batch * world.size * task.slots * 1000,
    )
    model, config = task.build(), replace(config, precision=precision)  # type: ignore[arg-type]
    if weights is not None:
        model.load_state_dict(weights)
    if fused is None:
        fused = world.device.type == "cuda" and not config.is_exact
    engine = build_engine(
        config,
        model=model,
        optimizer=build_optimizer(OPTIMIZER, model, 0.01, config.zero, fused=fused),
        loss=build_loss(LossConfig(label_smoothing=0.1)),
        mixing=Mixing(MixingConfig(), plan, 0),
        plan=plan,
        world=world,
        preprocess=Preprocess(mean=[MEAN] * task.channels, std=[STD] * task.channels, channels_last=True),
        seed=0,
    )
    return engine, plan


def a_run(engine: Engine, plan: Plan, world: World, ema: EmaConfig | None = None) -> Any:
    """What `train_step` uses of a run: no data, no folder."""
    meter, statistics = Meter(), RunningStatistics(engine.module, engine.is_exact)
    none = np.zeros(0, np.uint64)
    index = ShardIndex(
        root="", shards=(), stamps=(), sizes=none, first=none, samples=np.zeros(0, SAMPLE), class_names=()
    )
    bad_samples = BadSampleLog(index, "auto", "train")
    average = Ema(ema, engine.local_weights(), statistics.running, 0, 10**6) if ema is not None else None
    return SimpleNamespace(
        learner=SimpleNamespace(
            engine=engine, learning_rate=LearningRate(LearningRateConfig(peak=0.01), plan), ema=average
        ),
        record=SimpleNamespace(meter=meter, bad_samples=bad_samples),
        sums=StepSums(
            plan=plan,
            batch_norm=statistics,
            ema=average,
            meter=meter,
            bad_samples=bad_samples,
            listing=Path(os.devnull),
            stop_request=StopRequest(),
            world=world,
            is_exact=engine.is_exact,
        ),
        progress=Progress(),
        batch_norm=statistics,
    )


def a_batch(images: torch.Tensor, labels: torch.Tensor, step: int, slot: int) -> Batch:
    """Of samples that all count."""
    size = len(labels)
    ids = torch.zeros(size, dtype=torch.int64)
    return Batch(images, labels, torch.ones(size), ids, SlotAddress(step, slot), num_valid=size)


def ours(
    task: Task,
    precision: str,
    world: World,
    batches: HostBatches,
    config: EngineConfig,
    *,
    ema: EmaConfig | None = None,
    fused: bool | None = None,
) -> Steps:
    """The loop's own step."""
    engine, plan = an_engine(task, precision, world, config, fused=fused)
    run = a_run(engine, plan, world, ema)
    weight = torch.ones(task.batch, pin_memory=world.device.type == "cuda")

    def steps(count: int) -> None:
        for step in range(count):
            batch = a_batch(*batches[step % len(batches)], step, world.rank)
            batch.weight = weight
            train_step(run, step, iter([batch]))
        run.sums.finish()

    return steps
