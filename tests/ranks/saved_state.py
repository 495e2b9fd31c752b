"""Optimizer state for a checkpoint, from every ZeRO stage: on rank 0, one parameter at a time."""

import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist
from optimizers import Case, batch_of, build_net

from dist_trainer.distributed.world import World
from dist_trainer.engine import deepspeed
from dist_trainer.tricks.optimizers import OptimizerConfig


def main(world: World, argv: list[str]) -> None:
    for zero in (1, 2, 3):
        case = Case(world, OptimizerConfig(name="adamw"), 0.01, [])
        engine = case.engine(f"zero{zero}", build_net([]))
        for slot in case.plan.slots_of(world.rank):
            engine.forward_backward(batch_of(0, slot))
        assert engine.step()
        whole, alive = deepspeed.safe_get_full_optimizer_state, []
        most = 0

        def watched(parameter: Any, key: str, whole: Any = whole, alive: Any = alive) -> torch.Tensor:
            nonlocal most
            found: torch.Tensor = whole(parameter, key)
            alive.append(weakref.ref(found.untyped_storage()))
            gc.collect()
            most = max(most, sum(each() is not None for each in alive))
            return found

        deepspeed.safe_get_full_optimizer_state = watched
        state = engine.optimizer_state()
        deepspeed.safe_get_full_optimizer_state = whole
        names = {name for name, _ in engine.module.named_parameters()}
        if world.is_main:
            assert state.keys() == {f"{key}/{name}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
            assert all(value.device.type == "cpu" for value in state.values())
        else:
            assert state == {}
            assert len(alive) == 2 * len(names) and most <= 2, f"stage {zero}: {most} of {len(alive)} at a time"
        engine.close()
        dist.barrier()
