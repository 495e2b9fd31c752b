"""One process that trains a few steps on random images, without data, folder or command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore

from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.losses import LossConfig, build_loss
from dist_trainer.tricks.mixing import Mixing, MixingConfig
from dist_trainer.tricks.optimizers import OptimizerConfig, build_optimizer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
NUM_CLASSES, MICRO_BATCH, NUM_SLOTS = 10, 4, 2


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def micro_batch(step: int, slot: int, channels: int = 3, size: int = 32) -> Any:
    """Random images and labels, a function of the address."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    return SimpleNamespace(
        images=torch.randint(0, 256, (MICRO_BATCH, channels, size, size), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, NUM_CLASSES, (MICRO_BATCH,), generator=generator),
        weight=torch.ones(MICRO_BATCH),
        address=SimpleNamespace(step=step, slot=slot),
    )


@dataclass
class Trained:
    """`losses` by micro-batch; `gradients` of the last step by name; `statistics` as published."""

    engine: Engine
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    statistics: RunningStatistics


def build(
    model: nn.Module, *, lr: float = 1e-3, channels: int = 3, mixing: MixingConfig | None = None, **engine: Any
) -> Engine:
    config = EngineConfig(**{"backend": "torch", "precision": "fp32", **engine})
    batch = BatchConfig(global_batch=MICRO_BATCH * NUM_SLOTS, micro_batch=MICRO_BATCH)
    plan = make_plan(batch, Duration.parse("9step", "duration"), world=1, num_samples=800)
    preprocess = Preprocess(mean=[0.5] * channels, std=[0.25] * channels, channels_last=True)
    built = build_engine(
        config,
        model=model,
        optimizer=build_optimizer(OptimizerConfig(), model, lr, 0),
        loss=build_loss(LossConfig()),
        mixing=Mixing(mixing or MixingConfig(), plan, 7),
        plan=plan,
        world=ALONE,
        preprocess=preprocess,
        seed=7,
    )
    built.set_lr(lr)
    return built


def train(model: nn.Module, *, steps: int = 2, channels: int = 3, size: int = 32, **engine: Any) -> Trained:
    """A few steps at fp32, as the loop makes them."""
    built = build(model, channels=channels, **engine)
    statistics, losses = RunningStatistics(model), []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for slot in range(NUM_SLOTS):
            losses.append(float(built.forward_backward(micro_batch(step, slot, channels, size))))
            statistics.add()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert built.step()
        statistics.update(statistics.take(), NUM_SLOTS)
    statistics.publish()
    return Trained(built, losses, gradients, statistics)
