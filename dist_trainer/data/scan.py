"""Build the index of WebDataset tars, strictly: what plain readers skip in silence fails here, by shard and byte."""

import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import base_plus_ext

from dist_trainer.data.index import SAMPLE, ShardIndex
from dist_trainer.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LABEL_SUFFIX = "cls"
_MAX_LABEL = 2**31 - 1
_FEW_BYTES = 2**27  # read sooner than processes start
_MAX_SIDE = 2**16 - 1  # pixels, as the index holds them


@dataclass(frozen=True)
class ShardScan:
    """What one tar holds: rows of SAMPLE in file order, and its size in bytes."""

    samples: npt.NDArray[np.void]
    size: int
    stamp: str = ""


def _image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from an image's header; PNG's is read directly: Pillow would cost more than all the rest."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return struct.unpack(">II", data[16:24])
    with Image.open(io.BytesIO(data)) as image:
        return image.size


class _Scanner:
    """Collects the members of one tar into samples: `add` each file, then `finish`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[tuple[Any, ...]] = []
        self._seen: set[str] = set()
        self._key = ""
        self._start(0)

    def _start(self, offset: int) -> None:
        self._begin, self._image, self._label = offset, None, None

    _image: tuple[int, bytes] | None
    _label: int | None

    def bad(self, offset: int, reason: str) -> UserError:
        return UserError(f"{self._path}: at byte {offset}: {reason}")

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        key, suffix = base_plus_ext(member.name)
        if key is None:
            return
        if key != self._key:
            self.finish()
            if key in self._seen:
                raise self.bad(member.offset, f"key {key!r} comes again, apart from its first place")
            self._seen.add(key)
            self._key = key
            self._start(member.offset)
        file = tar.extractfile(member)
        if file is None:
            return
        if suffix.lower() in IMAGE_SUFFIXES:
            if self._image is not None:
                raise self.bad(member.offset, f"sample {key!r} has two images")
            self._image = (member.offset_data, file.read())
        elif suffix.lower() == LABEL_SUFFIX:
            if self._label is not None:
                raise self.bad(member.offset, f"sample {key!r} has two labels")
            text = file.read().decode("ascii", "replace").strip()
            if not text.isdecimal() or int(text) > _MAX_LABEL:
                raise self.bad(member.offset, f"the label of sample {key!r} is {text!r}, not a class number")
            self._label = int(text)

    def finish(self) -> None:
        """End the sample that was being collected."""
        if not self._key:
            return
        if self._image is None:
            raise self.bad(self._begin, f"sample {self._key!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
        if self._label is None:
            raise self.bad(self._begin, f"sample {self._key!r} has no label (.{LABEL_SUFFIX})")
        offset, data = self._image
        try:
            width, height = _image_size(data)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, struct.error):
            raise self.bad(offset, f"the image of sample {self._key!r} does not decode") from None
        if max(width, height) > _MAX_SIDE:
            raise self.bad(
                offset, f"the image of sample {self._key!r} is {width} x {height}, over {_MAX_SIDE:,} a side"
            )
        self.rows.append((offset, len(data), self._label, zlib.crc32(data), width, height))
        self._key = ""


def scan_tar(path: Path) -> ShardScan:
    """Read one tar from end to end.

    Raises UserError naming tar, byte and reason for: a destroyed or zeroed header (Python's tarfile takes it for the
    end), a truncation, a key that comes twice or in two places, a sample without image or label, a label that is no
    number, an image whose header does not parse.
    """
    scanner = _Scanner(path)
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                if end > size:
                    raise scanner.bad(member.offset, f"{member.name!r} is cut short: the tar ends at byte {size}")
                if member.isfile():
                    scanner.add(member, tar)
            scanner.finish()
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    _check_end(scanner, path, end)
    return ShardScan(np.array(scanner.rows, SAMPLE), size, str(path.stat().st_mtime_ns))


def _check_end(scanner: _Scanner, path: Path, end: int) -> None:
    """After the last member, at byte `end`, there must be the end marker of 1,024 zeros and nothing but zeros."""
    with path.open("rb") as file:
        file.seek(end)
        at = end
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise scanner.bad(at, "a destroyed header: data follow where the tar seems to end")
            at += len(block)
    if at - end < 1024:
        raise scanner.bad(end, "the end marker is missing: the tar was cut short")


def join(names: Sequence[str], scans: Sequence[ShardScan], class_names: Sequence[str] = ()) -> ShardIndex:
    """One index of several scanned tars. Without `class_names`, classes are called by their numbers."""
    samples = np.concatenate([scan.samples for scan in scans])
    if not len(samples):
        raise UserError(f"{names[0]}: the tars hold no samples")
    num_classes = max(int(samples["label"].max()) + 1, len(class_names))
    return ShardIndex(
        root=".",
        shards=tuple(names),
        stamps=tuple(scan.stamp for scan in scans),
        sizes=np.array([scan.size for scan in scans], np.uint64),
        first=np.cumsum([0, *(len(scan.samples) for scan in scans)]).astype(np.uint64),
        samples=samples,
        class_names=tuple(class_names) or tuple(str(n) for n in range(num_classes)),
    )


def scan_tars(root: Path, tars: Sequence[Path], num_processes: int) -> ShardIndex:
    """The index of `tars`, scanned in parallel; names are kept relative to `root`."""
    names = [str(tar.relative_to(root)) for tar in tars]
    if num_processes <= 1 or sum(tar.stat().st_size for tar in tars) < _FEW_BYTES:
        scans = [scan_tar(tar) for tar in tars]
    else:
        with ProcessPoolExecutor(min(num_processes, len(tars)), mp_context=get_context("spawn")) as pool:
            scans = list(pool.map(scan_tar, tars))
    return join(names, scans)
