"""The report's plots, by matplotlib: SVG whose colours are the page's, and PNG."""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_trainer.report.read import RunRecord, scored

SERIES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#3f8fbf", "#882255", "#4d7c0f"]
"""Told apart by people who do not see all colours, after Okabe and Ito 2008; for white paper."""
INK, FAINT, PAPER = "#1b1c1e", "#d4d6da", "#fffffe"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    color: f"var(--c{number})" for number, color in enumerate(SERIES)
}
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2))]
MOST_POINTS = 600
PHASES = [
    ("perf/seconds_data", "waiting for data"),
    ("perf/seconds_forward", "forward"),
    ("perf/seconds_rest", "backward, exchange, update"),
    ("perf/seconds_eval", "evaluation"),
    ("perf/seconds_save", "saving"),
]
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.5, "figure.facecolor": "none",
    "axes.facecolor": "none",
}  # fmt: skip


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means of neighbours, which keep the shape of a noisy curve."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _figure(y_label: str, *, of_runs: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.0 + 0.12 * max(0, of_runs - 3)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("epoch")
    axes.set_ylabel(y_label)
    return figure, axes


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], label: str, **style: object) -> None:
    if not xs:
        return
    x, y = thinned(xs, ys)
    axes.plot(x, y, label=label, marker="o" if len(x) == 1 else None, **style)  # type: ignore[arg-type]


def _legend(axes: Axes) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(loc="best")


def _mark(axes: Axes, run: RunRecord) -> None:
    """Restarts, with the number of ranks from there on."""
    for event in run.events:
        axes.axvline(event["epoch"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        text = f"{event['run/world']}" if "run/world" in event else ""
        axes.annotate(
            text, (event["epoch"], 1), xycoords=("data", "axes fraction"), fontsize=8, ha="center", va="bottom"
        )


def loss(runs: list[RunRecord]) -> Figure:
    figure, axes = _figure("loss", of_runs=len(runs))
    for number, run in enumerate(runs):
        color, name = SERIES[number % len(SERIES)], "" if len(runs) == 1 else f"{run.name}: "
        _line(axes, *run.values("train/loss"), f"{name}training", color=color)
        if run.values("val/loss")[0]:
            second = SERIES[1] if len(runs) == 1 else color
            _line(axes, *run.values("val/loss"), f"{name}validation", color=second, linestyle=DASHES[1])
    _legend(axes)
    return figure


def top1(runs: list[RunRecord]) -> Figure:
    """All weights of one run; of several, the best weights of each."""
    figure, axes = _figure("top-1, %", of_runs=len(runs))

    def draw(run: RunRecord, name: str, label: str, **style: object) -> None:
        xs, ys = run.values(name)
        _line(axes, xs, [100 * y for y in ys], label, **style)

    for number, run in enumerate(runs):
        kinds = scored(run)
        if len(runs) == 1:
            for place, (prefix, title) in enumerate(kinds.items()):
                draw(run, f"{prefix}/top1", title, color=SERIES[place], linestyle=DASHES[place % 2])
            if run.values("train_eval/top1")[0]:
                draw(run, "train_eval/top1", "training samples", color=INK, linestyle=DASHES[2])
        elif kinds:
            best = max(kinds, key=lambda prefix: run.best(f"{prefix}/top1") or 0.0)
            draw(run, f"{best}/top1", f"{run.name}: {kinds[best]}", color=SERIES[number % len(SERIES)])
    _legend(axes)
    return figure


def rate(runs: list[RunRecord]) -> Figure:
    figure, axes = _figure("learning rate", of_runs=len(runs))
    for number, run in enumerate(runs):
        _line(axes, *run.values("train/lr"), run.name, color=SERIES[number % len(SERIES)])
    _legend(axes)
    return figure


def throughput(runs: list[RunRecord]) -> Figure:
    """With dotted lines where a run was started again, and the number of ranks from there on."""
    figure, axes = _figure("images per second", of_runs=len(runs))
    for number, run in enumerate(runs):
        _line(axes, *run.values("perf/images_per_s"), run.name, color=SERIES[number % len(SERIES)])
        _mark(axes, run)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def phases(runs: list[RunRecord]) -> Figure:
    """Shares of the time of each run, from its record."""
    figure = Figure(figsize=(4.8, 1.6 + 0.45 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(runs))
    sums = np.array([[sum(run.values(name)[1]) for run in runs] for name, _ in PHASES])
    total = np.maximum(sums.sum(axis=0), 1e-9)
    for number, (_, title) in enumerate(PHASES):
        shares = 100 * sums[number] / total
        axes.barh(range(len(runs)), shares, left=left, color=SERIES[number], label=title, height=0.6)
        left += shares
    axes.set_yticks(range(len(runs)), [run.name if len(runs) > 1 else "" for run in runs])
    axes.set_xlabel("% of the time")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


PLOTS = {
    "top1": ("Top-1 accuracy", top1, "val/top1"),
    "loss": ("Loss", loss, "train/loss"),
    "rate": ("Learning rate", rate, "train/lr"),
    "throughput": ("Throughput", throughput, "perf/images_per_s"),
    "phases": ("Where the time goes", phases, "perf/seconds_rest"),
}
"""File name -> (title, the function that draws it, the metric without which there is nothing to draw)."""


def drawn(runs: list[RunRecord]) -> Iterable[tuple[str, str, Figure]]:
    """(file name, title, figure) of every plot for which some run has values."""
    with mpl.rc_context(STYLE):
        for name, (title, draw, metric) in PLOTS.items():
            if any(run.values(metric)[0] for run in runs):
                yield name, title, draw(runs)  # all of them: a run has one colour in every plot


def svg(figure: Figure, name: str) -> str:
    """One <svg> element, with its own ids, in the colours of the page, as wide as its place."""
    file = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return _sized(text)


def _sized(text: str) -> str:
    head, _, rest = text.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", head) + ' role="img">' + rest


def png(figure: Figure) -> bytes:
    """On white, for slides and mails."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()
