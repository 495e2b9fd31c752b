"""The record, and its views as files: lines written, mended after a cut; CSV and TensorBoard hold the same values."""

import csv
import json
import sys
from pathlib import Path

import pytest
from running import TINY, run_jobs
from wandb_files import record

from dist_trainer.commands.plan import plan_figures
from dist_trainer.config.arguments import new_parser, parse_config
from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import MetricsFile, Tail, by_step, read_rows
from dist_trainer.log.names import METRICS
from dist_trainer.log.wandb_run import Ending, whole_rows

NOWHERE = ["--data.train=here", "--data.val=here", "--batch.global_batch=64", "--model.name=small_resnet"]


def test_a_cut_last_line_is_mended(tmp_path: Path) -> None:
    """At every byte of the last line. Mutation: append behind the rest of a line."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        MetricsFile(path, 99).write(step, {"train/loss": 0.5})
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        MetricsFile(path, 99).write(4, {"train/loss": 0.25})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 4]


def test_counts_of_restarts_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(5, {"run/event": "a", "run/restarts": 1, "run/roll_backs": 2})
    file.write(9, {"run/event": "b", "run/restarts": 2, "run/roll_backs": 2})
    resumed = MetricsFile(path, 5)
    assert (resumed.restarts, resumed.roll_backs) == (2, 2), "the dropped one happened too"
    path.write_text('{"step": 3, "run/event": "of a version without counts"}\n')
    assert MetricsFile(path, 5).restarts == 1


def test_a_reader_sees_whole_lines_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(tail.new()) == [{"step": 1}]
    assert list(tail.new()) == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert list(tail.new()) == [{"step": 2}]


def test_lines_of_one_step_are_one_row() -> None:
    lines = [{"step": 1, "a": 1.0, "b": None}, {"step": 1, "run/event": "x"}, {"step": 1, "run/event": "y", "a": 2.0}]
    assert list(by_step([*lines, {"step": 2}])) == [{"step": 1, "a": 2.0, "run/event": "x; y"}, {"step": 2}]


@pytest.mark.parametrize(
    ("ending", "kept"),
    [
        (Ending("done", {"steps": 20}), [10, 20]),
        (Ending("stopped", {"steps": 20}), [10]),  # its evaluation may have been cut short
        (Ending("stopped", {"steps": 23}), [10, 20]),
        (Ending("running", {}), [10]),
    ],
)
def test_a_row_that_may_grow_is_not_sent_to_a_server(ending: Ending, kept: list[int]) -> None:
    assert [row["step"] for row in whole_rows([{"step": 10}, {"step": 20}], ending)] == kept


def test_csv_and_tensorboard_hold_the_record(tmp_path: Path, fashion: list[str]) -> None:
    """Stopped and gone on with: value by value, each step once. Mutation: append to the files of the attempt before."""
    argv = [*TINY, *fashion, "--log.csv=true", "--log.tensorboard=true", "--eval.every=10step"]
    run_jobs(2, [{"name": "run", "argv": argv, "stop_at": 8}, {"name": "run", "argv": argv}], tmp_path)
    rows = record(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        table = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert table == [{name: str(value) for name, value in row.items()} for row in rows]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name in {name for row in rows for name in row} - {"step", "perf/time", "run/event"}:
        theirs = [(each.step, each.value) for each in events.Scalars(name)]
        assert theirs == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", ".nan"])
def test_a_time_that_is_none_is_refused(seconds: str) -> None:
    with pytest.raises(UserError, match=r"^wandb\.timeout: \S+ is not (positive|a number)"):
        config, _ = parse_config(new_parser("plan", ""), [*NOWHERE, f"--wandb.timeout={seconds}"])
        plan_figures(config, "run", num_samples=64)


def test_an_extra_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made. Mutation: the process beside rank 0 finds out."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        UserError, match=r"^log\.tensorboard: needs tensorboard: pip install 'dist_trainer\[tensorboard\]'$"
    ):
        plan_figures(
            parse_config(new_parser("plan", ""), [*NOWHERE, "--log.tensorboard=true"])[0], "run", num_samples=64
        )


def test_every_metric_of_a_run_is_in_the_table(tmp_path: Path, fashion: list[str]) -> None:
    """Also those of two ranks, with EMA, averages, exact sums. Mutation: a new name that names.py lacks."""
    more = ["--ema.decay=0.9", "--averaging.top_k=2", "--precise_bn.num_samples=256", "--engine.sums=exact"]
    argv = [*TINY, *fashion, *more, "--eval.every=10step", f"--run.mirror={tmp_path / 'mirror'}"]
    run_jobs(2, [{"name": "run", "argv": argv, "stop_at": 8}, {"name": "run", "argv": argv}], tmp_path)
    lines = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    names = {name for line in lines for name in line} - {"step", "epoch"}
    assert names <= METRICS.keys()
    assert METRICS.keys() - names == {"perf/memory_device"}
    assert all({"step", "epoch", "perf/time"} <= line.keys() for line in lines)
    for line in lines:
        if "train/loss" in line:
            assert line["perf/slowest_rank"] in (0, 1) and 0 <= line["perf/slowest_by"] <= 1
            assert 1e8 < line["perf/memory_host"] < 1e11
