"""Figures of one GPU: a step of ResNet-50 in every engine against a bare loop, an evaluation, a save, pinned memory."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_checks import has_deepspeed
from machine import Figures, figure
from steps import HostBatches, Steps, Task, a_batch, a_run, an_engine, bare, ours
from torch import nn

from dist_trainer.data.batch import Batch
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import EngineConfig
from dist_trainer.engine.evaluate import evaluate
from dist_trainer.errors import UserError
from dist_trainer.run_folder import checkpoint
from dist_trainer.train import train_step
from dist_trainer.tricks.ema import EmaConfig

TORCH = EngineConfig(backend="torch")
BARE, FAILED = "bare", "FAILED: "
GOALS = {256: 1.02, 32: 1.05}
"""Batch -> the most that a step at ZeRO 0, or on DDP, may take, as a multiple of the bare loop's."""
COMPILE_S = 150.0
"""That must be left for the row of compiled steps."""


def sides(world: World) -> dict[str, Callable[[Task, HostBatches], Steps]]:
    """Name -> what builds it. Updates are fused on a GPU, in the bare loop too, unless a name says otherwise."""
    on_gpu = world.device.type == "cuda"

    def plainly(ddp: bool, fused: bool = on_gpu) -> Callable[[Task, HostBatches], Steps]:
        return lambda task, batches: bare(task, "bf16", world, batches, ddp=ddp, fused=fused)

    def engine(config: EngineConfig, **more: Any) -> Callable[[Task, HostBatches], Steps]:
        return lambda task, batches: ours(task, "bf16", world, batches, config, **more)

    found = {
        BARE: plainly(ddp=False),
        "bare, updates not fused": plainly(ddp=False, fused=False),
        "bare DDP": plainly(ddp=True),
        "ours, DDP": engine(TORCH),
        "ours, DDP, updates not fused": engine(TORCH, fused=False),
        "ours, DDP, EMA": engine(TORCH, ema=EmaConfig(decay=0.9999)),
        "ours, DDP, EMA on the host": engine(TORCH, ema=EmaConfig(decay=0.9999, device="cpu")),
        "ours, DDP, exact sums": engine(replace(TORCH, sums="exact")),
    }
    if has_deepspeed():
        found |= {f"ours, ZeRO {stage}": engine(EngineConfig(zero=stage)) for stage in (0, 1, 2, 3)}  # type: ignore[arg-type]
    return found | {"ours, DDP, compiled": engine(replace(TORCH, compile=True))}


class Clock:
    """Milliseconds between two places on the device's own time line, or on the host's without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        self._on_gpu = device.type == "cuda"

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._events.append(time.perf_counter())

    def between(self) -> list[float]:
        """Between each mark and the next one."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return [float(a.elapsed_time(b)) for a, b in zip(self._events, self._events[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self._events, self._events[1:], strict=False)]


def between_backward_and_forward(steps: Steps, world: World, count: int) -> float:
    """Median ms from the end of a step's backward to the begin of the next one's forward, on the device's time line:
    the update and all that belongs to it, and whatever the device then waits for.
    """
    clock, forward, backward = Clock(world.device), nn.Conv2d.forward, torch.Tensor.backward
    in_forward = False

    def marked_forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        nonlocal in_forward
        if not in_forward:  # the first convolution of a step
            in_forward = True
            clock.mark()
        return forward(self, x)

    def marked_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal in_forward
        backward(self, *args, **kwargs)
        in_forward = False
        clock.mark()

    nn.Conv2d.forward, torch.Tensor.backward = marked_forward, marked_backward  # type: ignore[method-assign]
    try:
        steps(count + 1)
    finally:
        nn.Conv2d.forward, torch.Tensor.backward = forward, backward  # type: ignore[method-assign]
    return statistics.median(clock.between()[1::2])  # forward to backward, backward to forward, and so on


def settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def allocated(world: World) -> int:
    return torch.cuda.memory_allocated() if world.device.type == "cuda" else 0


def seconds_per_step(steps: Steps, count: int, world: World) -> float:
    settle(world)
    start = time.perf_counter()
    steps(count)
    settle(world)
    return (time.perf_counter() - start) / count


