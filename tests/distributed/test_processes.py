"""Processes that end together."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_trainer.distributed.processes import lost_contact, nccl_fault, status_of_rank

SCRIPT = """
import multiprocessing, os, sys, time
from pathlib import Path
from dist_trainer.data.parallel import as_worker

def work(folder: str) -> None:
    (Path(folder) / "pid").write_text(str(os.getpid()))
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)  # until the parent is gone
    as_worker()
    (Path(folder) / "lives").touch()
    time.sleep(60)  # were it to live, the test below would find it; it ends it too

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    while not (Path(sys.argv[1]) / "pid").exists():
        time.sleep(0.01)  # between two looks; the caller's time-out decides
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a signal for the death of a parent")
def test_a_worker_whose_parent_died_while_it_started_ends(tmp_path: Path) -> None:
    """The parent is killed after the worker's start and before `as_worker`. Then the kernel sends nothing any more.

    Mutation: rely on that signal alone; the worker, and whatever waits for it, stay for ever.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=False, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _lives(pid):
        time.sleep(0.01)  # between two looks; the deadline decides
    ended = not _lives(pid)
    if not ended:
        os.kill(pid, 9)
    assert ended
    assert not (tmp_path / "lives").exists()


@pytest.mark.parametrize(
    ("status", "alone", "for_torchrun", "said"),
    [(0, False, 0, 0), (3, False, 0, 3), (2, False, 0, 2), (130, False, 0, 130), (2, True, 2, 2), (1, True, 1, 1)],
)
def test_a_rank_ends_with_0_where_all_end_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, alone: bool, for_torchrun: int, said: int
) -> None:
    """And says its true status. Alone with its reason it must not: others wait for it in a collective until torchrun
    ends them. Mutation: 0 for every mistake.
    """
    for name, value in (("RUN_ID", "x"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("DIST_TRAINER_STATUS", str(tmp_path / "status"))
    assert status_of_rank(status, alone=alone) == for_torchrun
    assert (tmp_path / "status").read_text() == f"2 {said}\n"


def _lives(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LEFT = """
import multiprocessing, os
from dist_trainer.data.parallel import start_resource_tracker

if __name__ == "__main__":
    start_resource_tracker()
    lock = multiprocessing.get_context("spawn").Lock()
    os._exit(2)
"""


def test_multiprocessings_helper_cleans_up_without_a_word(tmp_path: Path) -> None:
    """A process that ends at once, as after an error, leaves a semaphore. Mutation: "leaked semaphore objects"."""
    script = tmp_path / "script.py"
    script.write_text(LEFT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")  # the helper holds stderr until it ends


PLACE = "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1331"
REMOTE = f"""{PLACE}, remote process exited or there was a network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer node7<50812>"""
LOCAL = f"""{PLACE}, unhandled cuda error, NCCL version 2.21.5
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 'out of memory'"""
SHARED = f"""{PLACE}, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.21.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 7000"""
TIMEOUT = (
    "[Rank 6] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=880, OpType=BROADCAST, NumelIn=112, "
    "NumelOut=112, Timeout(ms)=660000) ran for 660011 milliseconds before timing out."
)


def all_reduce(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize(
    ("text", "begin", "end"),
    [
        (
            REMOTE,
            "lost contact with another rank, which failed or was ended in all_reduce: ncclRemoteError: A call failed ",
            "exiting prematurely. socketProgress: Connection closed by remote peer node7<50812>",
        ),
        (LOCAL, "NCCL failed in all_reduce: ncclUnhandledCudaError: Call to ", "failed. Cuda failure 'out of memory'"),
        (
            "[/__w/gloo/transport/tcp/pair.cc:545] Read error [192.0.2.2]:21389: Connection reset by peer. This is "
            "typically caused by a remote worker crashing. Check the logs.",
            "lost contact with another rank, which failed or was ended in all_reduce: Read error [192.0.2.2]:21389: ",
            "Connection reset by peer",
        ),
        (
            SHARED,
            "NCCL failed in all_reduce: ncclInvalidUsage: ",
            "on CUDA device 7000; each rank needs a GPU of its own: start fewer per host, or srun --gpus-per-task=1",
        ),
        (TIMEOUT, "lost contact with another rank, which failed or was ended in BROADCAST: [Rank 6] ", "timing out."),
    ],
)
def test_a_failure_of_a_collective_is_one_line_that_names_it(text: str, begin: str, end: str) -> None:
    """Texts as users report them. A rank that is gone is told from a failure here. Mutations: the first line, which is
    a place in a source; every failure is another rank's.
    """
    with pytest.raises(RuntimeError) as caught:
        all_reduce(text)
    line = lost_contact(caught.value) or nccl_fault(caught.value) or ""
    assert line.startswith(begin) and line.endswith(end) and "\n" not in line


def test_other_errors_are_no_failure_of_nccl() -> None:
    """Mutation: any error is."""
    assert lost_contact(ValueError("NCCL")) is None and nccl_fault(RuntimeError("other")) is None
