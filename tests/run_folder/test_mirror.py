"""The second copy of a run folder: whatever cuts a pass off, what is there is whole, and comes back as it was."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from helpers import message

from dist_trainer.errors import Outage, UserError
from dist_trainer.run_folder import checkpoint, lineage
from dist_trainer.run_folder.checkpoint import MANIFEST
from dist_trainer.run_folder.mirror import Mirror
from dist_trainer.run_folder.retention import Retention
from dist_trainer.run_folder.snapshots import Snapshots
from dist_trainer.run_folder.uploader import Uploader
from dist_trainer.storage.storage import RetryConfig, Storage

TWO = Retention(last=2)


class Cut(BaseException):
    """As a kill: nothing catches it."""


class Counting(Storage):
    """Counts what changes the storage; at `end_at` it cuts the pass off, `before` or after the operation."""

    def __init__(self, end_at: int | None = None, *, before: bool = False) -> None:
        super().__init__({}, RetryConfig(timeout=1, deadline=1))
        self.changes, self._end_at, self._before = list[str](), end_at, before

    def write(self, location: str, content: bytes | Path) -> None:
        self._count(f"write {location}")
        super().write(location, content)
        self._end()

    def remove(self, location: str) -> None:
        self._count(f"remove {location}")
        super().remove(location)
        self._end()

    def _count(self, what: str) -> None:
        self.changes.append(what)
        if self._before and len(self.changes) == self._end_at:
            raise Cut

    def _end(self) -> None:
        if not self._before and len(self.changes) == self._end_at:
            raise Cut


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 3), float(step)), "bias": torch.arange(step % 7 + 1.0)}


def make_steps(run: Path, steps: list[int], retention: Retention = TWO) -> None:
    """What a run writes up to each of `steps`."""
    snapshots = Snapshots(run / "snapshots", 1, metric="val/top1")
    for step in steps:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 1 / step}) + "\n")
        snapshots.offer(step, step / 1000, state(step))
        checkpoint.save(run / "best", step, {"model": state(step)}, {"step": step})
        saved = {"step": step, "evaluated_step": step, "last": {"model": {"top1": step / 1000}}}
        kept = [checkpoint.step_of(each) for each in checkpoint.complete(run / "checkpoints")]
        snapshots.commit([*kept, step])
        checkpoint.save(run / "checkpoints", step, {"model": state(step), "optim": state(step + 1)}, saved, retention)
        snapshots.commit([checkpoint.step_of(each) for each in checkpoint.complete(run / "checkpoints")])


def begun(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("duration: 40step\n")
    (folder / "STATE").write_text("running\n")
    lineage.write(folder, [lineage.Begin("a", 0)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Of what a run goes on from."""
    kinds = ("checkpoints", "best", "snapshots")
    return {str(file.relative_to(folder)): file.read_bytes() for kind in kinds for file in (folder / kind).rglob("*.*")}


