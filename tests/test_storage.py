"""Storage: the same bytes from everywhere, whatever fails in between; and an end when it does not stop failing."""

import io
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty_fs
import fsspec
import numpy as np
import pytest
from faulty_fs import FAULTS, FOR_EVER, http_server, lines
from helpers import message
from s3_server import CREDENTIALS, S3Server, s3_server

from dist_trainer.data import retry, storage
from dist_trainer.data.storage import RetryConfig, Storage, refuse_secrets
from dist_trainer.errors import Outage, UserError

QUICK = RetryConfig(timeout=0.3, deadline=60)
"""Attempts that stall end soon; there is time for all that fail."""
GIVES_UP = RetryConfig(timeout=0.2, deadline=0.8)
HANG = 60  # seconds: a guard against hanging, no measure of speed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three files; `a.bin` has 5,000 random bytes."""
    path = tmp_path / "folder"
    path.mkdir()
    for name in ("a.bin", "b.bin", "c.tar"):
        (path / name).write_bytes(np.random.default_rng(ord(name[0])).bytes(5000))
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.05)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return message(caught)


# The same bytes


def test_every_kind_of_place_gives_the_same(folder: Path, s3: S3Server) -> None:
    """Size, names and bytes of a path, file://, memory://, http:// and s3:// equal those of the files on disk.

    Fails when a range is off by one, or a folder lists itself.
    """
    s3.upload("places", *folder.iterdir(), under="folder/")
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/folder/{file.name}", file.read_bytes())
    truth = (folder / "a.bin").read_bytes()
    with http_server(folder) as web:
        places: list[tuple[str, dict[str, Any]]] = [
            (str(folder), {}), (f"file://{folder}", {}), ("memory://folder", {}), (f"faulty://{folder}", {}),
            (web.url, {}), ("s3://places/folder", s3.options),
        ]  # fmt: skip
        for place, options in places:
            store = Storage(options)
            assert store.stat(f"{place}/a.bin").size == 5000
            assert store.stat(f"{place}/a.bin").stamp or place.startswith("memory")
            assert store.read(f"{place}/a.bin") == truth
            assert store.read(f"{place}/a.bin", 4990) == truth[4990:]
            assert store.read(f"{place}/a.bin", 7, 100) == truth[7:107]
            assert store.read(f"{place}/a.bin", 7, 0) == b""
            with store.open(f"{place}/a.bin") as file:
                assert file.read() == truth
            if place != web.url:  # plain HTTP has no folders
                assert store.list(place) == ["a.bin", "b.bin", "c.tar"]


def test_a_stamp_changes_with_the_file(folder: Path, s3: S3Server) -> None:
    """Also when the storage was listed before. Fails when listings are remembered."""
    for place, options in (("s3://stamps", s3.options), (f"file://{folder}", {}), (str(folder), {})):
        s3.upload("stamps", *folder.iterdir())
        store = Storage(options)
        store.list(place)
        before = store.stat(f"{place}/a.bin")
        (folder / "a.bin").write_bytes(b"other")
        s3.upload("stamps", folder / "a.bin")
        after = store.stat(f"{place}/a.bin")
        assert after.size == 5
        assert after.stamp != before.stamp
        (folder / "a.bin").write_bytes(bytes(100))


@pytest.mark.parametrize("steps", [[100_000], [1] * 50, [999, 1001, 3, 7000], [2500] * 4])
def test_an_open_file_reads_as_one_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """From one end to the other and after seeks, in chunks of 1,000 bytes, each of which fails once.

    Fails when a chunk's place is off, or when the last chunk is asked for whole.
    """
    monkeypatch.setattr(storage, "CHUNK", 1000)
    truth = io.BytesIO((folder / "a.bin").read_bytes())
    store = Storage({"faults": ["reset", "short"] * 3}, QUICK)
    with store.open(f"faulty://{folder}/a.bin") as file:
        assert file.seekable()
        for offset in (0, 990, 4999, 5000, 100):
            assert file.seek(offset) == truth.seek(offset)
            for step in steps:
                assert file.read(step) == truth.read(step)
                assert file.tell() == truth.tell()
        assert file.seek(-10, os.SEEK_END) == truth.seek(-10, os.SEEK_END)
        assert file.read() == truth.read()


