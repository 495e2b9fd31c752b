"""A run folder as the report shows it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import Row, by_step, read_rows
from dist_trainer.log.names import SCORES
from dist_trainer.report.standing import Standing, read_json, standing
from dist_trainer.run.pictures import best_predictions
from dist_trainer.run_folder.identity import KEYS, flatten
from dist_trainer.tensors import State


@dataclass(frozen=True)
class RunRecord:
    """Everything that was written about one run."""

    folder: Path
    standing: Standing
    rows: list[Row]
    """One per step, in order."""
    config: dict[str, Any]
    """Flat."""
    summary: dict[str, Any]
    environment: dict[str, Any]
    classes: tuple[str, ...]
    """Their names; none in a folder of a version that did not write them."""

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def said(self) -> State | None:
        """Predictions of the best weights."""
        return best_predictions(self.folder)

    def values(self, name: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of a metric, where it has one."""
        found = [(row["epoch"], row[name]) for row in self.rows if name in row and "epoch" in row]
        return [float(epoch) for epoch, _ in found], [float(value) for _, value in found]

    @property
    def events(self) -> list[Row]:
        """Rows at which it was started again, or rolled back."""
        return [row for row in self.rows if "run/event" in row]

    def best(self, metric: str) -> float | None:
        """The largest value (the smallest loss) of a metric."""
        _, values = self.values(metric)
        return (min if metric.endswith("/loss") else max)(values, default=None)

    @property
    def top1(self) -> float | None:
        return self.standing.best


def read_run(folder: Path) -> RunRecord:
    """Raises UserError for a folder that is no run, or has no metrics yet."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder: it has no config.yaml")
    rows = list(by_step(read_rows(folder / "metrics.jsonl")))
    if not rows:
        raise UserError(f"{folder}: metrics.jsonl has no metrics yet; wait until the run has logged something")
    try:
        config: dict[str, Any] = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{folder}/config.yaml: not YAML: {' '.join(str(error).split())}") from None
    summary = read_json(folder / "summary.json")
    environment, classes = read_json(folder / "env.json"), tuple(read_json(folder / "classes.json"))
    return RunRecord(folder, standing(folder), rows, config, summary, environment, classes)


def differing_keys(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) where values differ, but those of where a run lies and is shown."""
    keys = sorted({key for run in runs for key in run.config}, key=lambda key: (key not in KEYS, key))
    shown = [(key, [json.dumps(run.config.get(key)) for run in runs]) for key in keys]
    elsewhere = ("run.dir", "run.name", "wandb.")
    return [(key, values) for key, values in shown if len(set(values)) > 1 and not key.startswith(elsewhere)]


def scored(run: RunRecord) -> dict[str, str]:
    """Prefix -> title of the weights that were scored."""
    names = {name for row in run.rows for name in row}
    return {prefix: title for prefix, title in SCORES.values() if f"{prefix}/top1" in names}
