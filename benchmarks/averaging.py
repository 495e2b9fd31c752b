"""EMA per step, PreciseBN per pass, and what an evaluation of EMA moves, on a ResNet-50.

    torchrun --nproc-per-node 2 benchmarks/averaging.py [--quick] [--json FILE]     (or python, for one rank)

ema        One update of the average on rank 0, against timm's ModelEmaV3 and torch's swa_utils with its multi-tensor
           average, on the same parameters, taking turns.
precise    Re-estimating batch-norm from some micro-batches, against those forwards alone and against fvcore.
holding    Bringing the average into the module of every rank, and the training weights back.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from machine import SMOKE, Figures, figure, interleaved, machine, parser, save, table
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_trainer.distributed.world import World, init_world, shutdown_world
from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.tricks.ema import Ema, EmaConfig
from dist_trainer.tricks.losses import LossConfig, build_loss
from dist_trainer.tricks.mixing import Mixing, MixingConfig
from dist_trainer.tricks.precise_bn import re_estimate

DECAY = 0.9999


def network() -> nn.Module:
    return torchvision.models.resnet18() if SMOKE else torchvision.models.resnet50()  # type: ignore[no-any-return]


def engine_of(world: World, zero: int) -> Any:
    torch.manual_seed(0)
    model = network()
    batch = BatchConfig(global_batch=4 * world.size, micro_batch=4)
    plan = make_plan(batch, Duration.parse("9step", "duration"), world=world.size, num_samples=1000)
    preprocess = Preprocess(mean=[0.5] * 3, std=[0.5] * 3, channels_last=False)
    config = EngineConfig(backend="deepspeed" if zero else "torch", zero=zero, precision="fp32")  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mixing = Mixing(MixingConfig(), plan, 0)
    return build_engine(
        config,
        model=model,
        optimizer=optimizer,
        loss=build_loss(LossConfig()),
        mixing=mixing,
        plan=plan,
        world=world,
        preprocess=preprocess,
        seed=0,
    )


def ema_figures(world: World, rounds: int) -> Figures:
    """Seconds of one update."""
    results: Figures = {}
    for zero in (0, 1, 2, 3):
        engine = engine_of(world, zero)
        live = engine.local_weights() if engine.is_sharded or world.is_main else {}
        ours = Ema(EmaConfig(decay=DECAY), live, torch.zeros(2), 0, 10**6)
        sides: dict[str, Callable[[], object]] = {"ours": ours.update}
        if not zero:
            from timm.utils import ModelEmaV3

            theirs = ModelEmaV3(engine.module, decay=DECAY, foreach=True)
            swa = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
            sides["timm's ModelEmaV3"] = partial(theirs.update, engine.module)
            sides["swa_utils"] = partial(swa.update_parameters, engine.module)
        seconds = interleaved(sides, rounds, time.perf_counter)
        mine = seconds.pop("ours")
        results[f"EMA, ZeRO {zero}"] = figure(mine)
        results |= {f"EMA, ZeRO {zero}, against {name}": figure(mine, each) for name, each in seconds.items()}
        if zero in (0, 3):
            times = []
            for _ in range(3):
                dist.barrier()
                start = time.perf_counter()
                with engine.swapped_in(ours.weights):
                    pass
                times.append(time.perf_counter() - start)
            results[f"into the module and back, ZeRO {zero}"] = figure(statistics.median(times))
            numel = sum(parameter.numel() for parameter in network().parameters())
            results[f"broadcast by that, ZeRO {zero}"] = figure(0.0 if zero else 4.0 * numel, unit="B")
        engine.close()
    return results


def precise_figures(rounds: int) -> Figures:
    """Seconds of one pass over four micro-batches of 8 images of 96 pixels."""
    torch.manual_seed(0)
    model = network()
    batches = [torch.randn(8, 3, 96, 96) for _ in range(4)]

    @torch.no_grad()
    def bare() -> None:
        model.train()
        for batch in batches:
            model(batch)

    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: re_estimate(model, ((batch, True) for batch in batches), model),
        "the bare forwards": bare,
    }
    try:
        from fvcore.nn.precise_bn import update_bn_stats

        bn = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bn
        sides["fvcore"] = lambda: update_bn_stats(model.train(), batches, len(batches))
    except ImportError as error:
        print(f"skipped: {error} (pip install fvcore)")
    seconds = interleaved(sides, rounds, time.perf_counter)
    ours = seconds.pop("ours")
    return {f"PreciseBN, against {name}": figure(ours, each) for name, each in seconds.items()}


def main() -> None:
    values = parser(__doc__, "fewer rounds").parse_args()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    world = init_world()
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    rounds = 5 if values.quick else 21
    print(f"{machine()}, {world.size} rank{'s' if world.size > 1 else ''}")
    figures = ema_figures(world, rounds) | precise_figures(rounds)
    table("ResNet-50", figures)
    if world.is_main:
        save(values.json, figures)
    shutdown_world()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
