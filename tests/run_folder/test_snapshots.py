"""Snapshots: the k best against a sorted list; damage, and storage that refuses.

Every test was seen to fail under the mutation that it names.
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import flip_byte, message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kept_snapshots import assert_whole, bit_equal, files, names, offer, ranking, steps, weights

from dist_trainer.errors import UserError
from dist_trainer.run_folder import tensor_files
from dist_trainer.run_folder.snapshots import INDEX, Snapshots
from dist_trainer.tricks.averaging import (
    average,
)

VALUES = st.one_of(st.sampled_from([0.25, 0.5, 0.75, math.nan, math.inf, -math.inf]), st.floats(0, 1))


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=9), st.integers(0, 4), st.booleans())
@example([0.5, 0.25, 0.5, 0.5, 0.75], 2, True)
@example([0.5, 0.25, 0.5, 0.25, math.nan, 0.1], 2, False)
def test_the_best_are_those_of_a_sorted_list(offered: list[float], top_k: int, larger: bool) -> None:
    """After every offer, for accuracies and losses, with ties (the older stays) and values that are no numbers.

    Fails when an equal value displaces, when of equal worst ones the older goes, when a loss is ranked as an accuracy,
    when NaN or infinity is taken, when one more or one less is kept, or when what is displaced stays on the disk.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = Snapshots(folder, top_k, larger)
        values = dict(enumerate(offered, 1))
        for step, value in values.items():
            offer(kept, step, value)
            expected = ranking({s: values[s] for s in range(1, step + 1)}, top_k, larger)
            assert steps(kept) == expected
            assert files(folder) == (names(expected) | {INDEX} if expected else set())
            assert steps(Snapshots(folder, top_k, larger)) == expected
        assert [kept.load(each)["n"].item() for each in kept.best] == steps(kept)


def test_weights_are_asked_for_only_when_they_would_be_taken(tmp_path: Path) -> None:
    """Gathering them costs a collective. Fails when an equal value would be taken, or a NaN while there is room."""
    kept = Snapshots(tmp_path, 2)
    assert [kept.would_take(value) for value in (0.1, math.nan, math.inf, -math.inf)] == [True, False, False, False]
    kept.offer(1, 0.5, weights(1))
    assert kept.would_take(0.1)
    kept.offer(2, 0.7, weights(2))
    assert [kept.would_take(value) for value in (0.4, 0.5, 0.51, 0.9)] == [False, False, True, True]
    assert not Snapshots(tmp_path / "off", 0).would_take(1.0)


def test_weights_that_are_not_finite_are_not_kept_and_it_is_said(tmp_path: Path) -> None:
    """Nor is a value that is none. Fails when they are kept, or displace another first."""
    kept = Snapshots(tmp_path, 1)
    kept.offer(1, 0.5, weights(1))
    broken = {"w": torch.tensor([1.0, math.nan])}
    assert kept.offer(2, 0.9, broken) == "step 2: no snapshot is kept, w has values that are not finite"
    assert kept.offer(3, math.nan, weights(3)) == "step 3: no snapshot is kept, its metric is nan"
    assert kept.offer(4, 0.4, weights(4)) is None
    assert steps(kept) == [1]
    assert files(tmp_path) == {*names([1]), INDEX}


def test_every_layout_and_type_is_kept_bit_for_bit(tmp_path: Path) -> None:
    """channels_last, twins and views of one storage, bfloat16, integers. Fails when tensors are not laid out first."""
    storage = torch.randn(24)
    kernel = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    written = {"kernel": kernel, "tied": kernel, "view": storage[8:], "half": storage[:3].bfloat16()}
    written |= {"flat": storage.reshape(4, 6).T, "n": torch.tensor(7)}
    kept = Snapshots(tmp_path, 1)
    kept.offer(1, 0.5, written)
    loaded = kept.load(kept.best[0])
    assert bit_equal({key: loaded[key] for key in written}, written)


def test_a_step_offered_again_takes_its_own_place(tmp_path: Path) -> None:
    """Also with another value, as when a run is resumed on another world; what came after it is not counted any more.

    Fails when it is added once more, or when the former one stays.
    """
    kept = Snapshots(tmp_path, 3)
    for step, value in ((10, 0.5), (20, 0.6), (30, 0.7)):
        kept.offer(step, value, weights(step))
    kept = Snapshots(tmp_path, 3)
    kept.offer(20, 0.4, weights(21))
    assert [(each.step, each.value) for each in kept.best] == [(10, 0.5), (20, 0.4)]
    assert kept.load(kept.best[1])["n"].item() == 21
    assert_whole(tmp_path)
    assert files(tmp_path) == {*names([10, 20]), INDEX}


