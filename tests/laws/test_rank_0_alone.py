"""Rank 0 alone reads and writes the run folder: a thousand ranks do not open one file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, Session

WITHOUT_FOLDER = """
if [ "$RANK" = 0 ]; then exec "$@"; fi
exec unshare -m bash -c '
  mount -t tmpfs none runs && "$@"; status=$?
  find runs -type f > seen-by-$RANK; exit $status' _ "$@"
"""


def cannot_mount() -> bool:
    tried = (
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    )
    return os.getuid() != 0 or tried is None or tried.returncode != 0


@pytest.mark.skipif(cannot_mount(), reason="a rank that does not see the folder needs a mount of its own, and root")
def test_another_rank_needs_no_run_folder_to_train_resume_and_average(tmp_path: Path) -> None:
    """Where rank 0 has the runs, rank 1 has an empty file system, at the start and when the run is extended: it trains,
    evaluates, goes on from the checkpoint with momentum and EMA, averages snapshots, and writes nothing there.

    Mutations: every rank loads the checkpoint, the momentum, the EMA, the index of snapshots, or the snapshots.
    """
    source = ROOT / "tests" / "fixtures" / "81fd9c4"
    here = shutil.copytree(source, tmp_path / "here", ignore=shutil.ignore_patterns("runs"))
    (here / "runs").mkdir()
    (here / "start.sh").write_text(WITHOUT_FOLDER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    train = ["bash", "start.sh", sys.executable, "-m", "dist_trainer", "train", "small.yaml", "--run.name=run"]
    for number, steps in enumerate((8, 16)):
        argv = [*torchrun, *train, f"--duration={steps}step", '--run.allow_change=["duration"]']
        session = Session(argv, here / f"log-{number}", folder=here)
        assert session.wait() == 0, session.log.read_text()[-5000:]
        assert (here / "seen-by-1").read_text() == ""
    assert "resuming from step_00000008" in session.log.read_text()
    summary = json.loads((here / "runs" / "run" / "summary.json").read_text())
    assert summary["steps"] == 16 and summary["world"] == 2 and "average" in summary["final"]
