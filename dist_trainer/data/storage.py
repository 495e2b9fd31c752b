"""Local paths and fsspec URLs by one small interface: what a place holds, its size, and some of its bytes."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from dist_trainer.errors import UserError


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and what changes when the content does: an ETag, or a time of change; "" where there is none."""

    size: int
    stamp: str


def is_remote(location: str) -> bool:
    """Whether `location` is a URL of some storage rather than a local path."""
    return "://" in location


class Storage:
    """Reads of local paths and URLs. Open it in the process that uses it; safe between threads."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = dict(options or {})

    def _at(self, location: str) -> tuple[Any, str]:
        if location.startswith("pipe:"):
            raise UserError(
                f"{location}: shell pipes are refused; use a path or a URL that fsspec knows, such as s3://"
            )
        return fsspec.core.url_to_fs(location, **self._options)

    def stat(self, location: str) -> Stat:
        """Raises FileNotFoundError where there is nothing."""
        if not is_remote(location):
            local = Path(location).stat()
            return Stat(local.st_size, str(local.st_mtime_ns))
        fs, path = self._at(location)
        info = fs.info(path)
        stamp = info.get("ETag") or info.get("LastModified") or info.get("mtime") or ""
        return Stat(int(info["size"]), str(stamp).strip('"'))

    def list(self, folder: str) -> list[str]:
        """Sorted names (not paths) of what lies directly in `folder`."""
        if not is_remote(folder):
            return sorted(entry.name for entry in Path(folder).iterdir())
        fs, path = self._at(folder)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False))

    def read(self, location: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of a file, or to its end."""
        if not is_remote(location):
            with Path(location).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        fs, path = self._at(location)
        data: bytes = fs.cat_file(path, start=start, end=None if length is None else start + length)
        return data

    def open(self, location: str) -> BinaryIO:
        """A seekable file to read from one end to the other."""
        if not is_remote(location):
            return Path(location).open("rb")
        return io.BytesIO(self.read(location))