def test_opening_to_read_changes_nothing(tmp_path: Path) -> None:
    """An average may be made of a run that is going on. Fails when opening cleans up."""
    kept = Snapshots(tmp_path, 2)
    kept.offer(10, 0.5, weights(10))
    strays = [".step_00000020.safetensors", "step_00000020.safetensors", f".{INDEX}"]
    for name in (*strays, "bn_ema.safetensors"):
        (tmp_path / name).touch()
    before = files(tmp_path)
    assert [Snapshots(tmp_path, 2).load(each) for each in Snapshots(tmp_path, 2).best]
    assert not Snapshots(tmp_path / "nothing", 2).best
    assert files(tmp_path) == before
    assert Snapshots(tmp_path, 2).resume(10) == []
    assert files(tmp_path) == {*names([10]), "bn_ema.safetensors", INDEX}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, " has "),
    (lambda path: flip_byte(path, path.stat().st_size - 1), " does not match its digest"),
    (Path.unlink, " is missing"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_a_damaged_snapshot_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    """Fails when size or digest is not looked at, or an exception of safetensors or the system gets through."""
    kept = Snapshots(tmp_path, 2)
    for step in (10, 20):
        kept.offer(step, step / 100, weights(step))
    path = tmp_path / "step_00000010.safetensors"
    damage(path)
    with pytest.raises(UserError) as caught:
        average((each.file, kept.load(each)) for each in kept.best)
    assert message(caught).startswith(f"{path}{reason}")
    assert bit_equal(kept.load(kept.best[0]), dict(sorted(weights(20).items())))


def test_a_run_goes_on_without_a_snapshot_that_is_gone_and_says_so(tmp_path: Path) -> None:
    """Fails when the end of a long run finds out, or when the others go too."""
    kept = Snapshots(tmp_path, 2)
    for step in (10, 20):
        kept.offer(step, step / 100, weights(step))
    truncate(tmp_path / "step_00000020.safetensors")
    kept = Snapshots(tmp_path, 2)
    (note,) = kept.resume(20)
    assert note.startswith("snapshot step_00000020.safetensors has ")
    assert steps(kept) == [10]
    assert files(tmp_path) == {*names([10]), INDEX}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1, "checkpoints": [], "snapshots": [{"step": 1}]}'])
def test_a_damaged_index_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    """Fails when it counts as empty, so that a run's snapshots go, or when a JSON error gets through."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError) as caught:
        Snapshots(tmp_path, 1)
    assert f"{tmp_path / INDEX} does not parse" in message(caught)


def test_another_format_is_refused(tmp_path: Path) -> None:
    """Fails when the version is not looked at."""
    (tmp_path / INDEX).write_text('{"version": 99, "checkpoints": [], "snapshots": []}')
    with pytest.raises(UserError) as caught:
        Snapshots(tmp_path, 1)
    assert "format 99" in message(caught)


@pytest.mark.parametrize("place", ["save_file", "os.replace", "os.fsync"])
def test_storage_that_refuses_leaves_the_earlier_ones_whole(tmp_path: Path, place: str) -> None:
    """And the next offer is taken. Fails when OSError gets through, or what was half written stays on a full disk."""
    kept = Snapshots(tmp_path, 1)
    kept.offer(10, 0.5, weights(10))
    before = files(tmp_path)

    def refuse(*args: Any, **more: Any) -> None:
        if place == "save_file":
            args[1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = f"{tensor_files.__name__}.save_file" if place == "save_file" else place
    with mock.patch(target, refuse), pytest.raises(UserError) as caught:
        kept.offer(20, 0.6, weights(20))
    assert "No space left" in message(caught)
    assert "earlier snapshots are whole" in message(caught)
    assert files(tmp_path) == before
    assert_whole(tmp_path)
    assert steps(kept) == steps(Snapshots(tmp_path, 1)) == [10]
    kept.offer(30, 0.7, weights(30))
    assert steps(kept) == [30]
