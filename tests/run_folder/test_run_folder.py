"""The run folder: its name, and what is written into it."""

import json
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
    RunFolder(tmp_path).write_environment(world_size=3, total_steps=7)
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
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 1.0), (20, 2.0), (30, 7.0)]
    MetricsFile(path, 0)
    assert path.read_text() == ""
