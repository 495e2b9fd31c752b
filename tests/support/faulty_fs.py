"""Storage that fails on purpose: an fsspec file system over local files, and an HTTP server of a folder.

Both take the next fault for each request of bytes from a list, and serve well when it is used up; the last fault of a
list that ends in "for ever" is never used up. Both keep a log of requests.
"""

import contextlib
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from dist_trainer.storage.storage import Storage

FAULTS = ("reset", "short", "503", "stall")
FOR_EVER = "for ever"


class FaultyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """`faulty:///path`, with the storage options `faults` (a list) and `log` (a file: one line per request)."""

    protocol = "faulty"
    cachable = False

    def __init__(self, faults: tuple[str, ...] = (), log: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._faults, self._log = list(faults), log

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("faulty://")

    def _request(self, what: str) -> str:
        """Write the log, and give the fault of this request."""
        if self._log:
            with open(self._log, "a") as file:  # noqa: PTH123  # one write, so lines of several processes stay whole
                file.write(what + "\n")
        return take(self._faults)

    def _fail(self, fault: str, path: str) -> None:
        if fault == "reset":
            raise ConnectionResetError("connection reset by peer")
        if fault == "503":
            raise OSError("503 Slow Down\nplease reduce your request rate")
        if fault == "403":
            raise PermissionError("Access Denied")
        if fault == "stall":
            threading.Event().wait()
        if not Path(path).exists():
            raise FileNotFoundError(path)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._fail(self._request(f"info {path}"), path)
        found = Path(path).stat()
        kind = "directory" if Path(path).is_dir() else "file"
        return {"name": path, "size": found.st_size, "type": kind, "mtime": found.st_mtime}

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        self._fail(self._request(f"ls {path}"), path)
        names = [str(entry) for entry in Path(path).iterdir()]
        return [self.info(name) for name in names] if detail else names

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        fault = self._request(f"get {path} {start} {end}")
        self._fail(fault, path)
        data = Path(path).read_bytes()[start:end]
        return data[: len(data) // 2] if fault == "short" else data


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def take(faults: list[str]) -> str:
    """The next fault of a list, "" when there is none."""
    if not faults:
        return ""
    return faults[0] if faults[-1] == FOR_EVER and len(faults) == 2 else faults.pop(0)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.server.log.append(f"{self.command} {self.path} {wanted}".strip())
        fault = take(self.server.faults)
        path = self.server.folder / self.path.lstrip("/")
        if fault == "reset":  # no linger: the kernel sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "stall":
            self.server.released.wait()
            self.close_connection = True
            return
        if fault in ("403", "503") or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        if wanted and not self.server.ignores_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if not head:
            self.wfile.write(data[: len(data) // 2] if fault == "short" else data)
        self.close_connection = fault == "short"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, faults: tuple[str, ...], ignores_ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.ignores_ranges = folder, list(faults), ignores_ranges
        self.log: list[str] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


@contextlib.contextmanager
def http_server(folder: Path, *faults: str, ignores_ranges: bool = False) -> Iterator[_Server]:
    """The files of `folder` on a free port of loopback."""
    server = _Server(folder, faults, ignores_ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def lines(log: Path) -> list[str]:
    """The requests in the log of a FaultyFileSystem."""
    return log.read_text().splitlines() if log.exists() else []


def read_in_child(store: Storage, url: str, answer: Any) -> None:
    """To be run by another process."""
    answer.put(store.read(url, 0, 100))
