"""Build the index of WebDataset tars, strictly: what plain readers skip in silence fails here, with shard and offset."""

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


@dataclass(frozen=True)
class ShardScan:
    """What one tar holds: rows of SAMPLE in file order, and its size in bytes."""

    samples: npt.NDArray[np.void]
    size: int


def _image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from an image's header; PNG's is read directly, as Pillow's costs more than the rest of a sample."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return struct.unpack(">II", data[16:24])
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def scan_tar(path: Path) -> ShardScan:
    """Read one tar from end to end.

    Raises UserError naming tar, byte and reason for: a destroyed or zeroed header (Python's tarfile takes it for the
    end), a truncation, a key that comes twice or in two places, a sample without image or label, a label that is no
    number, an image whose header does not parse.
    """

    def bad(offset: int, reason: str) -> UserError:
        return UserError(f"{path}: at byte {offset}: {reason}")

    size = path.stat().st_size
    rows: list[tuple[Any, ...]] = []
    seen: set[str] = set()
    current = ""
    image: tuple[int, bytes] | None = None
    label: int | None = None
    begin = 0

    def finish() -> None:
        if not current:
            return
        if image is None:
            raise bad(begin, f"sample {current!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
        if label is None:
            raise bad(begin, f"sample {current!r} has no label (.{LABEL_SUFFIX})")
        offset, data = image
        try:
            width, height = _image_size(data)
        except (UnidentifiedImageError, OSError, struct.error):
            raise bad(offset, f"the image of sample {current!r} does not decode") from None
        rows.append((offset, len(data), label, zlib.crc32(data), width, height))

    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                padded = member.offset_data + -(-member.size // 512) * 512
                if padded > size:
                    raise bad(member.offset, f"{member.name!r} is cut short: the tar ends at byte {size}")
                end = padded
                if not member.isfile():
                    continue
                prefix, suffix = base_plus_ext(member.name)
                if prefix is None:
                    continue
                if prefix != current:
                    finish()
                    if prefix in seen:
                        raise bad(member.offset, f"key {prefix!r} comes again, apart from its first place")
                    seen.add(prefix)
                    current, image, label, begin = prefix, None, None, member.offset
                suffix = suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    if image is not None:
                        raise bad(member.offset, f"sample {prefix!r} has two images")
                    image = (member.offset_data, tar.extractfile(member).read())  # type: ignore[union-attr]
                elif suffix == LABEL_SUFFIX:
                    if label is not None:
                        raise bad(member.offset, f"sample {prefix!r} has two labels")
                    text = tar.extractfile(member).read().decode("ascii", "replace").strip()  # type: ignore[union-attr]
                    if not text.isdecimal() or int(text) > 2**31 - 1:
                        raise bad(member.offset, f"the label of sample {prefix!r} is {text!r}, not a class number")
                    label = int(text)
            finish()
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    with path.open("rb") as file:
        file.seek(end)
        rest = end
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise bad(rest, "a destroyed header: data follow where the tar seems to end")
            rest += len(block)
    if rest - end < 1024:
        raise bad(end, "the end marker is missing: the tar was cut short")
    return ShardScan(np.array(rows, SAMPLE), size)


def join(root: Path, names: Sequence[str], scans: Sequence[ShardScan], class_names: Sequence[str] = ()) -> ShardIndex:
    """One index of several scanned tars. Without `class_names`, classes are called by their numbers."""
    samples = np.concatenate([scan.samples for scan in scans])
    if not len(samples):
        raise UserError(f"{root}: the tars hold no samples")
    num_classes = max(int(samples["label"].max()) + 1, len(class_names))
    return ShardIndex(
        root=root,
        shards=tuple(names),
        sizes=np.array([scan.size for scan in scans], np.uint64),
        first=np.cumsum([0, *(len(scan.samples) for scan in scans)]).astype(np.uint64),
        samples=samples,
        class_names=tuple(class_names) or tuple(str(n) for n in range(num_classes)),
    )


def scan_tars(root: Path, tars: Sequence[Path], num_processes: int) -> ShardIndex:
    """The index of `tars`, scanned in parallel; names are kept relative to `root`."""
    names = [str(tar.relative_to(root)) for tar in tars]
    if num_processes <= 1 or len(tars) == 1:
        scans = [scan_tar(tar) for tar in tars]
    else:
        with ProcessPoolExecutor(min(num_processes, len(tars)), mp_context=get_context("spawn")) as pool:
            scans = list(pool.map(scan_tar, tars))
    return join(root, names, scans)
