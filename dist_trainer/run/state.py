"""The parts of a run, in groups: streams, learner, record, progress."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.bad_samples import BadSampleLog
from dist_trainer.distributed.world import World
from dist_trainer.engine.base import Engine
from dist_trainer.log.meter import Meter
from dist_trainer.log.over_ranks import over_ranks
from dist_trainer.log.tracker import Tracker
from dist_trainer.plan import Plan
from dist_trainer.run.averaging import Averaging
from dist_trainer.run.blueprint import Intervals
from dist_trainer.run.data import Streams
from dist_trainer.run.pace import Pace
from dist_trainer.run.step_sums import StepSums
from dist_trainer.run.weights import Weights
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.retention import Retention
from dist_trainer.tricks.batch_norm import RunningStatistics
from dist_trainer.tricks.ema import Ema
from dist_trainer.tricks.learning_rate import LearningRate


@dataclass
class Progress:
    """How far a run is. `step` counts updates tried, `skipped` those that were not applied."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    last: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of the last evaluation, by the weights' name (log/names.py)."""
    train_eval: dict[str, float] = field(default_factory=dict)
    """Those of the model on training samples."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best top-1 of all evaluations, with the weights' name."""

    def count(self, applied: bool) -> None:
        """One more step was tried."""
        self.step += 1
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1

    def skip_to(self, step: int) -> None:
        """Continue after `step`, if that lies ahead: the steps up to it are not made."""
        self.skipped += max(0, step - self.step)
        self.step = max(step, self.step)

    def forget_scores(self) -> None:
        """Evaluate again: the scores so far are of another validation set."""
        self.evaluated_step, self.last, self.train_eval, self.best = 0, {}, {}, {}

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """For a checkpoint; `position` is samples consumed, which no number of ranks or workers changes."""
        return {**asdict(self), "epoch": plan.epoch(self.step), "position": plan.position(self.step)}


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The network in its engine, its learning rate, and everything derived from its weights."""

    engine: Engine
    learning_rate: LearningRate
    batch_norm: RunningStatistics
    ema: Ema | None
    weights: Weights
    averaging: Averaging | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is stored and logged about a run."""

    folder: RunFolder
    tracker: Tracker
    meter: Meter
    pace: Pace
    bad_samples: BadSampleLog
    retention: Retention
    facts: dict[str, Any]
    """How the run was set up, for its checkpoints."""
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"eval": 0.0, "save": 0.0})
    """Time that was not spent on training."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop uses."""

    config: TrainConfig
    world: World
    plan: Plan
    intervals: Intervals
    streams: Streams
    learner: Learner
    record: Record
    sums: StepSums
    progress: Progress
    resumed_from: Path | None
    """The checkpoint that it continues, if any."""

    def times_of_ranks(self) -> dict[str, float | int | None]:
        """The meter's metrics since the last call, and those over all ranks (collective)."""
        forward_s = self.learner.engine.forward_time.take()
        metrics = self.record.meter.take(forward_s)
        own_s, rest_s = (metrics["perf/seconds_data"] or 0) + forward_s, metrics["perf/seconds_rest"] or 0
        self.record.pace.trained(self.progress.step, own_s + rest_s)
        return metrics | over_ranks(self.world, own_s, own_s + rest_s)

    @contextlib.contextmanager
    def paused(self, activity: str) -> Iterator[None]:
        """This block waits for the step's sums, and its time counts as `activity` (a key of `record.seconds`)."""
        self.record.meter.pause()
        self.sums.finish()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.record.seconds[activity] += seconds
            self.record.pace.paused(activity, seconds)
            self.record.meter.resume(activity, seconds)