def test_a_copy_that_came_back_is_the_run(tmp_path: Path) -> None:
    """All files that a run goes on from, byte for byte. Mutations: leave snapshots, best or lineage out."""
    run, back = begun(tmp_path / "run"), tmp_path / "back"
    make_steps(run, [10, 20])
    mirror = Mirror(str(tmp_path / "mirror"), Storage())
    mirror.bring_up_to_date(run, TWO)
    assert mirror.bring_back(back) == []
    shutil.rmtree(run / "checkpoints" / "step_00000010")  # a run goes on from the newest
    assert contents(back) == contents(run)
    for name in ("metrics.jsonl", "config.yaml", "STATE", "lineage.json"):
        assert (back / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("before", [True, False])
def test_a_pass_that_is_cut_off_anywhere_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path, before: bool
) -> None:
    """At each of its writes and removals; and the next pass mends it. Metrics reach as far as the checkpoint.

    Mutations: the manifest first; remove before the successor is whole; metrics last; overwrite under a manifest.
    """
    run = begun(tmp_path / "run")
    make_steps(run, [10, 20])
    Mirror(str(tmp_path / "before"), Storage()).bring_up_to_date(run, TWO)
    make_steps(run, [30, 40])
    counting = Counting()
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    Mirror(str(tmp_path / "whole"), counting).bring_up_to_date(run, TWO)
    assert len(counting.changes) > 20
    for end_at in range(1, len(counting.changes) + 1):
        place, back = tmp_path / "cut" / str(end_at), tmp_path / "back" / str(end_at)
        shutil.copytree(tmp_path / "before", place)
        with pytest.raises(Cut):
            Mirror(str(place), Counting(end_at, before=before)).bring_up_to_date(run, TWO)
        assert Mirror(str(place), Storage()).bring_back(back) == [], counting.changes[end_at - 1]
        (newest,) = checkpoint.complete(back / "checkpoints")
        step = checkpoint.step_of(newest)
        assert step in (20, 40), counting.changes[end_at - 1]
        assert torch.equal(checkpoint.load_tensors(newest, "model")["weight"], state(step)["weight"])
        logged = [json.loads(line)["step"] for line in (back / "metrics.jsonl").read_text().splitlines()]
        assert max(logged) >= step
        assert checkpoint.complete(back / "best")
        Mirror(str(place), Storage()).bring_up_to_date(run, TWO)
        left = sorted(str(each.relative_to(place)) for each in place.rglob("*"))
        whole = sorted(str(each.relative_to(tmp_path / "whole")) for each in (tmp_path / "whole").rglob("*"))
        assert [each for each in left if "." in each] == [each for each in whole if "." in each]


def test_each_place_keeps_by_its_own_rule(tmp_path: Path) -> None:
    """A mirror that was away for a while keeps what it has until it has more; the local disk does not wait for it.

    Mutations: remove what is not here any more; keep everything; forget the best that is there alone.
    """
    run = begun(tmp_path / "run")
    rule = Retention(last=1, best=1, larger_is_better=False)  # the first has the least top-1
    make_steps(run, [10, 20], rule)
    mirror = Mirror(str(tmp_path / "mirror"), Storage())
    mirror.bring_up_to_date(run, rule)
    assert sorted(mirror.manifests("checkpoints")) == [10, 20]
    shutil.rmtree(run / "checkpoints" / "step_00000010")  # as a run that came back from it, with the newest alone
    make_steps(run, [30, 40, 50], rule)
    assert [checkpoint.step_of(each) for each in checkpoint.complete(run / "checkpoints")] == [50, 20]
    again = Mirror(str(tmp_path / "mirror"), Storage())
    again.bring_up_to_date(run, rule)
    assert sorted(again.manifests("checkpoints")) == [10, 50]


def test_what_is_there_already_is_not_copied_again(tmp_path: Path) -> None:
    """In the same start, and in the next one. Mutations: forget; go by names alone."""
    run = begun(tmp_path / "run")
    make_steps(run, [10, 20])
    first, second = Counting(), Counting()
    mirror = Mirror(str(tmp_path / "mirror"), first)
    mirror.bring_up_to_date(run, TWO)
    count = len(first.changes)
    mirror.bring_up_to_date(run, TWO)
    assert len(first.changes) == count
    Mirror(str(tmp_path / "mirror"), second).bring_up_to_date(run, TWO)
    assert not [each for each in second.changes if "checkpoints" in each or "best" in each]
    make_steps(run, [20])  # made again, with other bytes
    checkpoint.save(run / "checkpoints", 20, {"model": state(21)}, {"step": 20, "evaluated_step": 20}, TWO)
    mirror.bring_up_to_date(run, TWO)
    mirror.bring_back(tmp_path / "back")
    (newest, *_) = checkpoint.complete(tmp_path / "back" / "checkpoints")
    assert torch.equal(checkpoint.load_tensors(newest, "model")["weight"], state(21)["weight"])


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(tmp_path: Path, harm: str) -> None:
    """Mutations: trust what comes; take the one before without a word."""
    run = begun(tmp_path / "run")
    make_steps(run, [10, 20])
    place = tmp_path / "mirror"
    Mirror(str(place), Storage()).bring_up_to_date(run, TWO)
    file = place / "checkpoints" / "step_00000020" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if harm == "flip" else data[:-1])
    if harm == "gone":
        file.unlink()
    (note,) = Mirror(str(place), Storage()).bring_back(tmp_path / "back")
    assert note.startswith(f"{place}/checkpoints/step_00000020 is not complete (model.safetensors ")
    assert note.endswith("passed over")
    assert [each.name for each in checkpoint.complete(tmp_path / "back" / "checkpoints")] == ["step_00000010"]


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """Mutation: join its names to the folder."""
    run = begun(tmp_path / "run")
    make_steps(run, [10])
    place = tmp_path / "mirror"
    Mirror(str(place), Storage()).bring_up_to_date(run, TWO)
    manifest = place / "checkpoints" / "step_00000010" / MANIFEST
    manifest.write_text(manifest.read_text().replace("model.safetensors", "../../../outside"))
    (place.parent / "outside").write_text("x")
    with pytest.raises(UserError):
        Mirror(str(place), Storage()).bring_back(tmp_path / "deep" / "back")
    assert not list((tmp_path / "deep").rglob("outside"))


