"""log.csv: metrics.csv, one row per step, one column per metric, for spreadsheets."""

import csv
import io
from pathlib import Path

from dist_trainer.log.metrics_file import Row
from dist_trainer.log.names import METRICS
from dist_trainer.log.wandb_run import Ending
from dist_trainer.storage.atomic import replace_text


class CsvTable:
    """Written anew when the first value of a column comes, else appended to."""

    title = "metrics.csv"

    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._columns = path, list[Row](), list[str]()

    def show(self, rows: list[Row], ending: Ending | None = None) -> None:
        self._rows += rows
        known = {name for row in rows for name in row} | set(self._columns)
        columns = [name for name in ("step", "epoch", *METRICS) if name in known]
        if columns != self._columns:
            self._columns = columns
            replace_text(self._path, ",".join(columns) + "\n" + self._text(self._rows))
        elif rows:
            with self._path.open("a", newline="") as file:
                file.write(self._text(rows))

    def _text(self, rows: list[Row]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def close(self, ending: Ending) -> None:
        """Nothing is left to write."""
