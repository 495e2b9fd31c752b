"""Local paths and fsspec URLs behind one small interface: listings, sizes, and bytes.

Every request is retried, except after errors that will not pass (no such file, no access). The storage packages find
credentials in the environment or in their own files; nothing here reads them.
"""

import contextlib
import copy
import io
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.asyn import sync

from dist_trainer.errors import UserError, nearest
from dist_trainer.storage.atomic import replacing
from dist_trainer.storage.retry import RetryConfig, ShortRead, in_background, lasting_local, lasting_remote, retrying
from dist_trainer.storage.secret import refuse_secret_url, resolved

__all__ = ["RetryConfig", "ShortRead", "Stat", "Storage", "check_protocol", "is_remote"]

T = TypeVar("T")

CHUNK = 2**23  # bytes of one request while a whole file is read
_RETRY = RetryConfig()
_STAMPS = ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "last_modified", "updated", "mtime")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "http", "https": "http"}
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "hf")  # have no folders to make


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a stamp that changes with the content: an ETag or a modification time; "" if there is none."""

    size: int
    stamp: str


def is_remote(location: str) -> bool:
    """Whether `location` is a URL of some storage rather than a local path."""
    return "://" in location or location.startswith("pipe:")  # which is then refused


def check_protocol(key: str, location: str) -> None:
    """Raises UserError, naming the config key `key`, for a URL of no storage that fsspec knows."""
    protocol = location.split("://", 1)[0].rsplit("::", maxsplit=1)[-1]
    if protocol not in fsspec.available_protocols():
        hint = nearest(protocol, fsspec.available_protocols())
        raise UserError(
            f"{key}: {location}: {protocol}:// is no storage that fsspec knows, such as s3:// or gs://{hint}"
        )


class Storage:
    """Reads of local paths and URLs. Safe between threads; file systems open in the process that uses them.

    Every method raises FileNotFoundError or PermissionError at once, and Outage if the storage cannot be reached.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, retry: RetryConfig = _RETRY) -> None:
        self._options, self._retry = dict(options or {}), retry
        self.retries = 0
        """Attempts that failed and were followed by another."""
        self.bytes_read = 0
        self._reset()

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._systems: dict[str, Any] = {}

    def with_retry(self, retry: RetryConfig) -> "Storage":
        """The same places, asked for another time."""
        other = copy.copy(self)
        other._retry = retry
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_systems", "_pid")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _at(self, location: str) -> tuple[Any, str]:
        """(fsspec's file system, its path of `location`). One instance per process and bucket."""
        if location.startswith("pipe:"):
            raise UserError(
                f"{location}: shell pipes are refused; use a path or a URL that fsspec knows, such as s3://"
            )
        refuse_secret_url(location)
        if os.getpid() != self._pid:  # after a fork neither its event loop nor its sockets are ours
            self._reset()
        # Chained URLs (zip://...::s3://...) are one file system each.
        root = location if "::" in location else "/".join(location.split("/", 3)[:3])
        with self._lock:
            if root not in self._systems:
                self._systems[root] = self._connect(location)
            system = self._systems[root]
        return system, system._strip_protocol(location)

    def _connect(self, location: str) -> Any:
        protocol = location.split("://", 1)[0]
        options = resolved(self._options, "storage_options")
        if protocol in ("s3", "s3a"):  # botocore would retry by itself, uncounted and past the deadline
            ours = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}
            options["config_kwargs"] = {**ours, **options.get("config_kwargs", {})}
        try:
            system, _ = fsspec.core.url_to_fs(location, skip_instance_cache=True, **options)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            mend = f"pip install 'dist_trainer[{extra}]'" if extra else " ".join(str(error).split())
            raise UserError(f"{location}: {protocol}:// needs a package that is not installed: {mend}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{location}: {' '.join(str(error).split())}") from None
        if hasattr(system, "retries"):
            system.retries = 1  # s3fs's own, likewise
        return system

    def _ask(
        self,
        location: str,
        verb: str,
        check: Callable[[Any], T],
        *,
        more_s: float = 0.0,
        content: bytes | Path | None = None,
        **arguments: Any,
    ) -> T:
        """`verb` of the file system, retried until `check` of its answer raises nothing. `more_s`: seconds that it may
        take beyond those of the config, for each attempt and in all."""

        def attempt(timeout: float) -> T:
            system, path = self._at(location)
            placed: tuple[Any, ...] = (path,) if content is None else (path, content)
            if isinstance(content, Path):
                placed = (str(content), path)
            if verb != "cat_file":
                system.invalidate_cache()  # a cached listing may be outdated
            try:
                if system.async_impl:  # cancelled when it takes too long, so its connection is free again
                    answer = sync(system.loop, getattr(system, f"_{verb}"), *placed, timeout=timeout, **arguments)
                else:
                    answer = in_background(partial(getattr(system, verb), *placed, **arguments)).result(timeout)
            except TimeoutError as error:
                raise error if str(error) else TimeoutError(f"no answer in {timeout:.3g} s") from None
            return check(answer)

        config = replace(self._retry, timeout=self._retry.timeout + more_s, deadline=self._retry.deadline + more_s)
        return retrying(location, attempt, config, lasting_remote(location), self._retried)

    def _local(self, location: str, work: Callable[[], T]) -> T:
        """Retry local paths too: NFS and Lustre lose their servers. If the kernel hangs, no thread helps."""
        return retrying(location, lambda timeout: work(), self._retry, lasting_local, self._retried)

    def _retried(self) -> None:
        with self._lock:
            self.retries += 1

    def stat(self, location: str) -> Stat:
        """Size and stamp. Raises FileNotFoundError if there is nothing."""
        if not is_remote(location):
            local = self._local(location, Path(location).stat)
            return Stat(local.st_size, str(local.st_mtime_ns))
        info = self._ask(location, "info", lambda info: info)
        if info.get("size") is None:
            raise UserError(f"{location}: the server does not say how many bytes it has")
        stamp = next((info[name] for name in _STAMPS if info.get(name)), "")
        return Stat(int(info["size"]), str(stamp).strip('"'))

    def list(self, folder: str) -> list[str]:
        """Sorted names (not paths) of the entries of `folder`."""
        if not is_remote(folder):
            return self._local(folder, lambda: sorted(entry.name for entry in Path(folder).iterdir()))
        paths = [path.rstrip("/") for path in self._ask(folder, "ls", lambda paths: paths, detail=False)]
        here = self._at(folder)[1].rstrip("/")  # S3 may hold a marker of the folder itself, and then lists it
        return sorted({path.rpartition("/")[2] for path in paths if path != here})

    def read(self, location: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of a file, or to its end.

        Raises ShortRead if a local file ends before, UserError if a server does not support ranges.
        """

        def whole(data: bytes) -> bytes:
            if length is not None and len(data) < length:
                raise ShortRead(f"{len(data):,} bytes came where {length:,} were asked for")
            if length is not None and len(data) > length:
                raise UserError(f"{location}: the server ignores ranges: {len(data):,} bytes came for {length:,}")
            return data

        def local() -> bytes:
            with Path(location).open("rb") as file:
                file.seek(start)
                return whole(file.read(-1 if length is None else length))

        if length == 0:
            return b""
        if not is_remote(location):
            data = self._local(location, local)
        else:
            whole_file = start == 0 and length is None
            bounds: dict[str, Any] = (
                {} if whole_file else {"start": start, "end": None if length is None else start + length}
            )
            data = self._ask(location, "cat_file", whole, **bounds)
        with self._lock:
            self.bytes_read += len(data)
        return data

    def write(self, location: str, content: bytes | Path) -> None:
        """Put a small text, or the file at a path, there. A reader sees the former content or the whole new one, but
        on file systems behind a URL (sftp://). A second is added to the times of the config for each megabyte."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if not is_remote(location):
            self._local(location, lambda: _write_local(Path(location), content))
            return
        system, path = self._at(location)
        if location.split("://", 1)[0] not in _OBJECT_STORES:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
        verb = "put_file" if isinstance(content, Path) else "pipe_file"
        self._ask(location, verb, lambda answer: None, more_s=size / 1e6, content=content)

    def remove(self, location: str) -> None:
        """Remove a file; it is no error if there is none."""
        with contextlib.suppress(FileNotFoundError):
            if is_remote(location):
                self._ask(location, "rm_file", lambda answer: None)
            else:
                self._local(location, Path(location).unlink)

    def open(self, location: str) -> BinaryIO:
        """A seekable file for sequential reading. At a URL: large requests, with the next one already running."""
        if not is_remote(location):
            return self._local(location, lambda: Path(location).open("rb"))
        return cast(BinaryIO, io.BufferedReader(_Stream(self, location, self.stat(location).size), 2**16))


def _write_local(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as temporary:
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            temporary.write_bytes(content)


class _Stream(io.RawIOBase):
    """A file at a URL, with two chunks in memory."""

    def __init__(self, storage: Storage, location: str, size: int) -> None:
        self._storage, self._location, self._size = storage, location, size
        self._position = 0
        self._chunks: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        number, skip = divmod(self._position, CHUNK)
        wanted = [n for n in (number, number + 1) if n * CHUNK < self._size]
        self._chunks = {n: self._chunks.get(n) or self._fetch(n) for n in wanted}
        data = memoryview(self._chunks[number].result())[skip : skip + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, number: int) -> "Future[bytes]":
        start = number * CHUNK
        length = min(CHUNK, self._size - start)
        return in_background(lambda: self._storage.read(self._location, start, length))
