"""Where metrics go: the terminal, metrics.jsonl and W&B, on rank 0.

Names: train/loss (mean over samples since the last line; null if no update was made), train/lr, train/grad_norm (of the
last step, before clipping), train/skipped (steps not applied, so far), data/bad (different bad samples, so far),
train/beyond (values of gradients so far that engine.sums: exact does not promise), ema/decay, val/top1, val/top5
(fractions), val/loss, and the same with the other prefixes of SCORES, train_eval/top1, top5, loss (training samples
with the evaluation's transform), train_eval/gap (its top1 less val/top1), perf/images_per_s, perf/data_wait (share of
the time that rank 0 waited for data), epoch. run/event (a line: how the run was started again), run/world.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.distributed.world import World
from dist_trainer.errors import plural
from dist_trainer.log.console import Terminal
from dist_trainer.log.metrics_file import Metrics, MetricsFile
from dist_trainer.log.wandb_run import WandbConfig, WandbRun

SCORES = {
    "model": ("val", "model"),
    "model_bn": ("val_bn", "model, BN re-estimated"),
    "ema": ("val_ema", "EMA"),
    "ema_bn": ("val_ema_bn", "EMA, BN re-estimated"),
    "average": ("val_avg", "average"),
    "average_bn": ("val_avg_bn", "average, BN re-estimated"),
}
"""The weights that can be scored: name in files -> (prefix of their metrics, name for people)."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Training metrics."""

    every: str = "50step"
    """How often a line of training metrics is written."""


class Tracker:
    """Sends metrics to the terminal, metrics.jsonl and W&B. On ranks other than 0 every call does nothing."""

    def __init__(self, world: World, total_steps: int, terminal: Terminal) -> None:
        self.terminal = terminal
        self._world, self._total_steps = world, total_steps
        self._file: MetricsFile | None = None
        self._wandb: WandbRun | None = None
        self._beyond: float = 0

    def open(
        self, folder: Path, step: int, wandb: WandbConfig, config: dict[str, Any], *, is_evaluated: bool = True
    ) -> None:
        """At this step, whose evaluation was made to its end, or is still to be made."""
        if not self._world.is_main:
            return
        self._file = MetricsFile(folder / "metrics.jsonl", step, are_whole=is_evaluated)
        self._wandb = WandbRun(wandb, folder, folder.name, config)
        if self._wandb.note:
            self.terminal.say(self._wandb.note)
        self.terminal.start(step, self._total_steps)

    def _write(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        if self._file is not None:
            self._file.write(step, metrics)
        if self._wandb is not None:
            self._wandb.log(step, metrics)

    def train(self, step: int, metrics: Metrics) -> None:
        self._write(step, metrics)
        if self._world.is_main:
            beyond = metrics.get("train/beyond") or 0
            if beyond > self._beyond:
                self.terminal.say(
                    f"warning: step {step}: {plural(int(beyond), 'gradient value')} so far beyond the bound of exact "
                    "sums, a mean of 32: the run goes on, but equal bits on another number of ranks are not sure now"
                )
                self._beyond = beyond
            self.terminal.train_line(step, self._total_steps, metrics)

    def evaluation(
        self,
        step: int,
        epoch: float,
        weights: str,
        metrics: dict[str, float],
        num_samples: int,
        best: dict[str, Any],
    ) -> None:
        """Metrics of one evaluation of these weights: val/top1, val_ema/top1, ..."""
        prefix, title = SCORES[weights]
        self._write(step, {"epoch": epoch, **{f"{prefix}/{key}": value for key, value in metrics.items()}})
        self.terminal.eval_line(step, title, metrics, num_samples, best["top1"])

    def training_slice(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Metrics of the model on training samples: train_eval/top1, ..., train_eval/gap."""
        self._write(step, {"epoch": epoch, **{f"train_eval/{key}": value for key, value in metrics.items()}})
        if self._world.is_main:
            self.terminal.say(
                f"step {step}: training samples: top-1 {metrics['top1']:.2%}, {100 * metrics['gap']:+.1f} points"
            )

    def event(self, step: int, epoch: float, line: str, world: int) -> None:
        """A restart, a requeue, a roll-back, in a `line`: run/event, and run/world, the ranks from here on."""
        self._write(step, {"epoch": epoch, "run/event": line, "run/world": world})
        self.terminal.say(line)

    def close(self, summary: dict[str, Any]) -> None:
        self.terminal.stop()
        if self._wandb is not None:
            self._wandb.finish(summary)
