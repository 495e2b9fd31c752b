"""Blocks of remote samples on the node's own disk, shared by all ranks and loader workers of the node.

One file per block. While a block is fetched its file is called `NAME.part` and locked by flock: nobody fetches it a
second time, and the kernel releases the lock when its owner dies. Then it is renamed: a file without `.part` is
complete. The sum of all sizes is in the file `usage`, raised before a byte is written. A block that would exceed the
limit first evicts the least recently used ones, down to 19/20 of the limit, so that the folder is listed once per many
blocks. Times of use are accurate to ten seconds. The limit holds for the folder's files; each process may keep a few
evicted blocks open.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_trainer.errors import UserError
from dist_trainer.storage.flock import is_at, lock_file, remove_left

_MAX_OPEN = 4  # an evicted block keeps its disk space until every process has closed it
_MAX_MARKS = 4096
_TOUCH_EVERY = 10.0  # seconds between two marks of use of one block
_SWEEP_EVERY = 60.0  # seconds between two counts by processes that start
_PAUSE_WHEN_FULL = 30.0  # seconds without writing after the disk refused
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_UNITS["TIB"] = 2**40


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache on each node for samples from the network."""

    dir: str | None = None
    """An absolute folder on a local disk ($VARIABLES are expanded): paths on NFS or Lustre are cached there too. null:
    only URLs are cached, in a private folder in $SLURM_TMPDIR, $TMPDIR or /tmp."""
    size: str = "20GB"
    """Its limit per node, such as 500MB, 20GB or 1.5TiB."""

    def check(self, key: str) -> None:
        """Raises UserError, naming `key`, for an invalid size or a folder that is not absolute."""
        try:
            _ = self.size_bytes, self.folder
        except ValueError as error:
            raise UserError(f"{key}.{error}") from None

    @property
    def size_bytes(self) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", self.size.strip())
        if not found or found[2].upper() not in _UNITS:
            raise ValueError(f"size: {self.size!r} is not a size; write 500MB, 20GB or 1.5TiB")
        return int(float(found[1]) * _UNITS[found[2].upper()])

    @property
    def folder(self) -> Path:
        """The folder of the blocks; it may not exist yet."""
        if self.dir is None:
            base = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            return Path(base) / f"dist_trainer-{os.getuid()}"
        path = Path(os.path.expandvars(self.dir))
        if "$" in str(path):
            raise ValueError(f"dir: {self.dir!r} has a variable that is not set")
        if not path.is_absolute():
            raise ValueError(f"dir: {self.dir!r} is not an absolute path")
        return path


