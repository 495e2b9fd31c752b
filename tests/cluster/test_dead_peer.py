"""A rank waits for one that is stuck, inside a library: a stop is heard all the same, and ends it in time."""

import os
import signal
import time
from pathlib import Path

from cluster_jobs import ARGV, LONG, work_folder
from running import PATIENCE, Session, torchrun

from dist_trainer.distributed.watchdog import STOP_S


def start(folder: Path) -> tuple[Session, dict[str, int]]:
    """Two ranks of which number 1 was frozen in the middle of its steps: {"0": pid, "1": pid}."""
    folder.mkdir()
    here = work_folder(folder)
    argv = ["-m", "dist_trainer", "train", "small.yaml", *ARGV, *LONG, "--duration=3000step", "--run.name=run"]
    session = Session(torchrun(2, *argv), folder / "log", folder=here)
    metrics = here / "runs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE * 120
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert time.monotonic() < deadline and session.process.poll() is None, session.log.read_text()
        time.sleep(0.05)  # between two looks; the deadline decides
    pids = {}
    for pid in session.rank_pids():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        pids[next(each[5:].decode() for each in variables if each.startswith(b"RANK="))] = pid
    os.kill(pids["1"], signal.SIGSTOP)
    return session, pids


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_stop_that_no_step_follows_ends_the_rank_with_its_line(tmp_path: Path) -> None:
    """Rank 0 stands in a collective of gloo for which rank 1, frozen, never comes: as with NCCL, no signal handler of
    Python runs there. torchrun is told to stop, and would kill after 30 s; or it dies itself, and nobody would kill,
    until run.timeout. Both ways rank 0 ends by itself, and STATE says why.

    Mutations: note the signal in Python's handler alone; leave the agent's death to run.timeout (180 s here).
    """
    told, dies = start(tmp_path / "told"), start(tmp_path / "dies")
    began = time.monotonic()
    told[0].process.terminate()
    dies[0].process.kill()
    for session, pids in (told, dies):
        while lives(pids["0"]) and time.monotonic() - began < STOP_S + 25:
            time.sleep(0.1)  # between two looks; the deadline decides
        passed = time.monotonic() - began
        os.kill(pids["1"], signal.SIGKILL)
        log = session.log.read_text()
        assert STOP_S - 1 < passed < STOP_S + 9, log
        (line,) = [line for line in log.splitlines() if line.startswith("[rank 0] ")]
        assert f": SIGTERM, and no progress for {STOP_S:g} s, as when another rank is gone: ended; the last" in line
        run = session.log.parent / "here" / "runs" / "run"
        assert (run / "STATE").read_text() == "fault\n"
        stack = (run / "stacks" / "rank-0.txt").read_text()
        assert " in train\n" in stack, stack  # the loop; which of its collectives depends on when rank 1 was frozen
        assert not session.left_after(15)
