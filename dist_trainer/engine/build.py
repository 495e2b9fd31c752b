"""The engine that a config names."""

import torch
from torch import nn

from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.ddp import TorchEngine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.engine.zero import ExactZero, ZeroEngine, ZeroStage0
from dist_trainer.plan import Plan
from dist_trainer.tricks.losses import Loss
from dist_trainer.tricks.mixing import Mixing


def build_engine(
    config: EngineConfig,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    mixing: Mixing,
    plan: Plan,
    world: World,
    preprocess: Preprocess,
    seed: int,
) -> Engine:
    """The engine that `config` names. Raises UserError for settings that exclude each other."""
    config.check()
    sharded = ExactZero if config.is_exact else ZeroEngine
    backend = TorchEngine if config.backend == "torch" else sharded if config.zero else ZeroStage0
    return backend(model, optimizer, loss, mixing, config, plan, world, preprocess, seed)