def step_rows(task: Task, world: World, *, rounds: int, count: int, deadline: float) -> tuple[Figures, list[str]]:
    """(a row per side, what was left out and why). Sides take turns in changing order; the first round warms up."""
    batches, rows, notes = task.batches(world, 4), Figures(), list[str]()
    built: dict[str, Steps] = {}
    static: dict[str, int] = {}
    for name, build in sides(world).items():
        if name.endswith("compiled") and time.monotonic() + COMPILE_S > deadline:
            notes.append(f"{name}: no time left to compile")
            continue
        before = allocated(world)
        try:
            built[name] = build(task, batches)
            built[name](2)
        except torch.OutOfMemoryError:
            notes.append(f"{name}: batch {task.batch} does not fit into this device's memory")
            built.pop(name, None)
        except UserError as error:  # such as no compiler
            notes.append(f"{name}: {error}")
            built.pop(name, None)
        except Exception as error:  # the other sides still have figures; gpu.py ends with status 1
            notes.append(f"{FAILED}{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
            built.pop(name, None)
        static[name] = allocated(world) - before
    if BARE not in built:
        return rows, notes
    times: dict[str, list[float]] = {name: [] for name in built}
    order, number = list(built), 0
    while number <= rounds and (number < 3 or time.monotonic() < deadline):
        order.append(order.pop(0))  # nobody always follows the same neighbour
        for name in order:
            taken = seconds_per_step(built[name], count, world)
            if number:
                times[name].append(taken)
        number += 1
    peer = statistics.median(times[BARE])
    for name, each in times.items():
        row = figure(statistics.median(each), peer)
        row |= {"least": min(each), "most": max(each), "images_per_s": task.batch / row["ours"]}
        if world.device.type == "cuda":
            before = allocated(world)
            torch.cuda.reset_peak_memory_stats()
            built[name](2)
            row["peak_bytes"] = static[name] + torch.cuda.max_memory_allocated() - before
        if not name.endswith("compiled"):
            row["between_backward_and_forward_s"] = between_backward_and_forward(built[name], world, count) / 1e3
        rows[f"batch {task.batch}, {name}"] = row
    built.clear()
    gc.collect()
    return rows, notes


class Images:
    """What `evaluate` reads, from memory."""

    def __init__(self, task: Task, world: World, count: int) -> None:
        batches = task.batches(world, 4)
        self._batches = [a_batch(*batches[number % 4], number, 0) for number in range(count)]
        self.num_samples = count * task.batch

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def other_rows(task: Task, world: World, quick: bool) -> Figures:
    """An evaluation, a save of weights, optimizer and average, and pinned memory, of the same network."""
    engine, plan = an_engine(task, "bf16", world, TORCH)
    run = a_run(engine, plan, world, EmaConfig(decay=0.9999))
    images = Images(task, world, 4 if quick else 40)
    train_step(run, 0, iter([a_batch(*task.batches(world, 1)[0], 0, 0)]))
    run.sums.finish()
    times = []
    for _ in range(3):
        settle(world)
        start = time.perf_counter()
        evaluate(engine, images)  # type: ignore[arg-type]
        times.append(time.perf_counter() - start)
    rows = {"evaluation": figure(images.num_samples / min(times), unit="images/s")}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tensors = {"model": engine.model_state(), "optim": engine.optimizer_state(), "ema": run.learner.ema.weights}
        checkpoint.save(Path(folder), 1, tensors, {})
        rows["save of weights, optimizer and average"] = figure(time.perf_counter() - start)
    if world.device.type == "cuda" and hasattr(torch.cuda, "host_memory_stats"):
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
        if pinned is not None:
            rows["pinned memory of this benchmark"] = figure(pinned, unit="B")
    engine.close()
    return rows


def held_to_goals(rows: Figures) -> list[str]:
    """A line for each goal: met or missed."""
    lines = []
    for batch, goal in GOALS.items():
        row = next((rows[key] for side in ("ZeRO 0", "DDP") if (key := f"batch {batch}, ours, {side}") in rows), None)
        if row is not None:
            verdict = "met" if row["ratio"] <= goal else "MISSED"
            lines.append(f"batch {batch}: {row['ratio']:.3f} of the bare loop, goal {goal}: {verdict}")
    return lines
