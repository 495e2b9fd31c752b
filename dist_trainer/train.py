"""A training run. `train` is the loop and everything that happens in it, in order; run/ builds what it uses."""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

from dist_trainer.data.batch import Batch
from dist_trainer.errors import LocalError, UserError
from dist_trainer.run.advice import against_infinity
from dist_trainer.run.saving import counts, hear, save
from dist_trainer.run.scoring import score_all, score_average
from dist_trainer.run.state import Run
from dist_trainer.run.step_sums import CANNOT_SAVE, Stopped
from dist_trainer.run.summary import finish_run

MAX_SKIPPED_IN_A_ROW = 20


class RollBack(Exception):
    """Training is to continue after `step`, with the weights of the last checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"after step {step}")
        self.step = step


def train(run: Run) -> str | None:
    """Train to the end of the run. Returns None, or the name of the signal that stopped it before."""
    plan, sums, progress, bad_samples = run.plan, run.sums, run.progress, run.record.bad_samples
    if plan.due(progress.step, run.intervals.eval) and progress.evaluated_step < progress.step:
        validate(run)  # a stop or a failure came between a step and its evaluation
        if sums.stop:
            return stop(run)
        if plan.due(progress.step, run.intervals.checkpoint):
            save(run)
    for step, batches in run.streams.train.steps(start=progress.step):
        train_step(run, step, batches)
        hear(run)
        if bad_samples.outage:
            give_up(run, bad_samples.outage)
        if plan.due(progress.step, run.intervals.log):
            sums.finish()
            metrics = training_metrics(run)
            run.record.tracker.train(progress.step, metrics, run.record.pace.left_s(progress.step))
        if progress.skipped_in_a_row:
            not_finite(run)  # before a checkpoint, to which it would be no use to go back
        if plan.due(progress.step, run.intervals.eval) and not sums.stop:
            validate(run)
        if sums.stop:
            return stop(run)
        if plan.due(progress.step, run.intervals.checkpoint):
            save(run)
        if bad_samples.over_budget:
            give_up(run, bad_samples.over_budget)
    if run.learner.averaging is not None:
        average_snapshots(run)
    return sums.stop


def train_step(run: Run, step: int, batches: Iterator[Batch]) -> None:
    """One update from this rank's plan.forwards micro-batches, ghosts last."""
    learner, record = run.learner, run.record
    learner.engine.set_lr(learner.learning_rate(step))
    for batch in record.meter.timed(batches):
        run.sums.add(learner.engine.forward_backward(batch), batch)
    # All this is launched while the device still computes; then the host waits once, for the gradient's norm.
    learner.engine.reduce()
    run.sums.exchange(learner.engine.take_beyond())  # asynchronous: collects the sum of the step before
    if learner.ema is not None:
        learner.ema.settle()
    applied = learner.engine.step()  # never with a gradient that is not finite
    run.sums.decide(applied)
    if learner.ema is not None and applied:
        learner.ema.update()
    if not record.bad_samples.outage:  # otherwise this step is repeated later, with its data
        run.progress.count(applied)


def training_metrics(run: Run) -> dict[str, float | int | None]:
    """Metrics since the last call, by their documented names (log/names.py) (collective)."""
    learner, progress = run.learner, run.progress
    return {
        "epoch": run.plan.epoch(progress.step),
        **run.times_of_ranks(),
        "train/lr": learner.learning_rate(progress.step - 1),
        "train/grad_norm": float(learner.engine.grad_norm),
        "train/skipped": progress.skipped,
        **({"ema/decay": learner.ema.decay} if learner.ema is not None else {}),
        "data/bad": run.record.bad_samples.num_bad,
        **counts(run),
        **({"train/beyond": run.sums.num_beyond} if learner.engine.is_exact else {}),
    }


def validate(run: Run) -> None:
    """Score all weights exactly, as they are and with batch-norm re-estimated; keep the best so far (collective)."""
    with scoring(run):
        score_all(run)


def average_snapshots(run: Run) -> None:
    """Average the k best snapshots, score the result, keep it (collective)."""
    with scoring(run):
        score_average(run)


@contextlib.contextmanager
def scoring(run: Run) -> Iterator[None]:
    """A block that scores weights, cut short by a stop: then it is to be run again, from its begin.

    If it fails, the run is saved before UserError is raised: no training is lost.
    """
    last = dict(run.progress.last)
    try:
        with run.paused("eval"):
            yield
    except Stopped:
        run.progress.last = last
    except LocalError:
        raise
    except UserError as error:
        give_up(run, str(error))


def stop(run: Run) -> str:
    """Every rank stops after this step: save, unless that is what failed. Returns the signal."""
    assert run.sums.stop is not None
    if run.sums.stop == CANNOT_SAVE:
        finish_run(run, "failed")  # raises
    save(run)
    return run.sums.stop


def not_finite(run: Run) -> None:
    """The last gradient was not finite, on some rank, and was not applied: do as engine.not_finite says."""
    policy, progress = run.config.engine.not_finite, run.progress
    if policy == "roll_back":
        raise RollBack(progress.step)
    advice = against_infinity(run.config)
    if policy == "stop":
        give_up(run, f"its gradient was not finite and was not applied (engine.not_finite: stop); {advice}")
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        give_up(run, f"the gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row; none was applied; {advice}")


def give_up(run: Run, reason: str) -> NoReturn:
    """Save, end the run, and raise UserError: every rank stops after the same step."""
    save(run)
    finish_run(run, "mistake", reason)
    raise UserError(f"stopped after step {run.progress.step}, saved; start again to continue: {reason}")
