"""The process that shows a run's record elsewhere while rank 0 trains: `python -m dist_trainer.log.follow`.

It reads metrics.jsonl as it grows and STATE at the end, so whatever W&B does, or does not answer, training never waits
for it and loses nothing by it. It outlives a rank 0 that is killed, to say so. It ends when its standard input does.
Rank 0 (follower.py) reads what it writes: one JSON object per line, {"say": a line for the user} or {"busy": seconds}.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dist_trainer.errors import first_line
from dist_trainer.log.metrics_file import Row, Tail, by_step
from dist_trainer.log.wandb_run import Ending, WandbConfig, WandbRun, closing_s, describe, no_answer, whole_rows
from dist_trainer.storage.flock import lock_file

NO_ANSWER = 75
"""Exit status: W&B did not answer, or refused. Rank 0 starts this again, offline."""
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Task:
    """What rank 0 asks for."""

    folder: str
    mode: str
    """Of W&B: online, offline, disabled."""
    wandb: dict[str, Any]
    """WandbConfig's fields."""
    facts: dict[str, Any]
    """The run's config on W&B."""
    tensorboard: bool = False
    csv: bool = False
    label: str | None = None
    """Of another host than rank 0's: nothing is shown but its load."""

    @property
    def is_empty(self) -> bool:
        return self.mode == "disabled" and not self.tensorboard and not self.csv

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)


class View(Protocol):
    """A place where rows of whole steps are shown. A new attempt begins it again, from the first row."""

    def show(self, rows: list[Row], ending: Ending | None = None) -> Any: ...

    def close(self, ending: Ending) -> None: ...


def tell(**message: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(message), flush=True)


def read_ending(folder: Path) -> Ending:
    """What the run folder says of the attempt that is over."""
    try:
        state = (folder / "STATE").read_text().split("\n")[0]
    except OSError:
        state = "running"
    summary: dict[str, Any] = {}
    if state != "running":
        with contextlib.suppress(OSError, ValueError):
            summary = json.loads((folder / "summary.json").read_text())
    return Ending(state, summary)


class Deadline:
    """Ends this process if a block takes longer than it may; wandb's calls cannot be interrupted otherwise."""

    def __init__(self, seconds: float, line: str, status: int) -> None:
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._line, self._status = line, status

    def _end(self) -> None:
        tell(say=self._line)
        os._exit(self._status)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


class WandbView:
    """The W&B run, or one line that it failed."""

    def __init__(self, task: Task) -> None:
        """Raises SystemExit(NO_ANSWER) where it cannot be online."""
        self._folder, config = Path(task.folder), WandbConfig(**task.wandb)
        self._config, self.is_online, self._is_host = config, task.mode == "online", task.label is not None
        self._run: WandbRun | None = None
        later = f"dist-trainer wandb-sync {self._folder} uploads later"
        if self.is_online and (why := no_answer(config.timeout)):
            tell(say=f"W&B: {why}: goes on offline; {later}")
            task, self.is_online = replace(task, mode="offline"), False
        wait = f"W&B: no answer within {config.timeout:g} s: goes on offline; {later}"
        try:
            with Deadline(config.timeout, wait, NO_ANSWER):
                self._run = WandbRun(self._folder, config, task.facts, mode=task.mode, label=task.label)
        except Exception as error:
            if self.is_online:
                tell(say=f"W&B: {describe(error)}: goes on offline; {later}")
                sys.exit(NO_ANSWER)
            self._give_up(error)
        if self._run is not None and self.is_online and task.label is None:
            tell(say=f"W&B: {self._run.where}")

    def _give_up(self, error: Exception) -> None:
        self._run = None
        tell(
            say=f"W&B: {describe(error)}; goes on without it: metrics.jsonl has everything, and dist-trainer "
            f"wandb-sync {self._folder} uploads it"
        )

    def show(self, rows: list[Row], ending: Ending | None = None) -> None:
        if self._run is not None:
            try:
                self._run.show(rows, ending)
                self._run.remove_older()
            except Exception as error:
                self._give_up(error)

    def _keep_results(self, run: WandbRun) -> None:
        try:
            if line := run.artifact():
                tell(say=line)
        except Exception as error:
            tell(say=f"W&B: the best weights were not uploaded: {describe(error)}")

    def close(self, ending: Ending) -> None:
        run = self._run
        if run is None:
            return
        seconds = closing_s(self._folder, self._config) if ending.state == "done" else self._config.timeout
        missing = f"W&B: not done within {seconds:g} s: dist-trainer wandb-sync {self._folder} uploads what is missing"
        if ending.state == "done":
            tell(busy=seconds)
        try:
            with Deadline(seconds, missing, 1):
                if self._is_host:
                    ending = Ending("done", {})
                elif ending.state == "done":
                    self._keep_results(run)
                run.close(ending)
        except Exception as error:
            self._give_up(error)


def open_views(task: Task) -> list[View]:
    folder, views = Path(task.folder), list[View]()
    if task.csv:
        from dist_trainer.log.csv_table import CsvTable

        views.append(CsvTable(folder / "metrics.csv"))
    if task.tensorboard:
        from dist_trainer.log.tensorboard import TensorBoard

        views.append(TensorBoard(folder / "tensorboard"))
    if task.mode != "disabled":
        views.append(WandbView(task))
    return views


def follow(task: Task) -> None:
    """Show the record until rank 0 is done or gone."""
    tail, pending = Tail(Path(task.folder) / "metrics.jsonl"), list[Row]()
    views, is_over = open_views(task), False
    while not is_over:
        is_over = bool(select.select([0], [], [], POLL_S)[0])  # nothing is ever sent: readable means closed
        if task.label is None and not is_over:
            pending = _show_whole(pending + list(tail.new()), views)
    ending = read_ending(Path(task.folder))
    rows = list(by_step([*pending, *tail.new()])) if task.label is None else []
    for view in views:  # a server keeps what it has; files are written anew
        is_server = isinstance(view, WandbView) and view.is_online
        view.show(whole_rows(rows, ending) if is_server else rows, ending)
        view.close(ending)


def _show_whole(lines: list[Row], views: list[View]) -> list[Row]:
    """Show rows of steps that are over; returns the lines of the last one, which may still grow."""
    if not lines:
        return lines
    *rows, last = by_step(lines)
    for view in views if rows else []:
        view.show(rows)
    return [line for line in lines if line["step"] == last["step"]]


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # Slurm signals every process; the end comes from rank 0
    os.nice(10)
    task = Task(**json.loads(_first_line(0)))
    lock = None
    try:
        if task.mode == "online" and task.label is None:  # one process at a time continues the run on the server
            lock = lock_file(Path(task.folder) / ".wandb_lock", patience=2 * float(task.wandb["timeout"]))
        follow(task)
    except OSError as error:
        tell(say=f"log: {first_line(error)}; metrics.jsonl has everything")
    finally:
        if lock is not None:
            os.close(lock)
    sys.stdout.flush()
    os._exit(0)  # not through wandb's atexit, which may wait


def _first_line(descriptor: int) -> bytes:
    """Unbuffered, so that `select` sees what comes after it."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 4096)):
        line += byte
    return line


if __name__ == "__main__":
    main()
