"""A training run. `train` is the loop and everything that happens in it, in order; run.py builds what it uses."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import on_main
from dist_trainer.engine.base import State
from dist_trainer.engine.evaluate import evaluate, report_bad
from dist_trainer.errors import LocalError, UserError
from dist_trainer.run.start import Run, finish_run
from dist_trainer.run_folder import checkpoint

MAX_SKIPPED_IN_A_ROW = 20


class RollBack(Exception):
    """The run is to go on after `step`, with the weights of its last checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"after step {step}")
        self.step = step


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
        if progress.skipped_in_a_row:
            not_finite(run)
    if run.averaging is not None:
        average(run)
    return None


def train_step(run: Run, step: int, batches: Iterator[Batch]) -> None:
    """One update from this rank's plan.forwards micro-batches, ghosts last."""
    run.engine.set_lr(run.learning_rate(step))
    for batch in run.meter.timed(batches):
        run.sums.add(run.engine.forward_backward(batch), batch)
    applied = run.engine.step()  # never with a gradient that is not finite
    run.sums.exchange(applied)  # asynchronous: takes in the step before
    if run.ema is not None and applied:
        run.ema.update()
    if not run.health.outage:  # then the step is to be done again, with its data
        run.progress.count(applied)


def not_finite(run: Run) -> None:
    """The last gradient was not, on any rank, and was not applied: do as engine.not_finite says."""
    policy, progress = run.config.engine.not_finite, run.progress
    if policy == "roll_back":
        raise RollBack(progress.step)
    advice = "Lower lr, lengthen lr.warmup.duration, or set engine.clip_grad_norm; then start again"
    if policy == "stop":
        give_up(run, f"its gradient was not finite, and not applied (engine.not_finite: stop). {advice}")
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"step {progress.step}: the gradient was not finite {MAX_SKIPPED_IN_A_ROW} times in a row; none was "
            f"applied. {advice}"
        )


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
        **({"ema/decay": run.ema.decay} if run.ema is not None else {}),
        "data/bad": run.health.num_bad,
    }


def validate(run: Run) -> None:
    """Score all weights exactly, as they are and with batch-norm re-estimated; keep the best so far (collective)."""
    with scoring(run):
        run.progress.last = {}
        for name in run.weights.names:
            score_held(run, name)
        score_training(run)
        run.progress.evaluated_step = run.progress.step


def score_training(run: Run) -> None:
    """Score the model on training samples, prepared as those of the validation set are."""
    progress = run.progress
    if run.train_eval is not None:
        with run.weights.held("model"):
            metrics = evaluate(run.engine, run.train_eval).metrics
        progress.train_eval = metrics | {"gap": metrics["top1"] - progress.last["model"]["top1"]}
        run.tracker.training_slice(progress.step, run.plan.epoch(progress.step), progress.train_eval)


def average(run: Run) -> None:
    """Score the mean of the k best snapshots, and keep it beside the checkpoints (collective)."""
    assert run.averaging is not None
    with scoring(run):

        def accuracy(state: State) -> float:
            with run.weights.held("average", state):
                return evaluate(run.engine, run.val).metrics["top1"]

        state = run.averaging.average(accuracy)
        if state is not None:
            score_held(run, "average", state)
            statistics = run.weights.re_estimated.get("average", {})
            metrics = {name: each for name, each in run.progress.last.items() if name.startswith("average")}
            tensors, folder = {"model": state | statistics}, run.folder.average
            on_main(run.world, lambda: checkpoint.save(folder, run.progress.step, tensors, metrics, keep=1))


@contextlib.contextmanager
def scoring(run: Run) -> Iterator[None]:
    """Where weights are scored. Raises UserError, after a save, when they cannot be: no training is lost."""
    try:
        with not_training(run, "eval"):
            yield
    except LocalError:
        raise
    except UserError as error:
        give_up(run, str(error))


def score_held(run: Run, name: str, state: State | None = None) -> None:
    """Score weights with their own running statistics, then, if so configured, with re-estimated ones."""
    with run.weights.held(name, state):
        score(run, name)
        if run.weights.can_re_estimate:
            run.weights.re_estimate(name)
            score(run, f"{name}_bn")


def score(run: Run, name: str) -> None:
    """Score what the module holds, under `name`."""
    progress = run.progress
    result = evaluate(run.engine, run.val)
    if not progress.last:  # bad validation samples are the same ones each time
        listing = run.folder.bad_samples if run.world.is_main else None
        report_bad(run.config.eval, run.val.index, result, listing, run.tracker.terminal)
    progress.last[name] = metrics = result.metrics
    if metrics["top1"] > progress.best.get("top1", -1.0):
        progress.best = {"weights": name, "step": progress.step, **metrics}
        weights, folder = run.weights.state(), run.folder.best
        on_main(run.world, lambda: checkpoint.replace_best(folder, weights, progress.best))
    if run.averaging is not None and (note := run.averaging.offer(name, progress.step, metrics)):
        run.tracker.terminal.say(note)
    run.tracker.evaluation(
        progress.step, run.plan.epoch(progress.step), name, metrics, result.num_samples, progress.best
    )


@contextlib.contextmanager
def not_training(run: Run, what: str) -> Iterator[None]:
    """What happens in this block waits for the step's sums, and its time counts as `what`."""
    run.meter.pause()
    run.sums.finish()
    start = time.perf_counter()
    try:
        yield
    finally:
        run.seconds[what] += time.perf_counter() - start
        run.meter.go_on()


def save(run: Run) -> None:
    """Commit a checkpoint of this very step (collective)."""
    with not_training(run, "save"):
        progress, weights = run.progress, run.weights
        run.batch_norm.publish()
        tensors = {"model": weights.state(), "optim": run.engine.optimizer_state()}
        if run.ema is not None:
            tensors["ema"] = weights.ema_state()
        if progress.evaluated_step == progress.step:
            tensors |= {f"bn_{name}": statistics for name, statistics in weights.re_estimated.items()}
        state: dict[str, Any] = {
            **run.facts,
            **progress.as_dict(run.plan),
            "meter": run.meter.state(),
            "bad_samples": run.health.state(),
        }

        def commit() -> None:
            root = run.folder.checkpoints
            checkpoint.save(root, progress.step, tensors, state, run.config.checkpoint.keep_last)
            if run.averaging is not None:
                run.averaging.commit(
                    checkpoint.load_state(each)["evaluated_step"] for each in checkpoint.complete(root)
                )

        on_main(run.world, commit)
