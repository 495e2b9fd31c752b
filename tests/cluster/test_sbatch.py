"""slurm/train.sbatch on a real Slurm: two nodes of one rank each."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import ENVIRONMENT, LONG, alone, digests, output, started, state, submit, work_folder
from running import ROOT

from slurm import Slurm, missing, running_slurm

# Named, not hidden: without root or Debian's package there is no Slurm to start. `make test` installs it where it can.
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm(4) as started:
        yield started


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: data and a config."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return work_folder(tmp_path)


def test_a_stopped_job_queues_itself_again_and_ends_as_if_it_had_not_been_stopped(slurm: Slurm, here: Path) -> None:
    """By Slurm's signal to its script, as before the time limit: it goes on by itself, to the very weights of one
    process that was not disturbed. A second one is cancelled by its user, and stays so, saved. A third has a mistake:
    status 2 in one line, and it is not tried again. The line of a run that is done is done at once.

    Mutations: requeue whatever STATE says; a run that was done before leaves the STATE of the attempt that did it; a
    STATE of another attempt counts; no veto by TERM; torchrun's own report.
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

    slurm.restart_now(job)
    alone(here)
    assert slurm.wait(job) == ("COMPLETED", "0:0"), (here / f"{job}.out").read_text()
    assert state(run) == ["done", f"{job}.1.0"]
    assert "resuming from step_" in (here / f"{job}.out").read_text()
    assert digests(run) == digests(here / "runs" / "alone")
    assert "Submitted" not in output(here, job)  # where a requeue is allowed, that is all

    again = submit(slurm, here, *LONG, "--run.name=run")
    assert slurm.wait(again) == ("COMPLETED", "0:0"), output(here, again)
    assert state(run) == ["done", f"{again}.0.0"] and output(here, again).count("runs/run: complete") == 1


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
    slurm.restart_now(job, "NumNodes=1")
    assert slurm.wait(job) == ("COMPLETED", "0:0"), (here / f"{job}.out").read_text()
    assert state(run) == ["done", f"{job}.1.0"]
    alone(here)
    assert digests(run) == digests(here / "runs" / "alone")


@pytest.mark.slow  # half a minute
def test_nodes_that_the_batch_cannot_feed_are_named_and_the_average_is_one_more_line(slurm: Slurm, here: Path) -> None:
    """Three nodes of two GPUs each (which are files here), and a batch of three micro-batches: two ranks on the first
    node and one on the second train, to the end. Then average.sbatch on what they left.

    Mutations: one rank per node; start six, which `train` refuses; leave a node idle without a word.
    """
    batch = ["--batch.global_batch=12", "--batch.micro_batch=4"]
    job = submit(slurm, here, "--run.name=run", *batch, options=("--nodes=3", "--gpus-per-node=2"))
    assert slurm.wait(job) == ("COMPLETED", "0:0"), output(here, job)
    idle = slurm("scontrol", "show", "job", job)
    last = re.search(r" NodeList=n\[?(?:\d)-?(\d)", idle) or re.search(r" NodeList=\S*,n(\d)", idle)
    assert last is not None, idle
    assert f"the batch feeds 3 ranks at most: nothing to do for n{last[1]}\n" in output(here, job)
    assert json.loads((here / "runs" / "run" / "summary.json").read_text())["world"] == 3
    options = ["--cpus-per-task=2", "--output=%j.out", str(ROOT / "slurm" / "average.sbatch")]
    job = slurm.submit(here, *options, "runs/run", "--last=2")
    assert slurm.wait(job) == ("COMPLETED", "0:0"), output(here, job)
    assert "top-1" in output(here, job)