class Away(Storage):
    """Cannot be reached, until it `returns`."""

    def __init__(self) -> None:
        super().__init__({}, RetryConfig(timeout=0.05, deadline=0.1))
        self.returns = list[bool]()  # of every copy of this

    def write(self, location: str, content: bytes | Path) -> None:
        if not self.returns:
            raise Outage(f"{location}: no route to host")
        super().write(location, content)

    def read(self, location: str, start: int = 0, length: int | None = None) -> bytes:
        if not self.returns:
            raise Outage(f"{location}: no route to host")
        return super().read(location, start, length)


def test_a_mirror_that_stays_away_costs_a_line_and_is_copied_when_it_returns(tmp_path: Path) -> None:
    """Mutations: raise; a line per pass; give up after the first."""
    run, storage = begun(tmp_path / "run"), Away()
    make_steps(run, [10])
    uploader, said = Uploader(Mirror(str(tmp_path / "mirror"), storage), run), list[str]()
    uploader.claim(said.append)
    assert said[0].startswith("warning: run.mirror: ") and "going on from" in said[0]
    uploader.begin(lineage.read(run))
    for _ in range(2):
        uploader.request(TWO)
        done = uploader._wanted
        with uploader._changed:
            assert uploader._changed.wait_for(lambda done=done: uploader._done >= done, 30)  # type: ignore[misc]
    assert [line for line in uploader.tell() if "tried again after the next checkpoint" in line]
    assert not uploader.tell()
    assert uploader.failed >= 2
    storage.returns.append(True)
    assert uploader.finish(30) is None
    assert uploader.tell() == [f"run.mirror: {tmp_path}/mirror is up to date again"]
    assert sorted(uploader.mirror.manifests("checkpoints")) == [10]


def test_a_mirror_that_cannot_be_read_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    """There may be a run. Mutation: begin at step 0, and overwrite it later."""
    with pytest.raises(UserError) as caught:
        Uploader(Mirror(str(tmp_path / "mirror"), Away()), tmp_path / "run").claim(print)
    assert message(caught).startswith("run.mirror: cannot be read, and no checkpoint is here to go on from: ")


