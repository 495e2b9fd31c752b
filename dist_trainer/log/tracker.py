"""Where metrics go: the terminal and metrics.jsonl, on rank 0. All else follows the file (follow.py). names.py has all
names."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError, plural
from dist_trainer.log.console import Terminal
from dist_trainer.log.follow import Task
from dist_trainer.log.follower import Follower
from dist_trainer.log.metrics_file import Metrics, MetricsFile
from dist_trainer.log.names import SCORES, is_evaluation, is_of_average
from dist_trainer.log.wandb_run import WandbConfig, mode_of, run_id
from dist_trainer.plan import DurationText

STOP_PATIENCE_S = 10.0
"""A stopped run waits no longer for W&B: torchrun kills its ranks after 30 s."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Training metrics."""

    every: DurationText = "50step"
    """How often a line of training metrics is written."""
    tensorboard: bool = False
    """Write TensorBoard's files too, in the run folder's tensorboard/."""
    csv: bool = False
    """Write metrics.csv too, one row per step."""
    verbose: bool = False
    """Show what DeepSpeed and torch say of themselves, too."""

    def check(self, wandb: WandbConfig) -> None:
        """Raises UserError for what needs a package that is not installed, and for a time that is none."""
        if not wandb.timeout > 0:
            raise UserError(f"wandb.timeout: {wandb.timeout:g} is not positive; it is seconds, such as 15")
        if self.tensorboard and not _is_installed("tensorboard"):
            raise UserError("log.tensorboard: needs tensorboard: pip install 'dist_trainer[tensorboard]'")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # half of it
        return False


class Tracker:
    """On ranks other than 0 every call does nothing."""

    def __init__(self, world: World, total_steps: int, terminal: Terminal) -> None:
        self.terminal = terminal
        self._world, self._total_steps = world, total_steps
        self._file: MetricsFile | None = None
        self._follower: Follower | None = None
        self._timeout_s = 0.0
        self._beyond: float = 0

    def open(
        self,
        folder: Path,
        step: int,
        *,
        log: LogConfig,
        wandb: WandbConfig,
        facts: dict[str, Any],
        is_evaluated: bool = True,
    ) -> None:
        """At this step, whose evaluation was made to its end, or is still to be made. `facts`: the config on W&B."""
        mode, label = mode_of(wandb), None if self._world.is_main else os.uname().nodename
        if not self._world.is_main and (self._world.local_rank or wandb.system != "all" or mode != "online"):
            return
        if self._world.is_main:
            at_end = step == self._total_steps  # where the average is scored, after the last checkpoint

            def made_again(name: str) -> bool:
                return is_evaluation(name) and (not is_evaluated or (at_end and is_of_average(name)))

            self._file = MetricsFile(folder / "metrics.jsonl", step, made_again=made_again)
            if mode != "disabled":
                run_id(folder)
        task = Task(
            folder=str(folder),
            mode=mode,
            wandb=asdict(wandb),
            facts=facts,
            tensorboard=log.tensorboard and self._world.is_main,
            csv=log.csv and self._world.is_main,
            label=label,
        )
        self._timeout_s = wandb.timeout
        if mode == "offline":
            self.terminal.say(f"W&B: offline; dist-trainer wandb-sync {folder} uploads the run")
        if not task.is_empty:
            self._follower = Follower(task, self.terminal.say)
        self.terminal.start(step, self._total_steps)

    def _write(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        if self._file is not None and (refused := self._file.write(step, metrics)):
            self.terminal.say(f"warning: {refused}")

    def train(self, step: int, metrics: Metrics, left_s: float | None) -> None:
        """Metrics of an interval of training; `left_s`: seconds to the end of the run, if known."""
        self._write(step, metrics)
        if self._world.is_main:
            beyond = metrics.get("train/beyond") or 0
            if beyond > self._beyond:
                self.terminal.say(
                    f"warning: step {step}: {plural(int(beyond), 'gradient value')} so far beyond the bound of exact "
                    "sums, a mean of 32: the run goes on, but equal bits on another number of ranks are not sure now"
                )
                self._beyond = beyond
            self.terminal.train_line(step, self._total_steps, metrics, left_s)

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

    def event(self, step: int, epoch: float, line: str, *, rolled_back: bool) -> None:
        """A restart, a requeue, a roll-back, in a `line`: run/event, and the ranks from here on."""
        if self._file is not None:
            self._file.restarts += not rolled_back
            self._file.roll_backs += rolled_back
            counts = {"run/restarts": self._file.restarts, "run/roll_backs": self._file.roll_backs}
            self._write(step, {"epoch": epoch, "run/event": line, "run/world": self._world.size, **counts})
        self.terminal.say(line)

    def close(self, *, is_done: bool) -> None:
        """STATE and summary.json are written: let the views end."""
        self.terminal.stop()
        if self._follower is not None:
            self._follower.close(self._timeout_s if is_done else min(self._timeout_s, STOP_PATIENCE_S))
