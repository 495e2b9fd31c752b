"""Read WebDataset tars for their index, strictly: faults that other readers skip silently are reported by shard and
byte."""

import io
import re
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dist_trainer.data.index import BAD, SAMPLE, Problem
from dist_trainer.data.listing import SUFFIXES_TEXT, is_image, passed_over
from dist_trainer.data.pillow import Image
from dist_trainer.errors import UserError
from dist_trainer.shards.join import ShardScan
from dist_trainer.shards.labels import LabelRule, obvious_field
from dist_trainer.shards.tar import Damage, Member, members
from dist_trainer.storage.storage import Storage

LABEL_SUFFIX = "cls"
_MAX_SIDE = 2**16 - 1  # pixels, as the index holds them
_MAX_LENGTH = 2**31 - 1  # bytes; no such image decodes
_CHECKED = 2**25  # pixels: what is larger takes too much memory to be decoded here
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
"""How a whole JPEG or PNG begins and ends. Others, and those with something behind their end, are decoded to see."""
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's own: a key ends at the first dot of the base name
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips


def measure(data: bytes) -> tuple[int, int, int]:
    """(crc32, width, height) of an encoded image.

    Raises ValueError with a text that completes "the image of ...", for one that is no image, or not a whole one.
    """
    try:
        width, height = _image_size(data)
    except Exception:  # Pillow's plugins raise whatever they meet
        found = f"{len(data):,} bytes, which begin with {data[:16]!r}" if data else "it is empty"
        raise ValueError(f"does not decode: {found}") from None
    ends_well = data[:2] in _ENDS and data.endswith(_ENDS[data[:2]])
    if not ends_well and width * height <= _CHECKED and (fault := _fault(data)):
        raise ValueError(f"does not decode: {fault}")
    if max(width, height) > _MAX_SIDE:
        raise ValueError(f"is {width} x {height}, over {_MAX_SIDE:,} a side")
    return zlib.crc32(data), width, height


