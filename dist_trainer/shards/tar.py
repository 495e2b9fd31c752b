"""The members of a tar, in one pass. Damage is never skipped silently.

Python's tarfile (and so webdataset) takes an invalid header for the end of the archive. Here it is a `Damage`, and
reading continues at the next valid header.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512  # bytes; headers begin at multiples of it
_END = 2 * BLOCK  # zeros that a whole tar ends with, at least
_MAGIC, _MAGIC_AT = b"ustar", 257
_CHUNK = 2**20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `offset` of its first header, `data` the offset of its `size` bytes."""

    name: str
    offset: int
    data: int
    size: int
    is_file: bool
    """A regular file, not a folder, a link or a device."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch from `offset` on that holds no readable member, and why."""

    offset: int
    reason: str


def members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Members and damage of the tar in `file`, which has `size` bytes, in order.

    PAX and GNU long names are understood. Between two members the caller may read wherever it likes.
    """
    at, long = 0, _LongHeader(0)
    while at + BLOCK <= size:
        block = _read(file, at, BLOCK)
        try:
            info = _header(block)
        except tarfile.HeaderError:
            following = _next_header(file, at, size)
            if following is None:
                break
            what = "no header" if any(block) else "zeros"
            yield Damage(at, f"a destroyed header: {what}, while the next whole one is at byte {following}")
            at, long = following, _LongHeader(following)
            continue
        data = at + BLOCK
        name, length = long.name or info.name, info.size if long.size is None else long.size
        holds_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _EXTENSIONS
        end = data + -(-length // BLOCK) * BLOCK if holds_data else data
        if end > size:
            yield Damage(long.offset, f"{name!r} is cut short: the tar ends at byte {size}")
            return
        if info.type in _EXTENSIONS:
            try:
                long.add(info.type, _read(file, data, length))
            except ValueError:
                yield Damage(long.offset, "a destroyed header: its extended records do not parse")
                long = _LongHeader(end)
        else:
            yield Member(name, long.offset, data, length, info.isreg())
            long = _LongHeader(end)
        at = end
    yield from _check_end(file, at, size)


_EXTENSIONS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class _LongHeader:
    """What extended headers say about the member that follows them. `offset` is where the first of all begins."""

    def __init__(self, offset: int) -> None:
        self.offset, self.name, self.size = offset, "", None

    size: int | None

    def add(self, kind: bytes, body: bytes) -> None:
        """Raises ValueError for records that do not parse."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.name = body.split(b"\0")[0].decode("utf-8", "surrogateescape")
        while kind in _PAX and body.strip(b"\0"):  # records: "LENGTH KEY=VALUE\n", LENGTH of all of it
            match = re.match(rb"(\d{1,20}) ([^=]+)=", body)
            if match is None or not match.end() < int(match[1]) <= len(body):
                raise ValueError
            value = body[match.end() : int(match[1]) - 1]
            if match[2] == b"path":
                self.name = value.decode("utf-8", "surrogateescape")
            elif match[2] == b"size":
                self.size = int(value)
            body = body[int(match[1]) :]


def _header(block: bytes) -> tarfile.TarInfo:
    """Raises HeaderError unless the checksum is right; the size is not negative."""
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if info.size < 0:
        raise tarfile.HeaderError("negative size")
    return info


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    return file.read(length)


def _next_header(file: BinaryIO, at: int, size: int) -> int | None:
    """The offset of the next valid header after `at`. Pre-POSIX ones, without magic, are not found."""
    for start in range(at, size, _CHUNK):
        chunk = _read(file, start, _CHUNK)
        found = chunk.find(_MAGIC)
        while found >= 0:
            begin = found - _MAGIC_AT
            if begin >= 0 and begin % BLOCK == 0:
                try:
                    _header(chunk[begin : begin + BLOCK])
                    return start + begin
                except tarfile.HeaderError:
                    pass
            found = chunk.find(_MAGIC, found + 1)
    return None


def _check_end(file: BinaryIO, end: int, size: int) -> Iterator[Damage]:
    """After the last member, at byte `end`, there must be the end marker of 1,024 zeros and nothing but zeros."""
    zeros = all((chunk := _read(file, at, _CHUNK)).count(0) == len(chunk) for at in range(end, size, _CHUNK))
    if end == 0:
        start = _read(file, 0, BLOCK)
        packer = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), "")
        if packer:
            yield Damage(0, f"compressed with {packer}: samples are read by their offset, so decompress it first")
        elif not zeros or size < _END:
            yield Damage(0, "not a readable tar" + (": it is empty" if not size else ""))
    elif not zeros:
        yield Damage(end, "a destroyed header: data follow where the tar seems to end")
    elif size - end < _END:
        yield Damage(end, "the end marker is missing: the tar was cut short")
