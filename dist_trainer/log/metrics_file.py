"""metrics.jsonl: one JSON object per line, `step` (updates made) and `epoch` in each; the source of every plot."""

import json
from collections.abc import Mapping
from pathlib import Path

from dist_trainer.errors import LocalError
from dist_trainer.storage.atomic import replace_text

Metrics = Mapping[str, float | int | None]
"""By name; None where there is no value."""


class MetricsFile:
    """Appends lines. A resumed run first drops those after its checkpoint, so that no step appears twice; and scores of
    that step unless all of them `are_whole`, since an evaluation that was cut short is made again."""

    def __init__(self, path: Path, resume_step: int, *, are_whole: bool = True) -> None:
        self._path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_step]
            if not are_whole:
                kept = [line for line in kept if not (_step(line) == resume_step and '/top1"' in line)]
            replace_text(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """One write call per line: a reader, or a kill, sees whole lines. Raises LocalError when the disk refuses."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise LocalError(
                f"cannot write {self._path}: {error.strerror or error}; the last checkpoint is whole: make room, then "
                "start again"
            ) from None


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # an incomplete last line
