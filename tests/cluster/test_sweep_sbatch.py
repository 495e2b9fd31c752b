"""slurm/sweep.sbatch on a real Slurm of one node, with the real `wandb agent`, against a server on loopback."""

from pathlib import Path

import pytest
from cluster_jobs import ENVIRONMENT, started, state, wait_for, work_folder
from running import ROOT
from wandb_server import KEY, serving

from slurm import missing, running_slurm

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "it is there"),
    pytest.mark.slow,  # a minute
]


def test_a_stopped_task_asks_again_and_its_trial_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Slurm's signal before the time limit. Mutations: no requeue; the agent is told to end instead."""
    here = work_folder(tmp_path)
    with running_slurm(1) as slurm, serving() as server:
        more = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false", "NPROC": "2"}
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        (here / "site.sh").write_text("".join(f"export {name}={value}\n" for name, value in more.items()))
        server.sweep = {"method": "grid", "parameters": {}}
        server.sweep["command"] = [str(ROOT / "launch" / "local.sh"), "train", "small.yaml", "${args}"]
        values = {
            "duration": "300step",
            "eval.every": None,
            "checkpoint.every": None,
            "log.every": "1step",
            "wandb.mode": "online",
        }
        server.trials = {"trial1": {**values, "run.name": "run"}}
        script = str(ROOT / "slurm" / "sweep.sbatch")
        options = ["--array=1-1", "--cpus-per-task=2", "--output=%A.out"]
        job = slurm.submit(here, *options, script, "me/p/sweep123")
        run = started(slurm, here, job, "run-trial1")
        slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
        said = (here / f"{job}.out").read_text
        wait_for(lambda: (run / "STATE").read_text() == "stopped\n", said, 60)

        slurm.restart_now(f"{job}_1")
        wait_for(lambda: state(run) == ["done"], said, 240)  # on a busy machine 300 steps take their time
        wait_for(lambda: server.runs["trial1"].exit_code == 0, said, 60)
        assert [row["step"] for row in server.runs["trial1"].history] == list(range(1, 301))
        assert server.runs.keys() == {"trial1"}
