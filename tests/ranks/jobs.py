"""Runs several trainings, one after another: `main(world, [JOBS.json, FOLDER])`, called by pool.py.

A job is {"name", "argv"} and may have: "stop_at" and "stop_rank" (that rank asks to stop when this step begins),
"kill_at" (the last rank is killed when this step begins), "record" (write what stands in every slot that this rank
runs), "eval" (score these weights instead of training), "fails" (it ends by a UserError on every rank, which is kept),
"weights" (write the weights after every step), "kill_in" ([name, n]: see there), "late" (instead of training, rank 0
works longer than collectives wait).
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dist_trainer.config import arguments
from dist_trainer.config.tree import TrainConfig
from dist_trainer.distributed.collectives import on_main
from dist_trainer.distributed.processes import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.run.evaluation import evaluate_weights
from dist_trainer.run.start import build_run, prepare_run
from dist_trainer.run.state import Run
from dist_trainer.run.summary import finish_run
from dist_trainer.train import train


def observe(run: Run, stop: StopRequest, job: dict[str, Any], folder: Path) -> None:
    """Look at every micro-batch that passes, without changing it."""
    forward_backward = run.learner.engine.forward_backward
    seen: list[dict[str, Any]] = []

    def watched(batch: Any) -> torch.Tensor:
        address = batch.address
        seen.append(
            {
                "step": address.step,
                "slot": address.slot,
                "ghost": address.ghost,
                "ids": batch.ids.tolist(),
                "weight": batch.weight.tolist(),
                "pixels": int(batch.images.sum()),
            }
        )
        if address.step == job.get("kill_at") and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if address.step == job.get("stop_at") and run.world.rank == job.get("stop_rank", 0):
            stop.signal = "SIGTERM"
        if job.get("record"):
            (folder / f"{job['name']}-rank{run.world.rank}.json").write_text(json.dumps(seen))
        return forward_backward(batch)

    run.learner.engine.forward_backward = watched  # type: ignore[method-assign]
    if job.get("weights"):
        log_weights(run, folder / f"{job['name']}-weights")
        check_what_is_left(run)
    if "kill_in" in job:
        kill_in(run, *job["kill_in"])


def log_weights(run: Run, folder: Path) -> None:
    """Write the whole weights after every step, and whether it was applied; and all running statistics."""
    folder.mkdir(exist_ok=True)
    step = run.learner.engine.step

    def logged() -> bool:
        applied = step()
        state = run.learner.engine.model_state()
        if run.world.is_main:
            weights = {
                name: state[name].clone().contiguous() for name, _ in run.learner.engine.module.named_parameters()
            }
            save_file(weights, folder / f"{run.progress.step:04d}-{int(applied)}.safetensors")
        return applied

    run.learner.engine.step = logged  # type: ignore[method-assign]
    update, rows = run.learner.batch_norm.update, [run.learner.batch_norm.running.clone()]

    def updated(sums: torch.Tensor, num_slots: int) -> None:
        update(sums, num_slots)
        rows.append(run.learner.batch_norm.running.clone())
        if run.world.is_main:
            save_file({"running": torch.stack(rows)}, f"{folder}-statistics.safetensors")

    run.learner.batch_norm.update = updated  # type: ignore[method-assign]


def check_what_is_left(run: Run) -> None:
    """Behind every block that holds other weights the module has the running statistics of training again."""
    swapped_in = run.learner.weights.swapped_in

    @contextlib.contextmanager
    def checked(name: str, state: Any = None) -> Iterator[None]:
        with swapped_in(name, state):
            yield
        left = run.learner.engine.module.state_dict()
        for key, value in run.learner.batch_norm.unflatten(run.learner.batch_norm.running).items():
            assert torch.equal(left[key], value), f"{key} of {name} was left in the module"

    run.learner.weights.swapped_in = checked  # type: ignore[method-assign]


def kill_in(run: Run, what: str, nth: int) -> None:
    """End the last rank by SIGKILL when weights of this name (or `re_estimate`) are scored for the n-th time."""
    swapped_in, re_estimate, count = run.learner.weights.swapped_in, run.learner.weights.re_estimate, 0

    def counted(name: str) -> None:
        nonlocal count
        count += name == what
        if count == nth and name == what and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def watched(name: str, state: Any = None) -> Iterator[None]:
        with swapped_in(name, state):
            counted(name)
            yield

    run.learner.weights.swapped_in = watched  # type: ignore[method-assign]
    run.learner.weights.re_estimate = lambda *args: (counted("re_estimate"), re_estimate(*args))[1]  # type: ignore


def start_run(config: TrainConfig, stop: StopRequest, world: World) -> Run:
    terminal = Terminal(active=world.is_main)
    prepared = prepare_run(config, stem="job", world=world, terminal=terminal)
    assert not prepared.claim.is_complete, f"{config.run.name} is complete already"
    return build_run(prepared, config=config, world=world, terminal=terminal, stop=stop)


def main(world: World, argv: list[str]) -> None:
    jobs, folder = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    for job in jobs:
        parser = arguments.new_parser("train", "")
        config, _ = arguments.parse_config(parser, [*job["argv"], f"--run.dir={folder}", f"--run.name={job['name']}"])
        stop = StopRequest()
        if "late" in job:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2))
            said = on_main(replace(world, host_group=group, beat_s=0.5), lambda: time.sleep(5) or "done")  # type: ignore[func-returns-value]
            (folder / f"{job['name']}-rank{world.rank}.txt").write_text(said)
            continue
        if "eval" in job:
            result, _ = evaluate_weights(
                config, Path(job["eval"]), world, Terminal(active=False), job.get("of", "model")
            )
            (folder / f"{job['name']}.json").write_text(json.dumps(asdict(replace(result, own=()))))
            continue
        run = start_run(config, stop, world)
        observe(run, stop, job, folder)
        try:
            stopped_by = train(run)
            finish_run(run, "stopped" if stopped_by else "done", stopped_by)
        except UserError as error:
            if not job.get("fails"):
                raise
            (folder / f"{job['name']}-rank{world.rank}.txt").write_text(str(error))
        assert not active_children(), f"{job['name']} left loader workers: {active_children()}"
