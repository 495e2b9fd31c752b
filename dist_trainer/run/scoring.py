"""Score weights on the validation set, as they are and with batch-norm re-estimated. The best are kept."""

from collections.abc import Callable

from dist_trainer.distributed.collectives import on_main
from dist_trainer.engine.evaluate import EvalResult, evaluate, predictions, report_bad
from dist_trainer.run.state import Run
from dist_trainer.run_folder import checkpoint
from dist_trainer.tensors import State


def score_all(run: Run) -> None:
    """Score the model, its moving average, and training samples (collective). Raises UserError where it cannot."""
    progress = run.progress
    progress.last = {}
    for name in run.learner.weights.names:
        score_weights(run, name, reports_bad=name == "model")  # they are the same samples each time
    score_training_samples(run)
    progress.evaluated_step = progress.step


def score_weights(run: Run, name: str, state: State | None = None, *, reports_bad: bool = False) -> None:
    """Score weights with their own running statistics, then, if so configured, with re-estimated ones (collective)."""
    learner, val = run.learner, run.streams.val
    with learner.weights.swapped_in(name, state):
        result = evaluate(learner.engine, val)
        if reports_bad:
            listing = run.record.folder.bad_samples if run.world.is_main else None
            report_bad(run.config.eval, val.index, result, listing, run.record.tracker.terminal)
        keep_score(run, name, result)
        if learner.weights.can_re_estimate:
            learner.weights.re_estimate(name, max(0, run.progress.step - 1))
            keep_score(run, f"{name}_bn", evaluate(learner.engine, val))


def keep_score(run: Run, name: str, result: EvalResult) -> None:
    """Record the score of the weights in the module, and keep them if they are among the best (collective)."""
    progress, record, averaging = run.progress, run.record, run.learner.averaging
    progress.last[name] = metrics = result.metrics
    if metrics["top1"] > progress.best.get("top1", -1.0):
        progress.best = {"weights": name, "step": progress.step, **metrics}
        weights, folder = run.learner.weights.state(), record.folder.best
        said = predictions(result, run.streams.val.index, run.world)
        best, tensors = progress.best, {"model": weights, "predictions": said}
        keep_behind(run, "best", tensors, lambda copies: checkpoint.save(folder, best["step"], copies, best))
    if averaging is not None:
        averaging.offer(name, progress.step, metrics)
    epoch = run.plan.epoch(progress.step)
    record.tracker.evaluation(progress.step, epoch, name, metrics, result.num_samples, progress.best)


def score_training_samples(run: Run) -> None:
    """Score the model on training samples, prepared as those of the validation set are (collective)."""
    progress, stream = run.progress, run.streams.train_eval
    if stream is not None:
        with run.learner.weights.swapped_in("model"):
            metrics = evaluate(run.learner.engine, stream).metrics
        progress.train_eval = metrics | {"gap": metrics["top1"] - progress.last["model"]["top1"]}
        run.record.tracker.training_slice(progress.step, run.plan.epoch(progress.step), progress.train_eval)


def score_average(run: Run) -> None:
    """Score the mean of the k best snapshots, and keep it beside the checkpoints (collective)."""
    averaging, weights = run.learner.averaging, run.learner.weights
    assert averaging is not None

    def accuracy(state: State) -> float:
        with weights.swapped_in("average", state):
            return evaluate(run.learner.engine, run.streams.val).metrics["top1"]

    state = averaging.average_kept(accuracy)
    if state is None:
        return
    score_weights(run, "average", state)
    statistics = weights.re_estimated.get("average", {})
    metrics = {name: each for name, each in run.progress.last.items() if name.startswith("average")}
    tensors, folder = {"model": state | statistics}, run.record.folder.average
    step = run.progress.step
    keep_behind(run, "average", tensors, lambda copies: checkpoint.save(folder, step, copies, metrics))


def keep_behind(run: Run, kind: str, tensors: dict[str, State], write: Callable[[dict[str, State]], None]) -> None:
    """Hand weights of this step to the folder's writer (collective)."""
    on_main(run.world, lambda: run.record.folder.writer.submit(kind, run.progress.step, tensors, write))
