"""One tar of `shards pack`: its images as samples, without those that cannot be used, which are listed beside it."""

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

from dist_trainer.data.pillow import Image
from dist_trainer.errors import UserError
from dist_trainer.packing.sources import Source
from dist_trainer.shards.join import ShardScan
from dist_trainer.shards.scan import LABEL_SUFFIX, measure, scan_tar

_UNFINISHED = ".part"
GO_ON = "finished tars stay, and the same command continues from there"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images become tars. Source and recipe determine every byte of the tars."""

    samples_per_shard: int = 2048
    seed: int = 0
    """Of the shuffle over shards."""
    max_side: int | None = None
    """Pixels: an image with a longer side is reduced and encoded as JPEG; others are copied byte for byte."""
    quality: int = 95
    """Of the JPEGs that `max_side` makes."""

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is not positive")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality: {self.quality} is not between 1 and 100")

    def manifest(self, source: Source) -> dict[str, Any]:
        """The content of pack.json. Equal manifests mean equal tars, byte for byte."""
        facts = {"version": 1, **source.facts, "samples": len(source), **asdict(self)}
        return {**facts, "class_names": list(source.class_names)}


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used. `item` is its number in the source."""

    item: int
    source: str
    """The source's own name."""
    image: str
    """The image's name within the source."""
    class_name: str
    reason: str
    is_gone: bool = False
    """It was found bad before, and has been removed since."""


@dataclass(frozen=True)
class Written:
    """A finished tar."""

    scan: ShardScan
    bad: tuple[BadImage, ...]


@dataclass(frozen=True)
class Shard:
    """One tar to write: a task for a worker process, with everything that it needs."""

    path: Path
    number: int
    items: npt.NDArray[np.int64]
    """Numbers in the whole source: they become keys."""
    source: Source
    """These images alone."""
    recipe: Recipe

    def write(self) -> Written:
        """Write it, unless it is there: under another name until it is complete. Raises UserError, naming an image that
        cannot be read, or the tar for errors of the file system.
        """
        if self.path.exists():
            before = read_bad(bad_file(self.path))
            if all(self._fault(number) for number, _ in self._those(before)):
                return Written(scan_tar(self.path), tuple(bad for _, bad in self._those(before)))
            self.path.unlink()  # one of them is mended
        unfinished = self.path.with_name(self.path.name + _UNFINISHED)
        try:
            with unfinished.open("wb") as file:
                bad = self._write_to(file)
                file.flush()
                os.fsync(file.fileno())  # a full disk is detected here at the latest, on NFS too
            scan = scan_tar(unfinished)
            bad_file(self.path).unlink(missing_ok=True)
            if bad:
                write_bad(bad_file(self.path), bad)
            unfinished.replace(self.path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UserError(f"{self.path}: {error.strerror or error}; {GO_ON}") from None
        return Written(scan, tuple(bad))

    def _write_to(self, file: io.BufferedWriter) -> list[BadImage]:
        bad = []
        with webdataset.ShardWriter(
            "%06d.tar",
            opener=lambda name: file,
            start_shard=self.number,
            maxcount=len(self.items) + 1,
            maxsize=1 << 62,
            verbose=0,
            mtime=0.0,
        ) as writer:
            for number, item in enumerate(self.items.tolist()):
                try:
                    data, suffix, label = self._read(number)
                except ValueError as error:
                    bad.append(self._bad(number, str(error)))
                    continue
                writer.write({"__key__": f"{item:08d}", suffix: data, LABEL_SUFFIX: str(label).encode()})
        return bad

    def _read(self, number: int) -> tuple[bytes, str, int]:
        """(encoded bytes, suffix, class). Raises ValueError with the reason for an image that cannot be used."""
        if self.source.is_gone(number):
            raise ValueError("is not there any more")
        data, suffix, label = self.source.read(number)
        _, width, height = measure(data)
        if self.recipe.max_side is not None and max(width, height) > self.recipe.max_side:
            data, suffix = shrink(data, (width, height), self.recipe.max_side, self.recipe.quality), "jpg"
        return data, suffix, label

    def _fault(self, number: int) -> str:
        try:
            self._read(number)
        except ValueError as error:
            return str(error)
        return ""

    def _bad(self, number: int, reason: str) -> BadImage:
        return BadImage(
            int(self.items[number]),
            str(self.source.facts["source"]),
            self.source.own_name(number),
            self.source.class_names[int(self.source.labels()[number])],
            reason,
            self.source.is_gone(number),
        )

    def _those(self, before: list[BadImage]) -> list[tuple[int, BadImage]]:
        """(place in this shard, the bad image as it is now)."""
        places = {item: number for number, item in enumerate(self.items.tolist())}
        found = [(places[bad.item], bad.reason) for bad in before if bad.item in places]
        return [(number, self._bad(number, reason)) for number, reason in found]


def shrink(data: bytes, size: tuple[int, int], max_side: int, quality: int) -> bytes:
    """A JPEG of the image, whose (width, height) are `size`, with `max_side` pixels on its longer side.

    Decoded as the trainer decodes, made smaller by Pillow's LANCZOS filter (antialiased), encoded as RGB, whatever it
    was before. Of EXIF the orientation is kept, about which data.exif decides. Raises ValueError for an image that does
    not decode.
    """
    from dist_trainer.data.decode import decode
    from dist_trainer.data.exif import orientation, orientation_alone

    pixels = decode(data, 3).permute(1, 2, 0).numpy()
    new = [max(1, round(side * max_side / max(size))) for side in size]
    buffer = io.BytesIO()
    exif = orientation_alone(orientation(data)[0])
    small = Image.fromarray(pixels).resize((new[0], new[1]), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=quality, **exif)
    return buffer.getvalue()


# The lists of bad images


def bad_file(tar: Path) -> Path:
    return tar.with_suffix(".bad.json")


def write_bad(path: Path, bad: list[BadImage]) -> None:
    path.write_text(json.dumps([asdict(each) for each in bad], indent=1))


def read_bad(path: Path) -> list[BadImage]:
    """Those of a list that was written whole; none of another file."""
    try:
        return [BadImage(**each) for each in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []
