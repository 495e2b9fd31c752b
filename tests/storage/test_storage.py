"""Storage: the same bytes from everywhere, files that read ahead, and what is refused."""

import io
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cache_jobs import HANG
from faulty_fs import http_server, lines
from helpers import message
from s3_server import S3Server

from dist_trainer.errors import UserError
from dist_trainer.storage import storage
from dist_trainer.storage.secret import refuse_secrets, resolved
from dist_trainer.storage.storage import RetryConfig, Storage

QUICK = RetryConfig(timeout=0.3, deadline=60)
"""Attempts that stall end soon; there is time for all that fail."""


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
    """From one end to the other and after seeks, in chunks of 900 bytes, six of which fail once.

    Fails when a chunk's place is off, or when the last chunk is asked for whole.
    """
    monkeypatch.setattr(storage, "CHUNK", 900)
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
        {"list": [{"secret": "x"}]}, {"endpoint_url": "https://me:x@host/"}, {"key": "env:A B"},
    ],
)  # fmt: skip
def test_secrets_in_a_config_are_refused(options: dict[str, Any]) -> None:
    """Named, at any depth, and not shown. Fails when only the first level is looked at."""
    text = refused(lambda: refuse_secrets("data.storage_options", options))
    assert text.startswith(("data.storage_options.", "https://host/"))
    assert "environment" in text
    assert "AKIA-x" not in text


def test_options_that_hold_no_secret_are_taken() -> None:
    refuse_secrets("data.storage_options", {
        "anon": True, "token": "anon", "endpoint_url": "https://s3.example.org", "profile": "lab", "token_": None,
        "client_kwargs": {"region_name": "eu-central-1", "verify": "/etc/ca.pem"}, "requester_pays": True,
    })  # fmt: skip


def test_a_secret_may_be_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth; it is read when the storage is opened, not before. Mutation: resolve it where it is saved."""
    options = {"key": "env:LAB_KEY", "client_kwargs": {"headers": [{"Authorization": "env:LAB_TOKEN"}]}, "anon": False}
    refuse_secrets("data.storage_options", options)
    monkeypatch.setenv("LAB_KEY", "k1")
    monkeypatch.setenv("LAB_TOKEN", "t1")
    assert resolved(options, "data.storage_options") == {
        "key": "k1",
        "client_kwargs": {"headers": [{"Authorization": "t1"}]},
        "anon": False,
    }
    monkeypatch.delenv("LAB_TOKEN")
    text = refused(lambda: resolved(options, "data.storage_options"))
    assert text == (
        "data.storage_options.client_kwargs.headers.Authorization: env:LAB_TOKEN: the environment variable LAB_TOKEN "
        "is not set"
    )


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
    for wrong in (RetryConfig(timeout=0), RetryConfig(deadline=0), RetryConfig(timeout=50, deadline=40)):
        assert refused(partial(wrong.check, "data.retry")).startswith("data.retry: ")
