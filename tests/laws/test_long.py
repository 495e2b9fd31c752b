"""Long proofs, for make test-slow."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, TINY, Session, assert_same_end, metrics, run_jobs, tensors, torchrun, wait_for_step

STEPS = 600


pytestmark = pytest.mark.slow


def test_the_demo_reaches_its_accuracy_and_knows_when_it_is_complete(tmp_path: Path, whole_fashion: list[str]) -> None:
    """At least 92.5% top-1 on the 10,000 test images, as `make demo` trains (a plain loop: 92.7 to 93.0).

    Mutations: no momentum; labels shifted by one; batch-norm's momentum 1 left in evaluation.
    """
    command = [str(ROOT / "launch" / "local.sh"), "train", "configs/fashion_mnist.yaml", *whole_fashion]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number in range(2):
        session = Session([*command, f"--run.dir={tmp_path}"], tmp_path / f"log{number}", PATH=path, NPROC="2")
        assert session.wait(400) == 0, session.log.read_text()[-5000:]
    (run,) = tmp_path.glob("fashion_mnist-*")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["model"]["top1"] >= 0.925
    assert summary["world"] == 2
    assert "complete" in (tmp_path / "log1").read_text()


def test_every_stage_continues_every_other(tmp_path: Path, fashion: list[str]) -> None:
    """Saved at ZeRO s, resumed at ZeRO t, all sixteen pairs: bit for bit the run that never stopped."""
    argv = [*TINY, *fashion]
    pairs = [(s, t) for s in range(4) for t in range(4)]
    jobs = [{"name": "whole", "argv": argv}]
    for s, t in pairs:
        jobs.append({"name": f"{s}{t}", "argv": [*argv, f"--engine.zero={s}"], "stop_at": 9})
        jobs.append({"name": f"{s}{t}", "argv": [*argv, f"--engine.zero={t}"]})
    run_jobs(2, jobs, tmp_path)
    for file in ("model", "optim"):
        whole = tensors(tmp_path / "whole", file)
        for s, t in pairs:
            other = tensors(tmp_path / f"{s}{t}", file)
            assert all(torch.equal(whole[key], other[key]) for key in whole), (s, t)


@pytest.mark.parametrize(("backend", "precision"), [("deepspeed", "bf16"), ("torch", "fp32")])
def test_killed_eight_times(tmp_path: Path, fashion: list[str], backend: str, precision: str) -> None:
    """SIGKILL to a random rank after a random number of steps, eight times: bit for bit the undisturbed run."""
    argv = ["-m", "dist_trainer", "train", *TINY, *fashion, f"--duration={STEPS}step", "--checkpoint.every=20step",
            "--eval.every=100step", "--log.every=5step", f"--engine.backend={backend}",
            f"--engine.precision={precision}", f"--run.dir={tmp_path}"]  # fmt: skip
    session = Session(torchrun(2, *argv, "--run.name=whole"), tmp_path / "log")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    run = tmp_path / "killed"
    for attempt in range(8):
        session = Session(torchrun(2, *argv, "--run.name=killed"), tmp_path / f"log{attempt}")
        reached = max(metrics(run, "step"), default=0) if (run / "metrics.jsonl").exists() else 0
        step = reached + random.randint(1, 60)  # beyond what earlier attempts have logged
        print(f"killing at step {step}")
        wait_for_step(session, run, step)
        os.kill(random.choice(session.rank_pids()), signal.SIGKILL)
        session.wait(60)
        assert not session.left_after(15), session.left_after(0)
    session = Session(torchrun(2, *argv, "--run.name=killed"), tmp_path / "log-last")
    assert session.wait() == 0, session.log.read_text()[-5000:]
    assert_same_end(run, tmp_path / "whole")
