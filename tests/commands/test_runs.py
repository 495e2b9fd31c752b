"""`dist-trainer runs`: what a folder says of a run that trains, has ended, or was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import MetricsFile
from dist_trainer.report.standing import find_runs, standing
from dist_trainer.run_folder.folder import RunFolder


def run_in(root: Path, name: str, state: str) -> RunFolder:
    folder = RunFolder(root / name)
    folder.claim()
    (folder.path / "config.yaml").write_text("{}")
    folder.write_environment(2, 40)
    (folder.path / "STATE").write_text(f"{state}\n")
    file = MetricsFile(folder.path / "metrics.jsonl", 0)
    file.write(10, {"epoch": 1.0, "val/top1": 0.5})
    file.write(10, {"epoch": 1.0, "val_ema_bn/top1": 0.75, "val/loss": 9.0})
    file.write(20, {"epoch": 2.0, "val/top1": 0.625})
    return folder


def test_a_run_that_trains_one_that_is_done_and_one_that_was_killed(tmp_path: Path) -> None:
    """Mutations: a killed run counts as running; the best of one kind of weights alone."""
    trains, done, killed = (run_in(tmp_path, name, state) for name, state in (
        ("trains", "running"), ("done", "done"), ("killed", "running")
    ))  # fmt: skip
    done.release()
    owner = json.loads((killed.path / "owner.json").read_text())
    (killed.path / "owner.json").write_text(json.dumps(owner | {"started": "another process of that number"}))
    found = {run.name: run for run in map(standing, find_runs(tmp_path))}
    assert {name: run.state for name, run in found.items()} == {"trains": "running", "done": "done", "killed": "killed"}
    assert all((run.step, run.total_steps, run.epoch, run.best) == (20, 40, 2.0, 0.75) for run in found.values())
    assert [run.name for run in map(standing, find_runs(done.path))] == ["done"]
    trains.release()


def test_a_line_a_run_whatever_the_width(tmp_path: Path) -> None:
    for name in ("a" * 60, "b"):
        run_in(tmp_path, name, "done").release()
    env = os.environ | {"COLUMNS": "40", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dist_trainer", "runs", str(tmp_path)]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert len(lines) == 3 and all("75.00%" in line and "20/40" in line for line in lines[1:])


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_runs_is_one_line(tmp_path: Path, make: bool) -> None:
    root = tmp_path / "runs"
    if make:
        root.mkdir()
    with pytest.raises(UserError, match=rf"{root}: .*run\.dir"):
        list(find_runs(root))
