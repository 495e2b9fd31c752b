"""`runs`: one line for each run folder, the newest first."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from dist_trainer.config.arguments import new_parser, parse
from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import Row, read_rows
from dist_trainer.log.names import SCORES
from dist_trainer.run_folder.owner import is_owned
from dist_trainer.run_folder.what_follows import read_state


def command(argv: list[str]) -> int:
    parser = new_parser("runs", "One line for each run in a folder: how far, how good, where.", config=False)
    parser.add_argument("dir", type=str, nargs="?", default="runs", help="where run folders are")
    parser.add_argument("--watch", action="store_true", help="look again every 5 seconds, until Ctrl-C")
    options = parse(parser, argv)
    root = Path(options.dir)
    if not options.watch:
        print(table_of(root))
        return 0
    with Live(auto_refresh=False) as live:
        while True:
            live.update(Text(table_of(root), no_wrap=True), refresh=True)
            time.sleep(5)


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
    environment = _json(folder / "env.json")
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


def _json(path: Path) -> dict[str, Any]:
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


def table_of(root: Path) -> str:
    """Whole lines, whatever the width of the terminal: they may go into another program."""
    rows = [("run", "state", "step", "epoch", "best top-1", "last sign of life", "host")]
    for run in sorted((standing(folder) for folder in find_runs(root)), key=lambda run: run.age_s):
        rows.append(
            (
                run.name,
                run.state,
                f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else ""),
                f"{run.epoch:.2f}",
                "" if run.best is None else f"{run.best:.2%}",
                f"{timedelta(seconds=round(run.age_s))} ago",
                run.host,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
