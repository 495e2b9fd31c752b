"""Rank 0's output: a progress display on a terminal, one plain line per interval in a log file."""

import contextlib
import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dist_trainer.log.metrics_file import Metrics


class _Console(Console):
    """A closed or failing stdout mutes it, and training goes on."""

    def on_broken_pipe(self) -> None:
        self.mute()

    def mute(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered must not fail later

    def print(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().print(*args, **kwargs)
        except OSError:  # a full disk, or a terminal that is gone
            self.mute()


class Terminal:
    """Silent unless `active` (rank 0)."""

    def __init__(self, active: bool) -> None:
        self._active = active
        self._console = _Console(highlight=False, soft_wrap=True, quiet=not active)
        self._progress: Progress | None = None
        self._task: Any = None
        self._best = ""

    def say(self, text: str) -> None:
        if self._active:
            self._console.print(text, markup=False)

    def start(self, step: int, total_steps: int) -> None:
        if self._active and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]:5.2f}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=step, epoch=0.0, text="")
            self._progress.start()

    def train_line(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Metrics of one log interval, by their documented names."""
        loss = metrics["train/loss"]
        text = (
            f"loss {'none, no update' if loss is None else f'{loss:.4f}'}  lr {metrics['train/lr']:.4g}  "
            f"{metrics['perf/images_per_s']:,.0f} img/s  data {metrics['perf/data_wait']:.1%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, epoch=metrics["epoch"], text=f"{text}  {self._best}")
        else:
            self.say(f"epoch {metrics['epoch']:.2f}  step {step}/{total_steps}  {text}")

    def eval_line(self, step: int, weights: str, metrics: dict[str, float], num_samples: int, best: float) -> None:
        self._best = f"top-1 {metrics['top1']:.2%} (best {best:.2%})"
        self.say(
            f"step {step}: {weights}: top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  "
            f"loss {metrics['loss']:.4f}  on {num_samples:,} images  (best top-1 {best:.2%})"
        )

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def table(self, title: str, rows: dict[str, str]) -> None:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        if self._active:
            self._console.print(table)
