"""A save changes nothing but the disk: neither when it happens, nor how, nor whether."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import PATIENCE, ROOT, TINY, Session, newest, run_jobs

from dist_trainer.run_folder import checkpoint


def files(run: Path) -> dict[str, str]:
    """The digest of every file of tensors."""
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in run.rglob("*.safetensors")
    }


def test_background_and_synchronous_saves_have_the_same_bytes_and_neither_changes_a_weight(
    fashion: list[str], tmp_path: Path
) -> None:
    """Checkpoints, best weights, snapshots, the average, on two ranks; and a run that saves at its end alone.

    Mutations: hand over the live tensors; let a save draw a random number.
    """
    more = ["--ema.decay=0.9", "--averaging.top_k=2", "--precise_bn.num_samples=256", "--eval.every=4step"]
    often = [*TINY, *fashion, *more, "--checkpoint.every=2step", "--checkpoint.keep_last=99"]
    jobs = [
        {"name": "behind", "argv": often},
        {"name": "at_once", "argv": [*often, "--checkpoint.background=false"]},
        {"name": "at_the_end", "argv": [*TINY, *fashion, *more, "--checkpoint.every=null"]},
    ]
    run_jobs(2, jobs, tmp_path)
    behind, at_once, at_the_end = (files(tmp_path / job["name"]) for job in jobs)
    assert len([name for name in behind if name.startswith("checkpoints/") and "model" in name]) >= 10
    assert behind == at_once
    assert at_the_end.items() <= behind.items()


def until(condition: Callable[[], bool], session: Session) -> None:
    deadline = time.monotonic() + PATIENCE * 60
    while not condition():
        assert session.process.poll() is None and time.monotonic() < deadline, session.log.read_text()
        time.sleep(0.02)  # between two looks; the deadline decides


@pytest.mark.parametrize(("sync_s", "grace"), [(60.0, 2.0), (0.3, 60.0)])
def test_a_stop_waits_for_a_slow_disk_as_long_as_grace_allows(tmp_path: Path, sync_s: float, grace: float) -> None:
    """Each sync of a checkpoint takes `sync_s` longer from some moment on; SIGTERM comes while a checkpoint is written.

    With enough grace the checkpoint of the last step stands, otherwise the one before, and the next start goes on from
    it. Mutations: wait as long as the write takes; end without waiting.
    """
    here, run = tmp_path / "here", tmp_path / "here" / "runs" / "run"
    shutil.copytree(ROOT / "tests" / "fixtures" / "81fd9c4", here, ignore=shutil.ignore_patterns("runs"))
    argv = [
        sys.executable, "-m", "dist_trainer", "train", "small.yaml", "--run.name=run", "--model.name=tiny:OnSlowDisk",
        "--model.args={}", "--duration=1000000step", "--eval.every=null", "--checkpoint.every=20step",
        f"--checkpoint.grace={grace:g}", "--log.every=1step",
    ]  # fmt: skip

    def complete() -> list[int]:
        return [int(each.name.removeprefix("step_")) for each in checkpoint.complete(run / "checkpoints")]

    def last_step() -> int:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])

    session = Session(argv, here / "log", folder=here)
    until(lambda: (run / "checkpoints").exists() and len(complete()) > 0, session)
    (here / "slow").write_text(str(sync_s))
    whole = max(complete())
    if sync_s > grace:
        # The disk hangs: training waits with one checkpoint for the other.
        until(lambda: last_step() == max(complete()) + 40, session)
    else:
        until(lambda: max(complete()) > whole, session)
    whole = max(complete())
    os.kill(session.process.pid, signal.SIGTERM)
    signalled = time.monotonic()
    assert session.wait(grace + 20) == 3
    assert (run / "STATE").read_text() == "stopped\n"
    if sync_s > grace:
        assert time.monotonic() - signalled < grace + 10
        assert max(complete()) == whole < last_step()
        line = session.log.read_text().splitlines()[-1]
        assert f"the checkpoint of step {whole + 20} could not be written in time: the checkpoint before it" in line
    else:
        assert max(complete()) == last_step()
        assert f"after step {last_step()}, saved" in session.log.read_text().splitlines()[-1]
    (here / "slow").unlink()
    ends = max(complete()) + 30
    again = Session([*argv, f"--duration={ends}step", "--run.allow_change=[duration]"], here / "log", folder=here)
    assert again.wait(60) == 0, again.log.read_text()
    assert int(newest(run).name.removeprefix("step_")) == ends
