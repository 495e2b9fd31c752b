"""Who trains in a run folder."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import message

from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.plan import BatchConfig, Duration, make_plan
from dist_trainer.run.end import End
from dist_trainer.run_folder import owner as ownership
from dist_trainer.run_folder.folder import RunFolder

CLAIM = """
import sys
from pathlib import Path
from dist_trainer.errors import UserError
from dist_trainer.run_folder.folder import RunFolder
print("ready", flush=True)
for line in sys.stdin:
    try:
        RunFolder(Path(line.strip())).claim()
        print("claimed", flush=True)
    except UserError:
        print("refused", flush=True)
"""


class Claimer:
    """A process that claims the folders it is told, and holds them until it ends."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CLAIM]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, folder: Path) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def claimers() -> Iterator[list[Claimer]]:
    """Two; the last test that uses them kills the first."""
    both = [Claimer(), Claimer()]
    assert [claimer.answer() for claimer in both] == ["ready", "ready"]
    yield both
    for claimer in both:
        claimer.process.kill()
        claimer.process.communicate()


def test_of_two_that_claim_at_once_one_is_refused(tmp_path: Path, claimers: list[Claimer]) -> None:
    """A hundred times over. Fails, now and then, when looking for an owner and becoming it are two steps."""
    for number in range(100):
        for claimer in claimers:
            claimer.tell(tmp_path / str(number))
        assert sorted(claimer.answer() for claimer in claimers) == ["claimed", "refused"]


def test_a_live_owner_is_respected_and_a_killed_one_is_succeeded(tmp_path: Path, claimers: list[Claimer]) -> None:
    """While another process lives, a claim names it; after SIGKILL, before anyone has buried it, the claim succeeds.

    Fails when a heartbeat must run out first, a zombie counts as alive, or the owner is not looked at.
    """
    folder, other = RunFolder(tmp_path / "run"), claimers[0]
    other.tell(folder.path)
    assert other.answer() == "claimed"
    with pytest.raises(UserError) as caught:
        folder.claim()
    assert f"process {other.process.pid} " in message(caught)
    other.process.kill()
    os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the process table
    folder.claim()
    assert json.loads((folder.path / "owner.json").read_text())["pid"] == os.getpid()
    folder.release()


def test_a_folder_that_was_released_is_free(tmp_path: Path) -> None:
    """Fails when the owner's file stays behind."""
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.claim()
    with pytest.raises(UserError) as caught:
        second.claim()
    assert f"process {os.getpid()} " in message(caught)
    first.release()
    second.claim()
    second.release()


def test_a_process_that_got_the_number_of_a_dead_owner_is_not_the_owner(tmp_path: Path) -> None:
    """Our own number, with another start. Fails when a process is told by its number alone."""
    folder = RunFolder(tmp_path)
    folder.claim()
    owner = json.loads((tmp_path / "owner.json").read_text())
    folder.release()
    (tmp_path / "owner.json").write_text(json.dumps({**owner, "started": "1"}))
    folder.claim()
    folder.release()


ELSEWHERE = {"host": "elsewhere.invalid", "processes": "other", "pid": 1, "started": "1", "job": "77"}


@pytest.mark.parametrize("clock", [0.0, 1e12])
def test_an_owner_on_another_host_lives_if_it_goes_on_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """Whatever its clock says. One that writes again is respected; one that does not is waited for, said in a line, and
    succeeded; one that has not written for long is succeeded at once.

    Mutations: compare its clock with ours; do not wait; refuse without waiting.
    """
    monkeypatch.setattr(ownership, "STALE_S", 1.5)
    beats = {**ELSEWHERE, "heartbeat": clock}
    (tmp_path / "owner.json").write_text(json.dumps(beats))
    lives = threading.Timer(0.3, (tmp_path / "owner.json").write_text, [json.dumps({**beats, "heartbeat": clock + 10})])
    lives.start()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).claim()
    lives.join()
    assert "process 1 on elsewhere.invalid" in message(caught) and "job 77" in message(caught)

    (tmp_path / "owner.json").write_text(json.dumps(beats))
    said: list[str] = []
    folder = RunFolder(tmp_path)
    folder.claim(said.append)
    assert len(said) == 2 and "elsewhere.invalid" in said[0] and said[1].endswith("going on in its place")
    folder.release()

    (tmp_path / "owner.json").write_text(json.dumps(beats))
    os.utime(tmp_path / "owner.json", (0, 0))
    folder = RunFolder(tmp_path)
    folder.claim(said.append)
    assert len(said) == 2
    folder.release()


def test_an_earlier_attempt_of_the_same_job_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm has ended it. Another job, or the same attempt, is waited for. Mutation: wait for all that wrote lately."""
    monkeypatch.setattr(ownership, "STALE_S", 0.6)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", "77.1.0")
    for owner, waits in [
        ({**ELSEWHERE, "attempt": "77.0.0"}, False),
        ({**ELSEWHERE, "attempt": "77.1.0"}, True),
        ({**ELSEWHERE, "attempt": "78.0.0", "job": "78"}, True),
    ]:
        (tmp_path / "owner.json").write_text(json.dumps(owner))
        said: list[str] = []
        folder = RunFolder(tmp_path)
        folder.claim(said.append)
        assert bool(said) == waits
        folder.release()


def test_a_trainer_that_lost_its_folder_to_another_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had been out of reach for too long: it must not save, record an end, go on beating, or release.

    Mutations: release without a look; beat without a look; STATE of another attempt counts as its own.
    """
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.05)
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", "1")
    first = RunFolder(tmp_path)
    first.claim()
    first.write_state("running")
    first.check_owner()
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", "2")
    (tmp_path / "owner.json").write_text(json.dumps(ELSEWHERE))
    (tmp_path / "STATE").write_text("running\n2\n")
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", "1")
    time.sleep(0.3)  # six heartbeats
    assert json.loads((tmp_path / "owner.json").read_text()) == ELSEWHERE
    assert not first.runs_in_this_attempt()
    with pytest.raises(UserError, match="another trainer has taken it over"):
        first.check_owner()
    first.release()
    assert (tmp_path / "owner.json").exists()


def test_a_trainer_that_lost_its_folder_records_no_end_in_it(tmp_path: Path) -> None:
    """STATE and summary.json are the other one's by now, though both attempts are without a name. Its own end is
    recorded. Mutation: leave `check_owner` out of `End.record`.
    """
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.write_state("running")
    end = End(World(0, 1, 0, 1, torch.device("cpu")))
    batch = BatchConfig(global_batch=8, micro_batch=8)
    plan = make_plan(batch, Duration.parse("9step", "duration"), world=1, num_samples=80)
    claim = SimpleNamespace(folder=folder, step=3)
    end.begins(SimpleNamespace(claim=claim, blueprint=SimpleNamespace(plan=plan)))  # type: ignore[arg-type]
    own = (folder.path / "owner.json").read_text()
    (folder.path / "owner.json").write_text(own.replace(json.loads(own)["token"], "another"))
    end.record("fault", "lost")
    assert (folder.path / "STATE").read_text() == "running\n" and not (folder.path / "summary.json").exists()
    (folder.path / "owner.json").write_text(own)
    end.record("fault", "lost")
    assert (folder.path / "STATE").read_text() == "fault\n"
    assert json.loads((folder.path / "summary.json").read_text())["reason"] == "lost"


def test_a_folder_that_cannot_be_made_is_refused_by_key(tmp_path: Path) -> None:
    """Fails when OSError gets through."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "file" / "run").claim()
    assert message(caught).startswith("run.dir: ")
