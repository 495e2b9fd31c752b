"""Jobs of slurm/train.sbatch on the Slurm of tests/support/slurm.py: a small run, and what is left of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from running import PATIENCE, ROOT

from slurm import Slurm

ARGV = ["--engine.sums=exact", "--wandb.mode=disabled"]
LONG = ["--duration=300step", "--eval.every=null", "--checkpoint.every=null", "--log.every=1step"]
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def work_folder(parent: Path) -> Path:
    """A folder with data and a config, small.yaml."""
    source = ROOT / "tests" / "fixtures" / "81fd9c4"
    return shutil.copytree(source, parent / "here", ignore=shutil.ignore_patterns("runs"))


def submit(slurm: Slurm, here: Path, *argv: str, options: tuple[str, ...] = ()) -> str:
    """A job on two nodes, or as `options` has it; its output is in `here`/JOB.out."""
    given = ["--nodes=2", "--cpus-per-task=2", "--output=%j.out", *options]
    return slurm.submit(here, *given, str(ROOT / "slurm" / "train.sbatch"), "small.yaml", *ARGV, *argv)


def alone(here: Path, *argv: str) -> Path:
    """The folder of an undisturbed run of one process."""
    command = [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *ARGV, *LONG, "--run.name=alone", *argv]
    subprocess.run(command, cwd=here, env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=600)
    return here / "runs" / "alone"


def digests(run: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return found


def output(here: Path, job: str) -> str:
    file = here / f"{job}.out"
    return file.read_text() if file.exists() else ""


def started(slurm: Slurm, here: Path, job: str, name: str, seconds: float = 90) -> Path:
    """The run folder of a job that has logged its first step."""
    run = here / "runs" / name
    logged = run / "metrics.jsonl"
    wait_for(
        lambda: logged.exists() and '"train/loss"' in logged.read_text(),
        lambda: output(here, job),
        seconds,
    )
    return run


def wait_for(condition: Callable[[], object], said: Callable[[], str], seconds: float) -> None:
    """Raises AssertionError with what was `said`, after PATIENCE x `seconds` or at a mistake."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        assert time.monotonic() < deadline and "dist-trainer: " not in said(), said()[-1500:]
        time.sleep(0.1)  # between two looks; the deadline decides


def state(run: Path) -> list[str]:
    """[state, attempt]"""
    return (run / "STATE").read_text().split()
