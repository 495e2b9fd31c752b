"""`runs`: one line for each run folder, the newest first."""

import time
from datetime import timedelta
from pathlib import Path

from rich.live import Live
from rich.text import Text

from dist_trainer.config.arguments import new_parser, parse
from dist_trainer.report.standing import find_runs, standing
from dist_trainer.report.table import aligned


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


def table_of(root: Path) -> str:
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
    return aligned(rows)
