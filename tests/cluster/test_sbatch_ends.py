"""Ends of slurm/train.sbatch that take a minute or more, at the same time on one Slurm."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import ARGV, ENVIRONMENT, LONG, alone, digests, output, started, state, submit, wait_for, work_folder
from running import ROOT
from wandb_files import compared, history, record

from slurm import Slurm, kill, missing, processes, running_slurm, search_path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")]

SAVING = [*LONG, "--checkpoint.every=20step"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm(8) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return work_folder(tmp_path)


def saved(here: Path, job: str, run: Path) -> None:
    """Wait for its second checkpoint."""
    wait_for(lambda: len(list(run.glob("checkpoints/step_*"))) > 1, lambda: output(here, job), 90)


def test_every_end_from_outside_is_gone_on_from_to_the_same_bits(slurm: Slurm, here: Path) -> None:
    """A rank is killed: its job starts again where it is, at once. A node is lost: on one node, since there is no
    other. The time limit nears: it saves, and queues again; so does one at a site that refuses to requeue, by
    submitting itself with its own options. Each ends with the weights of one process that was not disturbed, and is one
    W&B run.

    Mutations: no restart; the signal goes to ranks that cannot hear it yet; a job that was requeued submits itself too;
    the successor has other options, another script, or the dead job's addresses.
    """
    killed = submit(slurm, here, *SAVING, "--run.name=killed", "--wandb.mode=offline", options=("--nodelist=n1,n2",))
    only = ("--nodes=1-2", "--exclude=n1,n2,n5,n6,n7,n8")
    lost = submit(slurm, here, *SAVING, "--run.name=lost", options=only)
    limit = ("--time=2", "--signal=B:USR1@110", "--nodelist=n5,n6")  # up to 60 s earlier
    limited = submit(slurm, here, *LONG, "--run.name=limited", options=limit)
    refuse = ("--no-requeue", "--time=30", "--job-name=refused", "--nodelist=n7,n8", "--gres=gpu:1")
    refused = submit(slurm, here, *LONG, "--run.name=refused", options=refuse)

    run = started(slurm, here, refused, "refused", 180)
    slurm("scancel", "--batch", "--signal=USR1", refused)
    for job, name in ((killed, "killed"), (lost, "lost")):
        saved(here, job, started(slurm, here, job, name, 120))
    kill(processes(SLURM_JOB_ID=killed, RANK="1")[:1])
    slurm.lose("n4")
    slurm.wait_for_restart(limited, 120)

    assert slurm.wait(refused, 120) == ("COMPLETED", "0:0"), output(here, refused)
    successor = re.findall(r"Submitted batch job (\d+)", output(here, refused))
    assert len(successor) == 1
    shown = slurm("scontrol", "show", "job", successor[0])
    for option in ("JobName=refused", "TimeLimit=00:30:00", "NumNodes=2", "ReqNodeList=n[7-8]", "CPUs/Task=2", "gpu:1"):
        assert option in shown
    assert "train.sbatch small.yaml" in shown
    assert "Submitted batch job" not in output(here, limited) and "sbatch: error" not in output(here, limited)
    slurm.restart_now(limited, "TimeLimit=30")  # or the next one comes at once
    slurm.restart_now(lost)

    undisturbed = digests(alone(here))
    for job, name in ((killed, "killed"), (lost, "lost"), (limited, "limited"), (successor[0], "refused")):
        assert slurm.wait(job, 240) == ("COMPLETED", "0:0"), f"{name}: {output(here, job)[-1500:]}"
        run = here / "runs" / name
        assert state(run)[0] == "done"
        assert digests(run) == undisturbed
    assert state(here / "runs" / "killed")[1] == f"{killed}.0.1"
    assert state(here / "runs" / "lost")[1] == f"{lost}.1.0"
    assert "requeued after it was killed" in output(here, lost) or "requeued after a fault" in output(here, lost)
    assert "on 1 rank instead of 2" in output(here, lost)
    assert "requeued after a stop" in output(here, limited) and "started again after a stop" in output(here, refused)
    known = (here / "runs" / "killed" / "wandb_id").read_text()
    (file,) = here.glob(f"runs/killed/wandb/offline-run-*-{known}/run-{known}.wandb")
    assert compared(history(file)) == record(here / "runs" / "killed")


def test_the_container_script_puts_every_step_into_the_image(slurm: Slurm, here: Path) -> None:
    """There is no pyxis here, so a srun of our own writes down its options and leaves them out: plan, the ranks and
    what-follows run as steps with the image and the mounts, and the job ends as train.sbatch has it.

    Mutations: plan on the host; the ranks without mounts.
    """
    real = shutil.which("srun", path=search_path())
    shim = here / "bin" / "srun"
    shim.parent.mkdir()
    shim.write_text(
        "#!/bin/bash\n"
        'for word; do case $word in --container-*) echo "$word" >> options ;; *) kept+=("$word") ;; esac; done\n'
        f'exec {real} "${{kept[@]}}"\n'
    )
    shim.chmod(0o755)
    for name in ("train.sbatch", "train_container.sbatch"):
        shutil.copy(ROOT / "slurm" / name, here)
    environment = f"--export=ALL,IMAGE=/images/a.sqsh,MOUNTS=/data:/data,PATH={shim.parent}:{ENVIRONMENT['PATH']}"
    options = ["--nodes=2", "--cpus-per-task=2", "--output=%j.out", environment]
    job = slurm.submit(here, *options, "train_container.sbatch", "small.yaml", *ARGV, "--run.name=run")
    assert slurm.wait(job, 180) == ("COMPLETED", "0:0"), output(here, job)
    said = (here / "options").read_text().splitlines()
    expected = ["--container-image=/images/a.sqsh", f"--container-workdir={here}"]
    expected.append(f"--container-mounts={here}:{here},/data:/data")
    assert said == expected * 3


@pytest.mark.parametrize(("ends_scontrol", "submits"), [(True, False), (False, True)])
def test_a_job_that_is_queued_again_does_not_submit_itself_too(
    ends_scontrol: bool, submits: bool, tmp_path: Path
) -> None:
    """Slurm obeys `scontrol requeue` and ends the script's processes before scontrol has come back: seen on a machine
    under load. Where the site refuses, scontrol fails and nothing ends. By stand-ins for Slurm's programs.

    Mutation: take any failure of scontrol for a refusal.
    """
    says = {
        "dist-trainer": 'case $1 in plan) printf "runs/x\\n1\\n" ;; what-follows) echo requeue ;; esac',
        "srun": "exit 3",
        "scontrol": '[ "$1" = requeue ] || { echo " Command=/x/train.sbatch small.yaml"; exit 0; }; '
        + ('kill -TERM "$PPID"; kill -TERM $$' if ends_scontrol else "exit 1"),
        "sbatch": f"touch {tmp_path / 'submitted'}",
    }
    for name, line in says.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_CPUS_PER_NODE": "2",
        "SLURM_JOB_NAME": "x",
    }
    command = ["bash", str(ROOT / "slurm" / "train.sbatch"), "small.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (tmp_path / "submitted").exists() == submits, done.stdout + done.stderr
    assert done.returncode == (0 if submits else 3)
