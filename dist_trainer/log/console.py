"""Rank 0's output: a display on a terminal, one plain line per interval in a log file."""

import contextlib
import os
import sys
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

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
        self._live: Live | None = None
        self._scores = ""
        self._shown: tuple[int, int, Metrics, str] | None = None

    def say(self, text: str) -> None:
        if self._active:
            self._console.print(text, markup=False)

    def start(self, step: int, total_steps: int) -> None:
        if self._active and self._console.is_terminal:
            self._live = Live(display(step, total_steps, {}, "", ""), console=self._console, refresh_per_second=2)
            self._live.start()

    def train_line(self, step: int, total_steps: int, metrics: Metrics, left_s: float | None) -> None:
        """Metrics of one log interval, by their documented names; seconds to the end of the run, if known."""
        left = "" if left_s is None else in_hours(left_s)
        if self._live is not None:
            self._shown = step, total_steps, metrics, left
            self._live.update(display(*self._shown, self._scores))
        else:
            bad = metrics.get("data/bad")
            self.say(
                f"epoch {metrics['epoch']:.2f}  step {step}/{total_steps}  {in_words(metrics)}"
                + (f"  {bad} bad samples" if bad else "")
                + (f"  {left} left" if left else "")
            )

    def eval_line(self, step: int, weights: str, metrics: dict[str, float], num_samples: int, best: float) -> None:
        self._scores = f"top-1 {metrics['top1']:.2%}  best {best:.2%}"
        if self._live is not None and self._shown is not None:
            self._live.update(display(*self._shown, self._scores))
        self.say(
            f"step {step}: {weights}: top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  "
            f"loss {metrics['loss']:.4f}  on {num_samples:,} images  (best top-1 {best:.2%})"
        )

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, title: str, rows: dict[str, str]) -> None:
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        if self._active:
            self._console.print(table)


def in_hours(seconds: float) -> str:
    """`1:02:03`, `2 days, 3:04:05`"""
    return str(timedelta(seconds=round(seconds)))


def in_words(metrics: Metrics) -> str:
    loss = metrics["train/loss"]
    return (
        f"loss {'none, no update' if loss is None else f'{loss:.4f}'}  lr {metrics['train/lr']:.4g}  "
        f"{metrics['perf/images_per_s']:,.0f} img/s  data {metrics['perf/data_wait']:.1%}"
    )


def display(step: int, total_steps: int, metrics: Metrics, left: str, scores: str) -> Group:
    """Three lines of at most 80 columns: how far, how training goes, what was scored."""
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_column(no_wrap=True)
    epoch = f"epoch {metrics['epoch']:.2f}" if metrics else "starting"
    bar = ProgressBar(total=total_steps, completed=step)
    head.add_row(epoch, bar, f"step {step:,}/{total_steps:,}", f"{left} left" if left else "")
    bad = metrics.get("data/bad") if metrics else None
    last = "  ".join(each for each in (scores, f"{bad} bad samples" if bad else "") if each)
    return Group(head, Text(in_words(metrics) if metrics else ""), Text(last))
