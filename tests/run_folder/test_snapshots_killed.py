"""Snapshots of a run that is killed anywhere and resumed: the best are those of the undisturbed run.

Every test was seen to fail under the mutation that it names.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_snapshots import assert_whole, files, names, offer, ranking, steps, weights
from running import PATIENCE

from dist_trainer.run_folder import tensor_files
from dist_trainer.run_folder.snapshots import INDEX, Snapshots


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
            assert [of_then.load(each)["n"].item() for each in of_then.best] == self.expected(validated)
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
        deadline = time.monotonic() + PATIENCE * 60
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
