"""Where a run stands, from its folder alone: also of one that trains, or was killed."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import Row, read_rows
from dist_trainer.log.names import SCORES
from dist_trainer.run_folder.owner import is_owned
from dist_trainer.run_folder.what_follows import read_state

TOP1 = {f"{prefix}/top1" for prefix, _ in SCORES.values()}


@dataclass(frozen=True)
class Standing:
    """One run, from its folder alone."""

    name: str
    state: str
    step: int
    total_steps: int | None
    epoch: float
    best: float | None
    """The best validation top-1 of any weights."""
    age_s: float
    """Seconds since its last sign of life."""
    host: str


def standing(folder: Path) -> Standing:
    """Also of a run that trains, or was killed."""
    state, _ = read_state(folder)
    rows = list(read_rows(folder / "metrics.jsonl"))
    files = [file for name in ("metrics.jsonl", "STATE", "config.yaml") if (file := folder / name).exists()]
    seen = max(file.stat().st_mtime for file in files)
    environment = read_json(folder / "env.json")
    accuracies = [row[name] for row in rows for name in row.keys() & TOP1]
    last: Row = rows[-1] if rows else {"step": 0}
    return Standing(
        name=folder.name,
        state="killed" if state == "running" and not is_owned(folder) else state or "not begun",
        step=last["step"],
        total_steps=environment.get("total_steps"),
        epoch=last.get("epoch", 0.0),
        best=max(accuracies, default=None),
        age_s=time.time() - seen,
        host=environment.get("host", ""),
    )


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is missing or damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {}


FILES = ("config.yaml", "STATE")
"""What every run folder has."""


def find_runs(root: Path) -> Iterator[Path]:
    """Folders in `root`, or `root` itself, that hold a run. Raises UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one that run.dir names")
    found = [each for each in (root, *sorted(root.iterdir())) if all((each / name).is_file() for name in FILES)]
    if not found:
        raise UserError(f"{root}: holds no run folder; give the one that run.dir names")
    yield from found
