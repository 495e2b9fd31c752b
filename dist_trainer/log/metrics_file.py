"""metrics.jsonl, the record of a run: one JSON object per line, by the names of names.py; all else is a view of it.

Appended by rank 0 alone. Steps never go down. Several lines may have one step: training's, one for each weights that
were scored, events.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from dist_trainer.storage.atomic import replace_text

Metrics = Mapping[str, float | int | None]
"""By name; None where there is no value."""
Row = dict[str, Any]
"""A line, or all lines of one step together."""


class MetricsFile:
    """Appends lines. A resumed run first drops those after its checkpoint, so that no step appears twice; and lines of
    that step with a metric that is `made_again`, such as those of an evaluation that was cut short."""

    def __init__(self, path: Path, resume_step: int, *, made_again: Callable[[str], bool] = lambda name: False) -> None:
        self._path = path
        lines = list(read_rows(path))
        events = [line for line in lines if "run/event" in line]
        self.restarts = max((line.get("run/restarts", n) for n, line in enumerate(events, 1)), default=0)
        self.roll_backs = max((line.get("run/roll_backs", 0) for line in events), default=0)
        """So far, also by lines that are dropped now."""
        kept = [line for line in lines if line["step"] <= resume_step]
        kept = [line for line in kept if line["step"] < resume_step or not any(map(made_again, line))]
        if path.exists():
            replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._size = path.stat().st_size if path.exists() else 0
        self._unwritten = ""

    def write(self, step: int, metrics: Mapping[str, float | int | str | None]) -> str | None:
        """One write call per line: a reader, or a kill, sees whole lines.

        A line that the disk refuses is kept and written with the next one; then this returns a line to tell, once.
        """
        line = {"step": step, **metrics, "perf/time": round(time.time(), 3)}
        was_whole = not self._unwritten
        self._unwritten += json.dumps(line) + "\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                file.truncate(self._size)  # a full disk may have taken a part of a line
                self._size += _write_all(file, self._unwritten.encode())
                self._unwritten = ""
        except OSError as error:
            if was_whole:
                return f"cannot write {self._path}: {error.strerror or error}; its lines are kept until there is room"
        return None


def _write_all(file: FileIO, data: bytes) -> int:
    """All of `data`, or OSError: what fits on a disk is told by a short count, and the reason by the next call."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    return len(data)


def _parsed(text: str) -> Row | None:
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None  # cut off by a kill or a full disk


class Tail:
    """The lines of a record that is being written, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> Iterator[Row]:
        """Whole lines since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._at += end
        for text in data[:end].decode(errors="replace").splitlines():
            if (line := _parsed(text)) is not None:
                yield line


def read_rows(path: Path) -> Iterator[Row]:
    """Every whole line; none where there is no file."""
    return Tail(path).new()


def by_step(lines: Iterable[Row]) -> Iterator[Row]:
    """Lines of one step as one row, without what has no value. Of two values with one name, the later one counts;
    events are joined by `; `."""
    row: Row = {}
    for line in lines:
        if row and line["step"] != row["step"]:
            yield row
            row = {}
        known = {name: value for name, value in line.items() if value is not None}
        if "run/event" in row and "run/event" in known:
            known["run/event"] = f"{row['run/event']}; {known['run/event']}"
        row |= known
    if row:
        yield row
