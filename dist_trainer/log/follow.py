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
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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

    title: str

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

    def __init__(self, seconds: float, say: Callable[[], object], status: int) -> None:
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._say, self._status = say, status

    def _end(self) -> None:
        self._say()
        os._exit(self._status)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def title_of_wandb(folder: str) -> str:
    return f"W&B (dist-trainer wandb-sync {folder} uploads the run later)"


class WandbView:
    """The run at W&B. Where it cannot be online, it is offline, in this process or in another one."""

    def __init__(self, task: Task) -> None:
        self._folder, self._config = Path(task.folder), WandbConfig(**task.wandb)
        self._is_host, timeout = task.label is not None, self._config.timeout
        self.is_online = task.mode == "online"
        self.title = title_of_wandb(task.folder)
        if self.is_online and (why := no_answer(timeout)):
            self._tell_offline(why)
            task, self.is_online = replace(task, mode="offline"), False

        def leave(why: str) -> None:  # not through wandb's atexit, which may wait
            self._tell_offline(why)
            os._exit(NO_ANSWER)

        try:
            with Deadline(timeout, lambda: leave(f"no answer within {timeout:g} s"), NO_ANSWER):
                self._run = WandbRun(self._folder, self._config, task.facts, mode=task.mode, label=task.label)
        except Exception as error:
            if not self.is_online:
                raise
            leave(describe(error))
        if self.is_online:
            tell(say=f"W&B: {self._run.where}")

    def _tell_offline(self, why: str) -> None:
        tell(say=f"W&B: {why}: goes on offline; dist-trainer wandb-sync {self._folder} uploads later")

    def show(self, rows: list[Row], ending: Ending | None = None) -> None:
        self._run.show(rows, ending)
        self._run.remove_older()

    def close(self, ending: Ending) -> None:
        if self._is_host:
            ending = Ending("done", {})
        is_done = ending.state == "done"
        seconds = closing_s(self._folder, self._config) if is_done and not self._is_host else self._config.timeout
        missing = f"W&B: not done within {seconds:g} s: dist-trainer wandb-sync {self._folder} uploads what is missing"
        if is_done:
            tell(busy=seconds)
        with Deadline(seconds, lambda: tell(say=missing), 1):
            if is_done and not self._is_host:
                self._upload_best()
            self._run.close(ending)

    def _upload_best(self) -> None:
        try:
            if line := self._run.artifact():
                tell(say=line)
        except Exception as error:
            tell(say=f"W&B: the best weights were not uploaded: {describe(error)}")


def open_csv(task: Task) -> View:
    from dist_trainer.log.csv_table import CsvTable

    return CsvTable(Path(task.folder) / "metrics.csv")


def open_tensorboard(task: Task) -> View:
    from dist_trainer.log.tensorboard import TensorBoard

    return TensorBoard(Path(task.folder) / "tensorboard")


class Views:
    """All that a task asks for. One that fails is told of once and left out; the others go on."""

    def __init__(self, task: Task) -> None:
        self._open: list[View] = []
        wanted: dict[str, tuple[bool, Callable[[Task], View]]] = {
            "metrics.csv": (task.csv, open_csv),
            "tensorboard": (task.tensorboard, open_tensorboard),
            title_of_wandb(task.folder): (task.mode != "disabled", WandbView),
        }
        for title, (is_wanted, open_view) in wanted.items():
            if is_wanted:
                try:
                    self._open.append(open_view(task))
                except Exception as error:
                    self._tell(title, error)

    @staticmethod
    def _tell(title: str, error: Exception) -> None:
        tell(say=f"{title}: {describe(error)}; goes on without it: metrics.jsonl has everything")

    def each(self, action: Callable[[View], object]) -> None:
        for view in list(self._open):
            try:
                action(view)
            except Exception as error:
                self._open.remove(view)
                self._tell(view.title, error)


def follow(task: Task) -> None:
    """Show the record until rank 0 is done or gone."""
    tail, pending = Tail(Path(task.folder) / "metrics.jsonl"), list[Row]()
    views, is_over = Views(task), False
    while not is_over:
        is_over = bool(select.select([0], [], [], POLL_S)[0])  # nothing is ever sent: readable means closed
        if task.label is None and not is_over:
            pending = _show_whole(pending + list(tail.new()), views)
    ending = read_ending(Path(task.folder))
    rows = list(by_step([*pending, *tail.new()])) if task.label is None else []

    def finish(view: View) -> None:
        is_server = isinstance(view, WandbView) and view.is_online  # keeps what it has; files are written anew
        view.show(whole_rows(rows, ending) if is_server else rows, ending)
        view.close(ending)

    views.each(finish)


def _show_whole(lines: list[Row], views: Views) -> list[Row]:
    """Show rows of steps that are over; returns the lines of the last one, which may still grow."""
    if not lines:
        return lines
    *rows, last = by_step(lines)
    if rows:
        views.each(lambda view: view.show(rows))
    return [line for line in lines if line["step"] == last["step"]]


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # Slurm signals every process; the end comes from rank 0
    os.nice(10)
    task = Task(**json.loads(_first_line(0)))
    if task.mode == "online" and task.label is None:  # one process at a time continues the run on the server
        with contextlib.suppress(OSError):  # a file system without locks
            lock_file(Path(task.folder) / ".wandb_lock", patience=2 * float(task.wandb["timeout"]))
    follow(task)
    os._exit(0)  # releases the lock; not through wandb's atexit, which may wait


def _first_line(descriptor: int) -> bytes:
    """Unbuffered, so that `select` sees what comes after it."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 4096)):
        line += byte
    return line


if __name__ == "__main__":
    main()