def test_reading_ahead_stays_one_chunk_ahead(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file read from one end to the other asks for each chunk once, and never for more than the next one.

    Fails when nothing is read ahead, or everything is.
    """
    monkeypatch.setattr(storage, "CHUNK", 1000)
    log = tmp_path / "log"
    with Storage({"log": str(log)}).open(f"faulty://{folder}/a.bin") as file:
        raw = file.raw  # type: ignore[attr-defined]
        for chunk in range(5):
            raw.read(1000)
            until = time.monotonic() + HANG
            while len(lines(log)) < 1 + min(chunk + 2, 5) and time.monotonic() < until:
                time.sleep(0.005)
            assert len(lines(log)) == 1 + min(chunk + 2, 5)  # the size, and the chunks
    assert len(set(lines(log))) == 6


# Faults


@pytest.mark.parametrize("transport", ["faulty", "http"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(folder: Path, tmp_path: Path, transport: str, fault: str) -> None:
    """Three faults of each kind, by an fsspec file system without asyncio and by real sockets: the bytes are right,
    and four requests were made for them. Fails when a kind is taken for lasting, or a short answer for an answer.
    """
    truth = (folder / "a.bin").read_bytes()[10:2000]
    faults = [fault] * 3
    if transport == "faulty":
        store = Storage({"faults": faults, "log": str(tmp_path / "log")}, QUICK)
        assert store.read(f"faulty://{folder}/a.bin", 10, 1990) == truth
        requests = lines(tmp_path / "log")
    else:
        with http_server(folder, *faults) as web:
            store = Storage({}, QUICK)
            assert store.read(f"{web.url}/a.bin", 10, 1990) == truth
            requests = web.log
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
    said = {"reset": "reset by peer", "short": "50 bytes came where 100", "503": "Slow Down", "stall": "no answer in 0."}
    assert said[fault] in text


def test_what_asking_again_cannot_mend_is_asked_once(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    """A missing file and a refused one, by every transport: FileNotFoundError and PermissionError after one request.

    Fails when 403 or 404 are retried: there would be more requests, for ten minutes.
    """
    patient = RetryConfig(timeout=30, deadline=599)
    log = tmp_path / "log"
    with pytest.raises(FileNotFoundError):
        Storage({"log": str(log)}, patient).read(f"faulty://{folder}/none", 0, 10)
    with pytest.raises(PermissionError):
        Storage({"log": str(log), "faults": ["403"]}, patient).read(f"faulty://{folder}/a.bin", 0, 10)
    assert len(lines(log)) == 2
    with http_server(folder, "", "403") as web:
        with pytest.raises(FileNotFoundError):
            Storage({}, patient).read(f"{web.url}/none", 0, 10)
        with pytest.raises(PermissionError):
            Storage({}, patient).read(f"{web.url}/a.bin", 0, 10)
        assert len(web.log) == 2
        with pytest.raises(FileNotFoundError):
            Storage({}, patient).stat(f"{web.url}/none")
    s3.upload("once", folder / "a.bin")
    asked = len(s3.gets)
    for missing in ("s3://once/none", "s3://no-such-bucket/a.bin"):
        with pytest.raises(FileNotFoundError):
            Storage(s3.options, patient).read(missing, 0, 10)
    assert len(s3.gets) == asked + 2
    for missing in (f"{folder}/none", "s3://once/none"):
        with pytest.raises(FileNotFoundError):
            Storage(s3.options, patient).stat(missing)
    with pytest.raises(PermissionError):
        Storage({**s3.options, "profile": "no-such-profile"}, patient).stat("s3://once/a.bin")


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
            assert timeout <= 30
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
from dist_trainer.data.storage import RetryConfig, Storage
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
        code = STALLED.format(tests=str(Path(__file__).parent), url=f"{web.url}/a.bin", path=str(folder / "a.bin"))
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
    import errno  # noqa: PLC0415

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

    Fails when results come in the order in which they are done.
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
    assert len(started) < 10_000


# What is refused


def test_pipes_and_unknown_places_are_refused() -> None:
    assert "pipes are refused" in refused(lambda: Storage().read("pipe:cat x", 0, 1))
    assert "pipes are refused" in refused(lambda: Storage().stat("pipe:curl http://a/b"))
    assert "nonsense" in refused(lambda: Storage().stat("nonsense://a/b"))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when fsspec's ImportError comes through."""
    for module in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'dist_trainer[gcs]'" in refused(lambda: Storage().stat("gs://bucket/a.tar"))
    assert "adlfs" in refused(lambda: Storage().stat("abfs://container/a.tar"))


def test_a_server_without_ranges_is_refused(folder: Path) -> None:
    """Fails when a whole file passes for its range, or is asked for again and again."""
    with http_server(folder, ignores_ranges=True) as web:
        assert "ignores ranges" in refused(lambda: Storage().read(f"{web.url}/a.bin", 0, 10))
        assert len(web.log) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKIA-x"}, {"secret": "x"}, {"token": "x"}, {"client_kwargs": {"aws_secret_access_key": "x"}},
        {"account_key": "x"}, {"sas_token": "x"}, {"connection_string": "x"}, {"password": "x"}, {"sasToken": "x"},
        {"client_kwargs": {"headers": {"Authorization": "x"}}}, {"a": {"b": {"API-KEY": "x"}}}, {"token": {"x": "x"}},
        {"list": [{"secret": "x"}]},
    ],
)  # fmt: skip
def test_secrets_in_a_config_are_refused(options: dict[str, Any]) -> None:
    """Named, at any depth, and not shown. Fails when only the first level is looked at."""
    text = refused(lambda: refuse_secrets("data.storage_options", options))
    assert text.startswith("data.storage_options.")
    assert "environment" in text
    assert "AKIA-x" not in text


def test_options_that_hold_no_secret_are_taken() -> None:
    refuse_secrets("data.storage_options", {
        "anon": True, "token": "anon", "endpoint_url": "https://s3.example.org", "profile": "lab", "token_": None,
        "client_kwargs": {"region_name": "eu-central-1", "verify": "/etc/ca.pem"}, "requester_pays": True,
    })  # fmt: skip


@pytest.mark.parametrize(
    "url",
    ["https://user:hunter2@host/a.tar", "https://host/a.tar?X-Amz-Signature=hunter2", "https://host/a?x=1&sig=hunter2"],
)
def test_secrets_in_a_url_are_refused(url: str) -> None:
    """A URL stands in configs, indexes and messages. Fails when it is asked, or shown."""
    text = refused(lambda: Storage().read(url, 0, 1))
    assert "hunter2" not in text
    assert "host/a" in text


def test_times_that_cannot_be_kept_are_refused() -> None:
    RetryConfig().check("data.retry")
    for wrong in (RetryConfig(timeout=0), RetryConfig(deadline=600), RetryConfig(timeout=50, deadline=40)):
        assert refused(partial(wrong.check, "data.retry")).startswith("data.retry: ")

