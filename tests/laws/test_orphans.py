"""torchrun is killed while its ranks still start: none of them is left to wait for it."""

import os
import signal
import time
from pathlib import Path

import pytest
from running import PATIENCE, TINY, Session, torchrun


@pytest.mark.parametrize("delay", [0.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.06, 0.4, 1.5))])
def test_ranks_end_with_torchrun_however_early_it_dies(delay: float, fashion: list[str], tmp_path: Path) -> None:
    """The kernel's signal is asked for before torch is imported; before that, the parent's death is seen.

    Mutations: ask for it after the imports; do not look whether the parent is gone already.
    """
    argv = ["-m", "dist_trainer", "train", *TINY, *fashion, f"--run.dir={tmp_path}", "--run.name=run"]
    session = Session(torchrun(2, *argv, "--duration=100000step"), tmp_path / "log")
    try:
        deadline = time.monotonic() + PATIENCE * 60
        while len(session.rank_pids()) < 2:
            assert time.monotonic() < deadline, session.log.read_text()
            time.sleep(0.001)  # between two looks; the deadline decides
        time.sleep(delay)  # into their start: nothing is assumed to be done after it
        os.kill(session.process.pid, signal.SIGKILL)
        assert not session.left_after(15), session.log.read_text()
    finally:
        session.kill()
