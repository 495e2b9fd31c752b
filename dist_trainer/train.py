"""A training run. `train` is the loop and everything that happens in it, in order; run.py builds what it uses."""

import time
from collections.abc import Iterator
from typing import Any, NoReturn

from dist_trainer import checkpoint
from dist_trainer.comm import on_main
from dist_trainer.data.batch import Batch
from dist_trainer.errors import LocalError, UserError
from dist_trainer.evaluate import evaluate, report_bad
from dist_trainer.run import Run, finish_run

MAX_SKIPPED_IN_A_ROW = 20


def train(run: Run) -> str | None:
    """Train from where `run` stands to the end. Returns None, or the name of the signal that stopped it before."""
    plan, sums, progress = run.plan, run.sums, run.progress
    if plan.due(progress.step, run.every.eval) and progress.evaluated_step < progress.step:
        validate(run)  # a stop or a failure came between a step and its evaluation
    for step, batches in run.stream.steps(start=progress.step):
        train_step(run, step, batches)
        if run.health.outage:
            give_up(run, run.health.outage)
        if plan.due(progress.step, run.every.log):
            sums.finish()
            run.tracker.train(progress.step, training_metrics(run))
        if plan.due(progress.step, run.every.eval) and not sums.stop:
            validate(run)
        if plan.due(progress.step, run.every.checkpoint) or sums.stop:
            save(run)
        if sums.stop:
            return sums.stop
        if run.health.over_budget:
            give_up(run, run.health.over_budget)
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {progress.step}: the gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row; none was "
                "applied. Lower lr, lengthen lr.warmup.duration, or set engine.clip_grad_norm; then start again"
            )
    return None


def train_step(run: Run, step: int, batches: Iterator[Batch]) -> None:
    """One update from this rank's plan.forwards micro-batches, ghosts last."""
    run.engine.set_lr(run.learning_rate(step))
    for batch in run.meter.timed(batches):
        run.sums.add(run.engine.forward_backward(batch), batch)
    applied = run.engine.step()  # never with a gradient that is not finite
    run.sums.exchange(applied)  # asynchronous: takes in the step before
    if not run.health.outage:  # then the step is to be done again, with its data
        run.progress.count(applied)


def give_up(run: Run, reason: str) -> NoReturn:
    """Save what has been reached, and raise UserError: bad data and lost storage stop every rank at the same step."""
    save(run)
    finish_run(run, "an error")
    raise UserError(f"stopped after step {run.progress.step}, saved; start again to go on: {reason}")


def training_metrics(run: Run) -> dict[str, float | int]:
    """Metrics since the last call, by their documented names (log/tracker.py)."""
    return {
        "epoch": run.plan.epoch(run.progress.step),
        **run.meter.take(),
        "train/lr": run.learning_rate(run.progress.step - 1),
        "train/grad_norm": float(run.engine.grad_norm),
        "train/skipped": run.progress.skipped,
        "data/bad": run.health.num_bad,
    }


def validate(run: Run) -> None:
    """Score the validation set exactly; keep the weights if they are the best so far (collective).

    Raises UserError, after a save, for a validation set that cannot be scored: nothing that was trained is lost.
    """
    run.meter.pause()
    run.sums.finish()
    run.batch_norm.publish()
    start = time.perf_counter()
    listing = run.folder.bad_samples if run.world.is_main else None
    try:
        result = evaluate(run.engine, run.val)
        report_bad(run.config.eval, run.val.index, result, listing, run.tracker.terminal)
    except LocalError:
        raise
    except UserError as error:
        run.meter.go_on()
        give_up(run, str(error))
    progress, metrics = run.progress, result.metrics
    progress.evaluated_step, progress.last = progress.step, metrics
    if metrics["top1"] > progress.best.get("top1", -1.0):
        progress.best = {"step": progress.step, **metrics}
        weights = run.engine.model_state()
        folder = run.folder.best
        on_main(run.world, lambda: checkpoint.replace_best(folder, weights, progress.best))
    run.tracker.evaluation(
        progress.step, run.plan.epoch(progress.step), "val", metrics, result.num_samples, progress.best["top1"]
    )
    run.seconds["eval"] += time.perf_counter() - start
    run.meter.go_on()


def save(run: Run) -> None:
    """Commit a checkpoint of this very step (collective)."""
    run.meter.pause()
    run.sums.finish()
    run.batch_norm.publish()
    start = time.perf_counter()
    tensors = {"model": run.engine.model_state(), "optim": run.engine.optimizer_state()}
    state: dict[str, Any] = {
        **run.facts,
        **run.progress.as_dict(run.plan),
        "meter": run.meter.state(),
        "bad_samples": run.health.state(),
    }
    root, keep = run.folder.checkpoints, run.config.checkpoint.keep_last
    on_main(run.world, lambda: checkpoint.save(root, run.progress.step, tensors, state, keep))
    run.seconds["save"] += time.perf_counter() - start
    run.meter.go_on()
