"""The report: one HTML page that needs nothing beside it, and its plots as PNG files."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.index import ShardIndex
from dist_trainer.distributed.world import alone
from dist_trainer.errors import UserError
from dist_trainer.log.console import Terminal
from dist_trainer.log.names import METRICS
from dist_trainer.report.mistakes import Mistakes, mistakes
from dist_trainer.report.plots import drawn, png, svg
from dist_trainer.report.read import RunRecord, differing_keys, scored
from dist_trainer.run.data import open_data
from dist_trainer.run.pictures import captions, pictures, surely_wrong
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.storage.atomic import replace_text

MAX_MATRIX = 20
"""Classes up to which the whole confusion matrix is shown."""
NUM_PICTURES = 12
NUM_CLASSES = 20
"""Of classes and pairs in tables."""


@dataclass(frozen=True)
class Validation:
    """What the best weights of one run say of the validation set."""

    mistakes: Mistakes
    pictures: list[tuple[str, str, str, str]]
    """(image as a data URL, class, what was said, the file's own name)."""
    note: str


def write_report(runs: list[RunRecord], out: Path, sort: str, say: Callable[[str], None]) -> Path:
    """index.html and PNG files in `out`; returns the page. Raises UserError."""
    check_metric(sort, runs)
    lower = sort.endswith("/loss")
    runs = sorted(runs, key=lambda run: _order(run.best(sort), lower))
    out.mkdir(parents=True, exist_ok=True)
    plots = []
    for name, title, figure in drawn(runs):
        plots.append((name, title, svg(figure, name)))
        (out / f"{name}.png").write_bytes(png(figure))
    environment = Environment(
        loader=PackageLoader("dist_trainer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "ago": ago}
    page = environment.get_template("page.html.j2").render(
        runs=runs,
        sort=sort,
        plots=plots,
        best_of={run.name: best_scores(run) for run in runs},
        value_of={run.name: run.best(sort) for run in runs},
        validation={run.name: found for run in runs if (found := look_at_validation(run, say)) is not None},
        differing=differing_keys(runs) if len(runs) > 1 else [],
        max_matrix=MAX_MATRIX,
        num_classes=NUM_CLASSES,
    )
    replace_text(out / "index.html", page)
    return out / "index.html"


def check_metric(name: str, runs: list[RunRecord]) -> None:
    """Raises UserError for a metric that does not exist, or that no run has."""
    if name not in METRICS:
        raise UserError(f"--sort: no metric {name!r}; README lists them, such as val/top1, val_ema/top1, val/loss")
    if all(run.best(name) is None for run in runs):
        raise UserError(f"--sort: no run has {name}; take val/top1 or train/loss")


def _order(value: float | None, lower: bool) -> float:
    if value is None:
        return float("inf")
    return value if lower else -value


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def ago(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} ago"


def best_scores(run: RunRecord) -> list[tuple[str, float, float | None, float | None]]:
    """(weights, their best top-1, top-5 and loss at that step), of all weights that were scored."""
    found = []
    for prefix, title in scored(run).items():
        rows = [row for row in run.rows if f"{prefix}/top1" in row]
        best = max(rows, key=lambda row, prefix=prefix: row[f"{prefix}/top1"])  # type: ignore[misc]
        found.append((title, best[f"{prefix}/top1"], best.get(f"{prefix}/top5"), best.get(f"{prefix}/loss")))
    return found


def look_at_validation(run: RunRecord, say: Callable[[str], None]) -> Validation | None:
    """Where the validation set is not here, or is another one now, the pictures are left out, with a line."""
    said, names = run.said, list(run.classes)
    if said is None:
        return None
    ids, note = surely_wrong(said, NUM_PICTURES), ""
    shown: list[tuple[str, str, str, str]] = []
    try:
        config, index = open_validation(run)
        names = names or list(index.class_names)
        of_each = zip(pictures(config, index, ids), captions(index, said, ids), ids, strict=True)
        for picture, (label, answer), sample in of_each:
            shown.append((data_url(picture), label, answer, index.describe(sample)))
    except (UserError, OSError) as error:
        note = f"The images are left out: {error}"
        say(f"warning: {run.folder}: no images of what is wrong: {error}")
    return Validation(mistakes(said, names), shown, note) if names else None


def open_validation(run: RunRecord) -> tuple[TrainConfig, ShardIndex]:
    """Raises UserError unless it is here, and the one that the run was scored on."""
    config, _ = parse_config(new_parser("report", ""), [str(run.folder / "config.yaml")])
    index = open_data(config, alone(), Terminal(active=False)).val
    known = RunFolder(run.folder).read_val_fingerprint()
    if known is not None and known != index.fingerprint[:16]:
        raise UserError(f"{index.location} is another validation set now")
    return config, index


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
