"""Weight averaging: mean and greedy soup against exact arithmetic, snapshots against a sorted list, killed anywhere.

Every test was seen to fail under the mutation that it names.
"""

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import flip_byte, message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_trainer.errors import UserError
from dist_trainer.run_folder import tensor_files
from dist_trainer.run_folder.snapshots import INDEX, Snapshots
from dist_trainer.tensors import State
from dist_trainer.tricks.averaging import (
    AveragingConfig,
    Member,
    average,
    chosen_metric,
    larger_is_better,
)


def mean(members: Iterable[Member]) -> State:
    return average(members)[0]


def greedy_soup(members: Iterable[Member], score: Callable[[State], float]) -> tuple[State, list[str]]:
    return average(members, lambda name, state: score(state))


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bit_equal(one: State, other: State) -> bool:
    """Also the sign of zero, which == does not tell."""
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(one[key].reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8))
        for key in one
    )


def any_floats(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite ones, drawn as bit patterns: every exponent, subnormal ones, both zeros, the largest."""
    info = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(info.min, info.max + 1, (count,), generator=generator, dtype=torch.int64)
    values = patterns.to(BITS[dtype]).view(dtype)
    limits = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal], dtype=dtype)
    smallest = torch.tensor([1], dtype=BITS[dtype]).view(dtype)
    return torch.cat([edges, smallest, values[values.isfinite()]])


# The mean


def test_the_mean_of_copies_of_a_model_is_that_model_bit_for_bit() -> None:
    """Of 1 to 100 copies, in float32, bfloat16 and float16, for thousands of bit patterns of every size.

    Fails when the sum is float32 or starts from 0 (which loses -0.0), and when a float32 1/k is multiplied with.
    """
    model = {str(dtype): any_floats(3000, dtype, seed) for seed, dtype in enumerate(BITS)}
    for num in range(1, 101):
        assert bit_equal(mean((f"copy {n}", model) for n in range(num)), model), num


@given(st.integers(1, 100), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@example(num=3, values=[0.1, -0.0, 1e-45, 3.4028234663852886e38])
def test_the_mean_of_copies_of_any_float32_is_that_float32(num: int, values: list[float]) -> None:
    """Fails like the one above."""
    model = {"w": torch.tensor(values)}
    assert bit_equal(mean([("copy", model)] * num), model)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
@example([1e8, 1.0, -1e8])
@example([1.0, 2.0**-40, -1.0])
def test_the_mean_is_that_of_exact_arithmetic(values: list[float]) -> None:
    """To half a unit of float32, the rounding of the result, and one of float64 per addition.

    Fails when the sum is float32 (1e8 + 1 - 1e8 is 0), when a member is left out, or with another divisor.
    """
    result = mean((f"{n}", {"w": torch.tensor([value])}) for n, value in enumerate(values))["w"]
    assert result.dtype == torch.float32
    exact = sum(map(Fraction, values), Fraction()) / len(values)
    size = sum(abs(Fraction(value)) for value in values)
    half_a_unit = Fraction(float(np.spacing(np.float32(abs(float(exact)))))) / 2
    assert abs(Fraction(result.item()) - exact) <= half_a_unit * Fraction(1001, 1000) + size / 2**52


def test_the_mean_in_bfloat16_is_rounded_once() -> None:
    """256, 1 and 1: their mean is 86. In bfloat16, 256 + 1 is 256, and a third of it 85.5.

    Fails when bfloat16 is summed in its own type, or the result is not cast back.
    """
    values = torch.tensor([256.0, 1.0, 1.0]).bfloat16()
    result = mean((str(n), {"w": value}) for n, value in enumerate(values))["w"]
    assert result.dtype == torch.bfloat16
    assert result.item() == 86.0


def test_what_is_no_float_comes_from_the_best() -> None:
    """A batch-norm counter stays an integer, and it is that of the first file.

    Fails when integers are averaged (5 and 8: 6.5), or taken from the last.
    """
    first = {"n": torch.tensor(5), "mask": torch.tensor([True, False]), "w": torch.tensor([1.0])}
    second = {"n": torch.tensor(8), "mask": torch.tensor([False, False]), "w": torch.tensor([2.0])}
    expected = {"n": torch.tensor(5), "mask": torch.tensor([True, False]), "w": torch.tensor([1.5])}
    assert bit_equal(mean([("a", first), ("b", second)]), expected)


def test_the_mean_leaves_its_inputs_alone() -> None:
    """Float64 included, which needs no conversion. Fails when the sum is made in the first state's memory."""
    states = [{"w": torch.tensor([x], dtype=torch.float64), "n": torch.tensor([7])} for x in (1.0, 2.0)]
    result = mean(("x", state) for state in states)
    result["n"] += 1
    result["w"] += 1
    assert [state["w"].item() for state in states] == [1.0, 2.0]
    assert states[0]["n"].item() == 7


def test_a_score_may_do_what_it_likes_with_the_model_that_it_is_given() -> None:
    """PreciseBN and counters write into it. Fails when the sum lends out its integers."""

    def score(state: State) -> float:
        for value in state.values():
            value.fill_(9)
        return 0.0

    soup, _ = greedy_soup([(name, {"w": torch.ones(1), "n": torch.tensor(7)}) for name in "ab"], score)
    assert bit_equal(soup, {"w": torch.ones(1), "n": torch.tensor(7)})


def live(num: int) -> tuple[Iterator[Member], list[int]]:
    """`num` members made one by one, and how many of the earlier ones were alive at each making."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def one(n: int) -> State:
        alive.append(sum(each() is not None for each in made))
        state = {"w": torch.full((5,), float(n)), "n": torch.tensor(n)}
        made.extend(map(weakref.ref, state.values()))
        return state

    return ((str(n), one(n)) for n in range(num)), alive


def test_one_member_is_held_at_a_time() -> None:
    """In the greedy soup too. Fails when members are listed first, or one, or its integers, is held beside the next."""
    members, alive = live(4)
    mean(members)
    assert alive == [0, 0, 0, 0]
    members, alive = live(4)
    greedy_soup(members, lambda _: 0.0)
    assert alive == [0, 0, 0, 0]


BASE = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"w": torch.zeros(2, 3)}, ["missing: b"]),
        ({**BASE, "c": torch.zeros(1)}, ["unexpected: c"]),
        ({**BASE, "w": torch.zeros(3, 2)}, ["w float32 (3, 2) for float32 (2, 3)"]),
        ({**BASE, "b": torch.zeros(3).bfloat16()}, ["b bfloat16 (3,) for float32 (3,)"]),
        ({"w": torch.zeros(1), "x": torch.zeros(1)}, ["missing: b", "unexpected: x", "w float32 (1,)"]),
    ],
)
def test_models_that_do_not_match_are_refused_by_file_and_tensor(other: State, parts: list[str]) -> None:
    """A shape that broadcasts, or another type, would pass in silence.

    Fails when types or shapes are not compared, or only the keys of the first are looked at.
    """
    with pytest.raises(UserError) as caught:
        mean([("best.safetensors", BASE), ("other.safetensors", other)])
    assert message(caught).startswith("other.safetensors: cannot be averaged with best.safetensors")
    for part in parts:
        assert part in message(caught)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_refused_by_file_and_tensor(value: float, place: int) -> None:
    """Fails when only NaN is looked for, or the first file is not looked at."""
    states = [{"a": torch.zeros(2), "b": torch.zeros(2)} for _ in range(2)]
    states[place]["b"][1] = value
    with pytest.raises(UserError) as caught:
        mean((f"file{n}", state) for n, state in enumerate(states))
    assert message(caught).startswith(f"file{place}: b has values that are not finite")


def test_nothing_to_average_is_said() -> None:
    """Fails when an empty mean is an empty model, or ZeroDivisionError gets through."""
    for call in (lambda: mean([]), lambda: greedy_soup([], lambda _: 0.0)):
        with pytest.raises(UserError) as caught:
            call()
        assert "nothing to average" in message(caught)


# The greedy soup


def brute_force(values: list[int], score: Callable[[float], float]) -> tuple[int, ...]:
    """The one subset whose every choice is right: a member is in it exactly if it does not lower those before it."""

    def of(indices: tuple[int, ...]) -> float:
        return score(float(np.float32(sum(values[n] for n in indices) / len(indices))))

    def right(subset: tuple[int, ...]) -> bool:
        before = [tuple(m for m in subset if m < n) for n in range(len(values))]
        return all((n in subset) == (not b or of((*b, n)) >= of(b)) for n, b in enumerate(before))

    subsets = [s for size in range(len(values)) for s in itertools.combinations(range(len(values)), size + 1)]
    (only,) = filter(right, subsets)
    return only


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.integers(-2, 2))
@example([1, 1, -3, 3], 0)
def test_the_greedy_soup_is_that_of_brute_force(values: list[int], target: int) -> None:
    """Over all subsets, for the score -|mean - target|; of small integers, since equal scores keep a member.

    Fails with > for >=, when a trial that is refused stays in the sum, when it is compared with the first alone or with
    the score of the trial before, and when the result is the mean of all.
    """

    def score(value: float) -> float:
        return -abs(value - target)

    members = [(str(n), {"w": torch.tensor(float(value))}) for n, value in enumerate(values)]
    soup, kept = greedy_soup(iter(members), lambda state: score(state["w"].item()))
    expected = brute_force(values, score)
    assert kept == [str(n) for n in expected]
    assert bit_equal(soup, mean(members[n] for n in expected))


def test_a_score_that_is_no_number_keeps_no_member_but_the_first() -> None:
    """Fails when a member is refused only for a score that is smaller."""
    scores = iter([0.5, math.nan, 0.6])
    _, kept = greedy_soup([(name, {"w": torch.ones(1)}) for name in "abc"], lambda _: next(scores))
    assert kept == ["a", "c"]


# The config


def test_the_metric_is_chosen_from_what_is_logged() -> None:
    """Fails when auto prefers the model to its EMA, a misspelt name passes, or a loss counts as an accuracy."""
    plain = ["val/top1", "val/top5", "val/loss"]
    both = [*plain, "val_ema/top1", "val_ema/top5", "val_ema/loss"]
    assert chosen_metric(AveragingConfig(), plain) == "val/top1"
    assert chosen_metric(AveragingConfig(), both) == "val_ema/top1"
    assert chosen_metric(AveragingConfig(metric="val/loss"), both) == "val/loss"
    for config, parts in (
        (AveragingConfig(metric="val/top"), ["averaging.metric: 'val/top'", "did you mean 'val/top"]),
        (AveragingConfig(metric="val_ema/top1"), ["'val_ema/top1' is not logged", "val/loss, val/top1, val/top5"]),
        (AveragingConfig(top_k=-1), ["averaging.top_k: -1"]),
    ):
        with pytest.raises(UserError) as caught:
            chosen_metric(config, plain)
        for part in parts:
            assert part in message(caught)
    assert [name for name in both if not larger_is_better(name)] == ["val/loss", "val_ema/loss"]


# Snapshots


def weights(step: int) -> State:
    return {"w": torch.full((3,), float(step)), "n": torch.tensor(step)}


def offer(kept: Snapshots, step: int, value: float) -> None:
    """As the run does: weights are gathered only when they would be taken."""
    if kept.would_take(value):
        kept.offer(step, value, weights(step))


def ranking(values: dict[int, float], top_k: int, larger: bool) -> list[int]:
    """The steps of the best, by sorting all: best first, of equal ones the older."""
    finite = [step for step in values if math.isfinite(values[step])]
    return sorted(finite, key=lambda step: (-values[step] if larger else values[step], step))[:top_k]


def steps(kept: Snapshots) -> list[int]:
    return [each.step for each in kept.best]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names(of: list[int] | set[int]) -> set[str]:
    return {f"step_{step:08d}.safetensors" for step in of}


def assert_whole(folder: Path) -> None:
    """By json and hashlib alone: the index parses, and every file that it names has its size and digest."""
    if not (folder / INDEX).exists():
        return
    for each in json.loads((folder / INDEX).read_text())["snapshots"]:
        data = (folder / f"step_{each['step']:08d}.safetensors").read_bytes()
        assert len(data) == each["size"]
        assert hashlib.sha256(data).hexdigest() == each["sha256"]


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
        assert [each["n"].item() for _, each in kept.members()] == steps(kept)
        assert [file for file, _ in kept.members()] == [each.file for each in kept.best]


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
    assert list(Snapshots(tmp_path, 2).members())
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
        mean(kept.members())
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


# Killed anywhere


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


@dataclass
class Disk:
    """What reaches the disk before a crash at operation number `crash_at`.

    With `power`, the machine goes down: names that were given since the folder was last brought to the disk are as
    before, and files that were not brought there are half. Removals count at once: the worst of both.
    """

    crash_at: int
    power: bool
    num: int = 0
    unsynced: set[str] = field(default_factory=set)
    renames: list[tuple[Path, Path, bytes | None]] = field(default_factory=list)

    @property
    def has_crashed(self) -> bool:
        return 0 < self.crash_at <= self.num

    def operation(self) -> None:
        if self.has_crashed:
            raise Crash  # nor does the process tidy up
        self.num += 1
        if self.has_crashed:
            raise Crash

    def write(self, real: Callable[..., Any], content: Any, path: Path) -> None:
        real(content, path)
        self.unsynced.add(str(path))
        if self.num + 1 == self.crash_at:
            os.truncate(path, path.stat().st_size // 2)
        self.operation()

    def fsync(self, descriptor: int) -> None:
        self.operation()
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        self.unsynced.discard(path)
        self.renames = [each for each in self.renames if str(each[1].parent) != path]

    def replace(self, real: Callable[..., None], source: Path, target: Path) -> None:
        self.operation()
        self.renames.append((Path(source), Path(target), Path(target).read_bytes() if target.exists() else None))
        real(source, target)
        self.unsynced -= {str(target)}
        if str(source) in self.unsynced:
            self.unsynced = self.unsynced - {str(source)} | {str(target)}

    def unlink(self, real: Callable[..., None], path: Path) -> None:
        self.operation()
        real(path)

    def go_down(self) -> None:
        if not self.power:
            return
        for name in filter(os.path.exists, self.unsynced):
            os.truncate(name, Path(name).stat().st_size // 2)
        for source, target, before in reversed(self.renames):
            if target.exists():
                source.write_bytes(target.read_bytes())
                target.unlink()
            if before is not None:
                target.write_bytes(before)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        save, text, replace, unlink = tensor_files.save_file, Path.write_text, os.replace, os.unlink

        def write_text(path: Path, content: str) -> None:
            self.write(lambda c, p: text(p, c), content, path)

        with (
            mock.patch.object(tensor_files, "save_file", lambda state, path: self.write(save, state, path)),
            mock.patch.object(Path, "write_text", write_text),
            mock.patch.object(os, "fsync", self.fsync),
            mock.patch.object(os, "replace", lambda source, target: self.replace(replace, source, target)),
            mock.patch.object(os, "unlink", lambda path: self.unlink(unlink, path)),
        ):
            yield


@dataclass
class Simulation:
    """A run that validates at the steps of `values`, saves at `saves`, and keeps `keep` checkpoints.

    A checkpoint is (step, last step that was validated): at a step of `stops` the run is stopped between the two, so
    the checkpoint does not know of that step's validation, which is made when the run goes on.
    """

    folder: Path
    values: dict[int, float]
    saves: set[int]
    top_k: int = 2
    larger: bool = True
    keep: int = 2
    stops: set[int] = field(default_factory=set)
    checkpoints: list[tuple[int, int]] = field(default_factory=list)

    @property
    def last(self) -> int:
        return max(self.saves)

    def expected(self, validated: int) -> list[int]:
        return ranking({s: v for s, v in self.values.items() if s <= validated}, self.top_k, self.larger)

    def save(self, kept: Snapshots, disk: Disk, step: int, validated: int) -> None:
        disk.operation()
        older = [each for each in self.checkpoints if each[0] < step]
        self.checkpoints = [*older, (step, validated)][-self.keep :]
        disk.operation()
        kept.commit(validated for _, validated in self.checkpoints)

    def start(self, disk: Disk, damaged: int = 0) -> None:
        """From the newest checkpoint but `damaged` ones, or from the start, to the end or the crash."""
        self.checkpoints = self.checkpoints[: len(self.checkpoints) - damaged]
        step, validated = self.checkpoints[-1] if self.checkpoints else (0, 0)
        with disk():
            kept = Snapshots(self.folder, self.top_k, self.larger)
            assert kept.resume(validated) == []
            assert steps(kept) == self.expected(validated), "resumed with other snapshots"
            while True:
                if step in self.values and step > validated:
                    offer(kept, step, self.values[step])
                    validated = step
                    assert steps(kept) == self.expected(validated)
                if step in self.saves and (step, validated) not in self.checkpoints:
                    self.save(kept, disk, step, validated)
                if step == self.last:  # the end, maybe of a run that was killed between its last save and commit
                    return kept.commit(validated for _, validated in self.checkpoints)
                step += 1
                if step in self.stops:
                    self.stops.remove(step)
                    self.save(kept, disk, step, validated)
                    raise Crash

    def run(self, crashes: list[tuple[int, bool, int]]) -> int:
        """To the end, with a crash at the operation that each gives. Returns the number of the last operation."""
        for crash_at, power, damaged in [*crashes, *[(0, False, 0)] * (len(self.stops) + 1)]:
            disk = Disk(crash_at, power)
            try:
                self.start(disk, min(damaged, len(self.checkpoints)))
            except Crash:
                if disk.has_crashed:
                    disk.go_down()
                assert_whole(self.folder)
        return disk.num

    def check(self) -> None:
        """The final set is that of the undisturbed run, each checkpoint would find its own, and no more is kept."""
        kept = Snapshots(self.folder, self.top_k, self.larger)
        assert steps(kept) == self.expected(self.last)
        assert [each.value for each in kept.best] == [self.values[step] for step in self.expected(self.last)]
        needed = {step for _, validated in self.checkpoints for step in self.expected(validated)}
        assert files(self.folder) == names(needed) | {INDEX}
        for _, validated in self.checkpoints:
            copy = self.folder.with_name("copy")
            shutil.copytree(self.folder, copy)
            of_then = Snapshots(copy, self.top_k, self.larger)
            assert of_then.resume(validated) == []
            assert [state["n"].item() for _, state in of_then.members()] == self.expected(validated)
            shutil.rmtree(copy)


@contextlib.contextmanager
def simulation(**plan: Any) -> Iterator[Simulation]:
    with tempfile.TemporaryDirectory() as name:
        yield Simulation(Path(name) / "averages", **plan)


RISING = {2: 0.3, 3: 0.2, 4: 0.5, 5: 0.4, 6: 0.6, 8: math.nan, 9: 0.55, 10: 0.5, 11: 0.8}


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_killed_at_any_operation_and_resumed_the_best_are_those_of_the_undisturbed_run(
    power: bool, damaged: int
) -> None:
    """Before and in the middle of every write, fsync, rename, removal and save; resumed from the newest checkpoint, the
    one before, or the start. The process is killed, or the machine goes down with all that was not synced.

    Fails when displaced files go at once; when what was displaced later is not put back, or what is later not dropped,
    at a resume; when either end of a displaced one's life is off by one step (< for <=); when resuming forgets the
    other checkpoints or is not one itself; when the index is written before its file, or in place, or after the
    removals; without fsync of file, index or folder.
    """
    plan: dict[str, Any] = {"values": RISING, "saves": {4, 9, 11}}
    with simulation(**plan) as undisturbed:
        num_operations = undisturbed.run([])
        undisturbed.check()
    for crash_at in range(1, num_operations + 1):
        with simulation(**plan) as disturbed:
            disturbed.run([(crash_at, power, 0), (0, False, damaged)])
            disturbed.check()


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    last = draw(st.integers(4, 10))
    some, few = (st.sets(st.integers(1, last), max_size=most) for most in (last, 2))
    unvalidated = draw(few)
    value = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, math.nan])
    return {
        "values": {step: draw(value) for step in range(1, last + 1) if step not in unvalidated},
        "saves": {*draw(some), last},
        "stops": draw(few),
        "top_k": draw(st.integers(1, 3)),
        "keep": draw(st.integers(1, 3)),
        "larger": draw(st.booleans()),
    }


@settings(max_examples=50)
@given(plans(), st.lists(st.tuples(st.integers(5, 60), st.booleans(), st.integers(0, 1)), min_size=1, max_size=4))
def test_any_run_killed_several_times_and_stopped_between_a_step_and_its_validation(
    plan: dict[str, Any], crashes: list[tuple[int, bool, int]]
) -> None:
    """Other metrics, periods, numbers of checkpoints.

    Fails when `commit` removes nothing, and like the one above for what concerns resuming.
    """
    with simulation(**plan) as disturbed:
        disturbed.run(crashes)
        disturbed.check()


def test_a_step_offered_again_and_killed_meanwhile_leaves_an_index_of_whole_files(tmp_path: Path) -> None:
    """The file of a step is another one now. Fails when the index still names the former while it is replaced."""
    for crash_at in range(1, 40):
        folder = tmp_path / str(crash_at)
        kept = Snapshots(folder, 2)
        kept.offer(10, 0.5, weights(10))
        kept.offer(20, 0.6, weights(20))
        disk = Disk(crash_at, power=False)
        with contextlib.suppress(Crash), disk():
            kept.offer(20, 0.7, weights(21))
        assert_whole(folder)
        assert steps(Snapshots(folder, 2)) in ([20, 10], [10])
    assert disk.num < 39, "the last ones were to pass undisturbed"


def value_of(step: int) -> float:
    """Rising, with noise, and with ties."""
    return round(step / 50 + random.Random(step).random(), 1)


def train_on(folder: Path, last: int) -> None:
    """Offer at every step and save at every fifth, from the checkpoint on."""
    saved = folder.with_name("checkpoint")
    start = int(saved.read_text()) if saved.exists() else 0
    kept = Snapshots(folder, 3)
    assert kept.resume(start) == []
    for step in range(start + 1, last + 1):
        offer(kept, step, value_of(step))
        if step % 5 == 0:
            temporary = saved.with_name(".checkpoint")
            temporary.write_text(str(step))
            temporary.replace(saved)
            kept.commit([step])


def test_a_process_that_is_really_killed(tmp_path: Path) -> None:
    """SIGKILL at six random moments of a run that offers at every step; then the set is that of a sorted list.

    Fails when the index is written before its file, or after the removals.
    """
    folder = tmp_path / "averages"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_trainer.run_folder.snapshots"])
    draw = random.Random(0)
    reached = 0
    for _ in range(6):
        process = context.Process(target=train_on, args=(folder, 10**9))
        before = (folder / INDEX).stat().st_mtime_ns if reached else 0
        process.start()
        deadline = time.monotonic() + 60
        while not (folder / INDEX).exists() or (folder / INDEX).stat().st_mtime_ns == before:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert_whole(folder)
        reached = max(each["step"] for each in json.loads((folder / INDEX).read_text())["snapshots"])
    saved = folder.with_name("checkpoint")
    last = ((int(saved.read_text()) if saved.exists() else 0) // 5 + 2) * 5
    train_on(folder, last)
    expected = ranking({step: value_of(step) for step in range(1, last + 1)}, 3, True)
    assert steps(Snapshots(folder, 3)) == expected
    assert files(folder) == names(expected) | {INDEX}
