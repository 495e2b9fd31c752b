"""run.mirror on an S3 server with faults: a run goes on anywhere, from the newest whole checkpoint, with equal bits."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cluster_jobs import ARGV, work_folder
from running import PATIENCE, Session, tensors, torchrun
from s3_server import CREDENTIALS, S3Server

from dist_trainer.run_folder import checkpoint

MIRROR = "--run.mirror=s3://bucket/runs"
RETRY = "--data.retry={timeout: 2, deadline: 20}"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server.upload("bucket")
        yield server
    server.stop()


def start(
    here: Path, server: S3Server, name: str, folder: str, *more: str, world: int = 2, mirror: str = MIRROR
) -> Session:
    argv = ["-m", "dist_trainer", "train", "small.yaml", *ARGV, f"--run.name={name}", f"--run.dir={folder}", mirror]
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": server.options["endpoint_url"]}
    argv = [*argv, "--duration=24step", "--checkpoint.every=4step", "--engine.sums=exact", RETRY, *more]
    return Session(torchrun(world, *argv), here / f"{name}-{folder}.log", folder=here, **environment)


def until(session: Session, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE * 120
    while not condition():
        assert session.process.poll() is None and time.monotonic() < deadline, session.log.read_text()
        time.sleep(0.005)  # between two looks; the deadline decides


def whole(server: S3Server, name: str) -> list[int]:
    """Steps of the checkpoints of a run that are there whole, in the order in which they came. One that is slow to go
    is passed over for a later one, so which they are is open."""
    found = (re.search(rf"/{name}/checkpoints/step_(\d+)/MANIFEST", each) for each in server.puts)
    return [int(match[1]) for match in found if match]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    here = work_folder(tmp_path_factory.mktemp("undisturbed"))
    session = start(here, server, "plain", "runs")
    assert session.wait() == 0, session.log.read_text()
    return here / "runs" / "plain"


def same(run: Path, other: Path) -> None:
    """Final weights, EMA, momentum, the average, and all scores."""
    for kind in ("model", "ema", "optim"):
        ours, theirs = tensors(run, kind), tensors(other, kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run, other))
    for key in ("final", "best", "steps"):
        assert ours[key] == theirs[key]


def test_a_run_goes_on_on_another_machine(tmp_path: Path, server: S3Server, undisturbed: Path) -> None:
    """All ranks and torchrun are killed, the local folder is gone; another folder, with another number of ranks, goes
    on. What comes after the second checkpoint does not arrive, or the run might end first.

    Mutations: begin anew; leave snapshots on the first machine.
    """
    here = work_folder(tmp_path)
    server.trouble = lambda method, path: "stall" if "/moved/" in path and len(whole(server, "moved")) > 1 else None
    try:
        session = start(here, server, "moved", "first")
        until(session, lambda: len(whole(server, "moved")) > 1)
        session.kill()
    finally:
        server.trouble = lambda method, path: None
    shutil.rmtree(here / "first")
    session = start(here, server, "moved", "second", world=1)
    assert session.wait() == 0, session.log.read_text()
    said = session.log.read_text()
    step = whole(server, "moved")[1]
    assert f"s3://bucket/runs/moved is there, at step {step}" in said and f"resuming from step_{step:08d}" in said
    same(here / "second" / "moved", undisturbed)


@pytest.mark.slow
def test_faults_of_the_storage_cost_no_step_and_no_bit(tmp_path: Path, server: S3Server, undisturbed: Path) -> None:
    """A fifth of all requests fails, in each way. Mutations: no retries of puts; an error of a put ends the run."""
    here, dice = work_folder(tmp_path), random.Random(1)

    def trouble(method: str, path: str) -> str | None:
        if "/faulty/" not in path or dice.random() > 0.2:
            return None
        return dice.choices(["503", "reset", "stall"], [6, 6, 1])[0]

    server.trouble = trouble
    try:
        session = start(here, server, "faulty", "runs")
        assert session.wait() == 0, session.log.read_text()
    finally:
        server.trouble = lambda method, path: None
    same(here / "runs" / "faulty", undisturbed)
    shutil.rmtree(here / "runs")
    session = start(here, server, "faulty", "again")
    assert session.wait() == 0, session.log.read_text()
    assert "complete" in session.log.read_text()
    same(here / "again" / "faulty", undisturbed)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_upload_never_leaves_half_a_checkpoint(
    tmp_path: Path, server: S3Server, undisturbed: Path
) -> None:
    """The server holds a put of the second checkpoint's weights; then the ranks are killed. The run goes on from the
    first on another machine. Mutation: the manifest first.
    """
    here, held = work_folder(tmp_path), list[str]()

    def trouble(method: str, path: str) -> str | None:
        if method == "PUT" and "/cut/checkpoints/" in path and "/optim" in path and whole(server, "cut"):
            held.append(path)
            return "stall"
        return None

    server.trouble = trouble
    session = start(here, server, "cut", "first", "--checkpoint.keep_last=1")
    try:
        until(session, lambda: held)
        session.kill()
    finally:
        server.trouble = lambda method, path: None
    (step,) = whole(server, "cut")
    session = start(here, server, "cut", "second")
    assert session.wait() == 0, session.log.read_text()
    assert f"resuming from step_{step:08d}" in session.log.read_text()
    same(here / "second" / "cut", undisturbed)


@pytest.mark.slow
def test_a_mirror_that_goes_away_stops_nothing_and_fills_no_disk(
    tmp_path: Path, server: S3Server, undisturbed: Path
) -> None:
    """From the second checkpoint on nothing is taken. The run ends, says what is missing, and keeps two checkpoints.

    Mutations: wait for the mirror at each save; pin each checkpoint that was not copied.
    """
    here = work_folder(tmp_path)
    server.trouble = lambda method, path: "503" if method == "PUT" and "/away/" in path else None
    try:
        session = start(here, server, "away", "runs", "--data.retry={timeout: 1, deadline: 1}")
        assert session.wait() == 1  # torchrun's: it cannot claim what it cannot write, and has no run here
        assert "run.mirror: cannot be read" in session.log.read_text()
        server.trouble = lambda method, path: None
        session = start(here, server, "away", "runs", "--data.retry={timeout: 1, deadline: 1}")
        until(session, lambda: whole(server, "away"))
        server.trouble = lambda method, path: "503" if method == "PUT" and "/away/" in path else None
        assert session.wait() == 0, session.log.read_text()
    finally:
        server.trouble = lambda method, path: None
    said = session.log.read_text()
    assert said.count("tried again after the next checkpoint") == 1, said
    assert "s3://bucket/runs/away is not complete" in said and "start the run again to copy the rest" in said
    same(here / "runs" / "away", undisturbed)
    assert len(checkpoint.complete(here / "runs" / "away" / "checkpoints")) <= 3
    session = start(here, server, "away", "runs")
    assert session.wait() == 0
    shutil.rmtree(here / "runs")
    session = start(here, server, "away", "later")
    assert session.wait() == 0
    same(here / "later" / "away", undisturbed)


@pytest.mark.slow
def test_copies_that_have_parted_are_refused_in_a_line(tmp_path: Path, server: S3Server) -> None:
    """A copy of the folder went on without the mirror. Mutation: the newest wins."""
    here = work_folder(tmp_path)
    session = start(here, server, "parted", "first")
    until(session, lambda: whole(server, "parted"))
    os.kill(session.process.pid, signal.SIGTERM)
    session.wait()
    shutil.copytree(here / "first", here / "second")
    sessions = (
        start(here, server, "parted", "first"),
        start(here, server, "parted", "second", mirror="--log.every=2step"),
    )
    assert [session.wait() for session in sessions] == [0, 0]
    before = {path: path.read_bytes() for path in (here / "second").rglob("*") if path.is_file()}
    puts = len(server.puts)
    session = start(here, server, "parted", "second")
    assert session.wait() == 1
    said = session.log.read_text()
    assert "second/parted (at step 24) and s3://bucket/runs/parted (at step 24) have parted" in said
    assert {path: path.read_bytes() for path in before} == before
    assert {each.rpartition("/")[2] for each in server.puts[puts:]} <= {"owner.json"}


@pytest.mark.slow
def test_a_folder_at_a_url_is_a_scratch_folder_with_that_mirror(tmp_path: Path, server: S3Server) -> None:
    """`run.dir: s3://...`. Mutation: a folder called s3: here."""
    here = work_folder(tmp_path)
    argv = ["-m", "dist_trainer", "train", "small.yaml", *ARGV, "--run.name=only", "--run.dir=s3://bucket/urls"]
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": server.options["endpoint_url"], "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    session = Session(torchrun(2, *argv, "--duration=4step"), here / "log", folder=here, **environment)
    assert session.wait() == 0, session.log.read_text()
    assert not list(here.glob("s3*"))
    assert any("/bucket/urls/only/checkpoints/step_00000004/MANIFEST.json" in each for each in server.puts)
    (scratch,) = (tmp_path / "tmp").glob("dist_trainer-*/s3-bucket-urls/only")
    assert (scratch / "STATE").read_text() == "done\n"
