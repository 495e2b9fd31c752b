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
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=%j.out"]
    return slurm.submit(here, *options, str(ROOT / "slurm" / "train.sbatch"), "small.yaml", *ARGV, *argv)


def digests(run: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((run / "summary.json").read_text())["weights_sha256"]
    return found


def test_a_job_ends_as_its_ranks_do_and_submitting_it_again_resumes(slurm: Slurm, here: Path) -> None:
    """One stopped by Slurm's signal to its script, as before the time limit: status 3, and the same line again ends
    with the very weights of one process that was not disturbed. One with a mistake: status 2 in one line.

    Mutations: torchrun's own status; its report; --kill-on-bad-exit, which ends the other node's ranks meanwhile.
    """
    job, mistaken = submit(slurm, here, *LONG, "--run.name=run"), submit(slurm, here, "--lr.peak=fast")
    run, deadline = here / "runs" / "run", time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline, (here / f"{job}.out").read_text()
        time.sleep(0.1)  # between two looks; the deadline decides
    slurm("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job) == ("FAILED", "3:0")
    assert (run / "STATE").read_text() == "stopped\n"
    assert slurm.wait(mistaken) == ("FAILED", "2:0")
    said = (here / f"{mistaken}.out").read_text()
    assert len([line for line in said.splitlines() if line.startswith("dist-trainer: lr.peak: ")]) == 1
    assert "ChildFailedError" not in said and "Traceback" not in said
    job = submit(slurm, here, *LONG, "--run.name=run")
    command = [sys.executable, "-m", "dist_trainer", "train", "small.yaml", *ARGV, *LONG, "--run.name=alone"]
    subprocess.run(command, cwd=here, check=True, capture_output=True, timeout=120)
    assert slurm.wait(job) == ("COMPLETED", "0:0"), (here / f"{job}.out").read_text()
    assert (run / "STATE").read_text() == "done\n"
    assert "resuming from step_" in (here / f"{job}.out").read_text()
    assert digests(run) == digests(here / "runs" / "alone")