def test_copies_that_have_parted_are_both_named_and_left_as_they_are(tmp_path: Path) -> None:
    """Mutation: the larger step wins."""
    ours, theirs = begun(tmp_path / "ours"), begun(tmp_path / "theirs")
    lineage.write(theirs, [lineage.Begin("b", 0)])
    make_steps(ours, [10, 20])
    make_steps(theirs, [10, 30])
    place = tmp_path / "mirror"
    Mirror(str(place), Storage()).bring_up_to_date(theirs, TWO)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        Uploader(Mirror(str(place), Storage()), ours).claim(print)
    assert f"{ours} (at step 20) and {place} (at step 30) have parted" in message(caught)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_second_live_trainer_is_refused_at_the_mirror_too(tmp_path: Path) -> None:
    """One that goes on writing there, from another host; one that has died is waited for.

    Mutations: no owner; the first owner for ever.
    """
    place = tmp_path / "mirror"
    storage, ends = Storage(), threading.Event()

    def beat() -> None:
        while not ends.is_set():
            owner = {"host": "elsewhere", "processes": "another", "pid": 7, "token": "x", "heartbeat": time.time()}
            storage.write(f"{place}/owner.json", json.dumps(owner).encode())
            ends.wait(0.3)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        while not (place / "owner.json").exists():
            time.sleep(0.01)
        with pytest.raises(UserError) as caught:
            Uploader(Mirror(str(place), storage), tmp_path / "run").claim(print)
        assert "process 7 on elsewhere is training there" in message(caught)
    finally:
        ends.set()
        thread.join()
    old = {"host": "elsewhere", "processes": "another", "pid": 7, "token": "x", "heartbeat": time.time() - 59}
    storage.write(f"{place}/owner.json", json.dumps(old).encode())
    said = list[str]()
    Uploader(Mirror(str(place), storage), tmp_path / "run").claim(said.append)
    assert "process 7 on elsewhere was training there; it may live: waiting up to 1 s" in said[0]


class Falling(Storage):
    """Can be read until a checkpoint is asked for; from then on not, until it `returns`."""

    def __init__(self) -> None:
        super().__init__({}, RetryConfig(timeout=0.05, deadline=0.1))
        self.returns = list[bool]()

    def open(self, location: str) -> BinaryIO:
        if not self.returns:
            raise Outage(f"{location}: connection lost")
        return super().open(location)


def test_a_mirror_that_is_ahead_and_lost_on_the_way_back_is_never_overwritten(tmp_path: Path) -> None:
    """The run goes on from what is here, and says so; the mirror keeps what only it has. Mutation: whoever owns the
    mirror may write there."""
    run, place = begun(tmp_path / "run"), tmp_path / "mirror"
    make_steps(run, [10])
    ahead = Path(shutil.copytree(run, tmp_path / "ahead"))
    lineage.write(ahead, [lineage.Begin("a", 0), lineage.Begin("b", 10)])
    make_steps(ahead, [20, 30])
    Mirror(str(place), Storage()).bring_up_to_date(ahead, TWO)
    storage, said = Falling(), list[str]()
    uploader = Uploader(Mirror(str(place), storage), run)
    uploader.claim(said.append)
    assert said[-1].startswith("warning: run.mirror: ") and "going on from" in said[-1]
    storage.returns.append(True)
    before = contents(place)
    uploader.begin([*lineage.read(run), lineage.Begin("c", 10)])
    missing = uploader.finish(30)
    assert missing is not None and "has parted from" in missing
    assert contents(place) == before


def test_a_step_that_is_made_again_is_copied_as_a_new_checkpoint(tmp_path: Path) -> None:
    """After a roll-back, say. Cut off anywhere, it is the new one, or none, and the one before stands; never a mixture.

    Mutation: overwrite its files under the manifest of the former.
    """
    run = begun(tmp_path / "run")
    make_steps(run, [10, 20])
    Mirror(str(tmp_path / "before"), Storage()).bring_up_to_date(run, TWO)
    checkpoint.save(run / "checkpoints", 20, {"model": state(21), "optim": state(22)}, {"step": 20}, TWO)
    end_at = 0
    while True:
        end_at += 1
        place, back = (tmp_path / f"{kind}-{end_at}" for kind in ("cut", "back"))
        shutil.copytree(tmp_path / "before", place)
        try:
            Mirror(str(place), Counting(end_at)).bring_up_to_date(run, TWO)
        except Cut:
            assert Mirror(str(place), Storage()).bring_back(back) == []
            assert checkpoint.complete(back / "checkpoints")
        else:
            break
    assert end_at > 4
