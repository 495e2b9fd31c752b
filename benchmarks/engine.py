"""Step time of our loop at ZeRO 0 to 3, and on torch's DDP, against a bare DDP loop: same model, data, precision.

Rows of exact sums (engine.sums: exact) are held against fast ones at the same stage, in time and in the error of the
gradient.

    python benchmarks/engine.py [--quick] [--json FILE] [--ranks 2] [--rounds N]

The sides are in steps.py. They live in the same processes and take turns in changing order, so that a slow moment of
the machine meets all of them. Figures are medians over the rounds; the ratio is theirs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import SMOKE, Figures, figure, machine, parser, save
from steps import Steps, Task, a_batch, an_engine, bare, ours

from dist_trainer.distributed.world import World, init_world, shutdown_world
from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.numerics import set_numerics

TASKS = {
    # name: (task, steps per side and round, the same when quick)
    "demo": (Task(model="small_resnet", args={"in_channels": 1}, channels=1, pixels=28, batch=128), 20, 6),
    "resnet18_64px": (Task(model="torchvision/resnet18", pixels=64, batch=32), 3, 1),
}


def relative_error(task: Task, world: World, sums: str) -> float:
    """L2, of the gradient of 4 micro-batches per rank in float32 against their own gradients summed in float64."""
    config = EngineConfig(backend="torch", sums=sums)  # type: ignore[arg-type]
    engine, plan = an_engine(replace(task, slots=4), "fp32", world, config)
    batches = task.batches(world, len(plan.slots_of(world.rank)))
    true = [torch.zeros_like(each, dtype=torch.float64) for each in engine._parameters]
    for slot, (images, labels) in zip(plan.slots_of(world.rank), batches, strict=True):
        logits = engine.module(engine._prepare(images, torch.float32))
        loss = F.cross_entropy(logits, labels.to(world.device), label_smoothing=0.1, reduction="sum")
        for total, gradient in zip(
            true, torch.autograd.grad(loss / plan.global_batch, engine._parameters), strict=True
        ):
            total.add_(gradient)
        engine.forward_backward(a_batch(images, labels, 0, slot))
    for total in true:
        dist.all_reduce(total)
    engine.reduce()
    reduced = [each.grad.detach().clone() for each in engine._parameters if each.grad is not None]
    engine.step()
    difference = sum(float((a - b).square().sum()) for a, b in zip(reduced, true, strict=True))
    return float((difference / sum(float(each.square().sum()) for each in true)) ** 0.5)


def build_sides(task: Task, precision: str, world: World) -> dict[str, Steps]:
    """Name -> a function that trains that many steps."""
    batches = task.batches(world)
    fused = world.device.type == "cuda"  # as ours

    def engine(backend: str, zero: int, sums: str = "fast") -> Steps:
        config = EngineConfig(backend=backend, zero=zero, sums=sums)  # type: ignore[arg-type]
        return ours(task, precision, world, batches, config)

    sides = {
        "bare DDP": bare(task, precision, world, batches, ddp=True, fused=fused),
        "ours, DDP": engine("torch", 0),
    }
    sides |= {f"ours, ZeRO {zero}": engine("deepspeed", zero) for zero in (0, 1, 2, 3)}
    sides |= {f"exact, ZeRO {zero}": engine("deepspeed", zero, "exact") for zero in (0, 1, 2)}
    dist.barrier()
    return sides


def measure(arguments: argparse.Namespace) -> Figures:
    set_numerics(deterministic=False)
    world = init_world()
    results: Figures = {}
    errors: Figures = {}
    for name, (full, steps_full, steps_quick) in TASKS.items():
        task = replace(full, batch=4) if SMOKE else full
        count = 1 if SMOKE else steps_quick if arguments.quick else steps_full
        for precision in ("bf16",) if arguments.quick else ("bf16", "fp32"):
            sides = build_sides(task, precision, world)
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
        figures = [relative_error(task, world, sums) for sums in ("exact", "fast")]
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
