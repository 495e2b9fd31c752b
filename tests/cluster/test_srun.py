"""srun with one task per rank, and no torchrun; and SLURM_* variables that are left over."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import ARGV, ENVIRONMENT, LONG, alone, digests, output, started, state, work_folder

from slurm import Slurm, missing, processes, running_slurm

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")

TRAIN = f"dist-trainer train small.yaml {' '.join([*ARGV, *LONG])}"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm(2) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return work_folder(tmp_path)


def test_srun_starts_one_run_and_a_batch_script_one_process(slurm: Slurm, here: Path) -> None:
    """Two tasks on two nodes are the ranks of one run, which a signal stops with status 3 and the same line goes on
    with. Before it, in the same script, with all the variables of a job of two tasks, a plain command is one process.

    `doctor` measures the two of them together.

    Mutations: two runs that compete for the folder; the plain command waits for another rank; status 0 after a stop.
    """
    options = ["--nodes=2", "--ntasks=2", "--cpus-per-task=2", "--output=%j.out"]
    plain = f"{TRAIN} --run.name=plain --duration=3step"
    job = slurm.submit(here, *options, f"--wrap={plain} && srun --cpus-per-task=2 {TRAIN} --run.name=run")
    run = started(slurm, here, job, "run")
    assert json.loads((here / "runs" / "plain" / "summary.json").read_text())["world"] == 1
    assert json.loads((run / "env.json").read_text())["world"] == 2
    (rank,) = {pid for pid in processes(SLURM_JOB_ID=job, SLURM_PROCID="1") if is_trainer(pid)}
    os.kill(rank, signal.SIGUSR1)
    assert slurm.wait(job) == ("FAILED", "3:0"), output(here, job)
    assert state(run) == ["stopped"]
    doctor = "srun --cpus-per-task=2 dist-trainer doctor small.yaml"
    job = slurm.submit(here, *options, f"--wrap={doctor} && srun --cpus-per-task=2 {TRAIN} --run.name=run")
    assert slurm.wait(job) == ("COMPLETED", "0:0"), output(here, job)
    assert "waiting for 2 ranks at " in output(here, job) and "is training there" not in output(here, job)
    assert "✓ devices: 2 ranks on 1 host: " in output(here, job) and "all-reduce" in output(here, job)
    assert output(here, job).count("run folder runs/run, resuming from step_") == 1
    assert digests(run) == digests(alone(here))


def is_trainer(pid: int) -> bool:
    return b"train\0small.yaml" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_variables_of_another_job_are_named_at_once(here: Path) -> None:
    """Not after 11 minutes. Mutation: say nothing before the rendezvous."""
    stale = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    command = [sys.executable, "-m", "dist_trainer", "train", "small.yaml"]
    process = subprocess.Popen(command, cwd=here, env=os.environ | stale, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    process.kill()
    process.communicate()
    assert line == "waiting for 4 ranks at 127.0.0.1:9, as WORLD_SIZE and MASTER_ADDR in the environment say\n"
