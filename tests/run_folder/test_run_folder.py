"""The run folder: its name, its owner, and what is written into it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import message

from dist_trainer.config.tree import TrainConfig
from dist_trainer.data.stream import DataConfig
from dist_trainer.errors import UserError
from dist_trainer.log.metrics_file import MetricsFile
from dist_trainer.run_folder.folder import RunFolder
from dist_trainer.run_folder.identity import identity

CONFIG = TrainConfig(data=DataConfig(train="tars/train", val="tars/val"))


# The owner

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


def test_an_owner_on_another_host_lives_by_its_heartbeat(tmp_path: Path) -> None:
    """A beat from the far future is fresh, one from 1970 stale. Fails when owners elsewhere always, or never, live."""
    folder = RunFolder(tmp_path)
    owner = {"host": "elsewhere.invalid", "pid": 1, "started": "1", "job": "77"}
    (tmp_path / "owner.json").write_text(json.dumps({**owner, "heartbeat": 1e12}))
    with pytest.raises(UserError) as caught:
        folder.claim()
    assert "process 1 on elsewhere.invalid" in message(caught)
    assert "job 77" in message(caught)
    (tmp_path / "owner.json").write_text(json.dumps({**owner, "heartbeat": 0.0}))
    folder.claim()
    folder.release()


def test_a_folder_that_cannot_be_made_is_refused_by_key(tmp_path: Path) -> None:
    """Fails when OSError gets through."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "file" / "run").claim()
    assert message(caught).startswith("run.dir: ")


# The config


def test_a_changed_config_is_refused_with_old_and_new_values(tmp_path: Path) -> None:
    """Unless every changed key is allowed; then the new values are those to differ from. Nothing is written before.

    Fails when a refused change is written, when only added keys are seen, or when one allowed key allows all.
    """
    folder = RunFolder(tmp_path)
    old = {"data.fingerprint": "abc", "lr.base": 0.1, "gone": 1}
    new = {"data.fingerprint": "abc", "lr.base": 0.2, "duration": "100ep", "gone": 1}
    assert folder.check_identity(old, []) == []
    folder.write_config({"lr": {"base": 0.1}}, old, val_fingerprint="v", changed=[], step=0)
    assert folder.check_identity(old, []) == []
    with pytest.raises(UserError) as caught:
        folder.check_identity(new, ["duration"])
    text = message(caught)
    assert "lr.base 0.1 -> 0.2" in text
    assert "duration '90ep' -> '100ep'" not in text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": {"base": 0.1}}
    offered = json.loads(text.partition("--run.allow_change '")[2].rstrip("'"))
    assert offered == ["duration", "lr.base"]
    changed = folder.check_identity(new, offered)
    assert list(map(str, changed)) == ["duration '90ep' -> '100ep'", "lr.base 0.1 -> 0.2"]
    folder.write_config({"lr": {"base": 0.2}}, new, val_fingerprint="v", changed=changed, step=7)
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# from step 7: duration '90ep' -> '100ep'\n# from step 7: lr.base 0.1 -> 0.2\n")
    assert yaml.safe_load(text) == {"lr": {"base": 0.2}}
    assert folder.read_changes() == [
        {"step": 7, "key": "duration", "old": "90ep", "new": "100ep"},
        {"step": 7, "key": "lr.base", "old": 0.1, "new": 0.2},
    ]
    assert folder.check_identity(new, []) == []
    with pytest.raises(UserError) as caught:
        folder.check_identity({key: new[key] for key in new if key != "gone"}, [])
    assert "gone 1 -> None" in message(caught)


def test_what_no_run_can_change_is_refused_even_if_it_is_allowed(tmp_path: Path) -> None:
    """Mutation: run.allow_change lets a checkpoint of another batch through."""
    folder = RunFolder(tmp_path)
    keys = {"data.fingerprint": "abc"}
    folder.write_config({}, keys, val_fingerprint="v", changed=[], step=0)
    with pytest.raises(UserError) as caught:
        folder.check_identity({**keys, "batch.global_batch": 64}, ["batch.global_batch"])
    assert "batch.global_batch 256 -> 64" in message(caught)
    assert "allow_change" not in message(caught)


def test_the_written_config_makes_the_same_config_again(tmp_path: Path) -> None:
    """config.yaml repeats the run. Fails when a tuple or a nested dataclass is written as a Python object."""
    folder = RunFolder(tmp_path)
    keys = identity(CONFIG.as_dict(), "abc")
    folder.write_config(CONFIG.as_dict(), keys, val_fingerprint="v", changed=[], step=0)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG.as_dict()
    assert folder.read_val_fingerprint() == "v"


# STATE, summary, metrics, environment


def test_state_and_summary_round_trip(tmp_path: Path) -> None:
    """Fails when a batch script would have to parse STATE, or a summary that is not there is an error."""
    folder = RunFolder(tmp_path)
    assert folder.read_summary() is None
    for state in ("running", "stopped", "done"):
        folder.write_state(state)
        assert (tmp_path / "STATE").read_text() == f"{state}\n"
    summary = {"state": "done", "best": {"top1": 0.5, "step": 3}, "git": None}
    folder.write_summary(summary)
    assert folder.read_summary() == summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STATE", "summary.json"]  # nothing temporary


def test_state_names_the_attempt_that_a_launcher_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch script knows whose it is. Mutation: the first line holds both, and no state is read."""
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("DIST_TRAINER_ATTEMPT", "17.2")
    folder.write_state("stopped")
    assert (tmp_path / "STATE").read_text() == "stopped\n17.2\n"
    assert folder.read_state() == "stopped"


def test_the_environment_file_holds_no_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold secrets. Fails when os.environ is written."""
    monkeypatch.setenv("SOME_SECRET", "swordfish")
    RunFolder(tmp_path).write_environment(world_size=3)
    text = (tmp_path / "env.json").read_text()
    assert "swordfish" not in text
    assert json.loads(text)["world"] == 3


def test_a_resumed_run_drops_metrics_past_its_step_and_a_torn_line(tmp_path: Path) -> None:
    """Lines of steps 10, 20, 30 and half a line; resumed at 20, the run writes 30 once.

    Fails when the file is appended to as it stands, or the line of the resumed step itself goes.
    """
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.write(step, {"train/loss": step / 10})
    with path.open("a") as file:
        file.write('{"step": 15, "train/lo')
    second = MetricsFile(path, 20)
    second.write(30, {"train/loss": 7.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 10, "train/loss": 1.0}, {"step": 20, "train/loss": 2.0}, {"step": 30, "train/loss": 7.0}
    ]  # fmt: skip
    MetricsFile(path, 0)
    assert path.read_text() == ""
