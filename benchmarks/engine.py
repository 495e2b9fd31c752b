"""Step time of our loop at ZeRO 0 to 3, and on torch's DDP, against a bare DDP loop: same model, data, precision.

Rows of exact sums (engine.sums: exact) are held against fast ones at the same stage, in time and in the error of the
gradient.

    python benchmarks/engine.py [--quick] [--json FILE] [--ranks 2] [--rounds N]

The bare loop is what one writes without a library: normalise, forward under autocast, loss, backward, SGD step, clear.
Ours does besides: the learning rate, the finite check, loss and counts, world-independent batch-norm statistics, stop
votes. All sides live in the same processes and take turns in changing order, so that a slow moment of the machine meets
all of them. Figures are medians over the rounds; the ratio is theirs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import SMOKE, Figures, figure, machine, parser, save

from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.data.batch import Batch, SlotAddress
from dist_trainer.data.index import SAMPLE, ShardIndex
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import init_world, shutdown_world
from dist_trainer.engine.base import Engine, EngineConfig
from dist_trainer.engine.build import build_engine
from dist_trainer.engine.inference import Preprocess
from dist_trainer.log.meter import Meter
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.run.state import Progress
from dist_trainer.run.step_sums import StepSums
from dist_trainer.train import train_step
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.learning_rate import LearningRate, LearningRateConfig
from dist_trainer.tricks.losses import LossConfig, build_loss
from dist_trainer.tricks.mixing import Mixing, MixingConfig
from dist_trainer.tricks.optimizers import OptimizerConfig, build_optimizer, param_groups

MODELS = {
    # name: (model, its arguments, channels, pixels, samples per rank, steps per side and round, the same when quick)
    "demo": ("small_resnet", {"in_channels": 1}, 1, 28, 128, 20, 6),
    "resnet18_64px": ("torchvision/resnet18", {}, 3, 64, 32, 3, 1),
}
MEAN, STD = 0.5, 0.25
OPTIMIZER = OptimizerConfig(args={"momentum": 0.9, "nesterov": True}, weight_decay=5e-4)


def no_samples() -> ShardIndex:
    none = np.zeros(0, np.uint64)
    return ShardIndex(
        root="", shards=(), stamps=(), sizes=none, first=none, samples=np.zeros(0, SAMPLE), class_names=()
    )


def an_engine(name: str, precision: str, world: Any, config: EngineConfig, slots: int = 1) -> tuple[Engine, Plan]:
    """With `slots` micro-batches per rank and step."""
    model_name, args, channels, _, size, *_ = MODELS[name]
    size = 4 if SMOKE else size
    plan = make_plan(
        BatchConfig(global_batch=size * world.size * slots, micro_batch=size),
        Duration.parse("1000000step", "duration"),
        world=world.size,
        num_samples=size * world.size * slots * 1000,
    )
    model = build_model(ModelConfig(name=model_name, args=args), 10, 0)
    engine = build_engine(
        replace(config, precision=precision),  # type: ignore[arg-type]
        model=model,
        optimizer=build_optimizer(OPTIMIZER, model, 0.01, config.zero),
        loss=build_loss(LossConfig(label_smoothing=0.1)),
        mixing=Mixing(MixingConfig(), plan, 0),
        plan=plan,
        world=world,
        preprocess=Preprocess(mean=[MEAN] * channels, std=[STD] * channels, channels_last=True),
        seed=0,
    )
    return engine, plan


def relative_error(name: str, world: Any, sums: str) -> float:
    """L2, of the gradient of 4 micro-batches per rank in float32 against their own gradients summed in float64."""
    engine, plan = an_engine(name, "fp32", world, EngineConfig(backend="torch", sums=sums), slots=4)  # type: ignore[arg-type]
    _, _, channels, pixels, *_ = MODELS[name]
    generator = torch.Generator().manual_seed(world.rank)
    shape = (plan.micro_batch, channels, pixels, pixels)
    true = [torch.zeros_like(each, dtype=torch.float64) for each in engine._parameters]
    for slot in plan.slots_of(world.rank):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (plan.micro_batch,), generator=generator)
        ones = torch.ones(plan.micro_batch)
        logits = engine.module(engine._prepare(images, torch.float32))
        loss = F.cross_entropy(logits, labels.to(world.device), label_smoothing=0.1, reduction="sum")
        for total, gradient in zip(
            true, torch.autograd.grad(loss / plan.global_batch, engine._parameters), strict=True
        ):
            total.add_(gradient)
        engine.forward_backward(Batch(images, labels, ones, ones.long(), SlotAddress(0, slot), num_valid=len(labels)))
    for total in true:
        dist.all_reduce(total)
    engine.reduce()
    reduced = [each.grad.detach().clone() for each in engine._parameters if each.grad is not None]
    engine.step()
    difference = sum(float((a - b).square().sum()) for a, b in zip(reduced, true, strict=True))
    return float((difference / sum(float(each.square().sum()) for each in true)) ** 0.5)


def build_sides(name: str, precision: str, world: Any) -> dict[str, Callable[[int], None]]:
    """Name -> a function that trains that many steps."""
    model_name, args, channels, pixels, size, *_ = MODELS[name]
    size = 4 if SMOKE else size
    config = ModelConfig(name=model_name, args=args)
    generator = torch.Generator().manual_seed(world.rank)
    images = [
        torch.randint(0, 256, (size, channels, pixels, pixels), dtype=torch.uint8, generator=generator)
        for _ in range(8)
    ]
    labels = [torch.randint(0, 10, (size,), generator=generator) for _ in range(8)]

    def bare() -> Callable[[int], None]:
        model = build_model(config, 10, 0).to(world.device).to(memory_format=torch.channels_last)
        groups = param_groups(model, OPTIMIZER.weight_decay, OPTIMIZER.no_decay)
        sgd = torch.optim.SGD(groups, lr=0.01, **OPTIMIZER.args)
        ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

        def steps(count: int) -> None:
            for step in range(count):
                x = images[step % 8].to(world.device, torch.float32, memory_format=torch.channels_last)
                x = x.mul_(1 / (255 * STD)).sub_(MEAN / STD)
                with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = ddp(x)
                F.cross_entropy(logits.float(), labels[step % 8].to(world.device), label_smoothing=0.1).backward()
                sgd.step()
                sgd.zero_grad(set_to_none=True)

        return steps

    def ours(backend: str, zero: int, sums: str = "fast") -> Callable[[int], None]:
        engine, plan = an_engine(name, precision, world, EngineConfig(backend=backend, zero=zero, sums=sums))  # type: ignore[arg-type]
        meter, bad_samples = Meter(), BadSampleLog(no_samples(), "auto", "train")
        run: Any = SimpleNamespace(
            learner=SimpleNamespace(
                engine=engine, learning_rate=LearningRate(LearningRateConfig(peak=0.01), plan), ema=None
            ),
            record=SimpleNamespace(meter=meter, bad_samples=bad_samples),
            sums=StepSums(
                plan=plan,
                batch_norm=RunningStatistics(engine.module, engine.is_exact),
                ema=None,
                meter=meter,
                bad_samples=bad_samples,
                listing=Path(os.devnull),
                stop_request=StopRequest(),
                world=world,
                is_exact=engine.is_exact,
            ),
            progress=Progress(),
        )
        ones, ids = torch.ones(size), torch.zeros(size, dtype=torch.int64)

        def steps(count: int) -> None:
            for step in range(count):
                batch = Batch(
                    images[step % 8], labels[step % 8], ones, ids, SlotAddress(step, world.rank), num_valid=size
                )
                train_step(run, step, iter([batch]))
            run.sums.finish()

        return steps

    sides = {"bare DDP": bare(), "ours, DDP": ours("torch", 0)}
    sides |= {f"ours, ZeRO {zero}": ours("deepspeed", zero) for zero in (0, 1, 2, 3)}
    sides |= {f"exact, ZeRO {zero}": ours("deepspeed", zero, "exact") for zero in (0, 1, 2)}
    dist.barrier()
    return sides


def measure(arguments: argparse.Namespace) -> Figures:
    world = init_world()
    results: Figures = {}
    errors: Figures = {}
    for name, (*_, steps_full, steps_quick) in MODELS.items():
        count = 1 if SMOKE else steps_quick if arguments.quick else steps_full
        for precision in ("bf16",) if arguments.quick else ("bf16", "fp32"):
            sides = build_sides(name, precision, world)
            times: dict[str, list[float]] = {side: [] for side in sides}
            order = list(sides)
            for round_number in range(arguments.rounds + 1):
                order.append(order.pop(0))  # nobody always follows the same neighbour
                for side in order:
                    dist.barrier()
                    start = time.perf_counter()
                    sides[side](count)
                    if world.device.type == "cuda":
                        torch.cuda.synchronize()
                    if round_number:  # the first round warms up
                        times[side].append((time.perf_counter() - start) / count)
            for side in list(sides)[1:]:
                other = side.replace("exact", "ours") if side.startswith("exact") else "bare DDP"
                ours, peer = statistics.median(times[side]), statistics.median(times[other])
                results[f"{name}, {precision}, {side}"] = figure(ours, peer)
            del sides
        figures = [relative_error(name, world, sums) for sums in ("exact", "fast")]
        errors[f"{name}, fp32, error of exact sums"] = figure(*figures, unit="relative L2")
    if world.is_main:
        print(f"{machine()}, {world.size} ranks")
    if world.is_main and SMOKE:
        print(f"ran: {'; '.join([*results, *errors])}")
    elif world.is_main:
        print(f"{'':<38}{'ours ms':>9}{'peer ms':>13}{'ratio':>8}")
        for key, r in results.items():
            print(f"{key:<38}{r['ours'] * 1e3:>9.2f}{r['peer'] * 1e3:>13.2f}{r['ratio']:>8.3f}")
        for key, r in errors.items():
            print(f"{key:<38}{r['ours']:>9.1e}{r['peer']:>13.1e}{r['ratio']:>8.3f}")
        save(arguments.json, results | errors)
    shutdown_world()
    return results


def main() -> None:
    options = parser(__doc__, "bf16 only, fewer steps")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--rounds", type=int, default=None)
    arguments = options.parse_args()
    arguments.rounds = 1 if SMOKE else arguments.rounds or (9 if arguments.quick else 11)
    if "RANK" in os.environ:
        measure(arguments)
        os._exit(0)  # DeepSpeed's engines are not built to be torn down several at a time
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    sys.exit(subprocess.call([*launch, *sys.argv], env=environment))


if __name__ == "__main__":
    main()
