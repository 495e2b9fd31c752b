"""What launching scripts do after an attempt has ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_trainer.commands.main import dispatch
from dist_trainer.run_folder.folder import RunFolder, State
from dist_trainer.run_folder.what_follows import MAX_CRASHES, what_follows

ATTEMPT = "7.0.0"


def ended(run: Path, state: State, monkeypatch: pytest.MonkeyPatch, attempt: str = ATTEMPT) -> None:
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", attempt)
    run.mkdir(exist_ok=True)
    RunFolder(run).write_state(state)


@pytest.mark.parametrize(
    ("state", "then"),
    [
        ("done", "done"),
        ("stopped", "requeue"),
        ("mistake", "end"),
        ("interrupted", "end"),
        ("fault", "restart"),
        ("running", "restart"),
    ],
)
def test_the_state_of_this_attempt_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, then: str
) -> None:
    """Whatever the status is. That of an earlier attempt counts as absent: then a mistake ends, anything else was a
    crash.

    Mutations: any attempt's STATE counts; the status counts beside it.
    """
    ended(tmp_path, state, monkeypatch)
    for status in (0, 1, 2, 3, 137):
        assert what_follows(tmp_path, ATTEMPT, status)[0] == then
        (tmp_path / "crashes.json").unlink(missing_ok=True)
    assert what_follows(tmp_path, "7.1.0", 2)[0] == "end"
    assert what_follows(tmp_path, "7.1.0", 3)[0] == "restart"


def test_three_crashes_without_progress_are_followed_by_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once, the others by the queue, which may give other hosts. A new checkpoint begins the count anew,
    one without its manifest does not; whether the folder was there or not.

    Mutations: count the crashes of the whole run; a folder without a manifest is progress; count from 0 at each start.
    """
    run = tmp_path / "run"
    follow = [what_follows(run, ATTEMPT, 137)[0] for _ in range(MAX_CRASHES + 1)]
    assert follow == ["restart", *["requeue"] * (MAX_CRASHES - 1), "end"]
    ended(run, "running", monkeypatch)
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert what_follows(run, ATTEMPT, 1)[0] == "end"
    (run / "checkpoints" / "step_00000010" / "MANIFEST.json").touch()
    word, why = what_follows(run, ATTEMPT, 1)
    assert word == "restart" and "again, 1 of 3 since step_00000010" in why
    assert json.loads((run / "crashes.json").read_text()) == {"checkpoint": "step_00000010", "count": 1}


def test_the_command_says_the_word_alone_and_why_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without importing torch, which takes seconds that a preempted job may not have. Mutation: import the folder."""
    ended(tmp_path, "stopped", monkeypatch)
    assert dispatch(["what-follows", str(tmp_path), "--status", "3"]) == 0
    said = capsys.readouterr()
    assert said.out == "requeue\n" and said.err == f"{tmp_path}: stopped and saved; to be continued\n"
    program = "import sys; from dist_trainer.commands.main import dispatch; dispatch(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, "what-follows", str(tmp_path)], check=True, timeout=60)
