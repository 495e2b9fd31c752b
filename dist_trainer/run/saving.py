"""Checkpoints of a run: handed to the folder's writer, which writes them behind training."""

import copy
import time
from dataclasses import replace
from typing import Any

from dist_trainer.distributed.collectives import on_main
from dist_trainer.plan import Plan
from dist_trainer.run.blueprint import Intervals
from dist_trainer.run.state import Run
from dist_trainer.run.step_sums import CANNOT_SAVE
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.checkpoint import CheckpointConfig
from dist_trainer.run_folder.retention import Retention
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import larger_is_better


def save(run: Run) -> None:
    """Hand over a checkpoint of this very step; training stands still for the copy to host memory (collective).

    After a stop, the one before is waited for as long as checkpoint.grace allows; else this one is left out.
    """
    learner, record, progress = run.learner, run.record, run.progress
    with run.paused("save"):
        learner.weights.check_ranks()
        learner.batch_norm.publish()
        tensors = {"model": learner.weights.state(), "optim": learner.engine.optimizer_state()}
        if learner.ema is not None:
            tensors["ema"] = learner.weights.ema_state()
        if progress.evaluated_step == progress.step:
            tensors |= {f"bn_{name}": statistics for name, statistics in learner.weights.re_estimated.items()}
        state: dict[str, Any] = {
            **record.facts,
            **progress.as_dict(run.plan),
            "beyond": run.sums.num_beyond,
            "meter": record.meter.state(),
            "bad_samples": record.bad_samples.state(),
        }

        def hand_over() -> None:
            record.folder.check_owner()
            known, writer = copy.deepcopy(state), record.folder.writer
            if not writer.gives_up:  # otherwise all ranks stop soon
                writer.submit("checkpoint", progress.step, tensors, lambda copies: commit(run, copies, known))

        on_main(run.world, hand_over)


def commit(run: Run, tensors: dict[str, State], state: dict[str, Any]) -> None:
    """Write a checkpoint and remove those that it displaces; on the writer's thread."""
    folder, averaging = run.record.folder, run.learner.averaging
    root, retention, uploader = folder.checkpoints, run.record.retention, folder.uploader
    folder.check_owner()
    if uploader is not None and (copied := uploader.mirror.pinned) is not None:
        retention = replace(retention, for_ever=lambda step: step == copied or run.record.retention.for_ever(step))

    def keep_snapshots(*more: int) -> None:
        if averaging is not None:
            kept = (checkpoint.load_state(each)["evaluated_step"] for each in checkpoint.complete(root))
            averaging.commit({*kept, *more})

    keep_snapshots(state["evaluated_step"])  # before it is complete, since a kill may come between
    checkpoint.save(root, state["step"], tensors, state, retention)
    keep_snapshots()
    if uploader is not None:
        uploader.request(run.record.retention)


def grace_ends(run: Run) -> float | None:
    """Until when (time.monotonic) a stopped run waits for its writes; None: as long as they take."""
    return None if run.sums.stopped_at is None else run.sums.stopped_at + run.config.checkpoint.grace


def hear(run: Run) -> None:
    """Tell what the writer has to say, and of an epoch's bad samples. Every rank stops after this step if too many
    checkpoints failed.
    """
    if run.world.is_main:
        if line := run.record.bad_samples.tell(int(run.plan.epoch(run.progress.step))):
            run.record.tracker.terminal.say(line)
        writer, uploader = run.record.folder.writer, run.record.folder.uploader
        for line in [*writer.tell(), *(uploader.tell() if uploader is not None else [])]:
            run.record.tracker.terminal.say(line)
        if writer.gives_up:
            run.sums.ask_for(CANNOT_SAVE)


def last_copies(run: Run) -> None:
    """Wait until the mirror has everything, after a stop as long as checkpoint.grace says; on rank 0."""
    uploader, ends = run.record.folder.uploader, grace_ends(run)
    if uploader is not None:
        left = run.config.data.retry.deadline if ends is None else max(0.0, ends - time.monotonic())
        missing = uploader.finish(left)
        for line in [*uploader.tell(), *([f"warning: {missing}"] if missing else [])]:
            run.record.tracker.terminal.say(line)


def counts(run: Run) -> dict[str, int]:
    """Metrics of what could not be written or copied so far."""
    folder = run.record.folder
    copies = {"perf/failed_copies": folder.uploader.failed} if folder.uploader is not None else {}
    return {"perf/failed_saves": folder.writer.failed, **copies}


def retention_of(config: CheckpointConfig, weights: Weights, plan: Plan, intervals: Intervals) -> Retention:
    """Raises UserError for a metric that is not logged."""
    logged = weights.logged()
    config.check(logged)
    return Retention(
        last=config.keep_last,
        best=config.keep_best,
        metric=logged[config.best_metric],
        larger_is_better=larger_is_better(config.best_metric),
        for_ever=lambda step: plan.is_nth(step, intervals.checkpoint, config.keep_every),
    )
