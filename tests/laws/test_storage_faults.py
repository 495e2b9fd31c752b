"""Storage that fails: what passes is waited for, what stays is said at once, and everything ends."""

import errno
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty_fs
import numpy as np
import pytest
from cache_jobs import HANG
from faulty_fs import FAULTS, FOR_EVER, http_server, lines
from helpers import message
from running import SUPPORT
from s3_server import S3Server

from dist_trainer.errors import Outage
from dist_trainer.storage import retry, storage
from dist_trainer.storage.storage import RetryConfig, Storage

QUICK = RetryConfig(timeout=0.3, deadline=60)
"""Attempts that stall end soon; there is time for all that fail."""
PATIENT = RetryConfig(timeout=30, deadline=60)
"""No attempt ends before its answer, on a busy machine either, so attempts can be counted."""
GIVES_UP = RetryConfig(timeout=0.4, deadline=1.0)
pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.mark.parametrize("transport", ["faulty", "http"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(folder: Path, tmp_path: Path, transport: str, fault: str) -> None:
    """Three faults of each kind, by an fsspec file system without asyncio and by real sockets: the bytes are right,
    and four requests were made for them. Fails when a kind is taken for lasting, or a short answer for an answer.
    """
    truth = (folder / "a.bin").read_bytes()[10:2000]
    faults, config = [fault] * 3, QUICK if fault == "stall" else PATIENT
    if transport == "faulty":
        store = Storage({"faults": faults, "log": str(tmp_path / "log")}, config)
        assert store.read(f"faulty://{folder}/a.bin", 10, 1990) == truth
        requests = lines(tmp_path / "log")
    else:
        with http_server(folder, *faults) as web:
            store = Storage({}, config)
            assert store.read(f"{web.url}/a.bin", 10, 1990) == truth
            requests = web.log
    if fault == "stall":  # on a busy machine a good answer may take too long as well
        assert len(requests) >= 4
        assert store.retries >= 3
    else:
        assert len(requests) == 4
        # aiohttp itself asks once more after a cut connection, which is not counted.
        assert store.retries == 3 or (transport == "http" and fault == "reset" and store.retries > 0)


def test_facts_are_retried_as_bytes_are(folder: Path) -> None:
    """Size and names, after faults; fsspec's HTTP shows a 503 as a missing file. Fails when that is believed."""
    with http_server(folder, "503", "503", "reset", "reset") as web:
        assert Storage({}, QUICK).stat(f"{web.url}/a.bin").size == 5000
    store = Storage({"faults": ["503", "reset", "stall"]}, QUICK)
    assert store.stat(f"faulty://{folder}/a.bin").size == 5000
    store = Storage({"faults": ["503", "reset", "stall"]}, QUICK)
    assert len(store.list(f"faulty://{folder}")) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_what_never_ends_ends_with_an_outage(folder: Path, fault: str) -> None:
    """One line: what, how often, how long. Fails when a fault is retried for ever or masked."""
    began = time.monotonic()
    url = f"faulty://{folder}/a.bin"
    with pytest.raises(Outage) as caught:
        Storage({"faults": [fault, FOR_EVER]}, GIVES_UP).read(url, 0, 100)
    assert time.monotonic() - began < HANG
    text = message(caught)
    assert url in text
    found = re.search(r"gave up after (\d+) attempts in \d+ s", text)
    assert found
    assert int(found[1]) > 1
    said = {
        "reset": "reset by peer",
        "short": "50 bytes came where 100",
        "503": "Slow Down",
        "stall": "no answer in 0.",
    }
    assert said[fault] in text


def test_a_long_wait_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails when a process waits for minutes in silence, or says so at every attempt."""
    monkeypatch.setattr(retry, "_SAY_AFTER", 0.0)
    monkeypatch.setattr(retry, "_SAID", threading.Semaphore(1))
    Storage({"faults": ["reset"] * 5}, PATIENT).read(f"faulty://{folder}/a.bin", 0, 100)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "reset by peer; retrying for up to" in said[0]


def test_what_asking_again_cannot_mend_is_asked_once(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    """A missing file and a refused one, by every transport: FileNotFoundError and PermissionError after one request.

    Fails when 403 or 404 are retried: there would be more requests, for a minute.
    """
    log = tmp_path / "log"
    with pytest.raises(FileNotFoundError):
        Storage({"log": str(log)}, PATIENT).read(f"faulty://{folder}/none", 0, 10)
    with pytest.raises(PermissionError):
        Storage({"log": str(log), "faults": ["403"]}, PATIENT).read(f"faulty://{folder}/a.bin", 0, 10)
    assert len(lines(log)) == 2
    with http_server(folder, "", "403") as web:
        with pytest.raises(FileNotFoundError):
            Storage({}, PATIENT).read(f"{web.url}/none", 0, 10)
        with pytest.raises(PermissionError):
            Storage({}, PATIENT).read(f"{web.url}/a.bin", 0, 10)
        assert len(web.log) == 2
        with pytest.raises(FileNotFoundError):
            Storage({}, PATIENT).stat(f"{web.url}/none")
    s3.upload("once", folder / "a.bin")
    asked = len(s3.gets)
    for missing in ("s3://once/none", "s3://no-such-bucket/a.bin"):
        with pytest.raises(FileNotFoundError):
            Storage(s3.options, PATIENT).read(missing, 0, 10)
    assert len(s3.gets) == asked + 2
    for missing in (f"{folder}/none", "s3://once/none"):
        with pytest.raises(FileNotFoundError):
            Storage(s3.options, PATIENT).stat(missing)
    with pytest.raises(PermissionError):
        Storage({**s3.options, "profile": "no-such-profile"}, PATIENT).stat("s3://once/a.bin")


def test_s3_is_asked_again_by_us_alone(folder: Path, s3: S3Server) -> None:
    """Three times 503 are three counted retries and four requests. Fails when s3fs or botocore retry beneath."""
    s3.upload("slow", folder / "a.bin")
    s3.faults = 3
    store = Storage(s3.options, PATIENT)
    assert store.read("s3://slow/a.bin", 10, 100) == (folder / "a.bin").read_bytes()[10:110]
    assert store.retries == 3
    assert len(s3.gets) == 4


def test_pauses_grow_and_are_drawn_and_the_deadline_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's: pause n is uniform in [0, min(longest, first * 2**n)], and the sum stays in bounds.

    Fails without jitter (the means), without growth (the limits), or when a pause may end after the deadline.
    """
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.2)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 20.0)
    pauses: list[list[float]] = []
    for _ in range(400):
        clock = SimpleNamespace(now=0.0, slept=[])
        fake = SimpleNamespace(
            monotonic=partial(getattr, clock, "now"),
            sleep=lambda s, clock=clock: (clock.slept.append(s), setattr(clock, "now", clock.now + s)),
        )
        monkeypatch.setattr(retry, "time", fake)

        def attempt(timeout: float, clock: Any = clock) -> None:
            assert 0 < timeout <= 30
            assert clock.now + timeout <= 300
            clock.now += min(1.0, timeout)
            raise ConnectionResetError("again")

        with pytest.raises(Outage):
            retry.retrying("x", attempt, RetryConfig(), lambda error: None, lambda: None)
        assert clock.now <= 300
        pauses.append(clock.slept)
    for number in range(10):
        limit = min(20.0, 0.2 * 2**number)
        drawn = [each[number] for each in pauses]
        assert max(drawn) <= limit
        # The mean of 400 uniform draws lies within 10% of the middle but for one time in 10,000 (4 sigma: 0.058 limit).
        assert 0.4 * limit < np.mean(drawn) < 0.6 * limit
        assert min(drawn) < 0.1 * limit


