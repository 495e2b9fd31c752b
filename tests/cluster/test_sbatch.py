"""slurm/train.sbatch on a real Slurm: two nodes of one rank each."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

from slurm import Slurm, missing, running_slurm

# Named, not hidden: without root or Debian's package there is no Slurm to start. `make test` installs it where it can.
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")

ARGV = ["--engine.sums=exact", "--wandb.mode=disabled"]
LONG = ["--duration=300step", "--eval.every=null", "--checkpoint.every=null", "--log.every=1step"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path may have 107 characters
    with running_slurm(folder, 4) as started:
        yield started
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: data and a config."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = ROOT / "tests" / "fixtures" / "81fd9c4"
    return shutil.copytree(source, tmp_path / "here", ignore=shutil.ignore_patterns("runs"))


def submit(slurm: Slurm, here: Path, *argv: str) -> str:
    """A job on two nodes; its output is in `here`/JOB.out."""
    options = ["--nodes=2", "--cpus-per-task=2", "--output=%j.out"]
    return slurm.submit(here, *options, str(ROOT / "slurm" / "train.sbatch"), "small.yaml", *ARGV, *argv)


def digests(run: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return found


def started(slurm: Slurm, here: Path, job: str, name: str) -> Path:
    """The run folder of a job that has logged its first step."""
    run, deadline = here / "runs" / name, time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and '"train/loss"' in (run / "metrics.jsonl").read_text()):
        said = (here / f"{job}.out").read_text() if (here / f"{job}.out").exists() else ""
        assert time.monotonic() < deadline and "dist-trainer: " not in said, said
        time.sleep(0.1)  # between two looks; the deadline decides
    return run


def state(run: Path) -> list[str]:
    """[state, attempt]"""
    return (run / "STATE").read_text().split()


def test_a_stopped_job_queues_itself_again_and_ends_as_if_it_had_not_been_stopped(slurm: Slurm, here: Path) -> None:
    """By Slurm's signal to its script, as before the time limit: it goes on by itself, to the very weights of one
    process that was not disturbed. A second one is cancelled by its user, and stays so, saved. A third has a mistake:
    status 2 in one line, and it is not tried again.

    Mutations: requeue whatever STATE says; a STATE of another attempt counts; no veto by TERM; torchrun's own report.
    """
    job = submit(slurm, here, *LONG, "--run.name=run")
    mistaken = submit(slurm, here, "--lr.peak=fast", "--run.name=mistaken")
    run = started(slurm, here, job, "run")
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(mistaken) == ("FAILED", "2:0")
    said = (here / f"{mistaken}.out").read_text().splitlines()
    assert len(said) == 1 and said[0].startswith("dist-trainer: lr.peak: ")
    slurm.wait_for_restart(job)
    assert state(run) == ["stopped", f"{job}.0.0"]

    cancelled = submit(slurm, here, *LONG, "--run.name=cancelled")
    other = started(slurm, here, cancelled, "cancelled")
    slurm("scancel", cancelled)
    assert slurm.wait(cancelled)[0] == "CANCELLED"
    assert state(other) == ["stopped", f"{cancelled}.0.0"]

    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes
    command = [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *ARGV, *LONG, "--run.name=alone"]
    subprocess.run(command, cwd=here, check=True, capture_output=True, timeout=120)
    assert slurm.wait(job) == ("COMPLETED", "0:0"), (here / f"{job}.out").read_text()
    assert state(run) == ["done", f"{job}.1.0"]
    assert "resuming from step_" in (here / f"{job}.out").read_text()
    assert digests(run) == digests(here / "runs" / "alone")


@pytest.mark.slow  # a minute
def test_a_preempted_job_goes_on_when_the_nodes_are_free_again(slurm: Slurm, here: Path) -> None:
    """Slurm ends the ranks alone, and would call a script that ends within the grace time failed. It goes on
    with one node fewer, to the same weights.

    Mutation: leave the requeue to Slurm.
    """
    job = submit(slurm, here, *LONG, "--run.name=run")
    run = started(slurm, here, job, "run")
    other = slurm.submit(here, "--partition=high", "--nodes=4", "--output=%j.out", "--wrap=sleep 5")
    slurm.wait_for_restart(job)
    assert state(run) == ["stopped", f"{job}.0.0"]
    assert slurm.wait(other) == ("COMPLETED", "0:0")
    slurm("scontrol", "update", f"JobId={job}", "NumNodes=1", "StartTime=now")
    assert slurm.wait(job) == ("COMPLETED", "0:0"), (here / f"{job}.out").read_text()
    assert state(run) == ["done", f"{job}.1.0"]
    command = [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *ARGV, *LONG, "--run.name=alone"]
    subprocess.run(command, cwd=here, check=True, capture_output=True, timeout=120)
    assert digests(run) == digests(here / "runs" / "alone")
