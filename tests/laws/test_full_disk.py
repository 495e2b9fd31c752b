"""A disk that is full, or refuses: earlier checkpoints stay whole, training goes on, and what failed is told."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_jobs import ARGV, work_folder
from running import PATIENCE, Session, torchrun

from dist_trainer.log.metrics_file import MetricsFile, read_rows
from dist_trainer.run_folder import checkpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own. Mounting needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Write a file that leaves so many bytes free."""
    free = os.statvfs(disk)
    file = disk / "other people's"
    file.write_bytes(b"\0" * (free.f_bavail * free.f_bsize - leave))
    return file


def start(here: Path, disk: Path, *more: str) -> Session:
    argv = ["-m", "dist_trainer", "train", "small.yaml", *ARGV, "--run.name=run", f"--run.dir={disk}", *more]
    return Session(torchrun(2, *argv), here / "log", folder=here)


def test_a_full_disk_costs_lines_and_room_made_later_mends_everything(tmp_path: Path, small_disk: Path) -> None:
    """Checkpoints fail for a while, as metrics do; then there is room again. The record has every step, and the run
    ends as usual. Mutations: raise in the writer; lose lines of metrics; leave half a checkpoint on the full disk.
    """
    here = work_folder(tmp_path)
    session = start(here, small_disk, "--duration=80step", "--checkpoint.every=4step", "--checkpoint.max_failed=100")
    run = small_disk / "run"
    session_log = session.log
    with contextlib.ExitStack() as stack:
        stack.callback(session.kill)
        until(session, lambda: checkpoint.complete(run / "checkpoints"))
        other = fill(small_disk)
        until(session, lambda: "of 100 in a row" in session_log.read_text())
        assert checkpoint.complete(run / "checkpoints")
        other.unlink()
        assert session.wait() == 0
    said = session_log.read_text()
    told = r"No space left on device; .* whole; [\d.]+ [kM]B are needed there, and 0 kB are free \(1 of 100 in a row\)"
    assert re.search(told, said), said
    assert (run / "STATE").read_text() == "done\n"
    assert checkpoint.newest(run / "checkpoints")[0] == run / "checkpoints" / "step_00000080"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row] == list(range(2, 81, 2))


def until(session: Session, condition: Callable[[], object]) -> None:
    """Wait for it while the session lives."""
    deadline = time.monotonic() + PATIENCE * 120
    while not condition():
        assert session.process.poll() is None and time.monotonic() < deadline, session.log.read_text()
        time.sleep(0.01)  # between two looks; the deadline decides


@pytest.mark.slow
def test_a_disk_that_turns_read_only_for_a_while_is_mended_too(tmp_path: Path, small_disk: Path) -> None:
    """As a network file system that loses its server. Mutation: take only a full disk for a refusal."""
    here = work_folder(tmp_path)
    session = start(here, small_disk, "--duration=80step", "--checkpoint.every=4step", "--checkpoint.max_failed=100")
    run = small_disk / "run"
    with contextlib.ExitStack() as stack:
        stack.callback(session.kill)
        until(session, lambda: checkpoint.complete(run / "checkpoints"))
        # Refused while a file is open for writing.
        until(session, lambda: not subprocess.call(["mount", "-o", "remount,ro", str(small_disk)]))
        until(session, lambda: "Read-only file system" in session.log.read_text())
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        assert session.wait() == 0, session.log.read_text()[-3000:]
    assert (run / "STATE").read_text() == "done\n"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row] == list(range(2, 81, 2))


def test_too_many_failures_in_a_row_stop_every_rank_with_state_failed(tmp_path: Path) -> None:
    """No file may have more than 4 KiB, as on a disk that is full: the weights need 8. Mutations: go on for ever; stop
    rank 0 alone; a traceback.
    """
    here = work_folder(tmp_path)
    argv = ["-m", "dist_trainer", "train", "small.yaml", *ARGV, "--run.name=run", "--duration=4000step"]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *torchrun(2, *argv, "--checkpoint.every=2step")]
    session = Session([*limited, "--log.every=100step"], here / "log", folder=here)
    assert session.wait(120) == 1  # torchrun's; the rank's is 2
    said = session.log.read_text()
    assert [int(n) for n in re.findall(r"\((\d) of 3 in a row\)", said)] == [1, 2, 3], said
    run = here / "runs" / "run"
    assert (run / "STATE").read_text() == "failed\n"
    lines = [line for line in said.splitlines() if line.startswith("dist-trainer: ")]
    assert len(lines) == 1 and "File too large" in lines[0] and "then start again" in lines[0], said
    assert 'Traceback (most recent call last):\n  File "/' not in said.partition("torch.distributed.elastic")[0]


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_a_step_and_the_estimate_is_what_is_written(
    tmp_path: Path, small_disk: Path
) -> None:
    """Momentum, moving average and re-estimated statistics are in it. Mutations: forget one; ask at the first save."""
    here = work_folder(tmp_path)
    session = start(here, small_disk, "--duration=4step")
    assert session.wait() == 0
    (folder,) = checkpoint.complete(small_disk / "run" / "checkpoints")
    tensors = [checkpoint.load_tensors(folder, name) for name in checkpoint.tensor_names(folder)]
    written = sum(value.nbytes for state in tensors for value in state.values())
    argv = ["plan", "small.yaml", *ARGV, "--json"]
    planned = subprocess.run(
        [sys.executable, "-m", "dist_trainer", *argv], cwd=here, check=True, capture_output=True, text=True
    )
    assert json.loads(planned.stdout)["checkpoint_bytes"] == written
    used = sum(each.stat().st_size for each in small_disk.rglob("*.safetensors"))
    assert used < json.loads(planned.stdout)["disk_bytes"]
    fill(small_disk, leave=16384)  # less than a checkpoint
    assert start(here, small_disk, "--duration=4step").wait() == 0, "a run that is complete needs no room"
    session = start(here, small_disk, "--duration=4step", "--run.seed=1", "--run.name=other")
    assert session.wait() == 1
    (line,) = [line for line in session.log.read_text().splitlines() if line.startswith("dist-trainer: run.dir")]
    assert "are free in" in line and "make room" in line
    assert not (small_disk / "other").exists()


def test_a_record_that_cannot_be_written_is_kept_and_written_later(tmp_path: Path) -> None:
    """Its folder is gone for a while, as behind a lost mount; and a disk took half a line.

    Mutations: lose what was refused; tell it at each line; leave the half line.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl", 0)
    assert file.write(1, {"train/loss": 1.0}) is None
    folder.rename(tmp_path / "away")
    refused = file.write(2, {"train/loss": 2.0})
    assert refused is not None and refused.startswith(f"cannot write {folder}/metrics.jsonl: No such file")
    assert file.write(3, {"train/loss": 3.0}) is None  # told already
    (tmp_path / "away").rename(folder)
    with (folder / "metrics.jsonl").open("a") as half:
        half.write('{"step": 2, "tra')
    assert file.write(4, {"train/loss": 4.0}) is None
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]
