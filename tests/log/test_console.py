"""Rank 0's terminal: what it shows on one, and the time that is left."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running import TINY, Session

from dist_trainer.log.console import display, in_hours
from dist_trainer.plan import BatchConfig, Duration, Plan, make_plan
from dist_trainer.run.blueprint import Intervals
from dist_trainer.run.pace import Pace

METRICS: dict[str, Any] = {
    "epoch": 123.456, "train/loss": 1.23456, "train/lr": 0.00123456, "perf/images_per_s": 123456.7,
    "perf/data_wait": 0.123, "data/bad": 12,
}  # fmt: skip


@pytest.mark.parametrize("loss", [1.2345, None])
def test_the_display_fits_eighty_columns(loss: float | None) -> None:
    """At the largest figures. Mutation: a wider bar."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(
        display(1_234_567, 9_999_999, METRICS | {"train/loss": loss}, "12 days, 3:04:05", "top-1 71.23%  best 72.34%")
    )
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n")]
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines), lines
    for text in ("123.46", "1,234,567/9,999,999", "12 days, 3:04:05 left", "12.3%", "best 72.34%", "12 bad samples"):
        assert any(text in line for line in lines), (text, lines)


def plan(duration: str) -> Plan:
    batch = BatchConfig(global_batch=10, micro_batch=10)
    return make_plan(batch, Duration.parse(duration, "duration"), world=1, num_samples=100)


@pytest.mark.parametrize("every", ["1ep", "7step", "33%", "0.3ep", None])
@pytest.mark.parametrize("step", [0, 1, 9, 10, 20, 29, 30])
def test_what_is_due_is_counted_as_it_is_due(every: str | None, step: int) -> None:
    """Against `due` asked of every step. Mutation: the end counts twice where an interval ends there."""
    interval = None if every is None else Duration.parse(every, "eval.every")
    made = plan("3ep")
    assert made.num_due(step, interval) == sum(made.due(each, interval) for each in range(step + 1, 31))


def test_the_time_that_is_left_has_evaluations_and_saves_in_it() -> None:
    """By hand: 10 steps of 2 s, two evaluations of 5 s, one save of 3 s. Mutation: evaluations are free."""
    pace = Pace(plan("3ep"), Intervals(log=None, eval=Duration.parse("5step", "eval.every"), checkpoint=None))
    assert pace.left_s(0) is None
    pace.trained(5, 1000.0)  # start-up
    assert pace.left_s(5) is None
    pace.trained(10, 10.0)
    pace.trained(20, 20.0)
    pace.paused("eval", 4.0)
    pace.paused("eval", 6.0)
    pace.paused("save", 3.0)
    assert pace.left_s(20) == pytest.approx(10 * 2 + 2 * 5 + 3)
    assert pace.left_s(30) == 0
    assert in_hours(93784.6) == "1 day, 2:03:05"


@pytest.mark.slow
@pytest.mark.parametrize("verbose", [False, True])
def test_what_deepspeed_says_of_itself_is_shown_where_asked_for(
    tmp_path: Path, fashion: list[str], verbose: bool
) -> None:
    """Mutation: the key is read after DeepSpeed has begun."""
    argv = [*TINY, *fashion, f"--run.dir={tmp_path}", "--run.name=run", "--engine.zero=1"]
    command = [sys.executable, "-m", "dist_trainer", "train", *argv, f"--log.verbose={verbose}"]
    session = Session(command, tmp_path / "log")
    assert session.wait() == 0
    assert ("DeepSpeed" in session.log.read_text()) == verbose
