"""`shards pack` goes on after a kill and never overwrites."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import message, png
from pack_sources import contents, fill, folder_contents, packed, refused
from running import PATIENCE, ROOT

from dist_trainer.commands.main import dispatch
from dist_trainer.data.index import FILE_NAME, ShardIndex
from dist_trainer.errors import UserError
from dist_trainer.packing.pack import pack, partial_folder
from dist_trainer.packing.sources import FolderSource
from dist_trainer.packing.splits import find_splits
from dist_trainer.packing.write import Recipe

# Going on, and never overwriting


def test_pack_refuses_to_overwrite(tmp_path: Path) -> None:
    """Also what the very same command has made. Fails when an existing folder is replaced, or added to."""
    fill(tmp_path / "raw", {"ant": 3})
    packed(tmp_path / "raw", tmp_path / "out")
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out" / "train").iterdir()}
    for options in ([], ["--seed=1"]):
        assert refused(tmp_path / "raw", tmp_path / "out", *options).startswith(f"{tmp_path / 'out' / 'train'}: exists")
    with pytest.raises(UserError, match="exists"):
        next(pack(FolderSource(tmp_path / "raw"), tmp_path / "out" / "train", Recipe(), num_processes=1))
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out" / "train").iterdir()} == before


def test_a_command_that_was_killed_between_its_splits_goes_on_with_the_second(tmp_path: Path) -> None:
    """Training, finished by the same command, is left alone; one made in another way is refused before anything runs.

    Fails when the first split has to be removed before the second can be packed.
    """
    for split in ("train", "val"):
        fill(tmp_path / "raw" / split, {"ant": 3})
    splits = find_splits(str(tmp_path / "raw"))
    list(pack(splits["train"], tmp_path / "out" / "train", Recipe(), num_processes=1))
    before = (tmp_path / "out" / "train" / "000000.tar").stat()
    assert "exists" in refused(tmp_path / "raw", tmp_path / "out", "--seed=1")
    assert not (tmp_path / "out" / "val").exists()
    packed(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "train" / "000000.tar").stat() == before
    assert contents(tmp_path / "out" / "val") == folder_contents(tmp_path / "raw" / "val")


def test_a_killed_pack_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in the middle, workers included; then the same command: finished tars keep their inode and time.

    The result is an undisturbed run's, byte for byte. Fails when tars are written anew, or a half-written one is taken
    for whole.
    """
    raw = fill(tmp_path / "raw", {"ant": 2000, "bee": 2000})
    packed(raw, tmp_path / "undisturbed", "--samples_per_shard=70")
    argv = ["shards", "pack", str(raw), str(tmp_path / "out"), "--samples_per_shard=70"]
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the child may start two workers
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_trainer", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    partial = partial_folder(tmp_path / "out" / "train")
    try:
        deadline = time.monotonic() + PATIENCE * 120
        while len(list(partial.glob("*.tar"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)  # between two looks; the deadline decides
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while _alive(process.pid):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    finished = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in partial.glob("*.tar")}
    assert not (tmp_path / "out" / "train").exists()
    assert dispatch(argv) == 0
    assert f"continues, {len(finished)} tar" in capsys.readouterr().out
    for path in (tmp_path / "undisturbed" / "train").iterdir():
        other = tmp_path / "out" / "train" / path.name
        if path.name in finished:
            assert (other.stat().st_ino, other.stat().st_mtime_ns) == finished[path.name]
        if path.name != FILE_NAME:  # it has the tars' times of change
            assert other.read_bytes() == path.read_bytes()
    indices = [ShardIndex.load(tmp_path / name / "train" / FILE_NAME) for name in ("out", "undisturbed")]
    assert indices[0].fingerprint == indices[1].fingerprint


def _alive(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def test_another_recipe_starts_over_and_says_so(tmp_path: Path) -> None:
    """Also a source that gained a file. Fails when tars of another seed are taken into the result."""
    raw = fill(tmp_path / "raw", {"ant": 6, "bee": 6})
    out = tmp_path / "out" / "train"
    said: list[str] = []
    for recipe in (Recipe(samples_per_shard=4, seed=1), Recipe(samples_per_shard=4)):
        run = pack(FolderSource(raw), out, recipe, num_processes=1, say=said.append)
        assert next(run) == 4
        run.close()
    assert said == [f"{partial_folder(out)}: starts over: the unfinished tars had another seed"]
    (raw / "ant" / "new.png").write_bytes(png(np.random.default_rng(0)))
    list(pack(FolderSource(raw), out, Recipe(samples_per_shard=4), num_processes=1, say=said.append))
    assert "another listing, samples" in said[1]
    assert contents(out) == folder_contents(raw)


def test_two_runs_do_not_pack_into_the_same_folder(tmp_path: Path) -> None:
    """Fails when the second deletes what the first writes."""
    raw = fill(tmp_path / "raw", {"ant": 6})
    first = pack(FolderSource(raw), tmp_path / "out", Recipe(samples_per_shard=2), num_processes=1)
    next(first)
    with pytest.raises(UserError, match="another process packs into it") as caught:
        next(pack(FolderSource(raw), tmp_path / "out", Recipe(samples_per_shard=2), num_processes=1))
    message(caught)
    list(first)
    assert contents(tmp_path / "out") == folder_contents(raw)