def _fault(data: bytes) -> str:
    """Why Pillow does not decode it, or ""."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # Pillow's plugins raise whatever they meet
        return str(error) or type(error).__name__
    return ""


def _image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from an image's header; PNG's is read directly: Pillow would cost more than everything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return struct.unpack(">II", data[16:24])
    with Image.open(io.BytesIO(data)) as image:
        return image.size


@dataclass
class _Sample:
    """The sample that is being collected: neighbouring members of one key."""

    key: str
    offset: int
    damaged: bool
    """It is next to damage, which is reported already: missing members are not reported again."""
    image: tuple[int, int, int, int, int] | None = None
    """Offset, length, crc32, width and height."""
    label: tuple[int, bytes] | None = None
    """Offset of the member, and its bytes."""
    fault: tuple[int, str] | None = None
    suffixes: list[str] = field(default_factory=list)
    is_done: bool = False

    def blame(self, offset: int, reason: str) -> None:
        self.fault = self.fault or (offset, reason)


class _Scanner:
    """Groups the members of one tar into samples: `add` or `damage` each, then `finish`."""

    def __init__(self, shard: str, file: BinaryIO, rule: LabelRule) -> None:
        self._shard, self._file, self._rule = shard, file, rule
        self.rows: list[tuple[int, ...]] = []
        self.problems: list[Problem] = []
        self.names: dict[str, int] = {}
        self._seen: set[str] = set()
        self._sample: _Sample | None = None
        self._damaged = False
        self._without = Counter[str]()
        """Samples that have no label or no image."""
        self._hint = ""
        """The --label that their .json suggests."""
        self._images: list[str] = []
        """What might be the first sample's image."""

    def _tombstone(self, offset: int, reason: str) -> None:
        self.problems.append(Problem(self._shard, offset, reason, len(self.rows)))
        self.rows.append((offset, 0, BAD, 0, 0, 0))

    def damage(self, damage: Damage) -> None:
        sample = self._sample
        if sample is not None:
            sample.damaged = True
            if sample.image is not None and (sample.label is not None or self._rule.kind == "key"):
                self._end(sample)  # complete, so it comes before the damage; but its key may continue after it
        self._tombstone(damage.offset, damage.reason)
        self._damaged = True

    def add(self, member: Member) -> None:
        skipped = _META.match(member.name) or passed_over(member.name)
        match = None if skipped else _KEY.match(member.name)
        if match is None:
            return
        key, suffix = match[1], match[2].lower()
        sample = self._sample
        if sample is None or key != sample.key:
            if not member.is_file:
                return
            self.finish()
            sample = self._sample = _Sample(key, member.offset, self._damaged)
            self._damaged = False
            if key in self._seen:
                sample.blame(member.offset, f"key {key!r} comes again, apart from its first position")
            self._seen.add(key)
        if sample.is_done:
            return
        if not member.is_file:
            sample.suffixes.append(f"{suffix} (no regular file)")
        elif self._rule.is_image(suffix):
            self._add_image(sample, member)
        elif suffix == self._rule.kind:
            if sample.label is not None:
                sample.blame(member.offset, f"sample {key!r} has two labels")
            sample.label = member.offset, self._read(member)
        else:
            sample.suffixes.append(suffix)
            if suffix == "json" and not self._hint:
                self._hint = obvious_field(self._read(member))

    def _add_image(self, sample: _Sample, member: Member) -> None:
        if sample.image is not None:
            sample.blame(member.offset, f"sample {sample.key!r} has two images")
        sample.image = member.data, 0, 0, 0, 0
        try:
            if member.size > _MAX_LENGTH:
                raise ValueError(f"has {member.size:,} bytes")
            sample.image = member.data, member.size, *measure(self._read(member))
        except ValueError as error:
            sample.blame(member.data, f"the image of sample {sample.key!r} {error}")

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.data)
        data = self._file.read(member.size)
        if len(data) < member.size:
            raise UserError(f"{self._shard}: it became shorter while it was read; is it being written?")
        return data

    def finish(self) -> None:
        """End the sample that was being collected."""
        if self._sample is not None and not self._sample.is_done:
            self._end(self._sample)

    def _end(self, sample: _Sample) -> None:
        sample.is_done = True
        if sample.image is None:
            self._without["image"] += 1
            self._images = self._images or [each for each in sample.suffixes if is_image(f"x.{each}")]
            only = f", only {', '.join(sample.suffixes)}" if sample.suffixes else ""
            sample.blame(sample.offset, f"sample {sample.key!r} has no image ({SUFFIXES_TEXT}){only}")
        offset, text = (sample.offset, b"") if self._rule.kind == "key" else sample.label or (sample.offset, None)
        label = BAD
        if text is None:
            self._without["label"] += 1
            what = f"(.{self._rule.kind}; --label says where labels are)"
            sample.blame(offset, f"sample {sample.key!r} has no label {what}")
        else:
            try:
                value = self._rule.read(sample.key, text)
                label = value if isinstance(value, int) else BAD - 1 - self.names.setdefault(value, len(self.names))
            except ValueError as error:
                sample.blame(offset, f"the label of sample {sample.key!r} {error}")
        if sample.damaged and (sample.image is None or text is None):
            return  # its rest is in the damaged stretch
        if sample.fault is not None:
            self._tombstone(*sample.fault)
        elif sample.image is not None:
            offset, length, crc32, width, height = sample.image
            self.rows.append((offset, length, label, crc32, width, height))

    def refuse_wrong_rule(self) -> None:
        """Raises UserError, one line for all samples, where none has a label or an image and it is seen why."""
        count = len(self._seen)
        if count and self._without["image"] == count and self._images:
            raise UserError(
                f"{self._shard}: no sample has one image of its own, but {', '.join(self._images)}: "
                f"choose one with --image {self._images[0]}"
            )
        if count and self._without["label"] == count and self._hint:
            raise UserError(
                f"{self._shard}: no sample has a .{self._rule.kind}, but its .json names a class: --label {self._hint}"
            )


def scan_shard(location: str, storage: Storage, rule: LabelRule) -> ShardScan:
    """Read one tar, local or remote, from end to end.

    A destroyed or zeroed header (with everything up to the next whole one), a truncation, a key that comes twice or in
    two places, a sample without image or label, a label that is none and an image that does not decode each become a
    Problem and a row with the label BAD. Raises UserError where no sample has a label or an image for a wrong `rule`.
    """
    stat = storage.stat(location)
    with storage.open(location) as file:
        scanner = _Scanner(location, file, rule)
        for found in members(file, stat.size):
            if isinstance(found, Damage):
                scanner.damage(found)
            else:
                scanner.add(found)
        scanner.finish()
    scanner.refuse_wrong_rule()
    return ShardScan(rows(scanner.rows), stat.size, stat.stamp, tuple(scanner.problems), tuple(scanner.names))


def rows(values: list[tuple[int, ...]]) -> npt.NDArray[np.void]:
    """Rows of SAMPLE."""
    as_any: Any = values
    return np.array(as_any, SAMPLE)


def scan_tar(path: Path) -> ShardScan:
    """Read one local tar with labels in .cls. Raises UserError with its first problem: tar, byte and reason."""
    scan = scan_shard(str(path), Storage(), LabelRule())
    if scan.problems:
        raise UserError(str(scan.problems[0]))
    return scan