def own_folder(path: Path) -> Path:
    """Make `path` for this user alone. Raises UserError for one that others may write to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise UserError(f"data.cache.dir: {path}: {error.strerror or error}; name another folder") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"data.cache.dir: {path} is not a folder of this user; name another one")
    if found.st_mode & 0o077:
        raise UserError(f"data.cache.dir: {path} is open to others; name a folder inside it, or run: chmod 700 {path}")
    return path


class BlockCache:
    """At most `size` bytes of blocks in `folder`. `fetch` and `has` are safe between threads; one thread reads.

    If the disk fails it passes data through, after one warning. Raises UserError for a folder that cannot be used.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._blocks, self._usage = own_folder(folder) / "blocks", folder / "usage"
        self._open: OrderedDict[str, int] = OrderedDict()
        self._touched: dict[str, float] = {}
        self._resume, self._warned = 0.0, False
        try:
            self._blocks.mkdir(mode=0o700, exist_ok=True)
            with self._used() as used:
                if time.time() - used.swept > _SWEEP_EVERY:
                    self._sweep(used, room=0)
        except OSError as error:
            raise UserError(
                f"data.cache.dir: {folder}: {error.strerror or error}; name a local disk's folder"
            ) from None

    def takes(self, length: int) -> bool:
        """Whether a block of `length` bytes would be kept. For a while after a disk error none is."""
        return length <= self.size and time.monotonic() >= self._resume

    def has(self, name: str, length: int) -> bool:
        """Whether the block is there; marks it as used."""
        path = self._blocks / name
        with contextlib.suppress(OSError):
            if path.stat().st_size == length:
                os.utime(path)
                return True
        return False

    def read(self, name: str, length: int, start: int, count: int) -> bytes | None:
        """Bytes [start, start + count) of a block of `length` bytes; None where the block is not there."""
        try:
            descriptor = self._descriptor(name, length)
            now = time.monotonic()
            if now - self._touched.get(name, 0.0) > _TOUCH_EVERY:
                if len(self._touched) >= _MAX_MARKS:
                    self._touched.clear()
                self._touched[name] = now
                os.utime(descriptor)
            return os.pread(descriptor, count, start)
        except OSError:
            return None

    def _descriptor(self, name: str, length: int) -> int:
        descriptor = self._open.get(name)
        if descriptor is not None:
            self._open.move_to_end(name)
            return descriptor
        descriptor = os.open(f"{self._blocks}/{name}", os.O_RDONLY)
        if os.fstat(descriptor).st_size != length:
            os.close(descriptor)
            self.drop(name)
            raise OSError(errno.EIO, "a block that was cut short")
        if len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = descriptor
        return descriptor

    def drop(self, name: str) -> None:
        """Forget a block whose bytes are wrong."""
        if name in self._open:
            os.close(self._open.pop(name))
        self._remove(self._blocks / name)

    def fetch(self, name: str, length: int, source: Callable[[], bytes], patience: float) -> bytes:
        """The whole block of `length` bytes: from the cache, or from `source`, and then kept.

        While another thread or process fetches the same block this waits for it, at most `patience` seconds; then it
        asks `source` itself. Raises what `source` raises, and nothing else.
        """
        data = self._whole(name, length)
        if data is None:
            with self._part(name, patience) as part:
                data = self._whole(name, length)  # another one may have been quicker
                if data is None:
                    data = source()
                    if part is not None and self.takes(length):
                        self._keep(name, part, data)
        return data

    def _whole(self, name: str, length: int) -> bytes | None:
        try:
            data = (self._blocks / name).read_bytes()
        except OSError:
            return None
        if len(data) == length:
            return data
        self._remove(self._blocks / name)
        return None

    @contextlib.contextmanager
    def _part(self, name: str, patience: float) -> Iterator[int | None]:
        """A locked descriptor of the block's `.part`; None if it cannot be locked. An unfinished file is removed."""
        path = self._blocks / f"{name}.part"
        try:
            part = lock_file(path, patience)
        except OSError as error:
            self._disk_failed(error)
            part = None
        try:
            yield part
        finally:
            if part is not None:
                with contextlib.suppress(OSError):
                    if is_at(part, path):
                        self._remove(path)
                os.close(part)

    def _keep(self, name: str, part: int, data: bytes) -> None:
        """Write and rename. The space is taken first, as the file's length, so that every count includes it."""
        try:
            with self._used() as used:
                more = len(data) - os.fstat(part).st_size
                if used.bytes + more > self.size:
                    self._sweep(used, room=more)
                if used.bytes + more > self.size:
                    return
                used.set(used.bytes + more)  # before the file grows: a process killed here leaves too high a count
                try:
                    os.ftruncate(part, len(data))
                except OSError:
                    used.set(used.bytes - more)
                    raise
            written = 0
            while written < len(data):
                written += os.pwrite(part, memoryview(data)[written:], written)
            with self._used():  # no name changes while the folder is listed
                (self._blocks / f"{name}.part").rename(self._blocks / name)
        except OSError as error:
            self._disk_failed(error)

    def _disk_failed(self, error: OSError) -> None:
        self._resume = time.monotonic() + _PAUSE_WHEN_FULL
        if not self._warned:
            self._warned = True
            line = f"data.cache.dir: {self._blocks}: {error.strerror or error}; continuing without the cache"
            print(line, file=sys.stderr, flush=True)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError), self._used() as used:
            length = path.stat().st_size
            path.unlink()
            used.set(used.bytes - length)

    @contextlib.contextmanager
    def _used(self) -> Iterator["_Usage"]:
        """The shared counter, locked. Opened each time: an flock belongs to a descriptor, not to a thread."""
        descriptor = os.open(self._usage, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Usage(descriptor)
        finally:
            os.close(descriptor)

    def _sweep(self, used: "_Usage", room: int) -> None:
        """Recount, remove what killed processes left, and evict if `room` more bytes would exceed the limit."""
        blocks, total = [], 0
        with os.scandir(self._blocks) as entries:
            for entry in entries:
                is_part = entry.name.endswith(".part")
                if is_part and remove_left(Path(entry.path)):
                    continue
                with contextlib.suppress(FileNotFoundError):  # someone else removed it
                    found = entry.stat()
                    total += found.st_size
                    if not is_part:
                        blocks.append((found.st_mtime_ns, found.st_size, entry.path))
        if total + room > self.size:
            for _, length, path in sorted(blocks):
                if total + room <= self.size * 19 // 20:
                    break
                Path(path).unlink(missing_ok=True)
                total -= length
        used.set(total, swept=int(time.time()))


class _Usage:
    """The blocks' bytes, and the Unix time of the last count, in an open and locked file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        words = os.pread(descriptor, 64, 0).split()
        self.bytes, self.swept = (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def set(self, total: int, swept: int | None = None) -> None:
        self.bytes, self.swept = total, self.swept if swept is None else swept
        os.pwrite(self._descriptor, b"%31d %31d\n" % (self.bytes, self.swept), 0)
