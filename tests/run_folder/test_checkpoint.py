"""Checkpoints: what was written is read bit for bit, what is damaged does not exist, and what is kept."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import message
from torch import nn

from dist_trainer.errors import UserError
from dist_trainer.run_folder import checkpoint
from dist_trainer.run_folder.retention import Retention
from dist_trainer.run_folder.tensor_files import digest
from dist_trainer.tensors import State


def tensors(seed: int = 0) -> dict[str, State]:
    """A model with every kind of layout that safetensors refuses, and an optimizer."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(24, generator=generator)
    kernel = torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last)
    model = {
        "kernel": kernel,
        "head": storage[:12].reshape(3, 4),
        "tail": storage[8:],  # shares memory with head
        "transposed": storage.reshape(4, 6).T,
        "tied": kernel,
        "scalar": torch.tensor(7),
        "half": torch.randn(3, generator=generator).bfloat16(),
    }
    return {"model": model, "optim": {"momentum_buffer/kernel": torch.randn_like(kernel)}}


def save(root: Path, step: int, keep: int = 2) -> Path:
    checkpoint.save(root, step, tensors(step), {"step": step}, Retention(last=keep))
    return root / f"step_{step:08d}"


def kept(root: Path) -> list[int]:
    """Steps whose folders stand under `root`."""
    return sorted(int(path.name.removeprefix("step_")) for path in root.iterdir())


def test_what_was_written_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    """Values, types and shapes, of channels_last tensors and of views and twins of one storage too.

    Fails when tensors are not made contiguous and apart first, or are stored in another type.
    """
    written = tensors()
    checkpoint.save(tmp_path, 12, written, {"step": 12, "best": {"top1": 0.25}})
    folder, notes = checkpoint.newest(tmp_path)
    assert (folder, notes) == (tmp_path / "step_00000012", [])
    assert folder is not None
    for name, state in written.items():
        loaded = checkpoint.load_tensors(folder, name)
        assert loaded.keys() == state.keys()
        for key, value in state.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value)
    assert checkpoint.load_weights(folder).keys() == written["model"].keys()
    state = checkpoint.load_state(folder)
    assert (state["step"], state["best"]) == (12, {"top1": 0.25})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("optim.safetensors", truncate, "optim.safetensors has "),
        ("model.safetensors", flip, "model.safetensors does not match its digest"),
        ("state.json", flip, "state.json does not match its digest"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("MANIFEST.json", Path.unlink, "MANIFEST.json is missing"),
        ("MANIFEST.json", halve, "MANIFEST.json does not parse"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_says_why(
    tmp_path: Path, file: str, damage: Callable[[Path], None], reason: str
) -> None:
    """Fails when digests, sizes or the manifest are not looked at, or a JSON error gets through."""
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    assert checkpoint.newest(tmp_path) == (newer, [])
    damage(newer / file)
    folder, notes = checkpoint.newest(tmp_path)
    assert folder == older
    assert len(notes) == 1
    assert newer.name in notes[0]
    assert reason in notes[0]
    assert "\n" not in notes[0]
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(newer)
    assert reason in message(caught)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """Fails when the folder of a new run must exist."""
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])
    assert checkpoint.newest(tmp_path) == (None, [])


def test_another_format_is_refused(tmp_path: Path) -> None:
    """Fails when the version is not looked at."""
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError) as caught:
        checkpoint.load_state(folder)
    assert "format 99" in message(caught)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_exactly_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    """Fails when one more or one less is kept, or when step 100 sorts before step 20."""
    steps = [5, 10, 20, 100, 1000]
    for number, step in enumerate(steps, 1):
        save(tmp_path, step, keep)
        assert kept(tmp_path) == steps[:number][-keep:]


def test_newer_ones_that_were_passed_over_go_with_the_next_save(tmp_path: Path) -> None:
    """A run that resumed from step 10, since step 30 was damaged, must not find 30 again after it has saved 20.

    Fails when only older ones are removed.
    """
    save(tmp_path, 10)
    truncate(save(tmp_path, 30) / "model.safetensors")
    save(tmp_path, 20)
    assert kept(tmp_path) == [10, 20]


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """keep_last 2 means two to resume from: step 20 was torn, so steps 10 and 25 are kept.

    Fails when what is kept is counted by folders.
    """
    save(tmp_path, 10)
    (save(tmp_path, 20) / checkpoint.MANIFEST).unlink()
    save(tmp_path, 25)
    whole = [folder for folder in tmp_path.iterdir() if checkpoint.fault(folder) is None]
    assert sorted(folder.name for folder in whole) == ["step_00000010", "step_00000025"]


def test_a_save_that_fails_leaves_the_earlier_checkpoints_whole(tmp_path: Path) -> None:
    """Also the one of the very same step, which a run that validates late saves again.

    Fails when a checkpoint is removed before its successor is whole, or when OSError gets through.
    """
    save(tmp_path, 20)
    unwritable = {"model": tensors()["model"], "no/such/folder": {"x": torch.zeros(1)}}
    for step in (20, 30):
        with pytest.raises(UserError) as caught:
            checkpoint.save(tmp_path, step, unwritable, {"step": step})
        assert "earlier checkpoints are whole" in message(caught)
        assert checkpoint.newest(tmp_path)[0] == tmp_path / "step_00000020"
    save(tmp_path, 40, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000040"]  # nothing of the failed ones is left


def test_weights_that_do_not_fit_are_refused_with_missing_unexpected_and_misshapen_keys() -> None:
    """In one line. Nothing is loaded then. Fails when load_state_dict's many lines get through, or it is not strict."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {
        "0.weight": torch.zeros(3, 2),
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(1, 3),
        "2.w": torch.ones(1),
    }
    with pytest.raises(UserError) as caught:
        checkpoint.load_into(model, weights, "weights.safetensors")
    text = message(caught)
    assert text.startswith("weights.safetensors: ")
    for part in ("missing: 1.bias", "unexpected: 2.w", "0.bias (4,) for (3,)"):
        assert part in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_fit_are_loaded() -> None:
    """Fails when a copy is loaded into instead of the model."""
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source.running_mean = torch.arange(3.0)
    checkpoint.load_into(target, source.state_dict(), "x")
    assert torch.equal(target.get_buffer("running_mean"), torch.arange(3.0))


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.place,)


def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    """As a file of its own, and inside a checkpoint whose manifest was forged to match.

    Fails when weights are unpickled, or when safetensors' own exception gets through.
    """
    planted = tmp_path / "model.safetensors"
    planted.write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    folder = tmp_path / "step_00000001"
    checkpoint.write(folder, {"model": {"x": torch.zeros(1)}}, {})
    shutil.copy(planted, folder / "model.safetensors")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = {"size": planted.stat().st_size, "sha256": digest(planted)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.fault(folder) is None
    for path in (planted, folder):
        with pytest.raises(UserError) as caught:
            checkpoint.load_weights(path)
        assert message(caught).startswith(str(path))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(planted.read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap works


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Fails when FileNotFoundError gets through."""
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(tmp_path / "nothing.safetensors")
    assert message(caught).startswith(str(tmp_path / "nothing.safetensors"))


def test_a_manifest_that_names_a_file_elsewhere_makes_no_checkpoint(tmp_path: Path) -> None:
    """Though the file is there, and as it says. Mutation: join its names to the folder."""
    folder = save(tmp_path / "checkpoints", 20)
    other = tmp_path / "other"
    other.write_bytes(b"x")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"]["../../other"] = {"size": 1, "sha256": digest(other)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.fault(folder) == "MANIFEST.json names '../../other', which lies elsewhere"