STALLED = """
import sys; sys.path.insert(0, {tests!r})
import faulty_fs
from dist_trainer.storage.storage import RetryConfig, Storage
from dist_trainer.errors import Outage
for url, options in (({url!r}, {{}}), ("faulty://" + {path!r}, {{"faults": ["stall", "for ever"]}})):
    try:
        Storage(options, RetryConfig(timeout=0.1, deadline=0.5)).read(url, 0, 10)
    except Outage:
        print("outage", flush=True)
"""


def test_a_process_ends_while_its_requests_still_hang(folder: Path) -> None:
    """Fails when a thread that is stuck in a request is waited for at exit, as an executor's is."""
    with http_server(folder, "stall", FOR_EVER) as web:
        code = STALLED.format(tests=str(SUPPORT), url=f"{web.url}/a.bin", path=str(folder / "a.bin"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "outage\noutage\n", "")


def test_stalled_requests_do_not_use_up_the_connections(folder: Path) -> None:
    """More requests stall than connections are kept (aiohttp: 100), and the next one is answered.

    Fails when an attempt that took too long is left on its connection instead of being cancelled.
    """
    with http_server(folder, *["stall"] * 100) as web:
        store = Storage({}, QUICK)
        url = f"{web.url}/a.bin"
        found = retry.concurrently(lambda start: store.read(url, start, 1), range(100), 100)
    assert b"".join(found) == (folder / "a.bin").read_bytes()[:100]


def test_lost_servers_of_local_paths_are_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESTALE twice, as NFS gives it, and the bytes are right; ENOENT and EACCES are raised at once.

    Fails when local reads are not retried, or when everything is.
    """
    errors = [errno.ESTALE, errno.EIO]
    real = Path.open

    def open_(path: Path, *args: Any, **options: Any) -> Any:
        if errors:
            number = errors.pop(0)
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    store = Storage(retry=QUICK)
    assert store.read(str(folder / "a.bin"), 5, 10) == (folder / "a.bin").read_bytes()[5:15]
    assert store.retries == 2
    errors[:] = [errno.EACCES, errno.ENOENT]
    with pytest.raises(PermissionError):
        store.read(str(folder / "a.bin"), 5, 10)
    with pytest.raises(FileNotFoundError):
        store.read(str(folder / "a.bin"), 5, 10)
    with pytest.raises(storage.ShortRead, match="5 bytes came where 10"):
        store.read(str(folder / "a.bin"), 4995, 10)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_their_own_connections(folder: Path, method: str) -> None:
    """A Storage that was used is handed to a child process, which reads by it.

    Fails under fork when the parent's event loop is used: it has no thread there. Fails under spawn when a file system
    is pickled.
    """
    with http_server(folder) as web:
        store = Storage({}, RetryConfig(timeout=2, deadline=6))
        truth = store.read(f"{web.url}/a.bin", 0, 100)
        context = get_context(method)
        answer = context.Queue()
        child = context.Process(target=faulty_fs.read_in_child, args=(store, f"{web.url}/a.bin", answer))
        child.start()
        assert answer.get(timeout=HANG) == truth
        child.join(HANG)
        assert pickle.loads(pickle.dumps(store)).read(f"{web.url}/a.bin", 0, 100) == truth


def test_errors_of_one_item_stop_the_others() -> None:
    """`concurrently` keeps the order, raises the first error, and starts nothing after it.

    Fails when results come in the order in which they are done, or when only their reader stops the others.
    """
    barrier = threading.Barrier(3)
    assert retry.concurrently(lambda n: (barrier.wait(HANG), n)[1], [2, 0, 1], 3) == [2, 0, 1]
    assert retry.concurrently(str, [], 3) == []
    started = []

    def fail(number: int) -> None:
        started.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        retry.concurrently(fail, range(10_000), 2)
    assert len(started) <= 2
